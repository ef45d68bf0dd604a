"""Train a scorer on preferences: every published objective, Stable Preference included, which has no public code.

| `--objective` | loss | from |
|---|---|---|
| `pairs` (default) | -log sigmoid(better - worse) over all untied pairs | ImageReward eq. 1, VP-Score (VisionPrefer) |
| `choice` | softmax over the n images of a prompt, one of which was chosen | HPS v1 (001) |
| `soft` | KL to the shares of votes, a tie being half a vote for each | HPS v2 (003), PickScore |

Stable Preference is `pairs` with `--stable.views 3` (the anti-interference loss, eq. 5 and 6, over weak views) and
`--stable.weighting two-stage`: first what is ordered wrongly or narrowly counts (eq. 7), later what is clearly apart (eq. 8).

    accelerate launch finetune/reward_model.py --model hpsv2 --data data/preferences --stable.views 3 --stable.weighting two-stage

`--model` is a scorer of the table (`python -m rewards`) or a folder that a training wrote; OUTPUT/scorer is such a folder, holds
the weights in the authors' names, and is itself a scorer's name: `--rewards OUTPUT/scorer=1.0`. Rankings of the same images by
several annotators are read as one: the images are scored once, every annotator counts. The mean and deviation of held-out
scores become the constants that ImageReward's calls subtract and divide by.

Accuracy, logged, plotted and kept with the best weights: the share of held-out untied pairs, pooled, that are ordered as the
annotator did; a predicted tie counts as wrong (ImageReward's metric). A loss is the mean over all pairs (or choices) of an update, however it
is divided into passes and processes; so are the weights of eq. 8, for which an update in several passes costs one more
without gradient. Left out: HPS v2's sum over the batch where we take the mean.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preftune.augment import shifted, weak_view
from preftune.cli import dump, exit_on_user_error, parse
from preftune.order import items_at
from preftune.records import read_rankings
from preftune.training.accuracy_plot import plot
from preftune.training.preference_losses import (
    Favour,
    anti_interference_losses,
    choice_losses,
    clamp_scale,
    first_stage_weights,
    pair_losses,
    second_stage_logits,
    soft_losses,
    weighted_mean,
)
from preftune.training.rankings import Ranked, by_images, check_split, choices, load, split, untied, votes
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check
from rewards import Preprocess
from rewards.training import Head, Trainable, check_trainable, freeze, load_trainable

LEARNING_RATE = 1e-5
"""Where --learning-rate says nothing."""


@dataclass(frozen=True, kw_only=True)
class Stable:
    """Stable Preference: the loss over weak views, and which pairs count when."""

    views: int = 0
    """Weak views of each image that the anti-interference loss compares; 0 = without that loss, 3 as published."""
    least_area: float = 0.85
    """Least share of an image's area that a weak view shows, in (0, 1]."""
    flip: bool = True
    """Mirror every other weak view; not for captions that tell left from right."""
    weighting: Literal["none", "two-stage"] = "none"
    """two-stage: eq. 7 for the first updates, then eq. 8; none: all pairs alike."""
    first_stage_steps: int = 3000
    """Updates weighted by eq. 7."""
    b: float = 0.3
    """Eq. 7: the margin at which a pair counts half, in units of raw scores."""
    tau: float = 0.2
    """Eq. 7: how fast the weight falls around b, in units of raw scores."""
    favour: Favour = "larger"
    """Eq. 8 gives weight to pairs of larger margins (published), to all alike, or to those of smaller ones (Table 3)."""
    through_weights: bool = False
    """Let gradients flow through the weights. The paper does not say; a gradient of eq. 8 lowers the loss by making pairs
    that are ordered wrongly worse still, so that they count less. Hence constants are the default."""

    def __post_init__(self) -> None:
        if self.views < 0 or self.first_stage_steps < 0:
            raise ValueError(
                f"--stable.views and --stable.first-stage-steps must be 0 or more, got {self.views} and {self.first_stage_steps}"
            )
        if not 0 < self.least_area <= 1:
            raise ValueError(f"--stable.least-area must lie in (0, 1], got {self.least_area}")
        if not self.tau > 0:
            raise ValueError(f"--stable.tau must be above 0, got {self.tau}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a scorer on preferences.

    One image of --train-batch-size and of images_per_s is a ranking here: all its images, each with its weak views.
    """

    model: str
    """Scorer to start from: a name of the table, such as imagereward, hpsv2 or blipscore, or the folder of a trained one."""
    weights: Path | None = None
    """Weights of --model on disk; others come from the hub's cache."""
    data: tuple[Path, ...]
    """Folders with rankings.jsonl (prompt, generations, ranking); data_build/preferences.py writes them from published data."""
    objective: Literal["pairs", "choice", "soft"] = "pairs"
    """What the loss compares: pairs, the chosen one among all, or shares of votes."""
    stable: Stable = field(default_factory=Stable)
    head: Head = "own"
    """What makes the score: own = what the model has; mlp = a new MLP of ImageReward's shape on a CLIP (ImageReward, Table 2b)."""
    dropout: float | None = None
    """Dropout of an MLP head, in [0, 1); None = the architecture's own, 0.2, 0.2 and 0.1 as published."""
    validation_share: float = 0.1
    """Share of prompts held out, in (0, 1)."""
    jitter: int = 0
    """Training images are moved at random by up to so many pixels along each axis, their borders repeated."""
    frozen_share: float | None = None
    """Share of each tower's layers, from the bottom, that stays frozen with its embeddings; 0.7 in ImageReward, 0 trains all."""
    last_layers: tuple[int, int] | None = None
    """Train only so many last layers of the image tower and of the text tower; 10 6 in HPS v1, 18 8 in Stable Preference."""
    gradient_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(
            output_dir=Path("runs/reward_model"),
            max_train_steps=2000,
            lr_scheduler="cosine",
            validation_steps=200,
            adam_weight_decay=0.0,
        )
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data needs at least one folder of rankings")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"--validation-share must lie strictly between 0 and 1, got {self.validation_share}"
            )
        if self.jitter < 0:
            raise ValueError(f"--jitter must be 0 or more, got {self.jitter}")
        if self.frozen_share is not None and not 0 <= self.frozen_share <= 1:
            raise ValueError(f"--frozen-share must lie in [0, 1], got {self.frozen_share}")
        if self.frozen_share is not None and self.last_layers is not None:
            raise ValueError("--frozen-share and --last-layers both say what is frozen; give one of them")
        if self.objective != "pairs" and (self.stable.views or self.stable.weighting != "none"):
            raise ValueError(f"--stable is about pairs, not --objective {self.objective}")
        stable, run = self.stable, self.run
        if stable.weighting == "two-stage" and stable.first_stage_steps >= run.max_train_steps:
            raise ValueError(
                f"--stable.first-stage-steps ({stable.first_stage_steps}) must be below --max-train-steps ({run.max_train_steps}), or the second"
                " stage never comes; published: 3000 of 30000"
            )
        if stable.through_weights and run.gradient_accumulation_steps > 1:
            raise ValueError(
                "--stable.through-weights needs all pairs of an update in one pass; give --gradient-accumulation-steps 1"
            )


