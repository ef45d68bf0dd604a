"""Flags that the methods share which generate images, score them, and train on them with new noise: AWM, DiffusionNFT."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune.training.config import RewardConfig
from preftune.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ScoredConfig:
    """The images of an epoch, and how their rewards become advantages."""

    prompts_per_epoch: int = 16
    """Prompts to generate images for in each epoch."""
    images_per_prompt: int = 12
    """Images generated for each prompt, which are compared with each other; 2 or more."""
    updates_per_epoch: int | None = None
    """Updates before images are generated anew. None = as many as see each image once."""
    timesteps_per_image: int = 6
    """Noise levels at which an update trains on an image, each with a noise of its own: as many backward passes."""
    timesteps: Literal["random", "sampling"] = "random"
    """Noise levels to train at. random: those of the family's pre-training. sampling: those at which the images
    of the epoch were denoised but the last, in random order. Released: all 10 (DiffusionNFT), the middle 12 of 14 (AWM).
    """
    advantage_std: Literal["all", "prompt"] = "all"
    """Divide (reward - mean of the prompt's images) by the standard deviation of all images of the epoch, as published, or of the prompt's."""
    advantage_clip: float = 5.0
    """Advantages are cut to this on both sides and divided by it, so that they lie in [-1, 1]."""

    def __post_init__(self) -> None:
        least = {
            "prompts_per_epoch": 1, "images_per_prompt": 2, "updates_per_epoch": 1, "timesteps_per_image": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
        if not 0 < self.advantage_clip < math.inf:
            raise ValueError(f"--advantage-clip must be above 0 and finite, got {self.advantage_clip:g}")


def run(method: str) -> RunConfig:
    """Return the training's flags: 200 updates of 96 images, four at once."""
    return RunConfig(
        output_dir=Path("runs") / method,
        max_train_steps=200,
        train_batch_size=4,
        gradient_accumulation_steps=24,
        validation_steps=50,
        checkpointing_steps=50,
    )


def check_rewards(reward: RewardConfig) -> None:
    """Raise ValueError without a scorer."""
    if not reward.rewards:
        raise ValueError("--rewards is empty; name a scorer to compare images by, as imagereward=1.0")


def check_weight(flag: str, weight: float) -> None:
    """Raise ValueError for a weight below 0 or that is not finite."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"--{flag} must be 0 or more and finite, got {weight:g}")
