"""Flags that the methods share whose gradient of a reward reaches more than one denoising step: DRaFT, DRTune, FlowBP."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from preftune.families import Pretrained
from preftune.training.config import ModelConfig, RewardConfig, check_base_distance, check_guidance
from preftune.training.run_config import RunConfig

Truncation = Literal["last", "uniform", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class DirectConfig:
    """The trajectory, how images become a loss, and what is kept for the backward pass."""

    num_inference_steps: int | None = None
    """N, denoising steps of a trajectory. None = as published for the method; for a distilled model its own few."""
    solver: Literal["ddim", "euler"] | None = None
    """Timesteps of the trajectory: both step alike, euler ends without noise. None = ddim, for a distilled model euler."""
    guidance_scale: float | None = None
    """Guidance scale in training; 1 = no guidance. None = as published for the method, for a distilled model 1."""
    guidance_gradient: Literal["both", "positive"] | None = None
    """Gradient of both predictions of guidance, or of the prompt's alone, by calls of half the batch: the negative prompt's is a constant.
    None = as published for the method.
    """
    margin: float | None = None
    """Loss relu(margin - reward) as in FlowBP, without gradient above the margin; None = -reward."""
    pixel_clamp: Literal["none", "straight-through", "clamp"] = "none"
    """Of decoded pixels to [0, 1] before they are scored. straight-through: clamped values, the gradient as without; clamp: no gradient
    outside [0, 1], as in the released code of AlignProp and FlowBP.
    """
    jitter: int = 0
    """Shift each image at random by up to this many pixels along each axis before it is scored; 0 = published."""
    jitter_copies: int = 1
    """Number of shifted copies of each image; the reward is their mean."""
    flatness: float = 0.0
    """Score each image a step of this length against the gradient of its reward: only what is high all around counts (RSA-FT, which has
    0.01, in image space); 0 = off, as published. Two more passes of the scorers.
    """
    base_distance: float = 0.0
    """Weight of the mean squared difference between the noise that the tuned model and the base (its LoRA off) predict at the steps with
    gradient, as in DRaFT+, which has 0.2 to 1; 0 = off. One more call of the denoiser without gradient for each such step, and
    where its input is live one with.
    """
    call_checkpointing: bool = True
    """Keep only the latents of each call of the denoiser, and compute it again in the backward pass: the memory of one call, whatever
    the number of steps with gradient. Beside it, --gradient-checkpointing does the same for each block inside that call.
    """
    grad_norm_limit: float = 1e4
    """Stop the run, its last checkpoint untouched, when the norm of a gradient before it is clipped is above this; inf never stops.
    Norms that rise for good mean that the product of Jacobians of live steps explodes.
    """

    def __post_init__(self) -> None:
        demands = {
            f"--num-inference-steps must be at least 1, got {self.num_inference_steps}": (
                self.num_inference_steps is None or self.num_inference_steps >= 1
            ),
            f"--margin must be finite, got {self.margin}": self.margin is None or math.isfinite(self.margin),
            f"--jitter must be 0 or more, got {self.jitter}": self.jitter >= 0,
            f"--jitter-copies must be 1, or more with a --jitter, got {self.jitter_copies}": (
                self.jitter_copies == 1 or (self.jitter_copies > 1 and self.jitter > 0)
            ),
            f"--flatness must be 0 or more and finite, got {self.flatness}": 0 <= self.flatness < math.inf,
            f"--grad-norm-limit must be above 0, got {self.grad_norm_limit}": self.grad_norm_limit > 0,
        }
        for message, holds in demands.items():
            if not holds:
                raise ValueError(message)
        if self.guidance_scale is not None:
            check_guidance(self.guidance_scale)


def model() -> ModelConfig:
    """Return the model's flags where denoiser and decoder compute again in the backward pass."""
    return ModelConfig(
        pretrained=Pretrained(model=tyro.MISSING), gradient_checkpointing=True, vae_checkpointing=True
    )


def reward() -> RewardConfig:
    """Return the rewards' flags with ImageReward."""
    return RewardConfig(rewards=("imagereward=1.0",))


def run(method: str, *, max_grad_norm: float = 1.0) -> RunConfig:
    """Return the training's flags: 400 updates, as ReFL's."""
    return RunConfig(
        output_dir=Path("runs") / method,
        max_train_steps=400,
        validation_steps=100,
        max_grad_norm=max_grad_norm,
    )


def check_groups(direct: DirectConfig, model: ModelConfig, reward: RewardConfig) -> None:
    """Raise ValueError without a scorer, and for a distance to a base model that is not there."""
    if not reward.rewards:
        raise ValueError("--rewards is empty; name a scorer whose gradient is followed, as imagereward=1.0")
    check_base_distance(direct.base_distance, model.train)
