"""Fine-tune on scored images weighted by their reward (Lee et al. 2023, arXiv 2302.12192; ImageReward's
baseline, appendix E).

Loss, eq. 4: the mean of w(r) times the noise-prediction error over images of a model, plus beta times the
plain error over pre-training images. There are two weightings:

- `minmax` (default; ImageReward): w = (r - min) / (max - min) with the minimum and maximum score of the data set, in [0, 1].
- `exp` (reward-weighted regression, Black et al. 2023, arXiv 2305.13301): w = N softmax(r / temperature) over the data set, mean 1.
  Their released code calls 1 / temperature "temperature".

    python data_build/score.py --data data/generated --rewards imagereward --add-to-metadata --output-dir data/generated_scores
    python finetune/reward_weighted.py --model SD_FOLDER --data data/generated --score imagereward --pretraining-data data/laion

Scores are read from metadata.jsonl, where the first command writes them. Default: beta 0.5
(ImageReward) with pre-training data, else 0. Hardware: Stable Diffusion 1.x at 512 px needs a GPU; tiny models run on a CPU.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.image_folders import Columns
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig, check_dropout
from preftune.training.defaults import of_model
from preftune.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on scored images, each weighted by its reward."""

    data: Path
    """Folder of captioned images whose table, metadata.jsonl, .csv or .parquet, holds a score; rows without one are set aside."""
    score: str
    """Name of the score in the rows, higher is better."""
    weighting: Literal["minmax", "exp"] = "minmax"
    """minmax: scores scaled to [0, 1]; exp: exp(score / temperature), scaled to mean 1."""
    temperature: float = 1.0
    """Temperature of --weighting exp, in units of the score."""
    pretraining_data: Path | None = None
    """Imagefolder of captioned images for the pre-training loss with weight --beta."""
    beta: float | None = None
    """Weight of the plain loss on --pretraining-data; 0 leaves it out. None = 0.5 with --pretraining-data, else 0."""
    caption_dropout: float = 0.0
    """Share of captions left empty, in [0, 1)."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/reward_weighted"))
    )

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0 and finite, got {self.temperature}")
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta must be 0 or more and finite, got {self.beta}")
        if self.beta and self.pretraining_data is None:
            raise ValueError(f"--beta {self.beta:g} needs --pretraining-data IMAGEFOLDER; or choose --beta 0")
        check_dropout(self.caption_dropout)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(
        Config,
        needs="--data are images whose --score `preftune score --data IMAGES --rewards imagereward --add-to-metadata --output-dir scored` has written",
    )

import torch
from torch import Tensor

from preftune.cli.notes import counted, say
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.records import CaptionedImage, Skipped
from preftune.training import data, workspace
from rewards.on_device import upload

FLOAT32_MAX = torch.finfo(torch.float32).max


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


def weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """Return mean(w l) of losses (B,) and weights (B,): the first term of eq. 4, -log p being the diffusion loss."""
    return (weights * losses).mean()


def with_scores(
    samples: Sequence[CaptionedImage], name: str
) -> tuple[list[CaptionedImage], Tensor, list[Skipped]]:
    """Return the n samples that have a score, their scores (n,) float32, and the others, which score.py could not score.

    ValueError where no sample has one, and for a score that is no number.
    """
    scored, scores, skipped = list[CaptionedImage](), list[float](), list[Skipped]()
    for sample in samples:
        score = sample.extra.get(name)
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise ValueError(f"{sample.place}: --score {name} is {score!r}, not a finite number")
        if score is not None and abs(score) < FLOAT32_MAX:
            scored.append(sample)
            scores.append(float(score))
        else:
            why = f"{sample.place}: --score {name} is {score!r}, not a finite number"
            skipped.append(Skipped(place=sample.place, reason=why))
    if not scored:
        first = samples[0]
        known = ", ".join(key for key, value in first.extra.items() if type(value) is float)
        raise ValueError(f"{skipped[0].reason}; numbers there: {known or 'none'}")
    if skipped:
        say(
            f"{counted(len(skipped), 'image')} without a score {name} set aside; the first: {skipped[0].reason}"
        )
    return scored, torch.tensor(scores, dtype=torch.float32), skipped


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    groups = config.model, config.reward, config.validation, config.run
    with exit_on_user_error():
        data.check(config.data, config.columns)
        beta = (0.5 if config.pretraining_data else 0.0) if config.beta is None else config.beta
        pretraining_data = config.pretraining_data if beta else None
        if pretraining_data is not None:
            data.check(pretraining_data, config.columns.where_any(pretraining_data))
        named = config.validation.named()
        defaults = workspace.check(*groups)
        config = of_model(config, "reward_weighted", defaults, {"beta": beta})
        groups = config.model, config.reward, config.validation, config.run
        read, skipped = data.read(config.data, config.columns)
        samples, scores, unscored = with_scores(read, config.score)
        weights = reward_weights(scores, config.weighting, config.temperature)
        others, unread = list[CaptionedImage](), list[Skipped]()
        if pretraining_data is not None:
            others, unread = data.read(pretraining_data, config.columns.where_any(pretraining_data))
        prompts = named or config.validation.first([sample.text for sample in samples])
    with workspace.open(
        *groups, driver="reward_weighted", config_text=dump(config), prompts=prompts,
        skipped=skipped + unscored + unread,
    ) as w:  # fmt: skip
        run = w.run

        def losses(chosen: Sequence[CaptionedImage], indices: range, stream: int) -> Tensor:
            texts, dropout = [sample.text for sample in chosen], config.caption_dropout
            return w.losses(chosen, texts, indices, caption_dropout=dropout, stream=stream)

        for step in run.steps():
            for micro_batch in run.passes():
                indices = run.image_indices(step, micro_batch)
                rows = items_at(range(len(samples)), indices, config.run.seed)
                with run.accumulate():
                    own = losses([samples[row] for row in rows], indices, stream=0)
                    loss = weighted_loss(own, upload(weights[rows], own.device))
                    if others:
                        plain = losses(items_at(others, indices, config.run.seed), indices, stream=1).mean()
                        loss = loss + beta * plain
                    run.update(loss, diffusion_loss=own.mean())
            w.after(step)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
