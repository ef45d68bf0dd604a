"""Latents at one noise level from pure noise, by a solver of few steps: the part of a ReFL update without gradient.

The prediction at a late step depends on the latents there, and hardly on how they were reached: 12 steps of a second-order solver
(DPM-Solver++, Lu et al. 2022, arXiv 2211.01095, algorithm 2) take the place of 30 to 39 of the first order. The latents are those of
the deterministic path, without the noise that DDPM's own steps add. Steps are equally far apart in t, from the last training timestep.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from preftune import ahead
from preftune.families.base import Cond, Family
from preftune.solver_names import SolverName
from preftune.solvers import SOLVERS
from rewards.on_device import upload


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
    shape: Sequence[int],
    t: int,
    cond: Cond,
    guidance_scale: float,
    solver: SolverName,
    num_steps: int,
    generators: Sequence[Generator],
) -> Tensor:
    """Return latents (B, *shape) at timestep t from pure noise, by num_steps calls of the denoiser, without gradient.

    ValueError for solver pndm, whose steps have one length, and as `timesteps`.
    """
    grid = torch.tensor(timesteps(t, num_steps, family.defaults.num_train_timesteps))
    if solver in SOLVERS:
        x, _, steps = ahead.trajectory(family, grid, solver, shape, generators)
        for now in steps:
            x = ahead.step(family.predict(x, now.t, cond, guidance_scale), now, solver)
        return x
    if solver != "dpm++":
        raise ValueError(f"solver {solver} takes no timesteps; one of {', '.join([*SOLVERS, 'dpm++'])} does")
    scheduler = family.scheduler(solver, num_steps)
    scheduler.set_timesteps(timesteps=grid.tolist())  # the last one is reached, and no step begins there
    x = ahead.initial_noise(shape, generators, family.device)
    levels = upload(scheduler.timesteps, family.device)[:, None].expand(-1, len(x))
    for t_now, level in zip(scheduler.timesteps[:-1], levels, strict=False):
        output = family.predict(x, level, cond, guidance_scale).output
        x = scheduler.step(output, t_now, x).prev_sample
    return x
