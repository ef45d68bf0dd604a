"""Surrogates of a trajectory's end: their gradients by hand on one number, their identities, and the random choices of steps.

The toys: one number, r = x_N. Flow: x_0 = 2, v = theta x with theta 0.8, sigma 1, .75, .5, .25, 0, so that x_N = 2 (1 - .2)^4 = .8192.
VP: x_0 = 1, eps = theta x with theta 0.5, lambda = sigma / alpha = 2, 1, .5, 0.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune import active_steps, surrogates
from preftune.surrogates import Part

FLOW = (1.0, 0.75, 0.5, 0.25, 0.0)
VP = (2.0, 1.0, 0.5, 0.0)
ALPHA = [1 / math.sqrt(1 + level**2) for level in VP]


class Toy:
    """A trajectory of one number without gradient, and its calls with one."""

    def __init__(self, levels: Sequence[float], scales: Sequence[float], theta: float, x: float) -> None:
        self.levels, self.scales = levels, scales
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        self.inputs: list[tuple[int, bool]] = []
        self.states, self.directions = (
            [torch.full((1, 1), x / scales[0], dtype=torch.float64)],
            list[Tensor](),
        )
        for i in range(len(levels) - 1):
            self.directions.append(self.call(i, self.states[-1]).detach())
            self.states.append(self.states[-1] + (levels[i + 1] - levels[i]) * self.directions[-1])
        self.inputs.clear()

    def call(self, i: int, y: Tensor) -> Tensor:
        self.inputs.append((i, y.requires_grad))
        return self.theta * self.scales[i] * y

    def slope(self, parts: Sequence[Part], share: float = 0.0) -> float:
        y, _ = surrogates.surrogate(parts, self.states, self.directions, self.call, share)
        assert torch.equal(y, self.states[-1]), "the value is the true end, bit for bit"
        (gradient,) = torch.autograd.grad(self.scales[-1] * y, self.theta)
        return float(gradient)


def flow() -> Toy:
    return Toy(FLOW, [1.0] * 5, 0.8, 2.0)


def vp() -> Toy:
    return Toy(VP, ALPHA, 0.5, 1.0)


def test_the_ends_of_the_toys() -> None:
    assert float(flow().states[-1]) == pytest.approx(0.8192, abs=1e-15)
    assert float(vp().states[-1]) * ALPHA[-1] == pytest.approx(1.1095991287743163, abs=1e-14)


@pytest.mark.parametrize(
    ("toy", "active", "expected"),
    [
        (flow, (0, 1, 2, 3), -1.476),
        (flow, (0, 2), -0.82),
        (vp, (0, 1, 2), -2.252938),
        (vp, (0, 2), -1.639145),
    ],
)
def test_sparse_which_is_drtune(toy: Callable[[], Toy], active: Sequence[int], expected: float) -> None:
    case = toy()
    assert case.slope(surrogates.sparse(case.levels, active)) == pytest.approx(expected, abs=1e-6)
    assert case.inputs == [(i, False) for i in active], "active steps alone are called, at detached inputs"
    by_hand = sum((case.levels[i + 1] - case.levels[i]) * case.scales[i] * case.states[i] for i in active)
    assert expected == pytest.approx(float(by_hand) * case.scales[-1], abs=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, -1.476), (0.5, -1.386), (1.0, -1.296)])
def test_bridge(share: float, expected: float) -> None:
    case = flow()
    parts = surrogates.bridge(FLOW, 2, range(4))
    assert case.slope(parts, share) == pytest.approx(expected, abs=1e-12)
    assert case.inputs == [(0, False), (1, False), (2, share > 0), (3, False)]


@pytest.mark.parametrize(
    ("toy", "share", "expected"),
    [
        (flow, 0.0, -1.64),
        (flow, 0.3, -1.52),
        (flow, 1.0, -1.24),
        (vp, 0.0, -2.139145),
        (vp, 0.3, -2.038522),
        (vp, 1.0, -1.803735),
    ],
)
def test_leapalign(toy: Callable[[], Toy], share: float, expected: float) -> None:
    case = toy()
    assert case.slope(surrogates.leaps(case.levels, 0, 2), share) == pytest.approx(expected, abs=1e-6)


def test_bridge_with_detached_inputs_is_sparse() -> None:
    """On the same active steps, with any gamma."""
    for gamma in (0.0, 0.5, 1.0):
        for active in ((0, 2), (1, 2, 3), (0, 1, 2, 3)):
            case = flow()
            one, other = surrogates.bridge(FLOW, 2, active, gamma), surrogates.sparse(FLOW, active, gamma)
            assert case.slope(one) == pytest.approx(case.slope(other), rel=1e-14)


def test_a_factor_scales_the_gradient_alone() -> None:
    # |Delta| is .25 four times; two of them are half: 1 + .5 (2 - 1)
    assert surrogates.gradient_factor(surrogates.euler_weights(FLOW, 0, 4), (0, 2), 0.5) == pytest.approx(1.5)
    uneven = surrogates.euler_weights(VP, 0, 3)  # -1, -.5, -.5
    assert surrogates.gradient_factor(uneven, (0,), 1.0) == pytest.approx(2)
    assert surrogates.gradient_factor(uneven, (2,), 1.0) == pytest.approx(4)
    case = flow()
    assert case.slope(surrogates.sparse(FLOW, (0, 2), 0.5)) == pytest.approx(-0.82 * 1.5, abs=1e-12)


def test_pinned_has_the_value_bit_for_bit() -> None:
    draws = torch.Generator().manual_seed(0)
    live = (1e3 * torch.randn(1000, generator=draws)).requires_grad_()
    value = torch.randn(1000, generator=draws)
    found = surrogates.pinned(live, value)
    assert torch.equal(found, value)
    assert not torch.equal(live + (value - live).detach(), value), "which the usual way does not give"
    (gradient,) = torch.autograd.grad(found.sum(), live)
    assert gradient.tolist() == [1.0] * 1000


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_has_a_share_of_the_gradient(share: float) -> None:
    live = torch.tensor([0.1, -7.3], requires_grad=True)
    found = surrogates.mixed(live, share)
    assert torch.equal(found, live)
    assert found.requires_grad == (share > 0)
    if share:
        assert torch.autograd.grad(found.sum(), live)[0].tolist() == pytest.approx([share] * 2)


def test_lagrange_weights_by_hand() -> None:
    assert surrogates.lagrange_weights((1, 0.75, 0.5), 1, 0.25) == pytest.approx(
        [-0.1875, 0, -0.5625], abs=1e-14
    )
    assert surrogates.lagrange_weights((1, 0.5, 0), 1, 0) == pytest.approx([-1 / 6, -2 / 3, -1 / 6])
    assert surrogates.lagrange_weights((0.7,), 1, 0.25) == pytest.approx([-0.75]), "Euler's"
    points = (14.6, 9.1, 2.2, 0.4)
    for power in range(4):  # exact for polynomials below the number of points
        weights = surrogates.lagrange_weights(points, 12.0, 0.1)
        exact = (0.1 ** (power + 1) - 12.0 ** (power + 1)) / (power + 1)
        assert sum(w * p**power for w, p in zip(weights, points, strict=True)) == pytest.approx(
            exact, rel=1e-9
        )


def test_supports_are_spread_evenly() -> None:
    assert surrogates.supports(0, 9, 3) == [0, 4, 8]
    assert surrogates.supports(5, 25, 3) == [5, 15, 24]
    assert surrogates.supports(3, 5, 3) == [3, 4]
    assert surrogates.supports(3, 9, 1) == [3]


def test_leaps_of_order_three() -> None:
    """The first two supports are active, the second with a quarter of its gradient; the weights are the integral's."""
    first, second = surrogates.leaps([1 - i / 20 for i in range(21)], 2, 11, order=3)
    assert [*first.weights] == [2, 6, 10]
    assert first.active == {2: 1.0, 6: 0.25}
    assert sum(first.weights.values()) == pytest.approx(-9 / 20)
    assert (second.start, second.end) == (11, 20)
    assert second.active == {11: 1.0, 15: 0.25}


