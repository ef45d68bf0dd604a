"""The algebra of policy gradients: losses, advantages and divergences against numbers worked out by hand and loops of their own."""

import math
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from preftune.noise import Prediction
from preftune.solvers import ddim
from preftune.training.policy_gradient import (
    Advantages,
    approximate_kl,
    combined,
    group_advantages,
    is_clipped,
    ppo_losses,
    prediction_distance,
    prompt_advantages,
    step_exact_kl,
)

# ---------------------------------------------------------------- the loss


def test_the_loss_by_hand() -> None:
    """Ratios 1.25, 0.8 and 1 with a clip of 0.1, for either sign of the advantage."""
    old = torch.tensor([-1.0, -2.0, -3.0])
    now = old + torch.tensor([1.25, 0.8, 1.0]).log()
    for sign, expected in ((2.0, [-2 * 1.1, -2 * 0.8, -2.0]), (-2.0, [2 * 1.25, 2 * 0.9, 2.0])):
        losses, ratios = ppo_losses(now, old, torch.full((3,), sign), 0.1)
        torch.testing.assert_close(ratios, torch.tensor([1.25, 0.8, 1.0]))
        torch.testing.assert_close(losses, torch.tensor(expected))


def test_at_ratio_1_the_gradient_is_that_of_reinforce() -> None:
    """-A grad log p, not a half of it where both terms of the maximum are equal; none where A is 0."""
    log_probs = torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.5, -2.0, 0.0, 5.0])
    losses, ratios = ppo_losses(log_probs, log_probs.detach(), advantages, 1e-4)
    assert torch.equal(ratios, torch.ones(4))
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    assert torch.equal(gradient, -advantages)
    other, _ = ppo_losses(log_probs, log_probs.detach(), advantages[[1, 0, 2, 3]], 1e-4)
    (swapped,) = torch.autograd.grad(other.sum(), log_probs)
    assert torch.equal(swapped, -advantages[[1, 0, 2, 3]]), "rewards of two images that change places"


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("change", [-3e-4, -0.9e-4, 0.0, 0.9e-4, 3e-4])
def test_the_clip_is_active_where_a_step_has_gone_far_enough(change: float, advantage: float) -> None:
    """Beyond the range and in the direction of the advantage: exactly there the gradient is 0."""
    log_probs = torch.tensor([math.log1p(change)], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([advantage], dtype=torch.float64)
    losses, ratios = ppo_losses(log_probs, torch.zeros(1, dtype=torch.float64), weight, 1e-4)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    expected = abs(change) > 1e-4 and change * advantage > 0
    assert is_clipped(ratios, weight, 1e-4).item() == expected
    assert gradient.item() == pytest.approx(0.0 if expected else -advantage * (1 + change), abs=1e-12)


def test_approximate_kl() -> None:
    found = approximate_kl(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -2.0]))
    assert found.tolist() == [0.125, 0.0]


# ---------------------------------------------------------------- divergences


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_exact_divergence_is_that_of_normal_distributions() -> None:
    mean, reference = normal(0, 2, 4, 3, 3), normal(1, 2, 4, 3, 3)
    std = torch.tensor([0.02, 0.7], dtype=torch.float64).view(2, 1, 1, 1)
    exact = kl_divergence(Normal(mean, std), Normal(reference, std)).flatten(1).mean(1)
    torch.testing.assert_close(step_exact_kl(mean, reference, std), exact)
    assert torch.equal(step_exact_kl(mean, mean, std), torch.zeros(2, dtype=torch.float64))


def test_the_two_divergences_differ_by_the_slope_of_the_step() -> None:
    """(dmu / deps)^2 (eps - eps_ref)^2 / (2 std^2) at t 501 -> 481 of Stable Diffusion: slope -0.11119, std 0.294785."""
    x, eps, other = normal(0, 1, 4, 2, 2), normal(1, 1, 4, 2, 2), normal(2, 1, 4, 2, 2)
    level, after = ((torch.tensor(a**0.5), torch.tensor((1 - a) ** 0.5)) for a in (0.274999, 0.302295))
    steps = [
        ddim(Prediction((x - level[1] * e) / level[0], e, e), level, after, eta=1.0) for e in (eps, other)
    ]
    distance = prediction_distance(eps, other)
    exact = step_exact_kl(steps[0].mean, steps[1].mean, steps[0].std)
    assert exact.item() == pytest.approx(0.11119**2 / (2 * 0.294785**2) * distance.item(), rel=2e-4)
    assert distance.item() == pytest.approx(float(((eps - other) ** 2).mean()))
    assert prediction_distance(eps, eps).item() == 0


