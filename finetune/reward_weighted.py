"""Fine-tune on scored images, each counted by its reward (Lee et al. 2023; the baseline of paper 002, appendix E).

Loss, eq. 4: the mean of w(r) times the noise-prediction error over images of a model, plus beta times the plain error over
pre-training images. Two weightings by name:

- `minmax` (default; paper 002): w = (r - min) / (max - min), lowest and highest score of the data set, in [0, 1].
- `exp` (reward-weighted regression, Black et al. 2023, arXiv 2305.13301): w = N softmax(r / temperature) over the data set, mean 1.
  Their released code calls 1 / temperature "temperature".

    accelerate launch finetune/reward_weighted.py --model SD_FOLDER --data data/scored --score imagereward --pretraining-data data/laion

Scores are read from metadata.jsonl: `python data_build/score.py --data data/generated --rewards imagereward --add-to-metadata` puts them
there. Defaults: beta 0.5 and lr 1e-5 (paper 002). Hardware: Stable Diffusion 1.x at 512 px wants one GPU; tiny models run on a CPU.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from preftune.cli import dump, exit_on_user_error, parse
from preftune.order import items_at
from preftune.records import CaptionedImage, read_imagefolder
from preftune.training import validation, workspace
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check
from preftune.training.workspace import Tuning

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on scored images, each counted by its reward."""

    data: Path
    """Imagefolder with metadata.jsonl whose rows hold a score."""
    score: str
    """Name of the score in the rows, higher is better."""
    weighting: Literal["minmax", "exp"] = "minmax"
    """minmax: scores brought to [0, 1]; exp: the exponential of score / temperature, mean 1."""
    temperature: float = 1.0
    """Of --weighting exp, in units of the score."""
    pretraining_data: Path | None = None
    """Imagefolder of captioned images that are learned with weight --beta."""
    beta: float = 0.5
    """Weight of the plain loss on --pretraining-data; 0 leaves it out."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/reward_weighted"))
    )

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta must be 0 or more and finite, got {self.beta}")
        if self.beta and self.pretraining_data is None:
            raise ValueError(f"--beta {self.beta:g} needs --pretraining-data IMAGEFOLDER; or choose --beta 0")


def reward_weights(scores: Tensor, weighting: Literal["minmax", "exp"], temperature: float) -> Tensor:
    """Return the weights (N,) of all images of a data set with these scores (N,). ValueError: minmax of equal scores."""
    if weighting == "exp":
        return len(scores) * torch.softmax(scores.double() / temperature, 0).float()
    low, high = scores.min(), scores.max()
    if low == high:
        raise ValueError(
            f"all scores are {low.item():g}, so they cannot be brought to [0, 1]; --weighting exp gives each the weight 1"
        )
    return (scores - low) / (high - low)


def weighted_loss(errors: Tensor, weights: Tensor) -> Tensor:
    """Return mean(w e) of errors (B,) and weights (B,): the first term of eq. 4, -log p being the error."""
    return (weights * errors).mean()


def read_scores(samples: Sequence[CaptionedImage], name: str, folder: Path) -> Tensor:
    """Return the scores (N,) float32 of the rows; ValueError names the line of one that has none or is not finite."""
    scores = [sample.extra.get(name) for sample in samples]
    for number, score in enumerate(scores, 1):
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < FLOAT32_MAX:
            known = ", ".join(key for key, value in samples[number - 1].extra.items() if type(value) is float)
            raise ValueError(
                f"{folder / 'metadata.jsonl'} line {number}: --score {name} is {score!r}, not a finite number;"
                f" numbers there: {known or 'none'}"
            )
    return torch.tensor(scores, dtype=torch.float32)


def main(config: Config) -> int:  # noqa: C901 - the loop stays in one piece
    """Tune, show and save."""
    with exit_on_user_error():
        check(config.run)
        workspace.check_inputs(config.tuning)
        samples = read_imagefolder(config.data)
        scores = read_scores(samples, config.score, config.data)
        weights = reward_weights(scores, config.weighting, config.temperature)
        others = read_imagefolder(config.pretraining_data) if config.pretraining_data and config.beta else []
        validation_prompts = workspace.read_validation_prompts(
            config.tuning, [sample.text for sample in samples]
        )
        run = Run(config.run, driver="reward_weighted", config_text=dump(config))
        family, mix = workspace.load(config.tuning, run)

    def write(folder: Path) -> None:
        workspace.write(family, run, config.tuning.lora, folder)

    def show(name: str) -> validation.Shown:
        return workspace.show(family, mix, validation_prompts, config.tuning.sample, run, name)

    def errors(chosen: Sequence[CaptionedImage], indices: range, stream: int) -> Tensor:
        texts = [sample.text for sample in chosen]
        return workspace.errors(family, run, config.tuning, chosen, texts, indices, stream)

    if not run.resumed:  # samples, scores and saves once before training: whatever cannot work fails here
        if run.is_main:
            show("before")
        run.save(-1, write=write)

    for step in run.steps():
        for micro in range(run.gradient_accumulation_steps):
            indices = run.image_indices(step, micro)
            rows = items_at(range(len(samples)), indices, config.run.seed)
            with run.accumulate():
                error = errors([samples[row] for row in rows], indices, stream=0)
                loss = weighted_loss(error, weights[rows].to(error.device))
                if others:
                    plain = errors(items_at(others, indices, config.run.seed), indices, stream=1).mean()
                    loss = loss + config.beta * plain
                run.update(loss, error=error.mean())
        if run.due("validation_steps", step) and run.is_main and step + 1 < config.run.max_train_steps:
            run.log(step, **show(f"step_{step + 1:06d}").means())
        if run.due("checkpointing_steps", step):
            run.save(step, write=write)

    if run.is_main and not run.interrupted:
        write(run.folder)
        show("after")
        validation.conclude(run.folder, {"before": "before", "after": "after"})
    return run.finish()


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