def test_distances_and_closeness() -> None:
    case = flow()
    _, distances = surrogates.surrogate(surrogates.leaps(FLOW, 0, 2), case.states, case.directions, case.call)
    # 2 - .5 * 1.6 = 1.2 for 1.28; 1.28 - .5 * 1.024 = .768 for .8192
    assert [float(distance) for distance in distances] == pytest.approx([0.08, 0.0512])
    assert float(surrogates.closeness(distances, 0.06)) == pytest.approx(1 / 0.14)
    exact = surrogates.surrogate(surrogates.sparse(FLOW, (1,)), case.states, case.directions, case.call)[1]
    assert float(exact[0]) == pytest.approx(0, abs=1e-15)
    higher = surrogates.leaps(FLOW, 0, 2, order=2)
    missed = surrogates.surrogate(higher, case.states, case.directions, case.call)[1]
    assert float(missed[0]) < 0.08, "a higher order misses less"


# Choices


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_truncation() -> None:
    assert active_steps.first_live_step(rng(), 50, "last", 1) == 49
    assert active_steps.first_live_step(rng(), 50, "last", 50) == 0
    draws = rng()
    uniform = Counter(active_steps.first_live_step(draws, 10, "uniform", 1) for _ in range(9000))
    assert sorted(uniform) == [*range(1, 10)]
    assert all(800 < count < 1200 for count in uniform.values())
    gaussian = [active_steps.first_live_step(draws, 50, "gaussian", 1) for _ in range(4000)]
    assert min(gaussian) >= 1
    assert max(gaussian) == 49
    # int(N(42, 5)) below 50: the normal's mean below 50 is 42 - 5 phi(1.6) / Phi(1.6) = 41.4, truncation takes half a step
    assert np.mean(gaussian) == pytest.approx(40.9, abs=0.3)
    assert np.std(gaussian) == pytest.approx(4.4, abs=0.3)
    assert active_steps.first_live_step(draws, 1, "gaussian", 1) == 0


