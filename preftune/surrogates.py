"""The end of a trajectory as a function of a few network calls, for reward gradients that reach early steps: pure functions.

DRTune (arXiv 2405.00760), LeapAlign (arXiv 2604.15311) and FlowBP (arXiv 2606.11075) share one frame. A trajectory is run without
gradient. Then a few of its calls, the *active* ones, are repeated with gradient at inputs that are detached, or mixed with what an
earlier call gives; the trajectory's end is a weighted sum of directions, whose value is put back to the true end. Without live
inputs the gradient has no products of the network's Jacobians, which explode over many steps.

One step of DDIM without noise, of Euler's method and of a flow model is the same in these coordinates, y' = y + (l' - l) d:

    model   y          level l        direction d
    VP      x / alpha  sigma / alpha  eps            (Karras et al. 2022, arXiv 2206.00364)
    flow    x          sigma          v = eps - x_0

and y - l d is the predicted clean image, the step to level 0. FlowBP is published for flow models; the VP form is ours.

States are y_0 (noise) to y_N; step i leads from y_i to y_(i+1) along direction d_i. B images, latents (C, h, w).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[int, Tensor], Tensor]
"""(step, its input y (B, C, h, w)) -> its direction, with gradient to the weights and, where the input is live, to that."""


def pinned(live: Tensor, value: Tensor) -> Tensor:
    """Return `value`, bit for bit, with the gradient of `live`; both finite and of one shape."""
    return value.detach() + (live - live.detach())


def mixed(live: Tensor, share: float) -> Tensor:
    """Return `live` with that share of its gradient, in [0, 1]: share y + (1 - share) sg(y)."""
    return live.detach() if share == 0 else pinned(share * live, live)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a trajectory: y_end is about y_start + sum_i weights[i] d_i."""

    start: int
    end: int
    weights: Mapping[int, float]
    """Step -> weight of its direction."""
    active: Mapping[int, float]
    """Step that is repeated with gradient -> factor of its gradient."""

    def __post_init__(self) -> None:
        assert self.start < self.end, f"from {self.start} to {self.end}"
        assert self.active.keys() <= self.weights.keys(), (
            f"active {[*self.active]}, but weighed {[*self.weights]}"
        )


def euler_weights(levels: Sequence[float], start: int, end: int) -> dict[int, float]:
    """Return the weights l_(i+1) - l_i of all steps from state `start` to state `end`, which give y_end exactly."""
    return {i: levels[i + 1] - levels[i] for i in range(start, end)}


def gradient_factor(weights: Mapping[int, float], active: Sequence[int], gamma: float) -> float:
    """Return 1 + gamma (sum |w| / sum of the active |w| - 1): the active steps stand in for all others (FlowBP).

    gamma 0 = each for itself alone, 1 = for all.
    """
    total, chosen = (sum(abs(weights[i]) for i in steps) for steps in (weights, active))
    return 1 + gamma * (total / chosen - 1)


def sparse(levels: Sequence[float], active: Sequence[int], gamma: float = 0.0) -> list[Part]:
    """Return FlowBP-Sparse: the exact sum over all steps, of which some are active at detached inputs.

    With gamma 0 it is DRTune's chain: dr/dtheta = sum over the active of (l' - l) dr/dy_N dd_i/dtheta.
    """
    end = len(levels) - 1
    weights = euler_weights(levels, 0, end)
    factor = gradient_factor(weights, active, gamma)
    return [Part(start=0, end=end, weights=weights, active=dict.fromkeys(active, factor))]


def bridge(levels: Sequence[float], anchor: int, active: Sequence[int], gamma: float = 0.0) -> list[Part]:
    """Return FlowBP-Bridge: the exact sums before and after an anchor, at which the input of the second is mixed.

    The anchor must be active, else nothing reads the mixed input.
    """
    assert anchor in active, f"the anchor {anchor} is not among the active {list(active)}"
    end = len(levels) - 1
    factor = gradient_factor(euler_weights(levels, 0, end), active, gamma)
    return [
        Part(
            start=first,
            end=last,
            weights=euler_weights(levels, first, last),
            active={i: factor for i in active if first <= i < last},
        )
        for first, last in ((0, anchor), (anchor, end))
    ]


