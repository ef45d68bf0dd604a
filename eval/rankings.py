"""Reading of ranked images for evaluation: every image once, and the sets that annotators ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval.agreement import RankedSet, choices
from eval.view_scores import PromptedImage
from preftune.records import Ranking, read_rankings


@dataclass(frozen=True, kw_only=True)
class RankedImages:
    """What folders of rankings hold."""

    images: list[PromptedImage]
    """N images, each once."""
    judged: list[RankedSet]
    """Sets of them that annotators ranked."""
    prompts: list[str]
    """P prompts."""
    repeated: int
    """Rankings that were skipped, since the same source had ranked the same images before."""


def read_ranked_images(folders: Sequence[Path], count: int | None) -> RankedImages:
    """Return the rankings of the folders, at most `count` prompts of each; ValueError for what is wrong with them.

    A second ranking of the same images by the same source is skipped, also from another folder. Each ranking without a
    source counts as another annotator's.
    """
    prompts: dict[str, int] = {}
    images: dict[PromptedImage, int] = {}
    found: dict[tuple[int, tuple[int, ...]], list[list[int]]] = {}
    known: set[tuple[int, tuple[int, ...], str]] = set()
    repeated = 0
    for folder in folders:
        for ranking in first_prompts(read_rankings(folder), count):
            prompt = prompts.setdefault(ranking.prompt, len(prompts))
            numbers = [
                images.setdefault(PromptedImage(path=path, prompt=ranking.prompt), len(images))
                for path in ranking.paths
            ]
            # Annotators may list the same images in another order.
            ordered = sorted(zip(numbers, ranking.ranks, strict=True))
            rows = tuple(row for row, _ in ordered)
            if ranking.source and (prompt, rows, ranking.source) in known:
                repeated += 1
                continue
            known.add((prompt, rows, ranking.source))
            found.setdefault((prompt, rows), []).append([rank for _, rank in ordered])
    judged = [
        RankedSet(prompt=prompt, rows=np.array(rows), ranks=np.array(ranks, dtype=np.float64))
        for (prompt, rows), ranks in found.items()
    ]
    return RankedImages(images=list(images), judged=judged, prompts=list(prompts), repeated=repeated)


def first_prompts(rankings: Sequence[Ranking], count: int | None) -> list[Ranking]:
    """Return the rankings of the first `count` prompts."""
    chosen = set(list(dict.fromkeys(ranking.prompt for ranking in rankings))[:count])
    return [ranking for ranking in rankings if ranking.prompt in chosen]


def without_rejected(judged: Sequence[RankedSet], rejected: Mapping[int, str]) -> list[RankedSet]:
    """Return the sets without the rejected images; sets of fewer than two are gone."""
    sound = []
    for one in judged:
        kept = np.array([row not in rejected for row in one.rows.tolist()])
        if kept.sum() >= 2:
            sound.append(replace(one, rows=one.rows[kept], ranks=one.ranks[:, kept]))
    return sound


def sound_sets(ranked: RankedImages, rejected: Mapping[int, str]) -> list[RankedSet]:
    """Return the sets without the rejected images; ValueError where none is left."""
    sound = without_rejected(ranked.judged, rejected)
    if not sound:
        raise ValueError(
            f"no ranking has two images left: {len(rejected)} of {len(ranked.images)} were set aside, the first because"
            f" {rejected[min(rejected)]}"
        )
    return sound


def rejected_rows(images: Sequence[PromptedImage], rejected: Mapping[int, str]) -> list[dict[str, str]]:
    """Return the rejected images and why, as rejected.jsonl has them."""
    return [{"image": str(images[row].path), "reason": why} for row, why in sorted(rejected.items())]


def summary(judged: Sequence[RankedSet], rejected: int, repeated: int) -> str:
    """Return a sentence on what is measured: what is left, what was set aside, and what was skipped."""
    images = len({row for one in judged for row in one.rows.tolist()})
    rankings = sum(len(one.ranks) for one in judged)
    pairs = sum(int((choices(one.ranks) != 0).sum()) for one in judged)
    prompts = len({one.prompt for one in judged})
    alone = sum(len(one.ranks) == 1 for one in judged)
    parts = [
        f"{images} images of {prompts} prompts, {rankings} rankings with {pairs} untied pairs",
        f"{rejected} images set aside",
    ]
    if repeated:
        parts.append(f"{repeated} rankings skipped, whose source had ranked the same images before")
    if alone:
        parts.append(
            f"{alone} of {len(judged)} sets have a single annotator, who is held against no other and no mean"
        )
    return "; ".join(parts)
