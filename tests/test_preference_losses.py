"""The published losses of preferences against hand arithmetic on three examples, and their identities."""

import math

import pytest
import torch

from preftune.training.preference_losses import (
    anti_interference_losses,
    choice_losses,
    clamp_scale,
    first_stage_weights,
    pair_losses,
    second_stage_logits,
    soft_losses,
    weighted_mean,
)

BETTER, WORSE = torch.tensor([3.0, -1.0, 5.0]), torch.tensor([1.0, 0.0, 5.0])


def close(found: torch.Tensor, expected: list[float], abs_tolerance: float = 1e-6) -> bool:
    return found.tolist() == pytest.approx(expected, abs=abs_tolerance)


def test_pair_losses_by_hand() -> None:
    """-log sigmoid(d) of d = 2, -1, 0."""
    assert close(pair_losses(BETTER, WORSE), [0.126928, 1.313262, 0.693147])
    assert close(pair_losses(torch.tensor([100.0, -100.0]), torch.tensor([-100.0, 100.0])), [0.0, 200.0])
    as_choice = choice_losses(torch.stack([BETTER, WORSE], 1), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(as_choice, pair_losses(BETTER, WORSE))


def test_choice_losses_by_hand() -> None:
    """Softmaxes of (1, 0, 0), (0, 2, -1) and (0, 0, none); chosen 0, 2, 1."""
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, -torch.inf]])
    e = math.e
    expected = [math.log((e + 2) / e), math.log((1 + e**2 + 1 / e) * e), math.log(2)]
    assert close(choice_losses(scores, torch.tensor([0, 2, 1])), expected)


def test_soft_losses_by_hand() -> None:
    """Labels 1, 0.5, 0.75 with differences 1, 0, -1."""
    first, second = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 1.0])
    log_p = math.log(1 / (1 + math.e))  # of the lower one
    log_q = math.log(math.e / (1 + math.e))
    kl = 0.75 * (math.log(0.75) - log_p) + 0.25 * (math.log(0.25) - log_q)
    assert close(soft_losses(first, second, torch.tensor([1.0, 0.5, 0.75])), [-log_q, 0.0, kl])
    torch.testing.assert_close(soft_losses(BETTER, WORSE, torch.ones(3)), pair_losses(BETTER, WORSE))
    torch.testing.assert_close(soft_losses(BETTER, WORSE, torch.zeros(3)), pair_losses(WORSE, BETTER))
    difference = torch.tensor([0.3], requires_grad=True)
    label = torch.tensor([0.8])
    (gradient,) = torch.autograd.grad(soft_losses(difference, torch.zeros(1), label).sum(), difference)
    assert gradient.item() == pytest.approx(torch.sigmoid(torch.tensor(0.3)).item() - 0.8, abs=1e-6)


def test_anti_interference_by_hand() -> None:
    """Two views each; the extreme is now a view, now the image itself."""
    better = torch.tensor([[2.0, 1.5, 2.5], [0.0, 0.2, 0.1], [1.0, 1.0, 1.0]])
    worse = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.1, 0.3], [0.0, 0.0, 0.0]])
    inter = [1.5 - 1.0, 0.0 - 0.5, 1.0]
    intra = [(1.0 + 1.0) / 2, (0.2 + 0.4) / 2, 0.0]
    expected = [math.log(1 + math.exp(b - a)) for a, b in zip(inter, intra, strict=True)]
    assert close(anti_interference_losses(better, worse), expected)
    own = anti_interference_losses(BETTER[:, None], WORSE[:, None])
    torch.testing.assert_close(own, pair_losses(BETTER, WORSE))  # without views it is the pair loss
    equal = torch.full((1, 4), 0.7)
    assert anti_interference_losses(equal, equal).item() == pytest.approx(math.log(2))


def test_anti_interference_falls_when_views_agree_and_margins_grow() -> None:
    better, worse = torch.tensor([[1.0, 1.4, 0.6]]), torch.tensor([[0.0, 0.3, -0.3]])
    loss = anti_interference_losses(better, worse)
    calm = anti_interference_losses(1 + (better - 1) / 2, worse / 2)
    apart = anti_interference_losses(better + 0.5, worse)
    assert calm < loss
    assert apart < loss


def test_first_stage_by_hand() -> None:
    """1 / (1 + e^((d - 0.3) / 0.2)) of d = 0.3, 0.7, -0.1."""
    weights = first_stage_weights(torch.tensor([0.3, 0.7, -0.1]), b=0.3, tau=0.2)
    assert close(weights, [0.5, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])


def test_second_stage_by_hand() -> None:
    margins = torch.tensor([0.0, math.log(2), math.log(5)])
    for favour, expected in (
        ("larger", [1 / 8, 2 / 8, 5 / 8]),
        ("equal", [1 / 3] * 3),
        ("smaller", [10 / 17, 5 / 17, 2 / 17]),
    ):
        assert close(second_stage_logits(margins, favour).softmax(0), expected)


def test_weighted_mean_and_scale() -> None:
    losses, logits = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.25]).log()
    assert weighted_mean(losses, logits, logits.logsumexp(0)).item() == pytest.approx(2.0)
    halves = [weighted_mean(losses[i : i + 1], logits[i : i + 1], logits.logsumexp(0)) for i in range(2)]
    assert sum(halves).item() == pytest.approx(2.0), "parts of an update sum to its mean"
    large = torch.tensor([300.0, 300.0])
    assert weighted_mean(losses, large, large.logsumexp(0)).item() == pytest.approx(2.5, rel=1e-5), (
        "e^300 is not written"
    )
    none = torch.empty(0)
    assert weighted_mean(none, none, none.logsumexp(0)).item() == 0
    scale = torch.nn.Parameter(torch.tensor(7.0))
    clamp_scale(scale)
    assert scale.item() == pytest.approx(math.log(100))
    torch.nn.init.constant_(scale, -1.0)
    clamp_scale(scale)
    assert scale.item() == 0
