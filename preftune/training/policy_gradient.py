"""The algebra of policy gradients on denoising steps: DDPO (Black et al. 2023, arXiv 2305.13301) and GRPO (DeepSeekMath, arXiv
2402.03300, eq. 3; on diffusion models DanceGRPO, arXiv 2505.07818).

A denoising step is an action: p(x' | x, prompt) is a normal distribution, with its log-probability taken as the MEAN over the elements of
an image. A ratio is therefore one of means, and a clip range of 1e-4 is a figure for one element. B transitions, N images of a rollout, n
scorers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from preftune.training import advantages
from rewards.distinct import distinct

History = Mapping[str, Sequence[float]]
"""Prompt -> its latest rewards, the oldest first."""


class Advantages(NamedTuple):
    """How much better than comparable ones each image is."""

    values: Tensor
    """(N,) float32, about of variance 1."""
    flat: Tensor
    """(N,) bool: the images that it is compared with have one reward all, so that it is 0."""


def ppo_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) and the ratios exp(log p - log p_old), each (B,), of log-probabilities (B,).

    PPO (arXiv 1707.06347), eq. 7, as DDPO, section 4.3. At ratio 1 the gradient is that of REINFORCE, -A grad log p.
    """
    ratios = (log_probs - old_log_probs).exp()
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratios, -advantages * clipped), ratios


def is_clipped(ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return whether the clip removes the gradient, (B,) bool: where a step has already moved as far as it may in its direction."""
    up, down = ratios > 1 + clip_range, ratios < 1 - clip_range
    return (up & (advantages > 0)) | (down & (advantages < 0))


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return 1/2 (log p - log p_old)^2, (B,): an estimate of the KL divergence since the rollout, of means over elements."""
    return (log_probs - old_log_probs).square() / 2


def step_exact_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """Return the KL divergence of two steps of equal std, (B,), in nats per element: mean (mu - mu_ref)^2 / (2 std^2).

    Means (B, C, h, w), std (B, 1, 1, 1), that of the step as it was taken. DPOK (arXiv 2305.16381) has it as its regulariser.
    """
    return ((mean - reference).square() / (2 * std.square())).flatten(1).mean(1)


def prediction_distance(eps: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference of predicted noise (B, C, h, w), (B,): a KL whose weight is the same at all steps."""
    return (eps - reference).square().flatten(1).mean(1)


def group_advantages(rewards: Tensor, groups: Sequence[str]) -> Advantages:
    """Return (r - mean) / (std + 1e-8) of rewards (N,), within each group, with the unbiased standard deviation.

    GRPO's, as DanceGRPO's code for Stable Diffusion has it. A group of one image, or of one reward, has no better image: 0.
    """
    numbers = torch.tensor(distinct(groups)[1])
    values = advantages.group_advantages(rewards, numbers, unbiased=True, epsilon=1e-8)
    return Advantages(values, advantages.statistics(rewards, numbers, unbiased=True).flat)


def prompt_advantages(
    rewards: Tensor, prompts: Sequence[str], history: History, size: int, least: int
) -> tuple[Advantages, dict[str, list[float]]]:
    """Return (r - mean) / (std + 1e-6) of rewards (N,), and the history with them, by statistics of each image's prompt.

    DDPO's per-prompt statistics, as its code has them: the latest `size` rewards of a prompt, these included, with the population's
    standard deviation; a prompt with fewer than `least` of them has those of all images of this rollout. 0 where one reward is all there is.
    """
    after = {prompt: [*values] for prompt, values in history.items()}
    values, flat = torch.zeros(len(rewards), dtype=torch.float64), torch.ones(len(rewards), dtype=torch.bool)
    for prompt, rows in _rows(prompts).items():
        known = [*after.get(prompt, ()), *rewards[rows].tolist()][-size:]
        after[prompt] = known
        others = torch.tensor(known, dtype=torch.float64) if len(known) >= least else rewards.double()
        if others.max() > others.min():
            values[rows] = (rewards[rows].double() - others.mean()) / (others.std(correction=0) + 1e-6)
            flat[rows] = False
    return Advantages(values.float(), flat), after


def combined(columns: Sequence[Advantages], weights: Sequence[float], limit: float) -> Advantages:
    """Return the weighted sum of advantages, each of one scorer, cut to [-limit, limit]; an image is flat where it is so for all.

    Of rewards that were brought to one scale, each by itself, as MixGRPO (arXiv 2507.21802) and GDPO (arXiv 2601.05242); of a single
    column with the weight 1, which is that of the weighted sum of rewards, the scorer of the largest spread decides.
    """
    pairs = zip(columns, weights, strict=True)
    total = torch.stack([weight * column.values for column, weight in pairs]).sum(0)
    flat = torch.stack([column.flat for column in columns]).all(0)
    return Advantages(total.clamp(-limit, limit), flat)


def _rows(keys: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each key."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return found
