"""Teach a model which images people do not like, under a name that guidance can point away from (HPS v1, paper 001).

Fine-tuning on a data set of preferred, non-preferred and ordinary images (data_build/diffusiondb.py makes one): captions of
non-preferred ones begin with "Weird image. ", all others stay as they are, and the loss is plain noise prediction. When
images are generated, the same words are the negative prompt: guidance points away from what they have come to mean.
Defaults are section 6's and the released script's: LoRA of rank 32 on the attention's query, key, value and output
projections, lr 1e-5 constant, 40 images an update, 10,000 updates, AdamW with weight decay 1e-2, no empty captions.

    accelerate launch finetune/weird_lora.py --model SD_FOLDER --data data/filtered --regularisation data/laion

Where the released script differs from its paper: its own default rank is 4 (the paper says 32). Under several processes it
never averaged gradients, because it did not call the wrapped network; here they are averaged. Left out: random crops.
Hardware: Stable Diffusion 1.x at 512 px wants one GPU; the tiny configuration runs on two CPU cores.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.lora import LoRA
from preftune.order import items_at
from preftune.records import CaptionedImage, read_imagefolder
from preftune.training import validation, workspace
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check
from preftune.training.workspace import Tuning

KINDS = ("preferred", "non_preferred", "regularisation")
SHOWN = {
    "base": "base",
    "base, negative prompt": "base_negative",
    "tuned": "tuned",
    "tuned, negative prompt": "tuned_negative",
}


def _published_tuning() -> Tuning:
    return Tuning(model=tyro.MISSING, lora=LoRA(rank=32))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on preferred and non-preferred images, the latter under "Weird image. " (HPS v1)."""

    data: Path
    """Imagefolder with metadata.jsonl whose rows have a `kind`: preferred, non_preferred or regularisation."""
    regularisation: Path | None = None
    """Imagefolder of ordinary captioned images that joins in."""
    regularisation_share: float | None = None
    """Share of --regularisation among all images seen, in (0, 1); None = as many as there are."""
    prefix: str = "Weird image. "
    """Stands before the captions of non-preferred images, and is the negative prompt when images are generated."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=_published_tuning)
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
        if self.tuning.sample.guidance_scale == 1:
            raise ValueError(
                "--sample.guidance-scale 1 has no negative prompt, which is the point here; choose another, such as 7.5"
            )
        if share is not None and self.regularisation is None:
            raise ValueError("--regularisation-share needs --regularisation IMAGEFOLDER")


def captions(samples: Sequence[CaptionedImage], prefix: str) -> tuple[list[str], list[str]]:
    """Return what images are trained with, and what is left of it where the caption is dropped.

    That is their text, and nothing; of non-preferred ones both behind the prefix, which as the negative prompt stands alone, too.
    """
    prefixes = [prefix if sample.extra["kind"] == "non_preferred" else "" for sample in samples]
    return [before + sample.text for before, sample in zip(prefixes, samples, strict=True)], prefixes


def read(config: Config) -> list[CaptionedImage]:
    """Return the images of the data set and of regularisation; ValueError for a row without a kind, or none to learn from."""
    samples = read_imagefolder(config.data)
    for number, sample in enumerate(samples, 1):
        if sample.extra.get("kind") not in KINDS:
            raise ValueError(
                f"{config.data / 'metadata.jsonl'} line {number}: kind is {sample.extra.get('kind')!r};"
                f" it must be one of {', '.join(KINDS)}"
            )
    if not any(sample.extra["kind"] == "non_preferred" for sample in samples):
        raise ValueError(
            f"{config.data} holds no non_preferred image, so {config.prefix!r} would come to mean nothing"
        )
    if config.regularisation is None:
        return samples
    others = [
        replace(sample, extra={"kind": "regularisation"})
        for sample in read_imagefolder(config.regularisation)
    ]
    share = config.regularisation_share
    if share is None:
        return samples + others
    number = round(share / (1 - share) * len(samples))
    if not number:
        raise ValueError(
            f"--regularisation-share {share} of {len(samples)} images is less than one; choose a larger share"
        )
    return samples + items_at(others, range(number), config.run.seed)


def main(config: Config) -> int:
    """Tune, show and save."""
    with exit_on_user_error():
        check(config.run)
        workspace.check_inputs(config.tuning)
        samples = read(config)
        validation_prompts = workspace.read_validation_prompts(
            config.tuning, [sample.text for sample in samples]
        )
        run = Run(config.run, driver="weird_lora", config_text=dump(config))
        family, mix = workspace.load(config.tuning, run)

    def write(folder: Path) -> None:
        workspace.write(family, run, config.tuning.lora, folder)

    def show(name: str, negative: str = "") -> validation.Shown:
        return workspace.show(family, mix, validation_prompts, config.tuning.sample, run, name, negative)

    if not run.resumed:  # samples, scores and saves once before training: whatever cannot work fails here
        if run.is_main:
            show("base"), show("base_negative", config.prefix)
        run.save(-1, write=write)

    for step in run.steps():
        for micro in range(run.gradient_accumulation_steps):
            indices = run.image_indices(step, micro)
            chosen = items_at(samples, indices, config.run.seed)
            with run.accumulate():
                texts, dropped = captions(chosen, config.prefix)
                error = workspace.errors(family, run, config.tuning, chosen, texts, indices, dropped=dropped)
                run.update(error.mean())
        if run.due("validation_steps", step) and run.is_main and step + 1 < config.run.max_train_steps:
            run.log(step, **show(f"step_{step + 1:06d}", config.prefix).means())
        if run.due("checkpointing_steps", step):
            run.save(step, write=write)

    if run.is_main and not run.interrupted:
        write(run.folder)
        show("tuned"), show("tuned_negative", config.prefix)
        validation.conclude(run.folder, SHOWN)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
