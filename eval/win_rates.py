"""Computations of the methods table: wins, ties and win rates, bootstrap intervals, heat maps and CSV.

Scores are name -> (seeds, prompts, scorers), with the base first. Win rate is wins / (wins + losses), as in
ImageReward (arXiv 2304.05977, Table 4).
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from eval.flags import BASE
from eval.heat_maps import finite, heat_map
from preftune.images import save_figure
from preftune.statistics import bootstrap
from preftune.statistics.bootstrap import interval
from preftune.statistics.paired import wins_ties_losses


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """A line of the table: a method by one scorer, against the base."""

    method: str
    scorer: str
    mean: float
    change: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    images: int

    @property
    def win_rate(self) -> float:
        """Return wins / (wins + losses); NaN where all are ties."""
        return self.wins / (self.wins + self.losses) if self.wins + self.losses else math.nan


def method_table(
    scores: Mapping[str, NDArray[np.float64]], scorers: Sequence[str], images: Mapping[str, int]
) -> list[MethodResult]:
    """Return the rows of all methods and scorers; scores are name -> (seeds, prompts, scorers), the base's first."""
    base = scores[BASE]
    rows = []
    for name, found in scores.items():
        for column, scorer in enumerate(scorers):
            difference = found[:, :, column] - base[:, :, column]
            change, low, high = bootstrap.mean(difference.mean(0))
            wins, ties, losses = wins_ties_losses(difference)
            rows.append(
                MethodResult(
                    method=name, scorer=scorer, mean=float(found[:, :, column].mean()), change=change, low=low, high=high,
                    wins=wins, ties=ties, losses=losses, images=images[name],
                )
            )  # fmt: skip
    return rows


def win_rates(scores: Mapping[str, NDArray[np.float64]], column: int) -> NDArray[np.float64]:
    """Return (methods, methods): the win rate of the row's method against the column's by one scorer; NaN on the
    diagonal.
    """
    names = list(scores)
    rates = np.full((len(names), len(names)), np.nan)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            difference = scores[one][:, :, column] - scores[other][:, :, column]
            wins, _, losses = wins_ties_losses(difference)
            if wins + losses:
                rates[i, j] = wins / (wins + losses)
    return rates


def percent(share: float) -> str:
    """Return a share as a heat map says it."""
    return f"{100 * share:.0f} %"


def heat_maps(scores: Mapping[str, NDArray[np.float64]], scorers: Sequence[str], path: Path) -> None:
    """Write the win rates between all methods as an image, a map for each scorer."""
    names = list(scores)
    side = 1.1 * len(names) + 1.6
    figure, axes = plt.subplots(
        1, len(scorers), figsize=(side * len(scorers), side), squeeze=False, layout="constrained"
    )
    for column, (axis, scorer) in enumerate(zip(axes[0], scorers, strict=True)):
        rates = win_rates(scores, column)
        axis.set_title(f"win rate of row over column: {scorer}", fontsize=9)
        heat_map(axis, rates, names, limits=(-0.5, 1.5), words=percent, cells=finite(rates))
    save_figure(figure, path)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return lines of CSV; a number that there is none for, NaN, is an empty cell."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in row])
    return text.getvalue()


def to_csv(rows: Sequence[MethodResult]) -> str:
    """Return the table as CSV."""
    names = [
        "method",
        "scorer",
        "mean",
        "change",
        "low",
        "high",
        "wins",
        "ties",
        "losses",
        "win_rate",
        "images",
    ]
    return csv_text(names, ([getattr(row, name) for name in names] for row in rows))


def scores_csv(
    scores: Mapping[str, NDArray[np.float64]],
    scorers: Sequence[str],
    seeds: Sequence[int],
    prompts: Sequence[str],
) -> str:
    """Return every score as CSV, a line for each method, training seed and prompt."""
    lines = (
        [name, seed, prompt, *row]
        for name, found in scores.items()
        for seed, by_prompt in zip(seeds, found.tolist(), strict=True)
        for prompt, row in zip(prompts, by_prompt, strict=True)
    )
    return csv_text(["method", "seed", "prompt", *scorers], lines)


def to_text(rows: Sequence[MethodResult]) -> str:
    """Return the table as printed."""
    lines = [
        f"{'method':16s} {'scorer':18s} {'mean':>8s} {'change':>8s} {'95 % interval':>18s} {'wins':>6s} {'ties':>6s} {'win rate':>8s} {'images':>8s}"
    ]
    for row in rows:
        bounds = interval(row.low, row.high, "+z.3f")
        against = (
            f"{row.change:+z8.3f} {bounds:>18s} {row.wins:6d} {row.ties:6d} {100 * row.win_rate:7.1f}%"
            if row.method != BASE
            else " " * 50
        )
        lines.append(f"{row.method:16s} {row.scorer:18s} {row.mean:8.3f} {against} {row.images:8d}")
    return "\n".join(lines)
