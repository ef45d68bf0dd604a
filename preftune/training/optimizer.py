"""AdamW, the learning-rate schedule, and the exponential moving average (EMA) of the trained weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from preftune.training.run_config import RunConfig
from preftune.training.weight_copy import WeightCopy


def adamw(config: RunConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2) as configured, in full precision, fused where `is_fused`, or in 8 bits."""
    kind: Any = torch.optim.AdamW
    more = {"fused": True} if is_fused(config, parameters) else {}
    if config.use_8bit_adam:
        import bitsandbytes  # optional: `check` has seen that it is there

        kind = bitsandbytes.optim.AdamW8bit
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_vectors:
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        others = {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": 0.0,
        }
        groups = [{"params": matrices}, others]
    optimizer: torch.optim.Optimizer = kind(
        groups,
        lr=lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        **more,
    )
    return optimizer


def is_fused(config: RunConfig, parameters: list[nn.Parameter]) -> bool:
    """Return whether AdamW is one kernel for all weights: as --fused-adam says, else on CUDA.

    Not in fp16: accelerate does not see that a fused step was skipped, which it must for the average of the weights.
    """
    if config.fused_adam is not None:
        return config.fused_adam
    on_cuda = all(parameter.device.type == "cuda" for parameter in parameters)
    return on_cuda and not config.use_8bit_adam and config.mixed_precision != "fp16"


def lr_factor(config: RunConfig, step: int) -> float:
    """Share of the peak learning rate at update `step` (from 0): (step + 1) / lr_warmup_steps, then 1, a line or a half cosine."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - config.lr_warmup_steps) / (config.max_train_steps - config.lr_warmup_steps)
    return 1 - progress if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


MAX_SKIPPED = 50  # fp16 updates skipped in a row: a loss scale that has halved so often will not recover


class SkippedUpdates:
    """How many updates the loss scaler of fp16 has skipped: all in all, and in a row until now."""

    total = in_a_row = 0

    def note(self, skipped: bool, where: str) -> None:
        """Count an update. Raises FloatingPointError after 50 in a row."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(f"{MAX_SKIPPED} gradients overflowed fp16, up to {where}: use bf16")


class EMA(WeightCopy):
    """Exponential moving average of trained parameters; with ema_decay 0 it holds none and does nothing.

    The n-th update (from 1) decays by min(ema_decay, (1 + n) / (10 + n)), so that short runs are not
    dominated by the initial weights.
    """

    def __init__(self, config: RunConfig, parameters: Iterable[nn.Parameter]) -> None:
        self._decay = config.ema_decay
        super().__init__(parameters if self._decay else ())
        self.count = 0

    def update(self) -> None:
        """Move towards the present parameters."""
        self.count += 1
        self.follow(min(self._decay, (1 + self.count) / (10 + self.count)))

    def go_on(self, weights: list[Tensor], count: int) -> None:
        """Go on with a saved average of so many updates."""
        self.load(weights)
        self.count = count
