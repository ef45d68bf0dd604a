"""Ranked pictures as agreement is measured on them: every picture once, and the sets that annotators ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval.agreement import Judged
from eval.view_scores import Picture
from preftune.records import Ranking, read_rankings


def read(folders: Sequence[Path], count: int | None) -> tuple[list[Picture], list[Judged], list[str]]:
    """Return the pictures, the sets that annotators ranked and the prompts, at most `count` of each folder.

    ValueError for what is wrong with them.
    """
    prompts: dict[str, int] = {}
    pictures: dict[Picture, int] = {}
    found: dict[tuple[int, tuple[int, ...]], list[list[int]]] = {}
    for folder in folders:
        for ranking in first_prompts(read_rankings(folder), count):
            prompt = prompts.setdefault(ranking.prompt, len(prompts))
            rows = [
                pictures.setdefault(Picture(path=path, prompt=ranking.prompt), len(pictures))
                for path in ranking.paths
            ]
            # Annotators may list the same pictures in another order.
            ordered = sorted(zip(rows, ranking.ranks, strict=True))
            ranks = [rank for _, rank in ordered]
            found.setdefault((prompt, tuple(row for row, _ in ordered)), []).append(ranks)
    judged = [
        Judged(prompt=prompt, rows=np.array(rows), ranks=np.array(ranks, dtype=np.float64))
        for (prompt, rows), ranks in found.items()
    ]
    return list(pictures), judged, list(prompts)


def first_prompts(rankings: Sequence[Ranking], count: int | None) -> list[Ranking]:
    """Return the rankings of the first `count` prompts."""
    chosen = set(list(dict.fromkeys(ranking.prompt for ranking in rankings))[:count])
    return [ranking for ranking in rankings if ranking.prompt in chosen]


def without(judged: Sequence[Judged], rejected: Mapping[int, str]) -> list[Judged]:
    """Return the sets without the rejected pictures; sets of fewer than two are gone."""
    sound = []
    for one in judged:
        kept = np.array([row not in rejected for row in one.rows.tolist()])
        if kept.sum() >= 2:
            sound.append(replace(one, rows=one.rows[kept], ranks=one.ranks[:, kept]))
    return sound
