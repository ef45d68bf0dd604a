"""Flags of how much each noise level counts in a training: Min-SNR weights, and the timestep bias of diffusers'
train_text_to_image_sdxl.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from preftune.families.base import Defaults

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """How much each noise level counts; by default as the model's family is trained."""

    snr_gamma: float | None = None
    """Weight losses by Min-SNR (Hang et al. 2023, arXiv 2303.09556), which uses 5; None = all noise levels alike."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"
    """Which are drawn more often: the less noisy ones (earlier), the noisier ones (later), or those from --timestep-bias-begin to
    --timestep-bias-end (range).
    """
    timestep_bias_multiplier: float = 1.0
    """How many times as often as others."""
    timestep_bias_portion: float = 0.25
    """Share of the timesteps that earlier and later mean, in (0, 1]."""
    timestep_bias_begin: int = 0
    """First timestep of a range."""
    timestep_bias_end: int = 1000
    """End of a range, itself not in it."""

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"--snr-gamma must be positive, got {self.snr_gamma}; Min-SNR uses 5")
        if not self.timestep_bias_multiplier > 0:
            raise ValueError(
                f"--timestep-bias-multiplier must be positive, got {self.timestep_bias_multiplier}"
            )
        if not 0 < self.timestep_bias_portion <= 1:
            raise ValueError(f"--timestep-bias-portion must lie in (0, 1], got {self.timestep_bias_portion}")
        if self.timestep_bias_strategy == "none" and self.timestep_bias_multiplier != 1:
            raise ValueError(
                f"--timestep-bias-multiplier {self.timestep_bias_multiplier} needs a --timestep-bias-strategy: earlier, later or range"
            )

    def check(self, defaults: Defaults) -> None:
        """Raise ValueError for what a model with these defaults does not have."""
        if self.snr_gamma is not None and defaults.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"--snr-gamma weights losses of epsilon and v_prediction, and this model predicts {defaults.prediction_type}; leave it out"
            )
        begin, end, last = self.timestep_bias_begin, self.timestep_bias_end, defaults.num_train_timesteps
        if self.timestep_bias_strategy == "range" and not 0 <= begin < end <= last:
            raise ValueError(
                f"--timestep-bias-begin {begin} and --timestep-bias-end {end} are no range of the model's timesteps 0 to {last}"
            )

    def weights(self, num_train_timesteps: int) -> "Tensor":
        """Return how often each timestep is drawn, (num_train_timesteps,) float64, relative to the rest's 1."""
        import torch

        portion = int(self.timestep_bias_portion * num_train_timesteps)
        chosen = {
            "none": slice(0, 0),
            "earlier": slice(0, portion),
            "later": slice(num_train_timesteps - portion, None),
            "range": slice(self.timestep_bias_begin, self.timestep_bias_end),
        }[self.timestep_bias_strategy]
        weights = torch.ones(num_train_timesteps, dtype=torch.float64)
        weights[chosen] *= self.timestep_bias_multiplier
        return weights

    def draw(self, num_train_timesteps: int, generators: "Sequence[Generator]") -> "Tensor | None":
        """Return timesteps (B,), one from each generator; None without a bias, where the family draws them."""
        import torch

        if self.timestep_bias_strategy == "none":
            return None
        weights = self.weights(num_train_timesteps)
        return torch.cat([torch.multinomial(weights, 1, generator=generator) for generator in generators])
