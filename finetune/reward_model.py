"""Tune a scorer on rankings: the reward model of ImageReward (paper 002, section 2.2).

Loss, eq. 1: -log sigmoid(r(better) - r(worse)), the mean over all untied pairs of the rankings in a batch, on raw scores.
Rankings of the same pictures by several annotators are read as one: the pictures are scored once, each annotator's pairs
count. At the end the scores' mean and deviation over the held-out pictures become the constants that calls subtract and divide by.

    accelerate launch finetune/reward_model.py --model runs/pretrain_scorer/scorer --data data/rankings

Accuracy, logged and kept with the best checkpoint: the share of held-out untied pairs, pooled over rankings, that the
scorer orders as the annotator did; a predicted tie counts as wrong (the authors' metric). Left out, for later: soft labels,
ties in the loss, CLIP towers. The paper freezes 70 % of a pre-trained BLIP: `--frozen-share 0.7`.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from finetune.run import Run
from finetune.run_config import RunConfig, check
from preftune.cli import dump, exit_on_user_error, parse
from preftune.images import load_pixels, shifted
from preftune.prompts import items_at
from preftune.records import Ranking, read_jsonl, read_rankings
from rewards.imagereward import ImageReward


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune an ImageReward architecture on rankings."""

    model: Path
    """Scorer folder (config.json, vocab.txt, model.safetensors) to start from."""
    data: tuple[Path, ...]
    """Folders with rankings.jsonl (prompt, generations, ranking)."""
    valid_share: float = 0.1
    """Share of prompts held out, in (0, 1)."""
    shift: int = 0
    """Training pictures are moved at random by up to so many pixels along each axis, their borders repeated."""
    frozen_share: float = 0.7
    """Share of each tower's layers, from the bottom, that stays frozen with its embeddings; 0 trains everything."""
    valid_every: int = 200
    """Updates between measurements of accuracy on the held-out rankings."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(
            output=Path("runs/reward_model"), updates=2000, schedule="cosine", weight_decay=0.0
        )
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data needs at least one folder of rankings")
        if not 0 < self.valid_share < 1:
            raise ValueError(f"--valid-share must lie strictly between 0 and 1, got {self.valid_share}")
        if self.shift < 0:
            raise ValueError(f"--shift must be 0 or more, got {self.shift}")
        if not 0 <= self.frozen_share <= 1:
            raise ValueError(f"--frozen-share must lie in [0, 1], got {self.frozen_share}")
        if self.valid_every < 1:
            raise ValueError(f"--valid-every must be at least 1, got {self.valid_every}")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Pictures of one prompt and what all annotators said of them."""

    prompt: str
    paths: tuple[Path, ...]
    """n pictures."""
    ranks: tuple[tuple[int, ...], ...]
    """For each annotator n places, 1 = best."""


def by_pictures(rankings: Sequence[Ranking]) -> list[Ranked]:
    """Return the rankings, those of the same prompt and pictures in one, in the order of their first."""
    found: dict[tuple[str, tuple[Path, ...]], list[tuple[int, ...]]] = {}
    for ranking in rankings:
        found.setdefault((ranking.prompt, ranking.paths), []).append(ranking.ranks)
    return [
        Ranked(prompt=prompt, paths=paths, ranks=tuple(ranks)) for (prompt, paths), ranks in found.items()
    ]


def pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return all (better, worse) places of a ranking, 1 = best; ties give none."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def ranking_loss(better: Tensor, worse: Tensor) -> Tensor:
    """Return -log sigmoid(better - worse), the mean over pairs (N,): paper 002 eq. 1."""
    return F.softplus(worse - better).mean()


class Ranker(nn.Module):
    """Raw scores as the forward, so that processes share its gradients."""

    def __init__(self, scorer: ImageReward) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Return raw scores (B,)."""
        return self.scorer.raw(pixels, prompts)


def freeze(scorer: ImageReward, share: float) -> None:
    """Freeze that share of each tower's layers, from the bottom, and then the embeddings; projections are not trained."""
    for part in (scorer.vision_proj, scorer.text_proj):
        part.requires_grad_(False)
    for tower in (scorer.vision_model, scorer.text_model):
        layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
        for layer in layers[: int(len(layers) * share)]:
            layer.requires_grad_(False)
        if share:
            tower.embeddings.requires_grad_(False)


