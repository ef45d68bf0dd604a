"""Trajectories in the coordinates of `surrogates.py`, kept state by state, and their calls again with gradient."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from preftune import ahead
from preftune.families.base import Cond, Family
from preftune.noise import Prediction, predict_from
from preftune.resolution import Resolution
from preftune.solver_names import PredictionType
from preftune.surrogates import Part, pinned, surrogate
from rewards.on_device import upload

GuidanceGradient = Literal["both", "positive"]


class Grid(NamedTuple):
    """The timesteps of a trajectory and their coordinates, computed once for a run: a GPU is waited for here alone."""

    timesteps: Tensor
    """(N + 1,) int64 on the CPU."""
    solver: Literal["ddim", "euler"]
    scales: tuple[float, ...]
    """x = scale y, of the N + 1 states: alpha of a variance-preserving model, 1 of a flow model."""
    levels: tuple[float, ...]
    """sigma / alpha, or sigma of a flow model."""

    def until(self, stop: int) -> "Grid":
        """Return the grid whose last step, `stop`, goes to the predicted clean image."""
        scales, levels = (*self.scales[: stop + 1], 1.0), (*self.levels[: stop + 1], 0.0)
        return self._replace(timesteps=self.timesteps[: stop + 2], scales=scales, levels=levels)


class Path(NamedTuple):
    """One trajectory of B images without gradient, as lists of (B, C, h, w)."""

    states: list[Tensor]
    """y_0, ..., y_N."""
    directions: list[Tensor]
    """d_0, ..., d_(N-1)."""
    latents: Tensor
    """x_N, that is scale_N y_N."""


def grid(
    family: Family, num_inference_steps: int, solver: Literal["ddim", "euler"], resolution: Resolution
) -> Grid:
    """Return the grid of so many steps; AssertionError at zero terminal SNR, where x / alpha is infinite."""
    timesteps = family.timesteps(num_inference_steps, solver, resolution)
    alphas, sigmas = (level.double().tolist() for level in family.schedule(timesteps))
    if family.prediction_type == "flow":
        return Grid(timesteps, solver, (1.0,) * len(alphas), tuple(sigmas))
    assert min(alphas) > 0, "zero terminal SNR"
    return Grid(timesteps, solver, tuple(alphas), tuple(s / a for s, a in zip(sigmas, alphas, strict=True)))


def roll_out(
    family: Family,
    cond: Cond,
    on: Grid,
    generators: Sequence[Generator],
    resolution: Resolution,
    guidance_scale: float,
) -> Path:
    """Return the trajectory of the present weights, without gradient, by steps without noise.

    It is the trajectory of `sampling.sample`; on a grid cut by `until` the last step is to the predicted clean image.
    """
    shape = family.latent_shape(resolution)
    x, _, steps = ahead.trajectory(family, on.timesteps, on.solver, shape, generators)
    clean = on.levels[-1] == 0
    states, directions = [], []
    with family.lean():
        for i, now in enumerate(steps):
            prediction = family.predict(x, now.t, cond, guidance_scale)
            states.append(x / on.scales[i])
            directions.append(direction(prediction, family.prediction_type))
            last = i == len(on.scales) - 2
            x = prediction.x0 if last and clean else ahead.step(prediction, now, on.solver)
    return Path([*states, x / on.scales[-1]], directions, x)


def direction(prediction: Prediction, kind: PredictionType) -> Tensor:
    """Return dy/dl (B, C, h, w): the predicted noise, or of a flow model the velocity."""
    return prediction.output if kind == "flow" else prediction.eps


def predict(
    family: Family,
    x: Tensor,
    t: Tensor,
    cond: Cond,
    guidance_scale: float,
    gradient: GuidanceGradient,
    distances: list[Tensor] | None = None,
) -> Prediction:
    """Return `family.predict` with gradient through both predictions of guidance, or through the prompt's alone.

    The latter takes two calls instead of one of twice the batch; the negative prompt's has no gradient, not to x either. To a list of
    `distances` that of the prediction from the base model's is added, see `base_distance`.
    """
    if guidance_scale <= 1 or gradient == "both":
        found = family.predict(x, t, cond, guidance_scale)
    else:
        with torch.no_grad():
            without = family.predict(x, t, cond.unconditional()).output
        output = without + guidance_scale * (family.predict(x, t, cond).output - without)
        found = predict_from(output, x, *family.schedule(t), family.prediction_type)
    if distances is not None:
        here = predict(family, x.detach(), t, cond, guidance_scale, gradient) if x.requires_grad else found
        distances.append(base_distance(family, here, x.detach(), t, cond, guidance_scale, gradient))
    return found


def base_distance(
    family: Family,
    prediction: Prediction,
    x: Tensor,
    t: Tensor,
    cond: Cond,
    guidance_scale: float,
    gradient: GuidanceGradient,
) -> Tensor:
    """Return the mean squared difference (B,) between the noise of a prediction at latents x, a constant, and that which the model before
    tuning predicts there: DRaFT+, whose default is a single live step. At several, a step's distance moves the weights alone, not
    where the steps before it lead.
    """
    with torch.no_grad(), family.reference():
        base = predict(
            family, x, t, cond, guidance_scale, gradient
        ).eps  # by the same calls, so with the same rounding
    return (prediction.eps - base).square().flatten(1).mean(1)


def surrogate_latents(
    family: Family,
    prompts: Sequence[str],
    generators: Sequence[Generator],
    on: Grid,
    parts: Sequence[Part],
    resolution: Resolution,
    guidance_scale: float,
    gradient: GuidanceGradient,
    share: float = 0.0,
    distances: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the final latents (B, C, h, w) of a trajectory, bit for bit, with the gradient of the surrogate of these parts, and each
    part's distance from the trajectory, mean |difference| of latents (B,). `distances` are those of `predict`.

    The trajectory runs without gradient; then the active calls are repeated with gradient.
    """
    cond = family.encode(prompts)
    path = roll_out(family, cond, on, generators, resolution, guidance_scale)
    timesteps = upload(on.timesteps, family.device)

    def call(i: int, y: Tensor) -> Tensor:
        x, t = on.scales[i] * y, timesteps[i].expand(len(y))
        prediction = predict(family, x, t, cond, guidance_scale, gradient, distances)
        return direction(prediction, family.prediction_type)

    y, missed = surrogate(parts, path.states, path.directions, call, share)
    misses = [on.scales[part.end] * distance for part, distance in zip(parts, missed, strict=True)]
    return pinned(on.scales[-1] * y, path.latents), misses
