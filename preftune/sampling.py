"""Sampling of images from prompts in batches, and the noise of one step for drivers with their own loop.

Every image has its own torch.Generator, so it is a function of (weights, prompt, seed) alone: it does not
depend on the batch or on the number of processes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from preftune import solvers
from preftune.families.base import Cond, Family
from preftune.noise import Prediction
from preftune.sampling_config import Resolved, Sampling
from preftune.solver_names import SolverName
from preftune.solvers import SOLVERS

__all__ = ["Resolved", "Sampling", "initial_noise", "sample", "sharded", "step", "step_noise"]

_T = TypeVar("_T")

DECODED_PIXELS = 8 * 512 * 512
"""Pixels that are decoded at once. The decoder takes far more memory than the denoiser without gradient: for SDXL at 1024 px in
bf16 about 1.5 GiB an image (counted), twice that in float32.
"""


def initial_noise(
    shape: tuple[int, int, int], generators: Sequence[Generator], device: torch.device | str
) -> Tensor:
    """Return x_T (B, C, h, w), float32: one standard normal sample from each generator."""
    noise = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(noise).to(device)


def step_noise(x: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Return standard normal noise for a step from latents x (B, C, h, w): one sample from each image's generator."""
    _, channels, height, width = x.shape
    return initial_noise((channels, height, width), generators, x.device)


def step(
    family: Family,
    prediction: Prediction,
    t: Tensor,
    t_next: Tensor,
    solver: SolverName,
    generators: Sequence[Generator],
) -> Tensor:
    """Return the next latents (B, C, h, w): one step of a solver in SOLVERS from timestep t () to t_next ().

    A stochastic solver takes its noise from each image's generator, but none for a step that ends without noise (t_next
    -1), so that no random numbers are drawn unnecessarily.
    """
    transition = solvers.stepper(solver)(prediction, family.schedule(t), family.schedule(t_next))
    if not SOLVERS[solver].stochastic or t_next < 0:
        return transition.mean
    return transition.sample(step_noise(prediction.x0, generators))


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | Resolved,
    *,
    negative: str = "",
    progress: str | None = None,
) -> Iterator[Tensor]:
    """Yield pixels (b, 3, height, width) in [0, 1], float32 on the CPU, batch by batch: an image for each (prompt, seed).

    `negative` is the negative prompt; `progress` names a progress bar. The caller's grad mode is
    left alone between batches. ValueError, at the call, for lengths that differ.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    settings = sampling if isinstance(sampling, Resolved) else sampling.resolved(family.defaults)
    starts = range(0, len(prompts), settings.batch_size)
    parts = (slice(start, start + settings.batch_size) for start in starts)
    return (
        _sample_batch(family, prompts[part], seeds[part], settings, negative)
        for part in tqdm(parts, desc=progress, total=len(starts), disable=progress is None, leave=False)
    )


@torch.no_grad()  # on a function that returns: on a generator it would leak into the caller between two batches
def _sample_batch(
    family: Family, prompts: Sequence[str], seeds: Sequence[int], settings: Resolved, negative: str
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cond = family.encode(prompts, negative=negative)
    x = initial_noise(family.latent_shape(settings.resolution), generators, family.device)
    with family.lean():
        if settings.solver in SOLVERS:
            grid = family.timesteps(settings.num_inference_steps, settings.solver, settings.resolution)
            for t, t_next in itertools.pairwise(grid):
                level = t.expand(len(x)).to(x.device)
                prediction = family.predict(x, level, cond, settings.guidance_scale)
                x = step(family, prediction, t, t_next, settings.solver, generators)
        else:
            x = _scheduler_loop(family, x, cond, settings)
    at_once = max(1, DECODED_PIXELS // (settings.resolution.width * settings.resolution.height))
    return torch.cat([family.decode(part).float().clamp(0, 1).cpu() for part in x.split(at_once)])


def _scheduler_loop(family: Family, x: Tensor, cond: Cond, settings: Resolved) -> Tensor:
    """Return the last latents of pndm or dpm++: diffusers' scheduler on the network's own (guided) output."""
    scheduler = family.scheduler(settings.solver, settings.num_inference_steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        output = family.predict(x_in, t.expand(len(x)).to(x.device), cond, settings.guidance_scale).output
        x = scheduler.step(output, t, x).prev_sample
    return x


def sharded(items: Sequence[_T], rank: int, world_size: int) -> list[tuple[int, _T]]:
    """Return this process's items with their indices: rank, rank + world_size, ...; all processes have all items once."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    return list(enumerate(items))[rank::world_size]
