"""Sampling: an image is a function of (weights, prompt, seed), and it is the image of diffusers' own pipeline."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Generator, Tensor

import tiny
from preftune import ahead, families
from preftune.families.base import Defaults, Family
from preftune.noise import Prediction
from preftune.resolution import Resolution
from preftune.sampling import Sampling, initial_noise, sample, sharded
from preftune.solver_names import SolverName

PROMPTS = ["a red circle", "two cats", "a dog at sea"]
SEEDS = [11, 5, 2**40]
SOLVERS: list[SolverName] = ["ddpm", "ddim", "euler", "pndm", "dpm++"]
SHAPE = (4, 8, 8)


def settings(solver: SolverName, batch_size: int = 8, steps: int = 4, scale: float = 3.0) -> Sampling:
    return Sampling(
        num_inference_steps=steps,
        guidance_scale=scale,
        solver=solver,
        resolution=str(tiny.PIXELS),
        batch_size=batch_size,
    )


def images(family: Family, prompts: list[str], seeds: list[int], sampling: Sampling, **more: str) -> Tensor:
    return torch.cat(list(sample(family, prompts, seeds, sampling, **more)))


def configure(folder: Path, **changes: object) -> Path:
    """Write settings into a folder's scheduler configuration."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"), request.param)


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return families.load(folder)


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.pipeline_folder(tmp_path_factory.mktemp("zero_snr"), "v_prediction")
    return configure(folder, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_is_a_function_of_prompt_and_seed(family: Family, solver: SolverName) -> None:
    """Not of the batch, the order, the neighbours or the global random state."""
    pixels = images(family, PROMPTS, SEEDS, settings(solver))
    assert pixels.shape == (3, 3, tiny.PIXELS, tiny.PIXELS)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    before = torch.get_rng_state()
    alone = images(family, PROMPTS, SEEDS, settings(solver, batch_size=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    turned = images(family, PROMPTS[::-1], SEEDS[::-1], settings(solver, batch_size=2)).flip(0)
    torch.testing.assert_close(alone, pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned, pixels, rtol=0, atol=1e-5)
    other_seed = images(family, PROMPTS[:1], [12], settings(solver))
    assert (other_seed - pixels[:1]).abs().max() > 1e-2


THEIRS: dict[SolverName, Callable[[dict[str, object]], object]] = {
    "ddpm": lambda config: DDPMScheduler.from_config(config, steps_offset=0),
    "ddim": DDIMScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "pndm": PNDMScheduler.from_config,
    # The published file of Stable Diffusion 1.5 has no spacing, so that diffusers takes its default for this scheduler.
    "dpm++": lambda config: DPMSolverMultistepScheduler.from_config(config, timestep_spacing="linspace"),
}


def theirs(folder: Path, solver: SolverName, steps: int, scale: float = 3.0, **config: object) -> Tensor:
    """The images of PROMPTS and SEEDS by diffusers' own pipeline, with the schedulers it makes of the folder's file."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pipe.scheduler = THEIRS[solver](saved | config)
    generators = [Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(
        PROMPTS,
        negative_prompt=["blurred"] * 3,
        latents=initial_noise(SHAPE, generators, "cpu"),
        generator=generators,
        guidance_scale=scale,
        num_inference_steps=steps,
        output_type="pt",
    ).images


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_are_those_of_the_diffusers_pipeline(folder: Path, family: Family, solver: SolverName) -> None:
    ours = images(family, PROMPTS, SEEDS, settings(solver, steps=5), negative="blurred")
    exact = solver in ("ddim", "pndm", "dpm++")
    torch.testing.assert_close(ours, theirs(folder, solver, 5), rtol=0, atol=0 if exact else 1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler"])
def test_zero_terminal_snr_is_that_of_the_diffusers_pipeline(zero_snr: Path, solver: SolverName) -> None:
    """Trailing spacing, so that the first step is at pure noise. diffusers' Euler starts at alpha 2^-12."""
    ours = images(
        families.load(zero_snr), PROMPTS, SEEDS, settings(solver, steps=5, scale=1.0), negative="blurred"
    )
    expected = theirs(zero_snr, solver, 5, 1.0, timestep_spacing="trailing")
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3 if solver == "euler" else 1e-4)


@pytest.mark.parametrize("solver", ["pndm", "dpm++"])
def test_zero_terminal_snr_refuses_the_others(zero_snr: Path, solver: SolverName) -> None:
    with pytest.raises(ValueError, match="one of ddpm, ddim, euler can"):
        images(families.load(zero_snr), PROMPTS, SEEDS, settings(solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_do_not_depend_on_the_sampler_a_folder_was_saved_with(
    family: Family, solver: SolverName, tmp_path: Path
) -> None:
    """A folder saved with Euler says linspace, one saved by others asks for clipping: neither is about the model."""
    copy = tiny.pipeline_folder(tmp_path, family.prediction_type)
    configure(
        copy,
        _class_name="EulerDiscreteScheduler",
        timestep_spacing="linspace",
        steps_offset=0,
        clip_sample=True,
        thresholding=True,
        set_alpha_to_one=True,
        skip_prk_steps=False,
        solver_order=3,
        use_karras_sigmas=True,
        variance_type="fixed_large",
    )
    other = families.load(copy)
    size = Resolution(64, 64)
    if solver in ("ddpm", "ddim", "euler"):
        assert torch.equal(other.timesteps(40, solver, size), family.timesteps(40, solver, size))
    expected = images(family, PROMPTS[:1], SEEDS[:1], settings(solver))
    assert torch.equal(images(other, PROMPTS[:1], SEEDS[:1], settings(solver)), expected)


def test_a_ddim_step_lands_on_the_next_timestep(family: Family) -> None:
    """From the true x0 and eps, at every step: ten steps are 901, 801, ..., 1 and then 0."""
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=Generator().manual_seed(0))
    grid = family.timesteps(10, "ddim", Resolution(64, 64))
    assert grid.tolist() == [*range(901, 0, -100), 0]
    x, timesteps, steps = ahead.trajectory(family, grid, "ddim", SHAPE, [Generator().manual_seed(0)])
    assert torch.equal(timesteps[:, 0], grid)
    for t, t_next, now in zip(grid, grid[1:], steps, strict=False):
        alpha, sigma = family.schedule(t_next)
        after = ahead.step(Prediction(x0, eps, eps), now, "ddim")
        assert torch.equal(after, alpha * x0 + sigma * eps)
        assert now.t.tolist() == [t] * len(x)


def test_guidance_and_prompts_change_the_image(family: Family) -> None:
    one, other = images(family, PROMPTS[:2], [1, 1], settings("ddim"))
    assert (one - other).abs().max() > 1e-3
    negative = images(family, PROMPTS[:1], [1], settings("ddim"), negative="blurred")[0]
    assert (one - negative).abs().max() > 1e-3
    same = images(family, PROMPTS[:1], [1], settings("ddim"), negative=PROMPTS[0])
    unguided = images(family, PROMPTS[:1], [1], settings("ddim", scale=1.0))
    torch.testing.assert_close(same, unguided, rtol=0, atol=1e-5)


def test_guidance_below_1_is_no_guidance(family: Family) -> None:
    """As in diffusers; a scale of 0 must not turn to the negative prompt and ignore the prompt."""
    expected = images(family, PROMPTS[:2], [1, 1], settings("ddim", scale=1.0))
    for scale in (0.0, 0.5):
        assert torch.equal(images(family, PROMPTS[:2], [1, 1], settings("ddim", scale=scale)), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_sample_streams_and_leaves_grad_mode_alone(family: Family) -> None:
    """No batch is made before it is asked for, and between two batches the caller's grad mode is its own."""
    weight = next(family.denoiser.parameters())
    weight.requires_grad_(True)
    try:
        made: list[int] = []
        hook = family.denoiser.register_forward_hook(lambda *_: made.append(1))
        batches = sample(family, PROMPTS, SEEDS, settings("ddim", batch_size=2, steps=3))
        assert torch.is_grad_enabled()
        assert not made
        first = next(batches)
        assert torch.is_grad_enabled()
        assert (weight * 2).requires_grad
        assert len(made) == 3
        assert first.shape[0] == 2
        assert not first.requires_grad
        with torch.no_grad():
            last = next(batches)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert last.shape[0] == 1
        with pytest.raises(StopIteration):
            next(batches)
        batches = sample(family, PROMPTS, SEEDS, settings("ddim", batch_size=1, steps=1))
        next(batches)
        batches.close()
        assert torch.is_grad_enabled()
        hook.remove()
    finally:
        weight.requires_grad_(False)


def test_no_prompts_no_images(family: Family) -> None:
    assert list(sample(family, [], [], settings("ddim"))) == []


def test_a_wide_image(family: Family) -> None:
    wide = Sampling(num_inference_steps=1, guidance_scale=1.0, solver="ddim", resolution="64x32")
    assert images(family, PROMPTS[:1], [0], wide).shape == (1, 3, 32, 64)


def test_each_image_has_its_own_noise(family: Family) -> None:
    """x_T and the noise of a stochastic step come from the image's generator, one torch.randn each, and from nowhere else."""
    prediction = Prediction(*torch.zeros(3, 2, 4, 8, 8))
    generators = [Generator().manual_seed(1), Generator().manual_seed(2)]
    x, _, steps = ahead.trajectory(family, torch.tensor([501, 481]), "ddpm", SHAPE, generators)
    after = ahead.step(prediction, next(steps), "ddpm")
    own = [Generator().manual_seed(1), Generator().manual_seed(2)]
    first, second = (
        torch.stack([torch.randn(SHAPE, generator=generator) for generator in own]) for _ in "ab"
    )
    assert torch.equal(x, first)
    torch.testing.assert_close(after, 0.294785 * second, rtol=1e-5, atol=0)
    assert torch.equal(initial_noise(SHAPE, [Generator().manual_seed(1)], "cpu")[0], first[0])


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1, 3, 3), (2, 2, 2)])
def test_noise_drawn_ahead_is_that_of_each_step_by_itself(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number by number, also for sizes that torch.randn fills in another way, and where it is moved in parts."""
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 3 * 2 * 4 * math.prod(shape))  # three steps at once
    ours, own = ([Generator().manual_seed(seed) for seed in (1, 2)] for _ in "ab")
    drawn = list(ahead.noise(8, shape, ours, "cpu"))
    assert len(drawn) == 8
    for step in drawn:
        assert torch.equal(step, torch.stack([torch.randn(shape, generator=generator) for generator in own]))
    assert [g.get_state().tolist() for g in ours] == [g.get_state().tolist() for g in own]


def test_steps_without_noise_move_no_generator(family: Family) -> None:
    prediction = Prediction(*torch.randn(3, 1, 4, 8, 8, generator=Generator().manual_seed(0)))
    fresh = Generator().manual_seed(1)
    initial_noise(SHAPE, [fresh], "cpu")
    for solver, grid in (("ddim", [501, 481, 1]), ("ddpm", [0, -1]), ("euler", [501, 0, -1])):
        generator = Generator().manual_seed(1)
        steps = ahead.trajectory(family, torch.tensor(grid), solver, SHAPE, [generator])[2]
        after = [ahead.step(prediction, now, solver) for now in steps]
        assert torch.equal(generator.get_state(), fresh.get_state())
        assert solver == "ddim" or torch.equal(after[-1], prediction.x0)


def test_defaults_stand_in_for_none() -> None:
    defaults = Defaults(
        family="sd",
        distilled=False,
        resolution=Resolution(512, 768),
        num_inference_steps=50,
        guidance_scale=7.5,
        solver="pndm",
        lora_target_modules=("to_q",),
        prediction_type="epsilon",
        zero_snr=False,
        num_train_timesteps=1000,
    )
    resolved = Sampling().resolved(defaults)
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.solver) == (50, 7.5, "pndm")
    assert (resolved.resolution, resolved.batch_size) == (Resolution(height=512, width=768), 8)
    mine = Sampling(
        num_inference_steps=3, guidance_scale=0.0, solver="ddim", resolution="64x32", batch_size=2
    )
    resolved = mine.resolved(defaults)
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.solver) == (3, 0.0, "ddim")
    assert (resolved.resolution, resolved.batch_size) == (Resolution(height=32, width=64), 2)


def test_what_is_refused(family: Family) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):  # at the call, not at the first image
        sample(family, PROMPTS[:2], [1], settings("ddim"))
    for values, words in (
        ({"num_inference_steps": 0}, r"--sample.num-inference-steps must lie in 1..1000, got 0"),
        ({"num_inference_steps": 1001}, r"--sample.num-inference-steps must lie in 1..1000, got 1001"),
        ({"batch_size": 0}, "--sample.batch-size must be at least 1, got 0"),
        ({"resolution": "60"}, "--sample.resolution: .*60"),
        ({"resolution": "big"}, "--sample.resolution: .*big"),
        ({"guidance_scale": -1.0}, "--sample.guidance-scale must be a number of at least 0, got -1.0"),
        ({"guidance_scale": float("nan")}, "--sample.guidance-scale must be .* got nan"),
        ({"guidance_scale": float("inf")}, "--sample.guidance-scale must be .* got inf"),
    ):
        with pytest.raises(ValueError, match=words):
            Sampling(**values)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_the_images(world_size: int) -> None:
    parts = [sharded(PROMPTS, rank, world_size) for rank in range(world_size)]
    assert sorted(pair for part in parts for pair in part) == list(enumerate(PROMPTS))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
