"""What the steps of a trajectory need from the CPU: timesteps, noise levels and noise, drawn and moved before the first step.

A step then copies nothing between CPU and device, and a GPU never waits for one. The numbers are those of `torch.randn` from each
image's own generator, x_T first, then each step's in order.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor

from preftune import solvers
from preftune.noise import Prediction
from preftune.solver_names import SolverName
from preftune.solvers import SOLVERS, Level
from rewards.on_device import upload

if TYPE_CHECKING:
    from preftune.families.base import Family

AHEAD_BYTES = 1 << 28
"""Noise that is drawn and moved at once. SD at 512 px has 64 KiB a step and image, SDXL at 1024 px 256 KiB: this is all of an update
of 8 images in 40 steps. A longer trajectory of more images gets it in parts.
"""


class Ahead(NamedTuple):
    """One step's inputs, on the model's device."""

    t: Tensor
    """(B,) timesteps that it starts at."""
    level: Level
    """(alpha, sigma) there, each ()."""
    next_level: Level
    """(alpha, sigma) where it lands, each ()."""
    noise: Tensor | None
    """(B, C, h, w) standard normal; None for a step without noise."""


def noise(
    count: int, shape: Sequence[int], generators: Sequence[Generator], device: torch.device | str
) -> Iterator[Tensor]:
    """Yield standard normal noise (B, *shape), float32, `count` times: the next numbers of each image's own CPU generator."""
    pinned = torch.device(device).type == "cuda"
    at_once = max(1, AHEAD_BYTES // max(1, 4 * len(generators) * torch.Size(shape).numel()))
    for start in range(0, count, at_once):
        drawn = torch.empty(
            (min(at_once, count - start), len(generators), *shape), dtype=torch.float32, pin_memory=pinned
        )
        for image, generator in enumerate(generators):
            for place in drawn[:, image]:
                torch.randn(shape, generator=generator, out=place)
        yield from drawn.to(device, non_blocking=True)


def initial_noise(
    shape: Sequence[int], generators: Sequence[Generator], device: torch.device | str
) -> Tensor:
    """Return noise (B, *shape), float32: one standard normal sample from each generator, as x_T is."""
    return next(noise(1, shape, generators, device))


def noisy(timesteps: Tensor, solver: SolverName) -> list[bool]:
    """Return whether each step from timesteps (N + 1,) of a solver in SOLVERS draws noise: none ends without noise (at -1) with it."""
    return [SOLVERS[solver].stochastic and t_next >= 0 for t_next in timesteps[1:].tolist()]


def trajectory(
    family: "Family",
    timesteps: Tensor,
    solver: SolverName,
    shape: Sequence[int],
    generators: Sequence[Generator],
) -> tuple[Tensor, Tensor, Iterator[Ahead]]:
    """Return x_T (B, C, h, w), the timesteps (N + 1, B) on the device, and the inputs of the N steps of a solver in SOLVERS.

    `timesteps` (N + 1,) are on the CPU, those of `family.timesteps` or the first of them; shape is (C, h, w). Random numbers are
    drawn for steps that use them alone.
    """
    draws = noisy(timesteps, solver)
    drawn = noise(1 + sum(draws), shape, generators, family.device)
    x = next(drawn)
    return x, *steps(family, timesteps, draws, drawn, len(x))


def steps(
    family: "Family", timesteps: Tensor, draws: Sequence[bool], drawn: Iterator[Tensor], count: int
) -> tuple[Tensor, Iterator[Ahead]]:
    """Return the timesteps (N + 1, count) on the device, and the inputs of N steps, of which those that `draws` says take noise of `drawn`."""
    grid = upload(timesteps, family.device)
    alphas, sigmas = family.schedule(grid)
    rows = grid[:, None].expand(-1, count)
    return rows, (
        Ahead(
            rows[i],
            (alphas[i], sigmas[i]),
            (alphas[i + 1], sigmas[i + 1]),
            next(drawn) if draws[i] else None,
        )
        for i in range(len(draws))
    )


def step(prediction: Prediction, ahead: Ahead, solver: SolverName) -> Tensor:
    """Return the next latents (B, C, h, w): one step of a solver in SOLVERS."""
    transition = solvers.stepper(solver)(prediction, ahead.level, ahead.next_level)
    return transition.mean if ahead.noise is None else transition.sample(ahead.noise)
