"""The table of agreement: what every rater reaches against every reference by every metric, with intervals, and how
robust scorers are on changed views. Letters as in agreement.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.agreement import (
    ACCURACIES,
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGES,
    FLIPPED,
    GOLD,
    JUDGE,
    MEAN,
    ONE,
    PER_PROMPT,
    PUBLISHED,
    SELECTION,
    TIES,
    TIES_ALLOWED,
    Compared,
    Floats,
    Metric,
    RankedSet,
    by_prompt,
    flips,
    of_annotator,
    of_scorer,
    predicted_ties,
    references,
)
from preftune.statistics.bootstrap import ratios


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A line of the table: what a rater reaches against a reference by one metric, with its 95 % interval.

    The bounds are NaN where fewer than two prompts count.
    """

    rater: str
    reference: str
    view: str
    metric: str
    value: float
    low: float
    high: float
    prompts: int
    """Those that have something to count."""
    total: float
    """What is counted: pairs or rankings, those of one annotator by their weights."""


Sums = dict[tuple[str, str, str, str], Floats]
"""(rater, reference, view, metric) -> hits and totals of each prompt, (2, P)."""


def agreement_table(
    judged: Sequence[RankedSet], scores: Mapping[str, Floats], views: Sequence[str], prompts: int
) -> list[Measurement]:
    """Return every rater against every reference by every metric, then robustness; scores are name -> (V, N)."""
    reference_ranks = references(judged, scores[GOLD][0] if GOLD in scores else None)
    metrics = ACCURACIES | SELECTION | {TIES: predicted_ties}
    sums: Sums = {}
    for reference, ranks in reference_ranks.items():
        for rater, columns in scores.items():
            if (rater, reference) != (GOLD, JUDGE):
                sums |= reached(
                    rater, AS_IS, {reference: of_scorer(columns[0], judged, ranks)}, metrics, prompts
                )
        if reference != MEAN:
            sums |= by_annotator(judged, {reference: ranks}, metrics, prompts)
    for rater, columns in scores.items():
        if rater != GOLD:
            sums |= robustness(rater, columns, views, judged, reference_ranks, prompts)
    return measurements(sums)


def reached(
    rater: str,
    view: str,
    compared: Mapping[str, Sequence[Compared]],
    metrics: Mapping[str, Metric],
    prompts: int,
) -> Sums:
    """Return what a rater reaches by each metric; `compared` is reference -> the rater beside it."""
    return {
        (rater, reference, view, name): by_prompt(metric, beside, prompts)
        for reference, beside in compared.items()
        for name, metric in metrics.items()
    }


def by_annotator(
    judged: Sequence[RankedSet],
    reference_ranks: Mapping[str, Sequence[Floats]],
    metrics: Mapping[str, Metric],
    prompts: int,
) -> Sums:
    """Return what one annotator reaches against references that exclude this annotator.

    The accuracies that count a tie as wrong are left out where annotators tie more than TIES_ALLOWED of the pairs.
    """
    found: Sums = {}
    for reference, ranks in reference_ranks.items():
        beside = {reference: of_annotator(judged, reference, ranks)}
        ties, pairs = by_prompt(predicted_ties, beside[reference], prompts).sum(1)
        fair = {
            name: metric
            for name, metric in metrics.items()
            if name not in (ACCURACY, PER_PROMPT) or ties <= TIES_ALLOWED * pairs
        }
        found |= reached(ONE, AS_IS, beside, fair, prompts)
    return found


def robustness(
    rater: str,
    columns: Floats,
    views: Sequence[str],
    judged: Sequence[RankedSet],
    reference_ranks: Mapping[str, Sequence[Floats]],
    prompts: int,
) -> Sums:
    """Return a scorer's accuracies on all views but the first, their changes from it, and the share of
    choices that flip.

    Scores are (V, N), `reference_ranks` is name -> ranks of the reference. Choices between two images do
    not depend on a reference; their reference is given as the annotators.
    """
    before, *changed = (
        reached(
            rater,
            view,
            {name: of_scorer(column, judged, ranks) for name, ranks in reference_ranks.items()},
            PUBLISHED,
            prompts,
        )
        for view, column in zip(views, columns, strict=True)
    )
    before_ranks = [-columns[0][one.rows][None] for one in judged]
    found: Sums = {}
    for view, column, after in zip(views[1:], columns[1:], changed, strict=True):
        found |= after
        for (_, reference, _, name), (hits, totals) in after.items():
            gain = hits - before[rater, reference, views[0], name][0]
            found[rater, reference, view, CHANGES[name]] = np.stack([gain, totals])
        flipped = by_prompt(flips, of_scorer(column, judged, before_ranks), prompts)
        found[rater, ANNOTATORS, view, FLIPPED] = flipped
    return found


def measurements(sums: Sums) -> list[Measurement]:
    """Return the lines of all sums that count something, with their intervals."""
    sums = {key: pair for key, pair in sums.items() if pair[1].any()}
    hits, totals = np.stack([*sums.values()], axis=1)
    return [
        Measurement(
            rater=rater, reference=reference, view=view, metric=metric, value=value, low=low, high=high,
            prompts=int((total > 0).sum()), total=float(total.sum()),
        )
        for (rater, reference, view, metric), (value, low, high), total in zip(
            sums, ratios(hits, totals).tolist(), totals, strict=True
        )
    ]  # fmt: skip
