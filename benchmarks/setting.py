"""What benchmarks/plan.py plans, under the names of the drivers' flags; needs no torch."""

from dataclasses import dataclass
from typing import Literal

from preftune.resolution import Resolution
from preftune.resolution import parse as parse_resolution

Model = Literal["sd1", "sdxl"]
Method = Literal[
    "refl", "raft", "pretrain", "reward_weighted", "weird_lora", "dpo", "draft", "drtune", "flowbp", "ddpo", "awm", "nft"
]  # fmt: skip
Train = Literal["lora", "full"]
Switch = Literal["off", "on"]
Precision = Literal["no", "fp16", "bf16"]
RewardPrecision = Literal["fp32", "fp16", "bf16"]

DIRECT = ("draft", "drtune", "flowbp")
"""Methods whose gradient of a reward reaches several steps."""
THROUGH_PIXELS = ("refl", *DIRECT)
"""Methods with a gradient through the decoder, whose denoiser and decoder are checkpointed by default."""
FORWARD = ("awm", "nft")
"""Methods that hold an earlier policy, and train on images that it generated at random noise levels."""
GENERATED = ("raft", "ddpo", *FORWARD)
"""Methods that learn from images of their own: the scorer is in memory while an update lasts, and does nothing in it."""
SCORED = (*THROUGH_PIXELS, *GENERATED)
"""Methods with a scorer in training."""
REFERENCED = ("dpo", *FORWARD)
"""Methods that ask the model before tuning by default: with all weights trained it is a second denoiser in memory."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and how it is tuned. None = the default of the method or of the model."""

    model: Model = "sd1"
    method: Method = "refl"
    resolution: str | None = None
    train: Train = "lora"
    rank: int = 4
    train_batch_size: int = 2
    mixed_precision: Precision = "bf16"
    checkpointing: Switch | None = None
    reward_precision: RewardPrecision = "fp32"
    use_8bit_adam: bool = False
    ema_decay: float = 0.0
    sample_batch_size: int = 8
    late: float = 34.5
    """Steps without gradient before the one with it; the mean of ReFL's published window, 30..39 of 40."""

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "sample_batch_size", "rank"):
            if getattr(self, name) < 1:
                flag = {"sample_batch_size": "sample.batch-size", "rank": "lora.rank"}.get(name, name)
                raise ValueError(
                    f"--{flag.replace('_', '-')} must be at least 1, got {getattr(self, name)}; leave it out for the default"
                )
        if self.late < 1:
            raise ValueError(f"--late must be at least 1, got {self.late:g}; leave it out for 34.5")
        self.size()

    def size(self) -> Resolution:
        """Return height and width; ValueError for a resolution that is none."""
        try:
            return parse_resolution(self.resolution or ("512" if self.model == "sd1" else "1024"))
        except ValueError as error:
            raise ValueError(f"--resolution: {error}") from error

    def checkpointed(self) -> bool:
        """Return whether the activations of the denoiser, and with a gradient through it of the decoder, are computed again."""
        return self.method in THROUGH_PIXELS if self.checkpointing is None else self.checkpointing == "on"

    def flags(self) -> list[str]:
        """Return the driver's flags for it, without those that are its defaults or do nothing in the method."""
        own = self.method in THROUGH_PIXELS
        names = ["gradient-checkpointing", *(["vae-checkpointing"] if own else [])]
        words = [f"--train-batch-size {self.train_batch_size}"]
        words += [
            f"--{'' if self.checkpointed() else 'no-'}{name}" for name in names if self.checkpointed() != own
        ]
        words += ["--train full"] * (self.train == "full")
        words += [f"--lora.rank {self.rank}"] * (self.train == "lora" and self.rank != 4)
        words += ["--use-8bit-adam"] * self.use_8bit_adam
        if self.reward_precision != "fp32" and self.method in SCORED:
            words.append(f"--reward-precision {self.reward_precision}")
        words += [f"--sample.batch-size {self.sample_batch_size}"] * (self.sample_batch_size != 8)
        return words
