"""The settings of a LoRA, which flags are read into; needs no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank update of some layers. Where all weights are trained there is no LoRA: None."""

    rank: int = 4
    """Rank of the update."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None = alpha equals rank, a scale of 1."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers with a LoRA, by the last part of their name; the default is all attention projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(
                f"--lora.rank is {self.rank}; it must be 1 or more; --train full trains all weights"
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"--lora.alpha is {self.alpha}; it must be above 0, or None for alpha = rank")
        if not self.target_modules or not all(self.target_modules):
            raise ValueError(
                f"--lora.target-modules is {self.target_modules}; name at least one layer, such as to_q"
            )
