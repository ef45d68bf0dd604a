"""The reward of generated images in training, scored in copies that are moved at random."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from preftune.augment import shifted
from preftune.flat_reward import downhill
from rewards.mix import Mix, Mixed


class _Views(Protocol):
    @property
    def jitter(self) -> int: ...
    @property
    def jitter_copies(self) -> int: ...
    @property
    def flatness(self) -> float: ...


def mean_reward(
    mix: Mix, pixels: Tensor, prompts: Sequence[str], generators: Sequence[Generator], config: _Views
) -> tuple[Tensor, Mixed]:
    """Return the rewards (B,) of images (B, 3, H, W), each the mean over `jitter_copies` moved by up to `jitter` pixels and then by
    `flatness` against the reward's gradient, and the scores of the copies, which are not checked.
    """
    copies = torch.cat([shifted(pixels, generators, config.jitter) for _ in range(config.jitter_copies)])
    if config.flatness:
        texts = list(prompts) * config.jitter_copies
        copies = downhill(copies, lambda moved: mix.unchecked(moved, texts).rewards, config.flatness)
    mixed = mix.unchecked(copies, list(prompts) * config.jitter_copies)
    return mixed.rewards.view(config.jitter_copies, -1).mean(0), mixed.detach()