def test_drtune_chooses() -> None:
    draws = rng()
    stops = {active_steps.early_stop(draws, 25, 0.4) for _ in range(1000)}
    assert stops == {*range(15, 25)}
    assert {active_steps.early_stop(draws, 25, 0.0) for _ in range(20)} == {24}
    starts = set()
    for _ in range(500):
        chosen = active_steps.spaced(draws, 16, 3)  # stride 5, start 0..5
        assert [b - a for a, b in itertools.pairwise(chosen)] == [5, 5]
        starts.add(chosen[0])
    assert starts == {*range(6)}
    assert active_steps.spaced(draws, 2, 3) == [0, 1]
    assert active_steps.spaced(draws, 4, 4) == [0, 1, 2, 3]


def test_late_biased() -> None:
    draws = rng()
    first = Counter(active_steps.late_biased(draws, 0, 4, 1, 1.0)[0] for _ in range(10000))
    assert [first[i] / 10000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    chosen = active_steps.late_biased(draws, 5, 25, 4, 4.0)
    assert len(set(chosen)) == 4
    assert chosen == sorted(chosen)
    assert min(chosen) >= 5
    assert max(chosen) < 25
    assert active_steps.late_biased(draws, 2, 4, 9, 1.0) == [2, 3]


def test_around_an_anchor() -> None:
    draws = rng()
    for anchor in range(1, 25):
        chosen = active_steps.around_anchor(draws, 25, anchor, 5, 4.0)
        assert len(set(chosen)) == 5
        assert chosen == sorted(chosen)
        assert anchor in chosen
        before = sum(i < anchor for i in chosen)
        assert before == min(max(round(5 * anchor / 25), 1, 5 - (25 - anchor)), 4)
    assert active_steps.around_anchor(draws, 2, 1, 5, 1.0) == [0, 1]


def test_pairs() -> None:
    draws = rng()
    pairs = Counter(active_steps.pair(draws, 4) for _ in range(6000))
    assert sorted(pairs) == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert all(850 < count < 1150 for count in pairs.values())
    found = [active_steps.dirichlet_pair(draws, 25) for _ in range(3000)]
    assert all(0 <= k < j <= 24 for k, j in found)
    assert min(j for _, j in found) == 15, "at most ten steps from the end"
    gaps = [j - k for k, j in found]
    assert np.mean(gaps) == pytest.approx(25 * 6 / 10.5, abs=0.5)
    for number in (2, 3, 4, 5):
        assert all(
            0 <= k < j < number for k, j in [active_steps.dirichlet_pair(draws, number) for _ in range(50)]
        )
