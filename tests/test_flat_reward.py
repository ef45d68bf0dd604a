"""The flattened reward by hand: a linear and a quadratic reward of pixels."""

import pytest
import torch
from torch import Tensor

from preftune.flat_reward import downhill

PIXELS = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]).view(2, 3, 1, 1)


def quadratic(pixels: Tensor) -> Tensor:
    return pixels.square().sum((1, 2, 3)) / 2


def test_a_linear_reward_falls_by_radius_times_slope() -> None:
    """w = (0, 3, 4): the step is -0.5 (0, 0.6, 0.8), the reward falls by 0.5 x 5; its gradient is w still."""
    weights = torch.tensor([0.0, 3.0, 4.0]).view(1, 3, 1, 1)
    pixels = PIXELS.clone().requires_grad_()
    moved = downhill(pixels, lambda x: (weights * x).sum((1, 2, 3)), 0.5)
    assert (moved - pixels).flatten(1).tolist() == [pytest.approx([0, -0.3, -0.4])] * 2
    reward = (weights * moved).sum((1, 2, 3))
    assert reward.tolist() == pytest.approx([12 - 2.5, 8 - 2.5])
    (gradient,) = torch.autograd.grad(reward.sum(), pixels)
    assert gradient.flatten(1).tolist() == [pytest.approx([0, 3, 4])] * 2


def test_each_image_steps_by_its_own_gradient() -> None:
    """|x|^2 / 2 at (3, 4, 0) and (0, 0, 2): steps of length 1 along x; the gradient is that at the new place, (5 - 1) / 5 x."""
    pixels = PIXELS.clone().requires_grad_()
    moved = downhill(pixels, quadratic, 1.0)
    assert moved.flatten(1).tolist() == [pytest.approx([2.4, 3.2, 0]), pytest.approx([0, 0, 1])]
    (gradient,) = torch.autograd.grad(quadratic(moved).sum(), pixels)
    assert gradient.flatten(1).tolist() == [pytest.approx([2.4, 3.2, 0]), pytest.approx([0, 0, 1])]


def test_without_a_gradient_an_image_stays() -> None:
    moved = downhill(torch.zeros(1, 3, 2, 2), quadratic, 1.0)
    assert moved.tolist() == torch.zeros(1, 3, 2, 2).tolist()
    with torch.no_grad():
        assert not downhill(PIXELS, quadratic, 0.1).requires_grad
