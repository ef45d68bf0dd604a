"""Computations of eval/distribution.py: standardised scores, what a tuning is worth in best of n, relations of scorers, plots.

Scores are title -> (P, S, R): P prompts, S images of each (a model's own number), R scorers; the base's first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from eval.compared_folders import ModelFolder
from eval.correlation import centred, correlation
from eval.folder_scores import images_by_prompt
from eval.heat_maps import finite, heat_map
from eval.view_scores import PromptedImage
from eval.win_rates import csv_text
from preftune.images import save_figure
from preftune.json_values import json_value
from preftune.statistics import best_of_n, bootstrap, paired
from preftune.statistics.bootstrap import interval

Floats = NDArray[np.float64]
RESAMPLES = 2000
QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A line of the table: a model by one scorer. What there is no number for is NaN."""

    model: str
    scorer: str
    images: int
    mean: float
    """Raw units."""
    change: float
    """Mean difference to the base, in its standard deviations over prompts, with its 95 % interval over prompts."""
    low: float
    high: float
    quantiles: tuple[float, ...]
    """QUANTILES of the images' scores, standardised by the base."""
    n: float
    """One image is worth the best of n of the base: inf beyond the pool; NaN where it is worth less than one, and without a pool."""
    n_low: float
    n_high: float
    """95 % interval; 0 where it is worth less than one image."""
    kl: float
    """Of best of n, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Return it with null for NaN and "inf" for infinity, which JSON does not know."""
        found: dict[str, Any] = json_value(asdict(self))
        return found


def units(model: ModelFolder, base: ModelFolder) -> tuple[list[list[PromptedImage]], int]:
    """Return P prompts of S images of a model, in the order of the base's prompts, and how many images are left out: S is the least
    number that a prompt has. ValueError for other prompts than the base's.
    """
    by_prompt, wanted = images_by_prompt(model), list(dict.fromkeys(row.text for row in base.rows))
    if other := set(by_prompt) ^ set(wanted):
        text = min(other)
        has, lacks = (model, base) if text in by_prompt else (base, model)
        raise ValueError(
            f"{has.folder} has images of {text[:80]!r} and {lacks.folder} has none; compare folders of one prompt list"
        )
    each = min(map(len, by_prompt.values()))
    return [by_prompt[text][:each] for text in wanted], len(model.rows) - each * len(wanted)


def table(scores: Mapping[str, Floats], scorers: Sequence[str]) -> list[ModelRow]:
    """Return the rows of all models and scorers."""
    base = next(iter(scores.values()))
    rows = []
    for name, found in scores.items():
        for column, scorer in enumerate(scorers):
            mine, theirs = found[:, :, column], base[:, :, column]
            differences = mine.mean(1) - theirs.mean(1)
            units_of_base = paired.standardised(differences, theirs)
            known = np.isfinite(units_of_base).all()
            change, low, high = (
                bootstrap.mean(units_of_base, resamples=RESAMPLES) if known else (math.nan,) * 3
            )
            n, n_low, n_high = worth(theirs, mine)
            rows.append(
                ModelRow(
                    model=name, scorer=scorer, images=mine.size, mean=float(mine.mean()), change=change, low=low, high=high,
                    quantiles=tuple(np.percentile(standardised(mine, theirs), QUANTILES).tolist()),
                    n=n, n_low=n_low, n_high=n_high, kl=best_of_n.kl(n) if n >= 1 else math.nan,
                )
            )  # fmt: skip
    return rows


def standardised(scores: Floats, base: Floats) -> Floats:
    """Return scores (P, S) less the base's mean, in its standard deviations over prompts."""
    return paired.standardised((scores - base.mean()).ravel(), base)