class Ranker(nn.Module):
    """Raw scores as the forward, so that processes share its gradients."""

    def __init__(self, scorer: Trainable) -> None:
        super().__init__()
        self.scorer: Any = scorer

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Return raw scores (B,)."""
        if hasattr(self.scorer, "logit_scale"):
            clamp_scale(self.scorer.logit_scale)
        raw: Tensor = self.scorer.raw(pixels, prompts)
        return raw


def losses_of(raw: Tensor, chosen: Sequence[Ranked], config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) of raw scores (images, 1 + weak views) of these rankings, and the logarithms of their weights (N,).

    The data's own weights are among them, and those of eq. 8; eq. 7 is a factor of the loss, whose mean is over all pairs.
    """
    own = raw[:, 0]
    if config.objective == "choice":
        rows, best, weights = (tensor.to(raw.device) for tensor in choices(chosen))
        return choice_losses(own[rows].masked_fill(rows < 0, -torch.inf), best), weights.log()
    if config.objective == "soft":
        (first, second), shares, weights = (tensor.to(raw.device) for tensor in votes(chosen))
        return soft_losses(own[first], own[second], shares), weights.log()
    (better, worse), weights = (tensor.to(raw.device) for tensor in untied(chosen))
    losses, margins = pair_losses(own[better], own[worse]), own[better] - own[worse]
    stable = config.stable
    if stable.views:
        losses = losses + anti_interference_losses(raw[better], raw[worse])
    margins = margins if stable.through_weights else margins.detach()
    if in_second_stage(stable, step):
        return losses, weights.log() + second_stage_logits(margins, stable.favour)
    if stable.weighting == "two-stage":
        losses = first_stage_weights(margins, stable.b, stable.tau) * losses
    return losses, weights.log()


def in_second_stage(stable: Stable, step: int) -> bool:
    """Return whether an update is weighted by eq. 8."""
    return stable.weighting == "two-stage" and step >= stable.first_stage_steps


