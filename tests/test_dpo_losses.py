"""The losses of preference pairs against manual calculations and identities."""

import math

import pytest
import torch
from torch import Tensor

from preftune.training.dpo_losses import (
    agreement,
    dpo_losses,
    implicit_margins,
    ipo_losses,
    labelled,
    mapo_losses,
)


def slope(loss: Tensor, at: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.sum(), at)
    return found.tolist()


def test_diffusion_dpo_by_hand() -> None:
    """Errors .099 and .111, of the reference .10 and .11: 2500 (.012 - .010) = 5; at the reference log 2."""
    errors, reference = torch.tensor([[0.099, 0.1], [0.111, 0.11]]), torch.tensor([[0.10, 0.1], [0.11, 0.11]])
    margins = implicit_margins(errors, reference, 5000)
    torch.testing.assert_close(margins, torch.tensor([5.0, 0.0]), atol=2e-4, rtol=0)
    assert margins[1] == 0
    torch.testing.assert_close(dpo_losses(margins), torch.tensor([0.006715, 0.693147]), atol=2e-6, rtol=0)
    turned = implicit_margins(errors.flip(0), reference.flip(0), 5000)
    torch.testing.assert_close(turned, -margins)


def test_beta_of_a_sum_over_elements() -> None:
    """With sums over the 16,384 elements of a latent at 512 px 5000 is .305."""
    errors, reference = torch.tensor([[0.2], [0.3]]), torch.tensor([[0.21], [0.29]])
    elements = 4 * 64 * 64
    assert 5000 / elements == pytest.approx(0.305, abs=2e-4)
    torch.testing.assert_close(
        implicit_margins(elements * errors, elements * reference, 5000 / elements),
        implicit_margins(errors, reference, 5000),
    )


def test_poly_dpo_by_hand() -> None:
    margins = torch.tensor([0.0, 0.0, 1.5, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert dpo_losses(margins, 8.0)[0].item() == pytest.approx(4.693147, abs=5e-7)
    assert slope(dpo_losses(margins, 8.0), margins)[0] == pytest.approx(-2.5)
    assert slope(dpo_losses(margins), margins)[0] == pytest.approx(-0.5)
    p = torch.sigmoid(margins.detach())
    for alpha in (8.0, -0.5, 0.0):
        found = slope(dpo_losses(margins, alpha), margins)
        assert found == pytest.approx((-(1 - p) * (1 + alpha * p)).tolist()), "DPO's times (1 + alpha p)"
    assert torch.equal(dpo_losses(margins, 0.0), dpo_losses(margins))


def test_a_large_margin_is_no_infinity() -> None:
    margins = torch.tensor([-1e5, 1e5], requires_grad=True)
    assert dpo_losses(margins, 8.0).tolist() == [1e5 + 8, 0]
    assert slope(dpo_losses(margins, 8.0), margins) == [-1, 0]


def test_ipo_by_hand() -> None:
    """It is beta^2 times (h - 1 / (2 beta))^2 of the paper, h = margin / beta."""
    margins = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert ipo_losses(margins).tolist() == [0.25, 0, 2.25]
    assert slope(ipo_losses(margins), margins) == [-1, 0, 3]
    beta = 5000.0
    torch.testing.assert_close(
        ipo_losses(margins), beta**2 * (margins / beta - 1 / (2 * beta)) ** 2, atol=1e-12, rtol=1e-9
    )


def test_mapo_by_hand() -> None:
    """Errors .2 and .3: odds .1 / (e^.1 - 1) = .950833 and .15 / (e^.15 - 1) = .926874, 1000 times the difference is 23.959."""
    first, second = torch.tensor([0.2, 0.3, 0.2]), torch.tensor([0.3, 0.2, 0.2])
    odds = [0.5 * m / (math.exp(0.5 * m) - 1) for m in (0.2, 0.3)]
    assert odds == pytest.approx([0.950833, 0.926874], abs=1e-6)
    apart = 1000 * (odds[0] - odds[1])
    assert apart == pytest.approx(23.959, abs=1e-3)
    expected = [0.2 + 0.1 * math.exp(-apart), 0.3 + 0.1 * apart, 0.2 + 0.1 * math.log(2)]
    found = mapo_losses(first, second, 0.1, 1000)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert mapo_losses(torch.zeros(1), torch.zeros(1), 0.1, 1000).item() == pytest.approx(0.0693147, abs=1e-6)


def test_mapo_pulls_to_the_preferred_image_and_from_the_other() -> None:
    first, second = (torch.tensor([0.2], requires_grad=True) for _ in range(2))
    loss = mapo_losses(first, second, 0.1, 1000)
    # d odds / dm = -1/4 + m/24 at small m: 1 + .1 / 2 * 1000 * .241674, and the latter with the other sign
    assert slope(loss, first) == pytest.approx([1 + 50 * 0.241674], rel=1e-4)
    assert slope(mapo_losses(first, second, 0.1, 1000), second) == pytest.approx([-50 * 0.241674], rel=1e-4)


def test_a_pair_of_dgpo_has_the_gradient_of_dpo() -> None:
    """A group of two with advantages 1 and -1 (DGPO): sigmoid(s) A d, s = beta / 2 sum A (d - d_ref), the sigmoid without gradient."""
    generator = torch.Generator().manual_seed(0)
    errors, reference = torch.rand(2, 2, 5, generator=generator, dtype=torch.float64)
    errors.requires_grad_(True)
    beta, signs = 7.0, torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    group = beta / 2 * (signs * (errors - reference)).sum(0)
    dgpo = (torch.sigmoid(group).detach() * signs * errors).sum()
    (expected,) = torch.autograd.grad(0.5 * beta * dgpo, errors)
    (found,) = torch.autograd.grad(dpo_losses(implicit_margins(errors, reference, beta)).sum(), errors)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_soft_label_has_its_minimum_at_its_log_odds(share: float) -> None:
    margins = torch.tensor([math.log(share / (1 - share))], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([share], dtype=torch.float64)
    assert slope(labelled(dpo_losses(margins), dpo_losses(-margins), labels), margins) == pytest.approx(
        [0], abs=1e-12
    )
    middle = torch.tensor([share - 0.5], dtype=torch.float64, requires_grad=True)
    assert slope(labelled(ipo_losses(middle), ipo_losses(-middle), labels), middle) == pytest.approx(
        [0], abs=1e-12
    )


def test_a_label_of_one_is_the_loss_itself() -> None:
    ours, other = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    assert labelled(ours, other, torch.tensor([1.0, 0.25])).tolist() == [1, 0.25 * 2 + 0.75 * 7]


def test_agreement_counts_raters_and_half_of_those_it_cannot_tell() -> None:
    margins, labels = torch.tensor([2.0, -2.0, 0.0, 1e-9]), torch.tensor([0.8, 0.8, 0.8, 1.0])
    torch.testing.assert_close(agreement(margins, labels), torch.tensor([0.8, 0.2, 0.5, 1.0]))
