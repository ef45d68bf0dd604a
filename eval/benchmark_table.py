"""The table of a benchmark: models by scorers, with paired intervals over prompts, win rates and tests against a base.

Scores are title -> (P, S, R): P prompts, S images of each, R scorers; the base is one of the titles. The unit is the prompt: images of
one prompt are alike. Differences and win rates have percentile-bootstrap intervals over prompts; the sign test is exact, over
prompts whose difference is not zero; its p-values are adjusted over all claims of the table (Holm 1979).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preftune.json_values import json_value
from preftune.statistics import bootstrap, diversity
from preftune.statistics.bootstrap import interval
from preftune.statistics.image_statistics import STATISTICS
from preftune.statistics.paired import (
    holm,
    paired_differences,
    sign_test,
    standardised,
    win_shares,
    wins_ties_losses,
)

Floats = NDArray[np.float64]
LEVEL = 0.05
"""Of the adjusted p-value below which a difference counts as shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model by one scorer, against the base; of the base itself only the means are meant."""

    model: str
    scorer: str
    mean: float
    """Over prompts, of the mean over the images of a prompt."""
    best: float
    """Over prompts, of the best image of a prompt by this scorer; the mean where there is one image."""
    change: float
    low: float
    high: float
    standardised: float
    """Change in standard deviations of the base over prompts, NaN where it has none; bounds alike."""
    standardised_low: float
    standardised_high: float
    wins: int
    """Prompts whose mean over images is higher than the base's."""
    ties: int
    losses: int
    win_rate: float
    """Share of pairs (prompt, image), ties half."""
    win_low: float
    win_high: float
    p: float
    """Of the exact two-sided sign test over prompts."""
    p_holm: float
    """Adjusted for all rows of the table that are not the base's."""

    @property
    def verdict(self) -> str:
        """Return better, worse or not shown: the adjusted p is below 0.05, and the interval of the change is on that side of 0."""
        if self.p_holm < LEVEL and self.low > 0:
            return "better"
        if self.p_holm < LEVEL and self.high < 0:
            return "worse"
        return "not shown"


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A model by one scorer in one group of prompts, such as a style."""

    model: str
    scorer: str
    group: str
    mean: float
    """Of the means of the parts."""
    std: float
    """Population standard deviation of these means; NaN without parts."""
    parts: int


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A model by a measure of its images that is no score: how different they are, and what their pixels are like."""

    model: str
    measure: str
    value: float
    change: float
    low: float
    high: float
    """Of the change against the base; NaN where the measure is one number for all prompts."""


def table_rows(
    scores: Mapping[str, Floats], base: str, scorers: Sequence[str], factors: Sequence[float]
) -> list[Row]:
    """Return the rows of the base, then of the others, each with all scorers."""
    titles = [base, *(title for title in scores if title != base)]
    pairs = [
        (title, scorer, factor * scores[base][:, :, column], factor * scores[title][:, :, column])
        for title in titles
        for column, (scorer, factor) in enumerate(zip(scorers, factors, strict=True))
    ]
    differences = np.stack([paired_differences(theirs, mine) for *_, theirs, mine in pairs])
    changes = intervals(differences)
    rates = intervals(np.stack([win_shares(theirs, mine) for *_, theirs, mine in pairs]))
    rows = [
        _row(title, scorer, theirs, mine, row, change, rate)
        for (title, scorer, theirs, mine), row, change, rate in zip(
            pairs, differences, changes, rates, strict=True
        )
    ]
    claims = [index for index, row in enumerate(rows) if row.model != base]
    for index, adjusted in zip(claims, holm([rows[index].p for index in claims]), strict=True):
        rows[index] = replace(rows[index], p_holm=adjusted)
    return rows


def intervals(values: Floats) -> list[list[float]]:
    """Return mean and 95 % interval of each row of (M, P), as `bootstrap.mean`; all are resampled alike, in one pass."""
    found: list[list[float]] = bootstrap.ratios(values, np.ones_like(values)).tolist()
    return found


def _row(
    model: str,
    scorer: str,
    base: Floats,
    scores: Floats,
    differences: Floats,
    changes: Sequence[float],
    rates: Sequence[float],
) -> Row:
    """Return a row without its adjusted p-value, of scores (P, S), differences (P,), and mean and interval of change and win rate."""
    change, low, high = changes
    rate, win_low, win_high = rates
    unit = float(standardised(np.ones(1), base)[0])
    wins, ties, losses = wins_ties_losses(differences)
    p = sign_test(wins, losses)
    return Row(
        model=model, scorer=scorer, mean=float(scores.mean()), best=float(scores.max(1).mean()), change=change, low=low, high=high,
        standardised=unit * change, standardised_low=unit * low, standardised_high=unit * high, wins=wins, ties=ties, losses=losses,
        win_rate=rate, win_low=win_low, win_high=win_high, p=p, p_holm=p,
    )  # fmt: skip


def part_means(scores: Floats, part_size: int | None) -> Floats:
    """Return the means of consecutive parts of P scores, as HPS v2's own program takes them; a last part may be shorter."""
    if part_size is None:
        return scores.mean(keepdims=True)
    return np.array([scores[at : at + part_size].mean() for at in range(0, len(scores), part_size)])


