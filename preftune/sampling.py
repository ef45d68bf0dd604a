"""Sampling of images from prompts in batches, and the noise of one step for drivers with their own loop.

Every image has its own torch.Generator, so it is a function of (weights, prompt, seed) alone: it does not
depend on the batch or on the number of processes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from preftune import resolution as resolutions
from preftune import solvers
from preftune.families.base import Cond, Defaults, Family
from preftune.noise import Prediction
from preftune.resolution import Resolution
from preftune.solvers import SOLVERS, SolverName

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of images that are shown or scored."""

    num_inference_steps: int | None = None
    """Denoising steps, 1 to 1000; None = the model family's default."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale; 1 or less = none, as in diffusers; None = the model family's default."""
    solver: SolverName | None = None
    """Solver (scheduler); None = the model family's default."""
    resolution: str | None = None
    """Pixels: 512, or width x height as 768x512; None = the training resolution, elsewhere the model's own."""
    batch_size: int = 8
    """Images per forward pass; affects speed and memory, not the images."""

    def __post_init__(self) -> None:
        steps, scale = self.num_inference_steps, self.guidance_scale
        if steps is not None and not 1 <= steps <= 1000:
            raise ValueError(f"--sample.num-inference-steps must lie in 1..1000, got {steps}")
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"--sample.guidance-scale must be a number of at least 0, got {scale}")
        if self.batch_size < 1:
            raise ValueError(f"--sample.batch-size must be at least 1, got {self.batch_size}")
        if self.resolution is not None:
            try:
                resolutions.parse(self.resolution)
            except ValueError as error:
                raise ValueError(f"--sample.resolution: {error}") from error

    def at(self, resolution: Resolution) -> "Sampling":
        """Return the same settings with this resolution where they name none."""
        return self if self.resolution is not None else dataclasses.replace(self, resolution=str(resolution))

    def by_groups_of(self, number: int) -> "Sampling":
        """Return the same settings with a batch size that is a multiple of `number`, at least `number`."""
        return dataclasses.replace(self, batch_size=max(1, self.batch_size // number) * number)

    def resolved(self, defaults: Defaults) -> "Resolved":
        """Return the settings with the family's defaults in place of None. ValueError, before any weight loads, for a solver or a
        number of steps that the model cannot be sampled with.
        """
        parsed = None if self.resolution is None else resolutions.parse(self.resolution)
        scale = self.guidance_scale  # 0 is a value, so no `or`
        settings = Resolved(
            num_inference_steps=self.num_inference_steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale if scale is None else scale,
            solver=self.solver or defaults.solver,
            resolution=parsed or defaults.resolution,
            batch_size=self.batch_size,
        )
        defaults.check_solver(settings.solver, settings.num_inference_steps)
        return settings


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Sampling with all defaults filled in. Fields as in Sampling."""

    num_inference_steps: int
    guidance_scale: float
    solver: SolverName
    resolution: Resolution
    batch_size: int


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
    sampling: "Sampling | Resolved",
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
    if settings.solver in SOLVERS:
        grid = family.timesteps(settings.num_inference_steps, settings.solver, settings.resolution)
        for t, t_next in itertools.pairwise(grid):
            level = t.expand(len(x)).to(x.device)
            prediction = family.predict(x, level, cond, settings.guidance_scale)
            x = step(family, prediction, t, t_next, settings.solver, generators)
    else:
        x = _scheduler_loop(family, x, cond, settings)
    return family.decode(x).float().clamp(0, 1).cpu()


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