def worth(base: Floats, other: Floats) -> tuple[float, float, float]:
    """Return n for which the best of n images of the base, (P, N), scores as much as one of the other, (P, S), and its 95 % interval.

    The curve is the mean over prompts of each pool's unbiased estimate. A resample that is worth less than one image counts as 0. NaN
    where N is 1; NaN bounds for a single prompt.
    """
    prompts, pool = base.shape
    if pool < 2:
        return math.nan, math.nan, math.nan
    best, mine = best_of_n.curve(base), other.mean(1)
    value = best_of_n.equivalent(best.mean(0), float(mine.mean()))
    if prompts < 2:
        return value, math.nan, math.nan
    found = np.empty(RESAMPLES)
    for rows, times in bootstrap.counts(prompts, resamples=RESAMPLES):
        means = zip(times @ best / prompts, (times @ mine / prompts).tolist(), strict=True)
        found[rows] = [best_of_n.equivalent(curve, mean) for curve, mean in means]
    low, high = np.percentile(
        np.nan_to_num(found, nan=0.0, posinf=np.inf), [2.5, 97.5], method="nearest"
    ).tolist()
    return value, low, high


def scorer_correlations(scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return what is correlated -> correlations (R, R) of the scorers: over the images of a prompt, those of all models together; from
    three models on also over the models' means (Stable Preference, Fig. 5). NaN where a scorer gives all the same.
    """
    joined = np.concatenate(list(scores.values()), axis=1)  # (P, all images of it, R)
    prompts, images, count = joined.shape
    columns = joined.reshape(-1, count).T
    if images > 1:
        numbers = np.repeat(np.arange(prompts), images)
        found = {"images of a prompt": correlation(centred(columns, numbers))}
    else:
        found = {"images": correlation(columns)}
    if len(scores) > 2:
        found["models"] = correlation(np.stack([one.mean((0, 1)) for one in scores.values()], axis=1))
    return found


def box_plots(scores: Mapping[str, Floats], scorers: Sequence[str], path: Path) -> None:
    """Write the distributions: boxes from 25 to 75 %, whiskers from 5 to 95 %, the median and a dot at the mean."""
    base = next(iter(scores.values()))
    figure, axes = plt.subplots(
        1, len(scorers), figsize=(4.2 * len(scorers) + 1, 0.5 * len(scores) + 1.4), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )  # fmt: skip
    for column, (axis, scorer) in enumerate(zip(axes[0], scorers, strict=True)):
        values = [standardised(found[:, :, column], base[:, :, column]) for found in scores.values()]
        axis.boxplot(
            [one[np.isfinite(one)] for one in values], orientation="horizontal", whis=(5, 95), showfliers=False,
            showmeans=True, meanprops={"marker": "o", "markersize": 4}, widths=0.6,
        )  # fmt: skip
        axis.axvline(0, linestyle=":", color="grey")
        axis.set_yticks(range(1, len(scores) + 1), list(scores))
        axis.set_title(scorer, fontsize=9)
        axis.set_xlabel("standard deviations of the base")
    axes[0, 0].invert_yaxis()
    save_figure(figure, path)


def curves(
    scores: Mapping[str, Floats], scorers: Sequence[str], rows: Sequence[ModelRow], path: Path
) -> None:
    """Write the base's best-of-n curve for each scorer, and where the others are on it; above, the KL divergence."""
    base_name, base = next(iter(scores.items()))
    pool = base.shape[1]
    figure, axes = plt.subplots(
        1, len(scorers), figsize=(4.6 * len(scorers), 3.9), squeeze=False, layout="constrained"
    )
    for column, (axis, scorer) in enumerate(zip(axes[0], scorers, strict=True)):
        mine = base[:, :, column]
        gains = paired.standardised(best_of_n.curve(mine).mean(0) - mine.mean(), mine)
        axis.plot(range(1, pool + 1), gains, color="black", marker=".", label=f"best of n of {base_name}")
        others = [row for row in rows if row.scorer == scorer and row.model != base_name]
        for number, row in enumerate(others):
            colour = f"C{number}"
            axis.axhline(row.change, color=colour, linewidth=1, label=row.model)
            if math.isfinite(row.n):
                axis.plot([row.n], [row.change], "o", color=colour)
        axis.set_xscale("log", base=2)
        ticks = [2**power for power in range(int(math.log2(pool)) + 1)]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        above = axis.secondary_xaxis("top")
        above.set_xticks(ticks, [f"{best_of_n.kl(n):.2f}" for n in ticks], fontsize=8)
        above.minorticks_off()
        above.set_xlabel("KL of best of n, nats", fontsize=8)
        axis.set_xlabel("n")
        axis.set_ylabel("gain, standard deviations of the base")
        axis.set_title(scorer, fontsize=9)
        axis.legend(fontsize=8)
    save_figure(figure, path)


def heat_maps(correlations: Mapping[str, Floats], scorers: Sequence[str], path: Path) -> None:
    """Write the correlations of the scorers, a map for each that there is."""
    side = 0.9 * len(scorers) + 2
    figure, axes = plt.subplots(
        1, len(correlations), figsize=(side * len(correlations), side), squeeze=False, layout="constrained"
    )
    for axis, (title, found) in zip(axes[0], correlations.items(), strict=True):
        axis.set_title(f"correlation over {title}", fontsize=9)
        heat_map(axis, found, scorers, limits=(-1.5, 1.5), words="{:.2f}".format, cells=finite(found))
    save_figure(figure, path)


def n_interval(row: ModelRow, pool: int) -> str:
    """Return the interval of n in words: "[2.9, 4.1]", with "<1" and ">N" for what is off the curve; empty where there is none."""
    if math.isnan(row.n_low):
        return ""
    words = ["<1" if n < 1 else f">{pool}" if math.isinf(n) else f"{n:.1f}" for n in (row.n_low, row.n_high)]
    return f"[{', '.join(words)}]"


def sentence(row: ModelRow, base: str, pool: int) -> str:
    """Return what a row says, in words: which model is better, by how much, and how sure that is."""
    if math.isnan(row.change):
        return f"By {row.scorer} nothing can be said of {row.model}: {base} has one prompt, or the same score for all."
    sure = "one prompt does not say how sure that is" if math.isnan(row.low) else "which may be chance"
    if row.low > 0 or row.high < 0:
        sure = "more than chance"
    way = "better" if row.change > 0 else "worse"
    text = (
        f"By {row.scorer}, {row.model} is {abs(row.change):.2f} standard deviations {way} than {base}"
        f" {interval(row.low, row.high, '+z.2f')}".rstrip()
    )
    worth_of = (
        f" One of its images is worth {best_of_n.in_words(row.n, pool)} {n_interval(row, pool)}".rstrip()
    )
    return f"{text}: {sure}." + (f"{worth_of}." if pool > 1 else "")


def to_text(rows: Sequence[ModelRow], pool: int) -> str:
    """Return the table as printed."""
    lines = [
        f"{'model':16s} {'scorer':18s} {'images':>6s} {'mean':>8s} {'change':>7s} {'95 % interval':>16s}  {'worth':22s} {'95 % interval':14s} {'KL':>5s}"
    ]
    for row in rows:
        start = f"{row.model:16s} {row.scorer:18s} {row.images:6d} {row.mean:8.3f}"
        if row.model == rows[0].model:
            lines.append(start)
            continue
        words = best_of_n.in_words(row.n, pool) if pool > 1 else "one image: no pool"
        lines.append(
            f"{start} {'' if math.isnan(row.change) else f'{row.change:+z.2f}':>7s} {interval(row.low, row.high, '+z.2f'):>16s}  {words:22s} {n_interval(row, pool):14s}"
            f" {'' if math.isnan(row.kl) else f'{row.kl:5.2f}'}".rstrip()
        )
    return "\n".join(lines)


def to_csv(rows: Sequence[ModelRow]) -> str:
    """Return the table as CSV; change and quantiles in standard deviations of the base over prompts."""
    names = ["model", "scorer", "images", "mean", "change", "low", "high"]
    names += [f"q{quantile:02d}" for quantile in QUANTILES] + ["n", "n_low", "n_high", "kl"]
    lines = (
        [
            *(row.model, row.scorer, row.images, row.mean, row.change, row.low, row.high, *row.quantiles),
            *(row.n, row.n_low, row.n_high, row.kl),
        ]
        for row in rows
    )
    return csv_text(names, lines)
