r"""Train a scorer on preferences with any published objective, including Stable Preference, which has no
public code.

| `--objective` | loss | from |
|---|---|---|
| `pairs` (default) | -log sigmoid(better - worse) over all untied pairs | ImageReward (arXiv 2304.05977) eq. 1, VP-Score (arXiv 2404.15100) |
| `choice` | softmax over the n images of a prompt, one of which was chosen | HPS v1 (arXiv 2303.14420) |
| `soft` | KL to the shares of votes, a tie is half a vote for each | HPS v2 (arXiv 2306.09341), PickScore (arXiv 2305.01569) |

Stable Preference is `pairs` with `--stable.views 3` (the anti-interference loss over weak views, eq. 5 and
6) and `--stable.weighting two-stage`: the first stage weights wrong or close pairs (eq. 7), the second
pairs with a large margin (eq. 8).

    python finetune/reward_model.py --model hpsv2 --data data/preferences --max-train-steps 30000 \
        --stable.views 3 --stable.weighting two-stage

`--model` is a scorer of the table (`preftune scorers`) or the folder of a trained scorer. The result,
OUTPUT/scorer, is such a folder. It holds the weights under the authors' key names, and its path can be used
as a scorer: `--rewards OUTPUT/scorer=1.0`. Rankings of the same images by several annotators are combined:
the images are scored once, and every annotator counts. For an ImageReward, the mean and standard deviation
of the held-out scores become the constants that normalize its output.

The logged and plotted accuracy, which selects the best weights, is ImageReward's: the share of all held-out
untied pairs that are ordered as by the annotator; a predicted tie counts as wrong. The loss is the mean
over all pairs (or choices) of an update, independent of the split into passes and processes. So are the
weights of eq. 8; with several passes per update they need one more forward pass without gradient. Left out:
HPS v2's sum over the batch, which is a mean here.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.training.defaults import SCORER_RATES, filled, of_run
from preftune.training.run_config import RunConfig, check
from rewards.card import Head


@dataclass(frozen=True, kw_only=True)
class Stable:
    """Stable Preference: the loss over weak views, and the weights of pairs."""

    views: int = 0
    """Weak views of each image for the anti-interference loss; 0 = no such loss, 3 = published."""
    least_area: float = 0.85
    """Minimum share of an image's area in a weak view, in (0, 1]."""
    flip: bool = True
    """Mirror half of the weak views at random; switch off for captions with left and right."""
    weighting: Literal["none", "two-stage"] = "none"
    """two-stage: eq. 7 for the first updates, then eq. 8; none: equal weights."""
    first_stage_steps: int = 3000
    """Number of updates with the weights of eq. 7."""
    b: float = 0.3
    """Eq. 7: the margin at which the weight is 1/2, in units of raw scores."""
    tau: float = 0.2
    """Eq. 7: how fast the weight falls around b, in units of raw scores."""
    favour: Literal["larger", "equal", "smaller"] = "larger"
    """Eq. 8: larger weights for larger margins (published), equal weights, or for smaller margins (Table 3).
    """
    through_weights: bool = False
    """Let gradients flow through the weights. Off by default, because through eq. 8 they would worsen wrong
    pairs to reduce their weight; the paper does not say what it does.
    """

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
    """Scorer to start from: a name, such as imagereward or hpsv2, or the folder of a trained scorer."""
    weights: Path | None = None
    """Weights of --model on disk; None = from the Hugging Face cache."""
    data: tuple[Path, ...]
    """Folders with rankings.jsonl (prompt, generations, ranking), from `preftune preferences`, say; one that is named twice counts twice."""
    objective: Literal["pairs", "choice", "soft"] = "pairs"
    """Loss on pairs, on the chosen image among all, or on shares of votes."""
    stable: Stable = field(default_factory=Stable)
    head: Head = "own"
    """own = the head of the model; mlp = a new MLP of ImageReward's shape on a CLIP (ImageReward, Table 2b).
    """
    dropout: float | None = None
    """Dropout of an MLP head, in [0, 1); None = the architecture's own, 0.2, 0.2 and 0.1 as published."""
    validation_share: float = 0.1
    """Share of prompts held out, in (0, 1)."""
    jitter: int = 0
    """Shift training images at random by up to this many pixels along each axis; borders are repeated."""
    frozen_share: float | None = None
    """Frozen share of each tower's layers, from the bottom, with embeddings; 0.7 in ImageReward, 0 trains all.
    """
    last_layers: tuple[int, int] | None = None
    """Train only the last layers of the image and text tower; HPS v1: 10 6, Stable Preference: 18 8."""
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


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preftune import files
from preftune.augment import shifted, weak_view
from preftune.cli.printable import show
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.training import data, rankings
from preftune.training.accuracy_plot import plot
from preftune.training.preference_losses import (
    anti_interference_losses,
    choice_losses,
    clamp_scale,
    first_stage_weights,
    pair_losses,
    second_stage_logits,
    soft_losses,
    weighted_mean,
)
from preftune.training.rankings import Ranked, by_images, check_split, choices, split, untied, votes
from preftune.training.run import Run
from rewards import Preprocess, find_card
from rewards.on_device import upload
from rewards.training import Trainable, check_trainable, freeze, load_trainable

