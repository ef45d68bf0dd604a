"""The tables and plots of eval/preference_accuracy.py: accuracies, robustness, buckets, interpolation and correlation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from eval.agreement import (
    ACCURACIES,
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGES,
    FLIPPED,
    INVERSION,
    MEAN,
    ONE,
    SELECTION,
    TIES,
    Floats,
    RankedSet,
    commonest_buckets,
    of_annotator,
    of_scorer,
)
from eval.agreement_table import Measurement
from eval.correlation import centred, correlation, interpolation
from eval.heat_maps import heat_map
from preftune.images import save_figure
from preftune.statistics.bootstrap import interval


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table of the page; empty cells where nothing was measured."""

    title: str
    keys: int
    """Number of leading columns that identify a row."""
    heads: tuple[str, ...]
    lines: list[tuple[str, ...]]


def percent(row: Measurement) -> str:
    """Return a value in per cent, and its interval where there is one."""
    form = f"{'+' if row.metric in CHANGES.values() else ''}z.1f"  # z: no -0.0
    return f"{100 * row.value:{form}} {interval(100 * row.low, 100 * row.high, form)}".rstrip()


def tables(rows: Sequence[Measurement]) -> list[PageTable]:
    """Return the tables of the page; one without lines is left out."""
    unchanged = [row for row in rows if row.view == AS_IS]
    tied = any(row.metric == TIES and row.value for row in unchanged)
    measured = [
        _pivot("Agreement", unchanged, [*ACCURACIES, *([TIES] if tied else [])], ("reference", "rater")),
        _pivot("Selection", unchanged, list(SELECTION), ("reference", "rater")),
        _pivot(
            "Robustness",
            [row for row in rows if row.view != AS_IS],
            [*CHANGES.values(), FLIPPED],
            ("reference", "rater", "view"),
        ),
    ]
    return [table for table in measured if table.lines]


def _pivot(
    title: str, rows: Sequence[Measurement], metrics: Sequence[str], keys: tuple[str, ...]
) -> PageTable:
    """Return a line for each value of the keys and a column for each metric that occurs."""
    cells = {
        (*(getattr(row, key) for key in keys), row.metric): percent(row)
        for row in rows
        if row.metric in metrics
    }
    columns = [metric for metric in metrics if any(cell[-1] == metric for cell in cells)]
    lines = [
        (*names, *(cells.get((*names, metric), "") for metric in columns))
        for names in dict.fromkeys(cell[:-1] for cell in cells)
    ]
    return PageTable(title=title, keys=len(keys), heads=(*keys, *columns), lines=lines)


