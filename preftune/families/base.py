"""What a driver may ask of a model family. Drivers never mention UNet, SDXL or FLUX.

B batch, C h w latents, H W pixels, L tokens, D width of the text states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from preftune.lora import LoRA
from preftune.noise import Prediction


@dataclass(frozen=True, kw_only=True)
class Cond:
    """Encoded prompts: states (B, L, D), and those of the negative prompt, (1, L, D), that guidance points away from."""

    states: Tensor
    negative: Tensor


class Family(Protocol):
    """A text-to-image model as the drivers see it."""

    denoiser: nn.Module
    """The module whose weights are tuned; a driver puts the prepared one here, so that processes share gradients."""
    device: torch.device
    scheduler_config: Mapping[str, object]
    prediction: Prediction

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) for pixels of this size."""
        ...

    def encode(self, prompts: Sequence[str], negative: str = "") -> Cond:
        """Return the encoded prompts; differentiable in the text encoder's weights where they require it."""
        ...

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Return the network's output (B, C, h, w) at latents x and timesteps t (B,); guidance 1 = one pass."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), in [0, 1] up to overshoot: not clamped, since a clamp kills a reward's gradient."""
        ...

    def encode_pixels(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Return latents (B, C, h, w) of pixels in [0, 1]: a draw of the posterior by each generator, or its mean."""
        ...

    def abar(self, t: Tensor) -> Tensor:
        """Return the cumulative alphas (B,) of training timesteps t (B,) in [0, 1000)."""
        ...

    def trainable(self, lora: LoRA, seed: int) -> nn.Module:
        """Freeze all, then open the denoiser for training: LoRA layers, or at rank 0 all its weights (float32)."""
        ...

    def set_speed(self, attention: str, *, checkpointing: bool, vae_checkpointing: bool) -> None:
        """Choose the attention kernel ("sdpa" or "xformers") and gradient checkpointing; ValueError where it is not there."""
        ...

    def save_tuned(self, folder: Path, lora: LoRA) -> None:
        """Write what was tuned: a LoRA that `pipe.load_lora_weights(folder)` loads, or at rank 0 the denoiser's folder."""
        ...