Load = Callable[[Sequence[Ranked]], tuple[Tensor, list[str]]]


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
        rows, best, weights = (upload(tensor, raw.device) for tensor in choices(chosen))
        return choice_losses(own[rows].masked_fill(rows < 0, -torch.inf), best), weights.log()
    if config.objective == "soft":
        (first, second), shares, weights = (upload(tensor, raw.device) for tensor in votes(chosen))
        return soft_losses(own[first], own[second], shares), weights.log()
    (better, worse), weights = (upload(tensor, raw.device) for tensor in untied(chosen))
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
        scores: Tensor = module(upload(pixels.flatten(0, 1), device), self.prompts * len(pixels))
        return scores.view(len(pixels), -1).T


def part_of(train: list[Ranked], indices: range, load: Load, config: Config, run: Run) -> Part:
    """Return the rankings with these global indices, their images loaded."""
    chosen = items_at(train, indices, config.run.seed)
    pixels, prompts = load(chosen)
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
    """Return the logarithm () of the sum of all weights of an update; None if there is a single pass, which gives it.

    Only the weights of eq. 8 depend on scores: all passes are made for them once without gradient and weak views.
    """
    if len(parts) == 1:
        return None
    if not in_second_stage(config.stable, step):
        labels = {"pairs": untied, "choice": choices, "soft": votes}[config.objective]
        return log_total([upload(labels(part.chosen)[-1], run.device).log() for part in parts], run)
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


@one_writer
def main(config: Config) -> int:
    """Train, validate, keep the best."""
    with exit_on_user_error():
        check(config.run)
        check_trainable(config.model, config.weights, head=config.head, dropout=config.dropout)
        rate = SCORER_RATES["imagereward" if find_card(config.model).clip is None else "clip"]
        config = filled(config, of_run(rate), f"reward_model for {config.model}")
        read = [data.read_rankings(folder) for folder in config.data]
        ranked = [one for some, _ in read for one in by_images(some)]
        train, held = split(ranked, config.validation_share, config.run.seed)
        check_split(train, held, config.objective)
        scorer = prepare(config)
        skipped = [row for _, rows in read for row in rows]
        settings = data.as_setting(skipped)
        run = Run(config.run, driver="reward_model", config_text=dump(config), settings=settings)
        if config.stable.through_weights and run.world > 1:
            raise ValueError(
                "--stable.through-weights needs all pairs of an update in one process; start one, or leave it out"
            )
        module = run.prepare(Ranker(scorer), learning_rate=rate)
    if run.is_main:
        data.write_report(run.folder, skipped)
    best, preprocess = float(run.resumed_state.get("best", 0.0)), preprocess_of(scorer)
    restore_best(run)
    with rankings.loader(run, train, preprocess) as load:
        for step in run.steps():
            module.train()
            parts = [
                part_of(train, run.image_indices(step, micro_batch), load, config, run)
                for micro_batch in run.passes()
            ]
            total = total_before(module, parts, config, step, run)
            for part in parts:
                with run.accumulate():
                    raw = part.raw(module, run.device, config.stable.views)
                    losses, logits = losses_of(raw, part.chosen, config, step)
                    mean = weighted_mean(losses, logits, log_total([logits], run) if total is None else total)
                    better, worse = raw[:, 0][upload(untied(part.chosen)[0], run.device)]
                    right = (better > worse).float().mean() if len(better) else 0.5
                    run.update(mean * len(parts) * run.world, accuracy=right)
            if run.due("validation_steps", step) or run.scheduled("checkpointing_steps", step):
                with run.ema_weights():
                    accuracy = validate(scorer, held, run.device)
                    run.log(step, validation_accuracy=accuracy)
                    if accuracy >= best:
                        best = accuracy
                        if run.is_main:
                            scorer.save(run.folder / "scorer")
            if run.due("checkpointing_steps", step):
                run.save(step, write=partial(write_best, run), state={"best": best})
    return finish(run)


def finish(run: Run) -> int:
    """Plot the accuracy, say where the result is, and return the exit code."""
    if run.is_main:
        plot(run.folder)
        if not run.interrupted:
            show(f"best scorer, metrics and plot of its accuracy: {run.folder}")
    return run.finish()


def write_best(run: Run, folder: Path) -> None:
    """Put the best scorer until now into a checkpoint, where there is one."""
    if (run.folder / "scorer").is_dir():
        files.copy_into(run.folder / "scorer", folder / "scorer")


def restore_best(run: Run) -> None:
    """Put back the best scorer of the checkpoint that a run goes on from: a killed run may have written a later one."""
    if run.is_main and run.source is not None and (run.source / "scorer").is_dir():
        files.copy_into(run.source / "scorer", run.folder / "scorer")


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
        pixels, prompts = rankings.load(chosen, preprocess)
        raw = scorer.raw(pixels.to(device), prompts).float().cpu()
        better, worse = raw[untied(chosen)[0]]
        raws.append(raw)
        right, number = right + int((better > worse).sum()), number + len(better)
    every = torch.cat(raws)
    scorer.set_statistics(float(every.mean()), max(float(every.std()), 1e-6))
    return right / max(number, 1)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
