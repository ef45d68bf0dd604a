"""Stored trajectories: `rollout` samples one without gradient, `replay` evaluates a step of it again with
gradient.

For methods such as DDPO (Black et al. 2023, arXiv 2305.13301). Its ratio is exp(replayed.log_prob -
trajectory.log_probs[i]). For unchanged weights the ratio is exactly 1 in float32, because (1) a sample is
first rounded to the storage dtype, and the log-probability is that of the rounded sample; (2) the network
gets the stored latents both times; (3) every timestep is a vector (B,) both times. The caller must keep the
rest equal: batch size, train or eval mode, autocast, and the LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from preftune import ahead
from preftune.families.base import Cond, Family
from preftune.noise import Prediction
from preftune.resolution import Resolution
from preftune.solver_names import SolverName
from preftune.solvers import Step, Transition, stepper
from rewards.on_device import upload


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Trajectories of B images from noise to x_0 in N steps, with log-probabilities."""

    timesteps: Tensor
    """(N + 1,), falling, on the model's device; step i goes from timesteps[i] to timesteps[i + 1]."""
    latents: Tensor
    """(N + 1, B, C, h, w) in the storage dtype; latents[0] is x_T, latents[-1] is x_0."""
    log_probs: Tensor
    """(N, B) float32: log p(latents[i + 1] | latents[i]); nan at a step without noise, which has none."""
    reduce: Literal["mean", "sum"]
    """Over the elements of an image, in log_probs."""
    guidance_scale: float
    step: Step

    def __len__(self) -> int:
        """Return N."""
        return len(self.timesteps) - 1


@torch.no_grad()
def rollout(
    family: Family,
    cond: Cond,
    x_T: Tensor,  # noqa: N803 - the literature's name
    solver: SolverName,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[Generator],
    *,
    resolution: Resolution | None = None,
    step: Step | None = None,
    dtype: torch.dtype = torch.float32,
    reduce: Literal["mean", "sum"] = "mean",
) -> Trajectory:
    """Return a trajectory from x_T (B, C, h, w), without gradient, its noise from each image's generator.

    The timesteps are those of `solver`, the step is its own unless one is given: DDPO is solver ddim with
    partial(ddim, eta=1), whose last step still has noise. `resolution` matters to families whose timesteps depend on it;
    None is the family's default. `dtype` is that of the stored latents. ValueError for pndm and dpm++.
    """
    step = step or stepper(solver)
    grid = family.timesteps(num_inference_steps, solver, resolution or family.defaults.resolution)
    timesteps = upload(grid, x_T.device)
    draws = _noisy(family, timesteps, step)
    drawn = ahead.noise(sum(draws), x_T.shape[1:], generators, x_T.device)
    latents, log_probs = [x_T.to(dtype)], []
    for index, draw in enumerate(draws):
        _, transition = predicted_step(
            family, latents[-1], timesteps[index], timesteps[index + 1], cond, guidance_scale, step
        )
        if draw:
            latents.append(transition.sample(next(drawn)).to(dtype))
            log_probs.append(transition.log_prob(latents[-1], reduce))
        else:
            latents.append(transition.mean.to(dtype))
            log_probs.append(torch.full((len(x_T),), float("nan"), device=x_T.device))
    return Trajectory(
        timesteps=timesteps,
        latents=torch.stack(latents),
        log_probs=torch.stack(log_probs),
        reduce=reduce,
        guidance_scale=guidance_scale,
        step=step,
    )


def replay(family: Family, trajectory: Trajectory, cond: Cond, index: int | Tensor) -> Transition:
    """Return the transition from latents[index] under the present weights, with gradient to them.

    `index` is one step for all images, or (B,) int64, one for each. The new log-probability is
    `replay(...).log_prob(x_next, trajectory.reduce)` with x_next = latents[index + 1], image by image.
    """
    count = trajectory.latents.shape[1]
    if isinstance(index, int):
        x, t, t_next = trajectory.latents[index], trajectory.timesteps[index], trajectory.timesteps[index + 1]
    else:
        steps = upload(index, trajectory.latents.device)
        x = trajectory.latents[steps, torch.arange(count, device=steps.device)]
        t, t_next = trajectory.timesteps[steps], trajectory.timesteps[steps + 1]
    return predicted_step(family, x, t, t_next, cond, trajectory.guidance_scale, trajectory.step)[1]


def _noisy(family: Family, timesteps: Tensor, step: Step) -> list[bool]:
    """Return whether each step has noise: of all steps at once, for a GPU is waited for here."""
    none = torch.zeros(len(timesteps) - 1, 1, 1, 1, device=timesteps.device)
    prediction = Prediction(none, none, none)
    stds = step(prediction, family.schedule(timesteps[:-1]), family.schedule(timesteps[1:])).std
    found: list[bool] = (stds > 0).flatten().tolist()
    return found


def predicted_step(
    family: Family, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, guidance_scale: float, step: Step
) -> tuple[Prediction, Transition]:
    """Return the guided prediction and the transition from stored latents x (B, C, h, w); t and t_next are () or (B,)."""
    x = x.float()
    t, t_next = t.expand(len(x)), t_next.expand(len(x))
    prediction = family.predict(x, t, cond, guidance_scale)
    return prediction, step(prediction, family.schedule(t), family.schedule(t_next))
