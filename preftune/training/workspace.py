"""What drivers that tune a model on captioned images share: its settings, loading it, and showing what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import rewards
from preftune import families
from preftune.diffusion_loss import captioned_error
from preftune.families.base import Family
from preftune.lora import LoRA
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage
from preftune.sampling import Sampling
from preftune.training import validation
from preftune.training.run import Run
from rewards.mix import Mix, parse_files, parse_weights
from rewards.shared_towers import load_all

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The model that is tuned, what of it, and what is generated to show it."""

    model: Path
    """Pipeline folder in diffusers' format (Stable Diffusion 1.x or 2.x)."""
    resolution: int = 512
    """Side of the square that images are scaled and cropped to, pixels."""
    caption_dropout: float = 0.0
    """Share of captions left empty, in [0, 1)."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernel of the denoiser."""
    validation_prompts: Path | None = None
    """Prompt file that is generated before and after; None = the first eight captions or prompts of the training data."""
    num_validation_prompts: int = 256
    """At most so many prompts of --validation-prompts."""
    rewards: tuple[str, ...] = ()
    """Scorers with weights, as imagereward=1.0; `python -m rewards` lists them."""
    reward_files: tuple[str, ...] = ()
    """Weights of scorers on disk, as imagereward=PATH; others come from this repository or the hub's cache."""
    lora: LoRA = field(default_factory=LoRA)
    sample: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"--resolution must be a positive multiple of 8, got {self.resolution}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"--caption-dropout must lie in [0, 1), got {self.caption_dropout}")
        if self.num_validation_prompts < 1:
            raise ValueError(
                f"--num-validation-prompts must be at least 1, got {self.num_validation_prompts}"
            )
        self.scorers()

    def scorers(self) -> tuple[dict[str, float], dict[str, Path]]:
        """Return scorer name -> weight, and scorer name -> weights on disk; ValueError for a wrong term."""
        weights = parse_weights(self.rewards) if self.rewards else {}
        return weights, parse_files(self.reward_files, weights)


def check_inputs(config: Tuning) -> None:
    """Raise ValueError for a wrong pipeline folder or missing weights of a scorer, before any weight is read."""
    families.check(config.model)
    weights, files = config.scorers()
    for name in weights:
        rewards.check(name, files.get(name))


def read_validation_prompts(config: Tuning, texts: Sequence[str]) -> list[str]:
    """Return the prompts to draw: those of --validation-prompts, else the first eight different ones of texts."""
    if config.validation_prompts is None:
        return list(dict.fromkeys(texts))[:8]
    return read_prompts(config.validation_prompts)[: config.num_validation_prompts]


def load(config: Tuning, run: Run) -> tuple[Family, Mix | None]:
    """Return the model, its denoiser open for training and prepared, and the scorers; ValueError for what does not fit."""
    weights, files = config.scorers()
    scorers = load_all(list(weights), files=files, device=run.device, dtype=torch.float32)
    mix = Mix(scorers, weights, "raw") if scorers else None
    family = families.load(config.model, run.device)
    denoiser = family.trainable(config.lora, run.config.seed)
    family.set_speed(config.attention, checkpointing=config.gradient_checkpointing, vae_checkpointing=False)
    family.to(run.device, DTYPES[run.config.mixed_precision])
    family.denoiser = run.prepare(denoiser)
    return family, mix


def errors(
    family: Family,
    run: Run,
    config: Tuning,
    samples: Sequence[CaptionedImage],
    captions: Sequence[str],
    indices: range,
    stream: int = 0,
    dropped: Sequence[str] | None = None,
) -> Tensor:
    """Return the noise-prediction error (B,) of images with these captions; `indices` and `stream` give their noise.

    `dropped`: what stands in place of captions that --caption-dropout takes away; None = nothing.
    """
    return captioned_error(
        family,
        [sample.path for sample in samples],
        captions,
        [run.generator(i, stream) for i in indices],
        size=config.resolution,
        caption_dropout=config.caption_dropout,
        dropped=dropped,
    )


def write(family: Family, run: Run, lora: LoRA, folder: Path) -> None:
    """Write the tuned weights, averaged if the run averages, to folder/lora or, at rank 0, folder/unet."""
    with run.ema_weights():
        family.save_tuned(folder / ("lora" if lora.rank else "unet"), lora)


def show(
    family: Family,
    mix: Mix | None,
    prompts: list[str],
    sampling: Sampling,
    run: Run,
    name: str,
    negative: str = "",
) -> validation.Shown:
    """CaptionedImage the prompts with the weights as they are, score them, and keep them under RUN/samples/name."""
    with run.ema_weights():
        shown = validation.show(family, mix, prompts, sampling, run.device, negative)
    validation.save(shown, run.folder, name)
    return shown