def log_total(logits: Sequence[Tensor], run: Run) -> Tensor:
    """Return the logarithm () of the sum of all weights of an update, of the logarithms (N,) of this process' passes."""
    return run.gather(torch.cat([*logits]).logsumexp(0)[None]).logsumexp(0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process scores in one pass."""

    chosen: list[Ranked]
    pixels: Tensor
    """(1 + views, P, 3, H, W) in [0, 1]: the P images of the rankings, and their weak views."""
    prompts: list[str]
    """P prompts."""

    def raw(self, module: nn.Module, device: torch.device, views: int) -> Tensor:
        """Return raw scores (P, 1 + views) of the images and so many of their weak views."""
        pixels = self.pixels[: 1 + views]
        scores: Tensor = module(pixels.flatten(0, 1).to(device), self.prompts * len(pixels))
        return scores.view(len(pixels), -1).T


def part_of(train: list[Ranked], indices: range, preprocess: Preprocess, config: Config, run: Run) -> Part:
    """Return the rankings with these global indices, their images loaded."""
    chosen = items_at(train, indices, config.run.seed)
    pixels, prompts = load(chosen, preprocess)
    own = [
        generator
        for ranking, generator in zip(chosen, map(run.generator, indices), strict=True)
        for _ in ranking.paths
    ]
    return Part(chosen=chosen, pixels=views_of(pixels, own, config), prompts=prompts)


@torch.no_grad()
def total_before(
    module: nn.Module, parts: Sequence[Part], config: Config, step: int, run: Run
) -> Tensor | None:
    """Return the logarithm () of the sum of all weights of an update; None where its only pass says it.

    Only the weights of eq. 8 depend on scores: all passes are made for them once without gradient and weak views.
    """
    if len(parts) == 1:
        return None
    if not in_second_stage(config.stable, step):
        labels = {"pairs": untied, "choice": choices, "soft": votes}[config.objective]
        return log_total([labels(part.chosen)[-1].to(run.device).log() for part in parts], run)
    logits = [losses_of(part.raw(module, run.device, 0), part.chosen, config, step)[1] for part in parts]
    return log_total(logits, run)


def views_of(pixels: Tensor, generators: Sequence[torch.Generator], config: Config) -> Tensor:
    """Return the images (P, 3, H, W) and their weak views, (1 + views, P, 3, H, W)."""
    own = shifted(pixels, generators, config.jitter)
    stable = config.stable
    weak = [weak_view(own, generators, stable.least_area, stable.flip) for _ in range(stable.views)]
    return torch.stack([own, *weak])


def prepare(config: Config) -> Trainable:
    """Return the scorer to train, frozen as configured."""
    scorer = load_trainable(
        config.model, config.weights, config.run.seed, head=config.head, dropout=config.dropout
    )
    freeze(scorer, config.frozen_share, config.last_layers)
    if config.gradient_checkpointing:  # by hand: transformers' BLIP text tower cannot
        for layer in (layer for tower in scorer.towers() for layer in tower.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return scorer


def main(config: Config) -> int:
    """Train, validate, keep the best."""
    with exit_on_user_error():
        check(config.run)
        check_trainable(config.model, config.weights, head=config.head, dropout=config.dropout)
        rankings = [ranked for folder in config.data for ranked in by_images(read_rankings(folder))]
        train, held = split(rankings, config.validation_share, config.run.seed)
        check_split(train, held, config.objective)
        scorer = prepare(config)
        run = Run(config.run, driver="reward_model", config_text=dump(config))
        if config.stable.through_weights and run.world > 1:
            raise ValueError(
                "--stable.through-weights needs all pairs of an update in one process; start one, or leave it out"
            )
        module = run.prepare(Ranker(scorer), learning_rate=LEARNING_RATE)
    best, preprocess = float(run.resumed_state.get("best", 0.0)), preprocess_of(scorer)

    for step in run.steps():
        module.train()
        parts = [
            part_of(train, run.image_indices(step, micro_batch), preprocess, config, run)
            for micro_batch in run.passes()
        ]
        total = total_before(module, parts, config, step, run)
        for part in parts:
            with run.accumulate():
                raw = part.raw(module, run.device, config.stable.views)
                losses, logits = losses_of(raw, part.chosen, config, step)
                mean = weighted_mean(losses, logits, log_total([logits], run) if total is None else total)
                better, worse = raw[:, 0][untied(part.chosen)[0].to(run.device)]
                right = (better > worse).float().mean() if len(better) else 0.5
                run.update(mean * len(parts) * run.world, accuracy=right)
        if run.due("validation_steps", step) or run.due("checkpointing_steps", step):
            with run.ema_weights():
                accuracy = validate(scorer, held, run.device)
                run.log(step, validation_accuracy=accuracy)
                if accuracy >= best:
                    best = accuracy
                    if run.is_main:
                        scorer.save(run.folder / "scorer")
        if run.due("checkpointing_steps", step):
            run.save(step, state={"best": best})
    if run.is_main:
        plot(run.folder)
    return run.finish()


def preprocess_of(scorer: Trainable) -> Preprocess:
    """Return how the scorer's files are prepared."""
    assert scorer.card.preprocess is not None, f"{scorer.card.name} prepares no files"
    return scorer.card.preprocess


@torch.no_grad()
def validate(scorer: Trainable, held: list[Ranked], device: torch.device) -> float:
    """Return the pooled pair accuracy on held-out rankings, and set the scorer's statistics to theirs."""
    scorer.eval()
    preprocess = preprocess_of(scorer)
    raws, right, number = [], 0, 0
    for start in range(0, len(held), 16):
        chosen = held[start : start + 16]
        pixels, prompts = load(chosen, preprocess)
        raw = scorer.raw(pixels.to(device), prompts).float().cpu()
        better, worse = raw[untied(chosen)[0]]
        raws.append(raw)
        right, number = right + int((better > worse).sum()), number + len(better)
    every = torch.cat(raws)
    scorer.set_statistics(float(every.mean()), max(float(every.std()), 1e-6))
    return right / max(number, 1)


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
