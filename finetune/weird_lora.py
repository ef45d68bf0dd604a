"""Fine-tune on non-preferred images under a prefix that serves as the negative prompt at inference (HPS,
arXiv 2303.14420).

The data set has preferred, non-preferred and ordinary images (data_build/diffusiondb.py creates one).
Captions of non-preferred images begin with "Weird image. ", all others are unchanged, and the loss is plain
noise prediction. At inference the same words are the negative prompt, so guidance moves images away from
the non-preferred ones. Defaults are those of section 6 and of the released script: LoRA of rank 32 on the
attention's query, key, value and output projections, constant learning rate 1e-5, 40 images per update,
10,000 updates, AdamW with weight decay 1e-2, no empty captions.

    python finetune/weird_lora.py --model SD_FOLDER --data data/filtered --regularisation data/laion

Differences between the released script and the paper: the script's default rank is 4 (paper: 32). With
several processes the script does not average gradients, because it does not call the wrapped network; here
they are averaged. Left out: random crops. Hardware: Stable Diffusion 1.x at 512 px needs a GPU; the tiny
configuration runs on two CPU cores.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.families import Pretrained
from preftune.image_folders import Columns
from preftune.lora.config import LoRA
from preftune.training.cache_config import CacheConfig
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig, check_dropout
from preftune.training.defaults import of_model
from preftune.training.run_config import RunConfig

KINDS = ("preferred", "non_preferred", "regularisation")
NEGATIVE = "_negative"
"""Suffix of the folder names of validation images with the negative prompt."""
PUBLISHED = LoRA(rank=32)


def _published_model() -> ModelConfig:
    return ModelConfig(pretrained=Pretrained(model=tyro.MISSING), lora=PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on preferred and non-preferred images, the latter under "Weird image. " (HPS v1)."""

    data: Path
    """Imagefolder with metadata.jsonl, .csv or .parquet whose rows have a `kind`: preferred, non_preferred or regularisation."""
    regularisation: Path | None = None
    """Imagefolder of additional ordinary captioned images."""
    regularisation_share: float | None = None
    """Share of --regularisation among all training images, in (0, 1); None = use each image equally often."""
    prefix: str = "Weird image. "
    """Prefix of the captions of non-preferred images, and the negative prompt of validation images."""
    caption_dropout: float = 0.0
    """Share of captions left empty, in [0, 1); those of non-preferred images keep the prefix."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=_published_model)
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(
            output_dir=Path("runs/weird_lora"),
            max_train_steps=10_000,
            train_batch_size=10,
            gradient_accumulation_steps=4,
            checkpointing_steps=500,
        )
    )

    def __post_init__(self) -> None:
        if not self.prefix.strip():
            raise ValueError(f"--prefix must hold words, got {self.prefix!r}")
        share = self.regularisation_share
        if share is not None and not 0 < share < 1:
            raise ValueError(f"--regularisation-share must lie strictly between 0 and 1, got {share}")
        scale = self.validation.sample.guidance_scale
        if scale is not None and scale <= 1:
            raise ValueError(
                f"--sample.guidance-scale {scale:g} has no negative prompt, which is the point here; choose another, such as 7.5"
            )
        if share is not None and self.regularisation is None:
            raise ValueError("--regularisation-share needs --regularisation IMAGEFOLDER")
        check_dropout(self.caption_dropout)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(
        Config,
        needs="--data is what `preftune diffusiondb --data IMAGES --rewards hpsv1 --output-dir data/filtered` makes of images and prompts",
    )


from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.records import CaptionedImage, Skipped
from preftune.training import data, workspace


def captions(samples: Sequence[CaptionedImage], prefix: str) -> tuple[list[str], list[str]]:
    """Return what images are trained with, and what is left of it where the caption is dropped.

    That is their text, and nothing; of non-preferred ones both behind the prefix, which as the negative prompt stands alone, too.
    """
    prefixes = [prefix if sample.extra["kind"] == "non_preferred" else "" for sample in samples]
    return [before + sample.text for before, sample in zip(prefixes, samples, strict=True)], prefixes


def read(config: Config) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Return the images of the data set and of regularisation, and what was set aside; ValueError for a row without a kind,
    or none to learn from.
    """
    samples, skipped = data.read(config.data, config.columns)
    for sample in samples:
        if sample.extra.get("kind") not in KINDS:
            raise ValueError(
                f"{sample.place}: kind is {sample.extra.get('kind')!r}; it must be one of {', '.join(KINDS)}"
            )
    if not any(sample.extra["kind"] == "non_preferred" for sample in samples):
        raise ValueError(
            f"{config.data} holds no non_preferred image, so {config.prefix!r} would come to mean nothing"
        )
    if config.regularisation is None:
        return samples, skipped
    found, more = data.read(config.regularisation, config.columns.where_any(config.regularisation))
    others = [replace(sample, extra={"kind": "regularisation"}) for sample in found]
    skipped = skipped + more
    share = config.regularisation_share
    if share is None:
        return samples + others, skipped
    number = round(share / (1 - share) * len(samples))
    if not number:
        raise ValueError(
            f"--regularisation-share {share} of {len(samples)} images is less than one; choose a larger share"
        )
    return samples + items_at(others, range(number), config.run.seed), skipped


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        data.check(config.data, config.columns)
        if config.regularisation is not None:
            data.check(config.regularisation, config.columns.where_any(config.regularisation))
        named = config.validation.named()
        defaults = workspace.check(config.model, config.reward, config.validation, config.run, lora=PUBLISHED)
        config = of_model(config, "weird_lora", defaults)
        samples, skipped = read(config)
        prompts = named or config.validation.first([sample.text for sample in samples])
    start, end = "step_000000", f"step_{config.run.max_train_steps:06d}"
    moments = {
        "base": start,
        "base, negative prompt": start + NEGATIVE,
        "tuned": end,
        "tuned, negative prompt": end + NEGATIVE,
    }
    with workspace.open(
        config.model, config.reward, config.validation, config.run, driver="weird_lora", config_text=dump(config),
        prompts=prompts, skipped=skipped, moments=moments, negatives={"": "", NEGATIVE: config.prefix}, cache=config.cache,
    ) as w:  # fmt: skip
        run = w.run
        w.decode_ahead(samples)
        for step in run.steps():
            for micro_batch in run.passes():
                indices = run.image_indices(step, micro_batch)
                chosen = items_at(samples, indices, config.run.seed)
                with run.accumulate():
                    texts, dropped = captions(chosen, config.prefix)
                    dropout = config.caption_dropout
                    losses = w.losses(chosen, texts, indices, caption_dropout=dropout, dropped=dropped)
                    run.update(losses.mean())
            w.after(step)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