def group_rows(
    scores: Mapping[str, Floats],
    groups: Sequence[str],
    scorers: Sequence[str],
    factors: Sequence[float],
    part_size: int | None,
) -> list[GroupRow]:
    """Return model by scorer by group: mean and population standard deviation of the means of its parts; then all prompts as one.

    Groups are P names; all equal where there are none. `average` is the mean over all images, as in the published tables.
    """
    rows = []
    names = list(dict.fromkeys(groups))
    places = {name: np.array([group == name for group in groups]) for name in names}
    for model, found in scores.items():
        for column, (scorer, factor) in enumerate(zip(scorers, factors, strict=True)):
            values = factor * found[:, :, column].mean(1)
            for name in names:
                means = part_means(values[places[name]], part_size)
                std = float(means.std()) if part_size is not None else float("nan")
                rows.append(
                    GroupRow(
                        model=model, scorer=scorer, group=name or "all", mean=float(means.mean()), std=std, parts=len(means)
                    )
                )  # fmt: skip
            rows.append(
                GroupRow(
                    model=model, scorer=scorer, group="average", mean=float(values.mean()), std=float("nan"), parts=1
                )
            )  # fmt: skip
    return rows


def measures(
    statistics: Mapping[str, Floats], features: Mapping[str, Floats | None], base: str, *, within: bool = True
) -> list[Measure]:
    """Return diversity and image statistics of each model, of statistics (P, S, K) and features (P, S, D), with the change
    against the base.

    Pairwise distance (1 - cosine) and the Vendi score within a prompt need two images of a prompt, all three features. `within`:
    the S images are of one model; else each is of another training of it, and the two within a prompt are left out.
    """
    by_prompt: dict[str, dict[str, Floats]] = {}
    across: dict[str, float] = {}
    for model, table in statistics.items():
        rows = {name: table[:, :, column].mean(1) for column, name in enumerate(STATISTICS)}
        seen = features[model]
        if seen is not None:
            if within and seen.shape[1] > 1:
                rows["pairwise distance within a prompt"] = diversity.mean_pairwise_distance(seen)
                rows["Vendi score within a prompt"] = diversity.vendi(seen)
            across[model] = diversity.vendi_across(seen)
        by_prompt[model] = rows
    found = []
    for model in [base, *(model for model in by_prompt if model != base)]:
        names = list(by_prompt[model])
        differences = np.stack([by_prompt[model][name] - by_prompt[base][name] for name in names])
        for name, (change, low, high) in zip(names, intervals(differences), strict=True):
            value = float(by_prompt[model][name].mean())
            found.append(Measure(model=model, measure=name, value=value, change=change, low=low, high=high))
        if model in across:
            change = across[model] - across[base]
            found.append(
                Measure(
                    model=model, measure="Vendi score across prompts", value=across[model], change=change, low=float("nan"),
                    high=float("nan"),
                )
            )  # fmt: skip
    return found


def conclusions(rows: Sequence[Row], base: str) -> list[str]:
    """Return a sentence for each model but the base: by which scorers it is better or worse, by how much, and how sure."""
    found = []
    for model in dict.fromkeys(row.model for row in rows if row.model != base):
        mine = [row for row in rows if row.model == model]
        parts = []
        for verdict, words in (("better", "better than"), ("worse", "worse than")):
            shown = [row for row in mine if row.verdict == verdict]
            if shown:
                parts.append(f"{words} {base} by {', '.join(map(_in_words, shown))}")
        rest = [row for row in mine if row.verdict == "not shown"]
        if rest:
            parts.append(f"not shown to differ from {base} by {', '.join(map(_in_words, rest))}")
        found.append(f"{model} is {'; '.join(parts)}.")
    return found


def _in_words(row: Row) -> str:
    bounds = interval(row.low, row.high, "+.3f")
    return f"{row.scorer} ({row.change:+.3f}{f' {bounds}' if bounds else ''}, wins {100 * row.win_rate:.0f} %, p {in_p(row.p_holm)})"


def in_p(p: float) -> str:
    """Return a p-value as text."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def to_text(rows: Sequence[Row], base: str) -> str:
    """Return the table as printed."""
    wide = max(5, *(len(row.model) for row in rows))
    lines = [
        f"{'model':{wide}s} {'scorer':18s} {'mean':>9s} {'change':>9s} {'95 % interval':>20s} {'win rate':>8s} {'p (Holm)':>9s}  verdict"
    ]
    for row in rows:
        start = f"{row.model:{wide}s} {row.scorer:18s} {row.mean:9.4f}"
        if row.model == base:
            lines.append(f"{start} {'base':>9s}")
            continue
        lines.append(
            f"{start} {row.change:+z9.4f} {interval(row.low, row.high, '+z.4f'):>20s} {100 * row.win_rate:7.1f}% {in_p(row.p_holm):>9s}"
            f"  {row.verdict}"
        )
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return a row as JSON has it."""
    return json_value(asdict(value) | ({"verdict": value.verdict} if isinstance(value, Row) else {}))