def split(rankings: list[Ranked], share: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """Return training and held-out rankings: all rankings of one prompt fall on one side."""
    prompts = sorted({ranking.prompt for ranking in rankings})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))])
    train = [ranking for ranking in rankings if ranking.prompt not in held]
    if not train:
        raise ValueError(
            f"all {len(prompts)} prompts would be held out; give more rankings or a smaller --valid-share"
        )
    return train, [ranking for ranking in rankings if ranking.prompt in held]


def load(rankings: Sequence[Ranked], size: int) -> tuple[Tensor, list[str]]:
    """Return the pictures of these rankings, (sum of n, 3, size, size) in [0, 1], and their prompts."""
    paths = [(path, ranking.prompt) for ranking in rankings for path in ranking.paths]
    return torch.stack([load_pixels(path, size) for path, _ in paths]), [prompt for _, prompt in paths]


def places(rankings: Sequence[Ranked]) -> Tensor:
    """Return the rows of better and worse pictures, (2, number of pairs), in the order of `load`."""
    found, start = [], 0
    for ranking in rankings:
        found += [(start + i, start + j) for ranks in ranking.ranks for i, j in pairs(ranks)]
        start += len(ranking.paths)
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2).T


def main(config: Config) -> int:
    """Train, validate, keep the best."""
    with exit_on_user_error():
        check(config.run)
        rankings = [ranked for folder in config.data for ranked in by_pictures(read_rankings(folder))]
        train, held = split(rankings, config.valid_share, config.run.seed)
        scorer = ImageReward.load(config.model)
        freeze(scorer, config.frozen_share)
        run = Run(config.run, driver="reward_model", config_text=dump(config))
        module = run.prepare(Ranker(scorer))
    size, best = scorer.config.image_size, best_so_far(run.folder)

    for step in run.steps():
        module.train()
        for micro in range(run.accumulation):
            indices = run.image_indices(step, micro)
            chosen = items_at(train, indices, config.run.seed)
            pixels, prompts = load(chosen, size)
            own = [
                generator
                for ranking, generator in zip(chosen, map(run.generator, indices), strict=True)
                for _ in ranking.paths
            ]
            pixels = shifted(pixels, own, config.shift)
            with run.accumulate():
                raw = module(pixels.to(run.device), prompts)
                better, worse = raw[places(chosen).to(run.device)]
                loss = ranking_loss(better, worse) if len(better) else raw.sum() * 0  # nothing but ties
                run.update(loss, accuracy=(better > worse).float().mean() if len(better) else 0.5)
        if (step + 1) % config.valid_every == 0 or run.due("save_every", step):
            with run.ema_weights():
                accuracy = validate(scorer, held, size, run.device)
                run.log(step, valid_accuracy=accuracy)
                if run.is_main and accuracy >= best:
                    best = accuracy
                    scorer.save(run.folder / "scorer")
        if run.due("save_every", step):
            run.save(step)
    return run.finish()


def best_so_far(folder: Path) -> float:
    """Return the highest accuracy that the run has noted before it was stopped; 0 for a new run."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return max((row["valid_accuracy"] for row in rows if "valid_accuracy" in row), default=0.0)


@torch.no_grad()
def validate(scorer: ImageReward, held: list[Ranked], size: int, device: torch.device) -> float:
    """Return the pooled pair accuracy on held-out rankings, and set the scorer's statistics to theirs."""
    scorer.eval()
    raws, right, number = [], 0, 0
    for start in range(0, len(held), 16):
        chosen = held[start : start + 16]
        pixels, prompts = load(chosen, size)
        raw = scorer.raw(pixels.to(device), prompts).float().cpu()
        better, worse = raw[places(chosen)]
        raws.append(raw)
        right, number = right + int((better > worse).sum()), number + len(better)
    every = torch.cat(raws)
    scorer.set_statistics(float(every.mean()), max(float(every.std()), 1e-6))
    return right / max(number, 1)


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