def to_text(rows: Sequence[Measurement]) -> str:
    """Return the tables as printed."""
    lines = []
    for table in tables(rows):
        widths = [max(map(len, column)) for column in zip(table.heads, *table.lines, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in (table.heads, *table.lines)
        ] + [""]
    return "\n".join(lines)


def plot_all(
    rows: Sequence[Measurement], judged: Sequence[RankedSet], scores: Mapping[str, Floats], folder: Path
) -> list[Path]:
    """Write the plots and return their files; scores are name -> (views, N). No robustness without views, no pairs of
    one scorer.
    """
    first = {name: columns[0] for name, columns in scores.items()}
    paths = [folder / "accuracy.png"]
    draw_accuracies(rows, paths[0])
    if (panels := bucket_shares(judged, first)) is not None:
        paths.append(folder / "buckets.png")
        draw_buckets(panels, paths[-1])
    if any(row.view != AS_IS for row in rows):
        paths.append(folder / "robustness.png")
        draw_robustness(rows, paths[-1])
    if len(scores) > 1:
        paths += [folder / f"{name}.png" for name in ("interpolation", "correlation")]
        draw_interpolation(judged, first, paths[-2])
        draw_correlation(judged, first, paths[-1])
    return paths


def equal_accuracies(rows: Sequence[Measurement]) -> list[list[str]]:
    """Return the accuracies in groups whose values and intervals are the same for all raters and references.

    All four are one group where each set has one annotator and nobody ties.
    """
    groups: list[tuple[list[str], dict[tuple[str, str], tuple[float, float, float]]]] = []
    for metric in ACCURACIES:
        found = {
            (row.reference, row.rater): (row.value, row.low, row.high) for row in rows if row.metric == metric
        }
        for names, same in groups:
            if found.keys() == same.keys() and all(
                np.allclose(found[key], same[key], rtol=0, atol=1e-9, equal_nan=True) for key in found
            ):
                names.append(metric)
                break
        else:
            groups.append(([metric], found))
    return [names for names, found in groups if found]


def draw_accuracies(rows: Sequence[Measurement], path: Path) -> None:
    """Draw the accuracies of all raters with their intervals, a panel for each reference; those that are equal, once."""
    rows = [row for row in rows if row.view == AS_IS and row.metric in ACCURACIES]
    named = list(dict.fromkeys(row.reference for row in rows))
    raters = list(dict.fromkeys(row.rater for row in rows))
    groups = equal_accuracies(rows)
    figure, axes = plt.subplots(
        1, len(named), figsize=(2 + 3.4 * len(named), 1.6 + 0.75 * len(raters)),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, reference in zip(axes[0], named, strict=True):
        for number, equal in enumerate(groups):
            chosen = [row for row in rows if (row.reference, row.metric) == (reference, equal[0])]
            label = (
                "all four accuracies, which are equal" if len(equal) == len(ACCURACIES) else " = ".join(equal)
            )
            values = np.array([(row.value, row.low, row.high) for row in chosen]).reshape(-1, 3).T * 100
            axis.errorbar(
                values[0], [raters.index(row.rater) + 0.16 * (number - (len(groups) - 1) / 2) for row in chosen],
                xerr=np.abs(values[1:] - values[0]), fmt="o", markersize=4, capsize=2, label=label,
            )  # fmt: skip
        axis.axvline(50, color="grey", linestyle=":", linewidth=1)
        axis.set_title(f"against: {reference}", fontsize=10)
        axis.set_xlabel("per cent")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(raters)), raters)
    axes[0][0].set_ylim(len(raters) - 0.5, -0.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


def draw_robustness(rows: Sequence[Measurement], path: Path) -> None:
    """Draw changes of accuracy and flipped choices of each scorer over the views, with what Stable Preference's Table 1
    has of each data set.

    That is ImageReward's accuracy against rankings, and HPD v2's score against their mean. What nothing was counted for
    is left out.
    """
    changed = [row for row in rows if row.view != AS_IS]
    views = list(dict.fromkeys(row.view for row in changed))
    raters = list(dict.fromkeys(row.rater for row in changed))
    wanted = ((ANNOTATORS, CHANGES[ACCURACY]), (MEAN, CHANGES[INVERSION]), (ANNOTATORS, FLIPPED))
    measured = {(row.reference, row.metric) for row in changed}
    panels = [panel for panel in wanted if panel in measured]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (reference, metric) in zip(axes[0], panels, strict=True):
        for number, rater in enumerate(raters):
            chosen = [
                row for row in changed if (row.rater, row.reference, row.metric) == (rater, reference, metric)
            ]
            values = np.array([(row.value, row.low, row.high) for row in chosen]).reshape(-1, 3).T * 100
            shift = 0.08 * (number - (len(raters) - 1) / 2)
            axis.errorbar(
                [views.index(row.view) + shift for row in chosen], values[0],
                yerr=np.abs(values[1:] - values[0]), marker="o", capsize=3, label=rater,
            )  # fmt: skip
        axis.set_xticks(range(len(views)), views, fontsize=8)
        axis.set_xlim(-0.5, len(views) - 0.5)
        against = "" if metric == FLIPPED else f"\nagainst: {reference}"
        axis.set_title(f"{metric}, per cent{against}", fontsize=10)
        axis.axhline(0, color="grey", linewidth=1)
        axis.grid(alpha=0.3)
    axes[0, -1].set_ylim(bottom=0)
    axes[0, -1].legend(fontsize=8)
    save_figure(figure, path)


Panels = dict[bool, tuple[int, dict[str, Floats]]]
"""Whether it is the worst image -> number of places n, and each rater's shares (n,)."""


def bucket_shares(judged: Sequence[RankedSet], scores: Mapping[str, Floats]) -> Panels | None:
    """Return in which places the raters put the annotators' best and worst images; None where that tells nothing.

    That is where annotators tie all images, and where every rater ties them: all bars would be equal.
    """
    ranks = [one.ranks for one in judged]
    compared = {name: of_scorer(columns, judged, ranks) for name, columns in scores.items()}
    if any(len(one) > 1 for one in ranks):
        compared[ONE] = of_annotator(judged, ANNOTATORS, ranks)
    panels = {worst: commonest_buckets(compared, worst=worst) for worst in (False, True)}
    found = [share for _, shares in panels.values() for share in shares.values()]
    return None if all(np.allclose(share, share[0]) for share in found) else panels


def draw_buckets(panels: Panels, path: Path) -> None:
    """Draw the places of the annotators' best and worst images (ImageReward, arXiv 2304.05977, Fig. 16)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, (worst, (size, shares)) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(shares)
        for number, (name, share) in enumerate(shares.items()):
            at = np.arange(1, size + 1) + width * (number - (len(shares) - 1) / 2)
            axis.bar(at, 100 * share, width, label=name, color="grey" if name == ONE else f"C{number}")
        axis.axhline(100 / size, color="black", linestyle=":", linewidth=1)
        axis.set_xticks(range(1, size + 1))
        axis.set_xlabel(f"place of {size} that the rater gives")
        axis.set_title(f"the annotators' {'worst' if worst else 'best'} image, per cent", fontsize=10)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def draw_interpolation(judged: Sequence[RankedSet], scores: Mapping[str, Floats], path: Path) -> None:
    """Draw the accuracy of mixtures of any two scorers (ImageReward, arXiv 2304.05977, Fig. 17)."""
    couples = [*combinations(scores, 2)]
    figure, axis = plt.subplots(figsize=(6.5, 4 + 0.18 * len(couples)), layout="constrained")
    ranks = [one.ranks for one in judged]
    for first, second in couples:
        weights, values = interpolation(scores[first], scores[second], judged, ranks)
        axis.plot(weights, 100 * values, marker=".", label=f"{first} (0) to {second} (1)")
    axis.set_xlabel("weight of the second scorer, both divided by their deviations")
    axis.set_ylabel(f"{ACCURACY}, per cent")
    axis.set_title("mixtures of two scorers against the annotators", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save_figure(figure, path)


def draw_correlation(judged: Sequence[RankedSet], scores: Mapping[str, Floats], path: Path) -> None:
    """Draw how the scorers correlate over all images, and over those of the same prompt."""
    prompt_of = {row: one.prompt for one in judged for row in one.rows.tolist()}
    columns = np.stack([scores[name][list(prompt_of)] for name in scores])
    within = centred(columns, np.array(list(prompt_of.values())))
    side = 1.0 * len(scores) + 2
    figure, axes = plt.subplots(1, 2, figsize=(2 * side, side), layout="constrained")
    _heat_map(axes[0], correlation(columns), list(scores), "over all images")
    _heat_map(axes[1], correlation(within), list(scores), "less the mean of the same prompt")
    save_figure(figure, path)


def _heat_map(axis: Axes, values: Floats, names: Sequence[str], title: str) -> None:
    """Draw a matrix of correlations with its numbers."""
    axis.set_title(title, fontsize=10)
    heat_map(axis, values, names, limits=(-2, 2), words="{:.2f}".format)