# ---------------------------------------------------------------- advantages


def test_advantages_of_groups_by_hand() -> None:
    """1, 2, 3, 4 with the unbiased deviation; a group's place does not matter; one reward, or one image, has no better one."""
    rewards = torch.tensor([1.0, 7.0, 2.0, 3.0, 7.0, 4.0, 0.1, 0.1, 0.1, 5.0])
    groups = ["a", "b", "a", "a", "b", "a", "c", "c", "c", "d"]
    found = group_advantages(rewards, groups)
    expected = [-1.161895, 0, -0.387298, 0.387298, 0, 1.161895, 0, 0, 0, 0]
    torch.testing.assert_close(found.values, torch.tensor(expected))
    assert found.flat.tolist() == [group != "a" for group in groups]
    assert found.values.dtype == torch.float32


def test_the_least_spread_counts() -> None:
    """Rewards of HPS differ in the third digit: they are not taken for equal ones."""
    found = group_advantages(torch.tensor([0.2701, 0.2703]), ["a", "a"])
    torch.testing.assert_close(found.values, torch.tensor([-(0.5**0.5), 0.5**0.5]), rtol=1e-3, atol=0)
    assert not found.flat.any()


def test_advantages_of_prompts_by_hand() -> None:
    """The population's deviation: 1, 2, 3, 4 give -1.3416 and so on."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found, after = prompt_advantages(rewards, ["a"] * 4, {}, 16, 4)
    torch.testing.assert_close(found.values, torch.tensor([-1.341640, -0.447213, 0.447213, 1.341640]))
    assert after == {"a": [1.0, 2.0, 3.0, 4.0]}
    found, _ = prompt_advantages(torch.full((3,), 0.1), ["a"] * 3, {}, 16, 2)
    assert found.values.tolist() == [0, 0, 0]
    assert found.flat.all()


def test_statistics_of_prompts_are_those_of_ddpo() -> None:
    """Its tracker, written out: deques that are extended first; too few rewards of a prompt take the batch's. Six rollouts."""
    rng, size, least = np.random.default_rng(0), 5, 3
    deques: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=size))
    history: dict[str, list[float]] = {}
    used = set()
    for _ in range(6):
        prompts = [str(word) for word in rng.choice(list("abcdefg"), 8)]
        rewards = rng.normal(size=8).astype(np.float32)
        expected = np.empty(8)
        for prompt in set(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            deques[prompt].extend(rewards[rows].tolist())
            enough = len(deques[prompt]) >= least
            used.add(enough)
            others = np.array(deques[prompt]) if enough else rewards.astype(np.float64)
            expected[rows] = (rewards[rows] - others.mean()) / (others.std() + 1e-6)
        before = {prompt: [*values] for prompt, values in history.items()}
        found, after = prompt_advantages(torch.from_numpy(rewards), prompts, history, size, least)
        np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert history == before, "what a checkpoint holds is not changed"
        history = after
    assert used == {True, False}
    assert history == {prompt: [*values] for prompt, values in deques.items()}


def test_two_scorers_of_scale_1_and_1000() -> None:
    """Each brought to one scale has its say; in the weighted sum of rewards the large one alone decides."""
    small, large = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([3000.0, 1000.0, 2000.0, 0.0])
    groups = ["a"] * 4
    each = combined([group_advantages(column, groups) for column in (small, large)], (3.0, 1.0), 9.0)
    unit = torch.tensor([-1.161895, -0.387298, 0.387298, 1.161895])
    torch.testing.assert_close(each.values, 3 * unit + unit[[3, 1, 2, 0]], rtol=1e-5, atol=1e-5)
    total = combined([group_advantages(3 * small + large, groups)], (1.0,), 5.0)
    torch.testing.assert_close(total.values, unit[[3, 1, 2, 0]], rtol=0, atol=5e-3)
    assert each.values.argmax() == 3
    assert total.values.argmax() == 0


def test_combined_advantages_are_cut_and_flat_where_all_are() -> None:
    one = Advantages(torch.tensor([4.0, -4.0, 0.0, 0.0]), torch.tensor([False, False, True, True]))
    other = Advantages(torch.tensor([2.0, -2.0, 0.5, 0.0]), torch.tensor([False, False, False, True]))
    found = combined([one, other], (1.0, 1.0), 5.0)
    assert found.values.tolist() == [5.0, -5.0, 0.5, 0.0]
    assert found.flat.tolist() == [False, False, False, True]
