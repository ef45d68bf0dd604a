"""Sampling: an image is a function of (weights, prompt, seed), and it is the image that diffusers' own pipeline draws."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

import tiny
from preftune import families
from preftune.families.sd import SD
from preftune.families.tiny import SCHEDULER_CONFIG
from preftune.noise import x0_from
from preftune.sampling import Sampling, SolverName, make_scheduler, noise_like_seeds, sample, step

PROMPTS = ["a red circle", "two cats", "a dog at sea"]
SEEDS = [11, 5, 2**40]


def sampling(scheduler: SolverName, batch: int = 8, num_inference_steps: int = 4) -> Sampling:
    return Sampling(
        num_inference_steps=num_inference_steps,
        guidance_scale=3.0,
        solver=scheduler,
        resolution=str(tiny.PIXELS),
        batch_size=batch,
    )


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"), request.param)


@pytest.fixture(scope="module")
def family(folder: Path) -> SD:
    return families.load(folder)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "pndm", "dpm++"])
def test_an_image_is_a_function_of_prompt_and_seed(family: SD, scheduler: SolverName) -> None:
    """Not of the batch, the order, the neighbours or the global random state."""
    pixels = sample(family, PROMPTS, SEEDS, sampling(scheduler))
    assert pixels.shape == (3, 3, tiny.PIXELS, tiny.PIXELS)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    before = torch.get_rng_state()
    alone = sample(family, PROMPTS, SEEDS, sampling(scheduler, batch=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    turned = sample(family, PROMPTS[::-1], SEEDS[::-1], sampling(scheduler, batch=2)).flip(0)
    torch.testing.assert_close(alone, pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned, pixels, rtol=0, atol=1e-5)
    other_seed = sample(family, PROMPTS[:1], [12], sampling(scheduler))
    assert (other_seed - pixels[:1]).abs().max() > 1e-2


def test_guidance_and_prompts_change_the_image(family: SD) -> None:
    one, other = sample(family, PROMPTS[:2], [1, 1], sampling("ddim"))
    assert (one - other).abs().max() > 1e-3
    negative = sample(family, PROMPTS[:1], [1], sampling("ddim"), negative="blurred")[0]
    assert (one - negative).abs().max() > 1e-3
    same = sample(family, PROMPTS[:1], [1], sampling("ddim"), negative=PROMPTS[0])
    unguided = Sampling(num_inference_steps=4, guidance_scale=1.0, solver="ddim", resolution="64")
    torch.testing.assert_close(same, sample(family, PROMPTS[:1], [1], unguided), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpm++"])
def test_images_are_those_of_the_diffusers_pipeline(folder: Path, family: SD, scheduler: SolverName) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(family.scheduler_config)
    elif scheduler == "dpm++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(family.scheduler_config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipe(
        PROMPTS,
        negative_prompt=["blurred"] * 3,
        latents=noise_like_seeds(family.latent_shape(64, 64), generators, "cpu"),
        guidance_scale=3.0,
        num_inference_steps=5,
        output_type="pt",
    ).images
    ours = sample(family, PROMPTS, SEEDS, sampling(scheduler, num_inference_steps=5), negative="blurred")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_ddpm_takes_the_published_timesteps() -> None:
    """The released ReFL: 40 steps at 975, 950, ..., 0, although the folder says steps_offset 1."""
    assert SCHEDULER_CONFIG["steps_offset"] == 1
    assert make_scheduler(SCHEDULER_CONFIG, "ddpm", 40).timesteps.tolist() == list(range(975, -1, -25))
    assert make_scheduler(SCHEDULER_CONFIG, "ddim", 40).timesteps.tolist() == list(range(976, 0, -25))


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_x0_is_never_clipped(scheduler: SolverName) -> None:
    """Latents leave [-1, 1]; a folder that asks for clipping would ruin them."""
    config = {**SCHEDULER_CONFIG, "clip_sample": True, "thresholding": True}
    built = make_scheduler(config, scheduler, 10)
    x, output = torch.full((1, 4, 8, 8), 9.0), torch.ones(1, 4, 8, 8)
    t = built.timesteps[3]
    abar = built.alphas_cumprod[t]
    x0 = built.step(output, t, x).pred_original_sample
    torch.testing.assert_close(x0, x0_from(output, x, abar, "epsilon"))
    assert x0.min() > 1


def test_each_image_has_its_own_noise() -> None:
    """x_T and the noise of a stochastic step come from the image's generator, and from nowhere else."""
    scheduler = make_scheduler(SCHEDULER_CONFIG, "ddpm", 10)
    x, output = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    t = scheduler.timesteps[3]

    def run(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return step(scheduler, output[: len(seeds)], t, x[: len(seeds)], generators)

    both = run([1, 2])
    assert torch.equal(both[:1], run([1]))
    assert torch.equal(both[1:], run([2]))
    assert (both[0] - both[1]).abs().max() > 0.1
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = noise_like_seeds((4, 8, 8), [torch.Generator().manual_seed(1)], "cpu")
    assert torch.equal(drawn[0], expected)
    # at x = output = 0 the step is its noise alone, of the deviation of DDPM's fixed_small variance
    torch.testing.assert_close(both[0], expected * scheduler._get_variance(t) ** 0.5)


def test_what_is_refused(family: SD) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        sample(family, PROMPTS[:2], [1], sampling("ddim"))
    for settings, words in (
        ({"num_inference_steps": 0}, "--sample.num-inference-steps must be a positive number, got 0"),
        ({"batch_size": 0}, "--sample.batch-size must be a positive number, got 0"),
        (
            {"resolution": "60"},
            "--sample.resolution must be positive multiples of 8, as 512 or 768x512, got 60",
        ),
        (
            {"resolution": "-8"},
            "--sample.resolution must be positive multiples of 8, as 512 or 768x512, got -8",
        ),
        ({"guidance_scale": -1.0}, "--sample.guidance-scale must be at least 0, got -1.0"),
        ({"guidance_scale": float("nan")}, "--sample.guidance-scale must be at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            Sampling(**settings)
