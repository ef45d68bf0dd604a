r"""Score the predicted image at every denoising step: from which step on does a scorer see what the image will be?

For several prompts and seeds the clean image that the model predicts at each step is decoded and scored (ImageReward, arXiv
2304.05977, Fig. 4: one prompt, several seeds, separable after 30 of 40 steps). Scores of one prompt's seeds are ranked at each step
and at the end; a step's rank correlation is Spearman's, within prompts: ranks less their mean, all prompts together. The first step
from which on it stays above --threshold begins the window of ReFL for this model and scorer, printed as flags of `preftune refl`:
before it a reward's gradient is that of an image that will not be.

    python eval/steps.py
    python eval/steps.py --model SD_FOLDER --prompts my_prompts.txt --count 32 --rewards imagereward hpsv2.1

Steps, solver and guidance scale default to those of `preftune refl`: take those that you train with. Writes steps.csv (means,
standard deviations and correlations with 95 % bootstrap intervals over prompts), scores.csv (every score), steps.png (curves),
predictions.png (the predicted images of the first prompts) and steps.json, which says what they are of. A window needs that many
prompts that its interval is narrow: 32 prompts with 8 seeds, say.

Hardware: each image is decoded and scored once for every step: 40 times the scoring, beside the denoiser's 40 steps.
Stable Diffusion needs a GPU in practice.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import check_precision, device_here
from preftune.cli.scorer_flags import Files, Measured
from preftune.families import Pretrained
from preftune.sampling_config import Resolved, Sampling
from rewards.terms import parse_files, parse_names

REPORT, RECORD = ("steps.csv", "scores.csv", "steps.png", "predictions.png"), "steps.json"
"""Files of a report, and the one that says what it is of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score the images predicted at every denoising step, and recommend the window of ReFL."""

    model: Annotated[Pretrained, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Pretrained(model="assets/tiny/pipeline")
    )
    prompts: Path = Path("assets/tiny/held_out.txt")
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    count: int = 16
    """Maximum number of prompts, from the start of the file."""
    num_images_per_prompt: int = 8
    """Seeds of each prompt, whose ranks are compared; 2 or more."""
    seed: int = 0
    """Image k of prompt i has the seed seed + i * num_images_per_prompt + k."""
    rewards: Measured = ("imagereward-tiny",)
    reward_files: Files = ()
    threshold: float = 0.9
    """Rank correlation with the final score above which a step counts as decided, in (0, 1)."""
    sample: Sampling = field(default_factory=lambda: Sampling(guidance_scale=1.0))
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the model; scorers stay in fp32."""
    grid_rows: int = 4
    """Prompts in predictions.png."""
    output_dir: Path = Path("runs/steps")
    """Folder of the report."""
    overwrite_output_dir: bool = False
    """Replace a report of other settings."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("count", self.count, 1), ("num-images-per-prompt", self.num_images_per_prompt, 2), ("seed", self.seed, 0),
            ("grid-rows", self.grid_rows, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"--threshold must lie between 0 and 1, got {self.threshold:g}")
        if self.sample.solver not in (None, "ddpm", "ddim", "euler"):
            raise ValueError(
                f"--sample.solver {self.sample.solver} is no solver of `preftune refl`, whose window is measured; choose ddpm, ddim"
                " or euler"
            )
        if not self.rewards:
            raise ValueError("--rewards is empty; name a scorer, as in --rewards imagereward")
        check_precision(self.precision)
        self.files()

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, parse_names(self.rewards))


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import dataclasses

import torch

from eval.generated import DTYPES, settings_of
from eval.models import check_scorers
from eval.report_folder import check_report, write_record
from eval.step_scores import Measured as MeasuredSteps
from eval.step_scores import curves, measure, predictions, scores_csv, to_csv, to_text, window_flags
from preftune import families
from preftune.cli.printable import show
from preftune.families.base import Defaults
from preftune.families.digest import digest
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.images import save_image
from preftune.prompts import read_prompts
from preftune.training import defaults as training_defaults
from rewards.shared_towers import load_all


def as_refl_samples(sample: Sampling, defaults: Defaults) -> Resolved:
    """Return the sampling settings, with those of `preftune refl` where the flags say nothing."""
    own: dict[str, Any] = training_defaults.refl(
        defaults, num_inference_steps=sample.num_inference_steps, pretraining=None, data=False
    )
    steps, solver = own["num_inference_steps"], sample.solver or own["solver"]
    return dataclasses.replace(sample, num_inference_steps=steps, solver=solver).resolved(defaults)


def check_inputs(config: Config) -> tuple[list[str], Resolved]:
    """Return the prompts, and how to sample; ValueError before any weight loads."""
    prompts = read_prompts(config.prompts)[: config.count]
    sampling = as_refl_samples(config.sample, families.check(config.model.source()))
    check_scorers(parse_names(config.rewards), config.files(), prompts, sampling.resolution, config.prompts)
    check_writable(config.output_dir)
    return prompts, sampling


def record_of(config: Config, prompts: list[str], sampling: Resolved) -> dict[str, Any]:
    """Return what a report depends on, beside the scorers' own weights."""
    return {
        "model": digest(config.model.source()),
        "prompts": prompts,
        "seed": config.seed,
        "images per prompt": config.num_images_per_prompt,
        "rewards": list(parse_names(config.rewards)),
        "reward files": {name: str(path) for name, path in config.files().items()},
        "threshold": config.threshold,
        "precision": config.precision,
        "grid rows": config.grid_rows,
        "sampling settings": settings_of(sampling),
    }


def write_report(config: Config, measured: MeasuredSteps, sampling: Resolved) -> None:
    """Write the files of the report; print the table and the flags."""
    folder = config.output_dir
    write_text(folder / "steps.csv", to_csv(measured))
    write_text(folder / "scores.csv", scores_csv(measured))
    curves(measured, config.threshold, folder / "steps.png")
    save_image(predictions(measured, config.grid_rows), folder / "predictions.png")
    show(to_text(measured, config.threshold))
    for name in measured.scorers:
        show(f"{name}: {window_flags(measured, name, config.threshold, sampling)}")
    show(str(folder / "steps.png"))


@one_writer
def main(config: Config) -> int:
    """Sample, score every step, report."""
    device = device_here()
    with exit_on_user_error():
        prompts, sampling = check_inputs(config)
        record = record_of(config, prompts, sampling)
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        tidy(config.output_dir)
        family = families.load(config.model.source(), device, DTYPES[config.precision])
        scorers = load_all(
            parse_names(config.rewards), files=config.files(), device=device, dtype=torch.float32
        )
    seeds = [
        [config.seed + i * config.num_images_per_prompt + k for k in range(config.num_images_per_prompt)]
        for i in range(len(prompts))
    ]
    measured = measure(family, scorers, prompts, seeds, sampling, keep=config.grid_rows)
    write_record(config.output_dir, RECORD, record)
    write_report(config, measured, sampling)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
