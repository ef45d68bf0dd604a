"""Latents at one noise level from pure noise, by a solver of few steps: the part of a ReFL update without gradient.

The prediction at a late step depends on the latents there, and hardly on how they were reached: 12 steps of a second-order solver
(DPM-Solver++, Lu et al. 2022, arXiv 2211.01095, algorithm 2) take the place of 30 to 39 of the first order. The latents are those of
the deterministic path, without the noise that DDPM's own steps add. Steps are equally far apart in t, from the last training timestep.
"""

from typing import Literal

import torch
from torch import Tensor

from preftune.families.base import Cond, Family
from preftune.solvers import stepper
from rewards.on_device import upload

FewStepSolver = Literal["dpm++", "ddim", "euler"]
"""Those without noise; pndm's steps have one length."""


def timesteps(last: int, num_steps: int, num_train_timesteps: int) -> list[int]:
    """Return num_steps + 1 falling timesteps from the last of training to `last`; ValueError where they would not all differ."""
    first = num_train_timesteps - 1
    if not 1 <= num_steps <= first - last:
        raise ValueError(
            f"num_steps must lie in 1..{first - last} from timestep {first} to {last}, got {num_steps}"
        )
    return [round(first + (last - first) * index / num_steps) for index in range(num_steps + 1)]


@torch.no_grad()
def latents_at(
    family: Family,
    x: Tensor,
    t: int,
    cond: Cond,
    guidance_scale: float,
    solver: FewStepSolver,
    num_steps: int,
) -> Tensor:
    """Return latents (B, C, h, w) at timestep t from pure noise x, by num_steps calls of the denoiser, without gradient.

    ValueError as `timesteps`.
    """
    grid = timesteps(t, num_steps, family.defaults.num_train_timesteps)
    on_device = upload(torch.tensor(grid), x.device)
    levels = list(zip(*family.schedule(on_device), strict=True))
    scheduler = None if solver != "dpm++" else family.scheduler(solver, num_steps)
    if scheduler is not None:
        scheduler.set_timesteps(timesteps=grid)  # the last one is reached, and no step begins there
    for index in range(num_steps):
        prediction = family.predict(x, on_device[index].expand(len(x)), cond, guidance_scale)
        if scheduler is None:
            x = stepper(solver)(prediction, levels[index], levels[index + 1]).mean
        else:
            x = scheduler.step(prediction.output, scheduler.timesteps[index], x).prev_sample
    return x
