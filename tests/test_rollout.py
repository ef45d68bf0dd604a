"""Trajectories: what is stored, that a replay of unchanged weights has a ratio of exactly 1, and that it has the gradient."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Normal

import tiny
from preftune import families
from preftune.families.base import Cond, Family
from preftune.resolution import Resolution
from preftune.rollout import Trajectory, replay, rollout
from preftune.sampling import Sampling, initial_noise, sample
from preftune.solver_names import SolverName
from preftune.solvers import Step, cps, ddim

PROMPTS = ["a red circle", "two cats", "a dog at sea"]
STEPS: dict[str, tuple[SolverName, Step | None]] = {
    "ddpm": ("ddpm", None),
    "ddpo": ("ddim", partial(ddim, eta=1.0)),
    "ddim eta 0.3": ("ddim", partial(ddim, eta=0.3)),
    "cps": ("ddim", cps),
    "ddim": ("ddim", None),
    "euler": ("euler", None),
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return families.load(tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"), request.param))


def generators(count: int = 3) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in range(count)]


def run(
    family: Family, name: str = "ddpo", *, count: int = 3, dtype: torch.dtype = torch.float32, steps: int = 6
) -> tuple[Trajectory, Cond, list[Generator]]:
    """A trajectory of the first `count` prompts at 64 px, guided."""
    solver, step = STEPS[name]
    own = generators(count)
    cond = family.encode(PROMPTS[:count])
    shape = family.latent_shape(Resolution(tiny.PIXELS, tiny.PIXELS))
    x_t = initial_noise(shape, own, family.device)
    return rollout(family, cond, x_t, solver, steps, 3.0, own, step=step, dtype=dtype), cond, own


def noisy(trajectory: Trajectory) -> list[int]:
    """The steps that have noise."""
    return [index for index in range(len(trajectory)) if trajectory.log_probs[index].isfinite().all()]


def ratio(family: Family, trajectory: Trajectory, cond: Cond, index: int) -> Tensor:
    new = replay(family, trajectory, cond, index).log_prob(trajectory.latents[index + 1], trajectory.reduce)
    return (new - trajectory.log_probs[index]).exp()


@pytest.mark.parametrize("name", ["ddpm", "ddpo", "ddim eta 0.3", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ratio_of_unchanged_weights_is_exactly_1(family: Family, name: str, dtype: torch.dtype) -> None:
    """Also where latents are stored in half precision: they are rounded before their log-probability is taken."""
    trajectory, cond, _ = run(family, name, dtype=dtype)
    assert trajectory.latents.dtype == dtype
    assert trajectory.log_probs.dtype == torch.float32
    assert noisy(trajectory) == list(range(5 if name == "ddpm" else 6)), "ddpm's last step has no noise"
    for index in noisy(trajectory):
        assert torch.equal(ratio(family, trajectory, cond, index), torch.ones(3))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_steps_without_noise_have_no_log_prob_and_move_no_generator(family: Family, name: str) -> None:
    trajectory, cond, own = run(family, name)
    assert trajectory.log_probs.isnan().all()
    assert trajectory.log_probs.shape == (6, 3)
    fresh = generators()
    initial_noise((4, 8, 8), fresh, "cpu")
    for used, unused in zip(own, fresh, strict=True):
        assert torch.equal(used.get_state(), unused.get_state())
    for index in range(6):
        with torch.no_grad():
            assert torch.equal(replay(family, trajectory, cond, index).mean, trajectory.latents[index + 1])


def test_what_is_stored(family: Family) -> None:
    """x_T first, x_0 last, and each image's noise from its own generator, in the order of the steps."""
    trajectory, cond, _ = run(family)
    assert len(trajectory) == 6
    assert trajectory.timesteps.tolist() == [831, 665, 499, 333, 167, 1, 0]
    assert trajectory.latents.shape == (7, 3, 4, 8, 8)
    own = generators()
    assert torch.equal(trajectory.latents[0], initial_noise((4, 8, 8), own, "cpu"))
    for index in range(6):
        with torch.no_grad():
            transition = replay(family, trajectory, cond, index)
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in own])
        expected = transition.mean + transition.std * noise
        assert torch.equal(trajectory.latents[index + 1], expected)
        log_prob = Normal(transition.mean, transition.std).log_prob(expected).flatten(1).mean(1)
        torch.testing.assert_close(trajectory.log_probs[index], log_prob, rtol=1e-6, atol=1e-6)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_a_rollout_ends_in_the_image_that_sample_makes(family: Family, name: SolverName) -> None:
    trajectory, _, _ = run(family, name)
    settings = Sampling(solver=name, num_inference_steps=6, guidance_scale=3.0, resolution="64")
    pixels = torch.cat(list(sample(family, PROMPTS, [0, 1, 2], settings)))
    with torch.no_grad():
        assert torch.equal(family.decode(trajectory.latents[-1]).clamp(0, 1), pixels)


def test_an_image_does_not_depend_on_its_batch(family: Family) -> None:
    together, alone = run(family)[0], run(family, count=1)[0]
    torch.testing.assert_close(together.latents[:, :1], alone.latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.log_probs[:, :1], alone.log_probs, rtol=0, atol=1e-4)


def test_each_image_may_be_replayed_at_its_own_step(family: Family) -> None:
    trajectory, cond, _ = run(family)
    index = torch.tensor([4, 0, 2])
    with torch.no_grad():
        mixed = replay(family, trajectory, cond, index)
        for image, step in enumerate(index.tolist()):
            single = replay(family, trajectory, cond, step)
            torch.testing.assert_close(mixed.mean[image], single.mean[image], rtol=0, atol=1e-6)
            assert torch.equal(mixed.std[image], single.std[image])


def test_a_replay_has_the_gradient_of_reinforce(family: Family) -> None:
    """At ratio 1 the gradient of -A ratio is -A grad log p; it reaches the weights, and the rollout kept none."""
    family.denoiser.requires_grad_(True)
    try:
        trajectory, cond, _ = run(family)
        assert not trajectory.latents.requires_grad
        assert not trajectory.log_probs.requires_grad
        weight = next(family.denoiser.parameters())
        advantage = torch.tensor([1.0, -2.0, 0.0])
        (surrogate,) = torch.autograd.grad(-(advantage * ratio(family, trajectory, cond, 3)).mean(), weight)
        log_prob = replay(family, trajectory, cond, 3).log_prob(trajectory.latents[4], "mean")
        (reinforce,) = torch.autograd.grad(-(advantage * log_prob).mean(), weight)
        assert surrogate.abs().max() > 0
        torch.testing.assert_close(surrogate, reinforce)
    finally:
        family.denoiser.requires_grad_(False)


def test_sum_and_mean_differ_by_the_number_of_elements(family: Family) -> None:
    own = generators()
    x_t = initial_noise((4, 8, 8), own, "cpu")
    cond = family.encode(PROMPTS)
    summed = rollout(family, cond, x_t, "ddpm", 3, 1.0, own, reduce="sum")
    assert summed.reduce == "sum"
    own = generators()
    x_t = initial_noise((4, 8, 8), own, "cpu")
    mean = rollout(family, cond, x_t, "ddpm", 3, 1.0, own)
    torch.testing.assert_close(summed.log_probs[:2], mean.log_probs[:2] * 256)


def test_pndm_is_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pndm has no step of its own"):
        rollout(family, family.encode(PROMPTS[:1]), torch.zeros(1, 4, 8, 8), "pndm", 4, 1.0, generators(1))
