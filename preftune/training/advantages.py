"""Rewards of several images a prompt as advantages: by how many standard deviations each is better than its prompt's mean.

N images in groups, one for each prompt. A group whose rewards are all equal says nothing: its advantages are 0, exactly.
Statistics are in float64, where the mean of equal float32 rewards is that reward.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Statistics of groups, one value for each image, (N,) float64."""

    mean: Tensor
    """Of the image's group."""
    std: Tensor
    """Of the image's group."""
    flat: Tensor
    """Whether all rewards of the group are equal, bool."""


def statistics(rewards: Tensor, groups: Tensor, *, unbiased: bool = False) -> Groups:
    """Return the statistics of rewards (N,) in groups with numbers (N,) int64; unbiased divides squares by n - 1 instead of n."""
    values = rewards.double()
    number = int(groups.max()) + 1
    count = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, torch.ones_like(values))
    mean = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, values) / count
    squares = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, (values - mean[groups]).square())
    std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    low = torch.full((number,), torch.inf, dtype=torch.float64).scatter_reduce_(0, groups, values, "amin")
    high = torch.full((number,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, groups, values, "amax")
    return Groups(mean[groups], std[groups], (low == high)[groups])


def group_advantages(
    rewards: Tensor, groups: Tensor, *, unbiased: bool = False, epsilon: float = 1e-4
) -> Tensor:
    """Return (r - mean of the group) / (std of the group + epsilon), (N,) float32: GRPO (Shao et al. 2024, arXiv 2402.03300, 4.1.2).

    For rewards 1, 2, 3, 4 of one group: -1.3415, -0.4472, 0.4472, 1.3415; unbiased -1.1618, -0.3873, ...
    """
    found = statistics(rewards, groups, unbiased=unbiased)
    return ((rewards.double() - found.mean) / (found.std + epsilon)).float()


def batch_advantages(rewards: Tensor, groups: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Return (r - mean of the group) / (population std of all rewards + epsilon), (N,) float32: the released Flow-GRPO, AWM, DiffusionNFT.

    Groups whose rewards differ little get small advantages, which their own std would blow up.
    """
    found = statistics(rewards, groups)
    std = rewards.double().std(correction=0)
    return ((rewards.double() - found.mean) / (std + epsilon)).float()


def scaled(advantages: Tensor, clip: float) -> Tensor:
    """Return advantages (N,) cut to [-clip, clip] and divided by clip: in [-1, 1]."""
    return advantages.clamp(-clip, clip) / clip