def leaps(
    levels: Sequence[float], first: int, second: int, order: int = 1, others: float = 0.25
) -> list[Part]:
    """Return two leaps, from state `first` to `second` to the end, each by `order` directions (FlowBP-Lagrange).

    Order 1 is LeapAlign: one direction for the whole leap. Else the first two supports of a leap are active, and the gradient of the
    second is scaled by `others`, as in the released configuration.
    """
    parts = []
    for start, end in ((first, second), (second, len(levels) - 1)):
        steps = supports(start, end, order)
        weights = lagrange_weights([levels[i] for i in steps], levels[start], levels[end])
        active = {i: 1.0 if i == start else others for i in steps[:2]}
        parts.append(
            Part(start=start, end=end, weights=dict(zip(steps, weights, strict=True)), active=active)
        )
    return parts


def supports(start: int, end: int, order: int) -> list[int]:
    """Return up to `order` steps of start..end-1, evenly spread, the first and (of two or more) the last among them."""
    last = end - 1
    if last - start < order:
        return list(range(start, end))
    if order == 1:
        return [start]
    return sorted({start + round(i * (last - start) / (order - 1)) for i in range(order)})


def lagrange_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """Return the weights of a function's values at different points in the integral, from start to end, of the polynomial through them.

    Points 1, .5, 0 from 1 to 0 are Simpson's rule: -1/6, -2/3, -1/6.
    """
    weights = []
    for i, point in enumerate(points):
        basis = [
            1.0
        ]  # coefficients of prod_(j != i) (u - u_j) / (u_i - u_j), u = level - start, the constant first
        for j, other in enumerate(points):
            if j != i:
                root, gap = other - start, point - other
                raised, lowered = [0.0, *basis], [*(root * c for c in basis), 0.0]
                basis = [(a - b) / gap for a, b in zip(raised, lowered, strict=True)]
        width = end - start
        weights.append(sum(c * width ** (power + 1) / (power + 1) for power, c in enumerate(basis)))
    return weights


def surrogate(
    parts: Sequence[Part],
    states: Sequence[Tensor],
    directions: Sequence[Tensor],
    call: Call,
    share: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Return the end of the last part, whose value is its true state, and each part's distance from its true end.

    Args:
        parts: Each starts where the one before ends.
        states: y_0, ..., y_N, each (B, C, h, w), without gradient.
        directions: d_0, ..., d_(N-1), likewise; those of the inactive steps count in the distances alone.
        call: Repeats a step with gradient.
        share: The share of the gradient that the first call of a later part lets through to the parts before it, in [0, 1]; 0 =
            detached, 1 = live. Calls at other steps, and the first part's, have detached inputs.

    Returns:
        y_N, and for each part the mean of |y_end - sum|, (B,).
    """
    y, distances = states[parts[0].start].detach(), []
    for number, part in enumerate(parts):
        total = y
        for i, weight in part.weights.items():
            direction = directions[i].detach()
            if i in part.active:
                inner = mixed(y, share) if number and i == part.start else states[i].detach()
                live = call(i, inner)
                direction = pinned(part.active[i] * live, live)
            total = total + weight * direction
        distances.append((states[part.end] - total).detach().abs().flatten(1).mean(1))
        y = pinned(total, states[part.end])
    return y, distances


def closeness(distances: Sequence[Tensor], tau: float) -> Tensor:
    """Return LeapAlign's weights of images (B,), 1 / sum over the leaps of max(distance, tau), without gradient."""
    return 1 / torch.stack([distance.detach().clamp(min=tau) for distance in distances]).sum(0)
