"""Agreement of a rater with a reference on images of the same prompt: functions of scores and ranks.

A rater is a scorer or an annotator; a reference is the ranks that it is compared with. A metric takes both
for one set of images and returns (hits, total). Its value over prompts is sum(hits) / sum(totals), so a
bootstrap can resample prompts.

The result of one annotator is reported next to the scorers only where both are compared with the same
reference, and a set of images has the same weight for both, whatever its number of annotators.

Letters: n images of a set, A annotators of it, K comparisons of a rater with a reference on it, N images in
total, V views of them, P prompts, S scorers. `scores` (K, n): higher is better. `ranks` (K, n): lower is
better, ties allowed; only their order matters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from preftune.bootstrap import ratios

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats], tuple[float, float]]
"""scores (K, n) and ranks (K, n) -> hits and total."""

ANNOTATORS, MEAN, OTHERS, JUDGE = "annotators", "annotators' mean", "mean of the others", "judge"
"""The references: the ranking of each annotator; the mean rank of all annotators (published by HPD v2); the
mean rank of all other annotators, for each annotator; the judge of the shapes world.
"""
GOLD = "shapes"
"""The scorer that is this judge."""
ONE = "one annotator"
"""The rater that is reported next to the scorers."""
AS_IS = "as it is"
"""The view of the images that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class RankedSet:
    """Images of one prompt that A annotators ranked."""

    prompt: int
    """Place of its prompt among the P."""
    rows: NDArray[np.intp]
    """(n,): places of its images among the N."""
    ranks: Floats
    """(A, n)."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A rater's scores (K, n) and a reference's ranks (K, n) of one set of images."""

    prompt: int
    scores: Floats
    ranks: Floats
    weight: float = 1.0
    """How much a comparison counts, > 0."""


# ---------------------------------------------------------------- metrics


def choices(values: Floats) -> Floats:
    """Return which of two images has the higher value, (K, n (n - 1) / 2): 1 the first, -1 the second, 0 a tie."""
    i, j = np.triu_indices(values.shape[1], 1)
    return np.sign(values[:, i] - values[:, j])


def pooled_accuracy(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """ImageReward's accuracy (its test.py): the share of the reference's untied pairs; a predicted tie counts as wrong.

    All pairs count alike. The text of ImageReward (arXiv 2304.05977), Table 3, says "averaged per prompt"; its code
    does not do that.
    """
    truth = choices(-ranks)
    return float(((choices(scores) == truth) & (truth != 0)).sum()), float((truth != 0).sum())


def prompt_accuracy(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """HPS v2's accuracy on ImageReward's test set (its evaluation.py): the above for each ranking, then the mean.

    Rankings of nothing but ties, on which that code divides by 0, are left out.
    """
    truth = choices(-ranks)
    right, untied = ((choices(scores) == truth) & (truth != 0)).sum(1), (truth != 0).sum(1)
    return float((right[untied > 0] / untied[untied > 0]).sum()), float((untied > 0).sum())


def inversion_score(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """HPD v2's score (HPS v2's evaluation.py, "test"): 1 - inversions / (n (n - 1) / 2), the mean over rankings.

    A pair that the reference ties is never an inversion, so ties lift the score. Predicted ties are given an order, there
    by an unstable sort and here by the order of the images.
    """
    places = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    inverted = choices(-places.astype(np.float64)) * choices(-ranks) < 0
    return float((1 - inverted.mean(1)).sum()), float(len(ranks))


def soft_agreement(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """PickScore's points (its eval_preference_predictor.py): 1 for the same choice, 1/2 where one of the two ties, else 0.

    The mean over all pairs, ties too. Without ties it is (1 + Kendall's tau) / 2. For its place between people see
    HPS (arXiv 2303.14420), Table 3, ImageReward (arXiv 2304.05977), Table 2a, and Stable Preference, Table 5 ("single
    human vs. averaged human").
    """
    points = 1 - np.abs(choices(scores) - choices(-ranks)) / 2
    return float(points.sum()), float(points.size)


def buckets(scores: Floats, ranks: Floats, *, worst: bool = False) -> Floats:
    """Return (n,): how often the rater puts the reference's best (or worst) image in each place, summed over K.

    ImageReward (arXiv 2304.05977), Fig. 16. Where the rater ties, an image is spread evenly over the places of the tie;
    where the reference ties several as best, each has its part of the 1.
    """
    marked = ranks == (ranks.max(1) if worst else ranks.min(1))[:, None]
    higher = (scores[:, None, :] > scores[:, :, None]).sum(2)[..., None]
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)[..., None]
    place = np.arange(scores.shape[1])
    spread = ((higher <= place) & (place < higher + equal)) / equal  # (K, n images, n places)
    counted: Floats = np.einsum("kip,ki->p", spread, marked / marked.sum(1, keepdims=True))
    return counted


def recall(scores: Floats, ranks: Floats, k: int) -> tuple[float, float]:
    """Recall@k: how often the best image is among the rater's k best (ImageReward, arXiv 2304.05977, Table 3 and C.2);
    for more than k images.
    """
    return (float(buckets(scores, ranks)[:k].sum()), float(len(ranks))) if scores.shape[1] > k else (0.0, 0.0)


def filtering(scores: Floats, ranks: Floats, k: int) -> tuple[float, float]:
    """Filter@k: how often the worst image is among the rater's k worst (ImageReward, arXiv 2304.05977, Table 3 and C.2)."""
    found = buckets(scores, ranks, worst=True)[-k:].sum()
    return (float(found), float(len(ranks))) if scores.shape[1] > k else (0.0, 0.0)


def flips(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """The share of choices between two images that differ; a choice that becomes a tie, or ceases to be one, differs."""
    changed = choices(scores) != choices(-ranks)
    return float(changed.sum()), float(changed.size)


ACCURACY, INVERSION = "accuracy (ImageReward)", "inversion score (HPD v2)"
PUBLISHED: dict[str, Metric] = {
    ACCURACY: pooled_accuracy,
    "accuracy per prompt (HPS v2)": prompt_accuracy,
    INVERSION: inversion_score,
}
"""The three accuracies that papers report."""
ACCURACIES: dict[str, Metric] = PUBLISHED | {"soft agreement": soft_agreement}
CHANGES = {name: f"change of {name}" for name in PUBLISHED}
FLIPPED = "flipped choices"
"""Beside the accuracies of a view: against the view that changes nothing (Stable Preference, Table 1)."""
SELECTION: dict[str, Metric] = {
    **{f"recall@{k}": partial(recall, k=k) for k in (1, 2, 4)},
    **{f"filter@{k}": partial(filtering, k=k) for k in (1, 2, 4)},
}


def by_prompt(metric: Metric, compared: Sequence[Compared], prompts: int) -> Floats:
    """Return hits and totals of each prompt, (2, P), each comparison times its weight."""
    sums = np.zeros((2, prompts))
    for one in compared:
        sums[:, one.prompt] += np.multiply(metric(one.scores, one.ranks), one.weight)
    return sums


# ---------------------------------------------------------------- raters and references


def places(ranks: Floats) -> Floats:
    """Return mid-ranks (K, n): equal images share the mean of the places that they take together.

    Whether an annotator wrote 1 1 1 2, 1 1 1 4 or 3 3 3 9, it is 2 2 2 4: places of several people can only be averaged so.
    """
    these, others = ranks[:, :, None], ranks[:, None, :]
    found: Floats = (others < these).sum(2) + ((others == these).sum(2) + 1) / 2
    return found


def references(judged: Sequence[RankedSet], gold: Floats | None) -> dict[str, list[Floats]]:
    """Return name -> for each set the ranks (Q, n) of the reference; `gold` (N,): the judge's scores, where there is one.

    Means are of mid-ranks. They need two annotators: sets of one have none (Q = 0), and both are left out where no set
    has two.
    """
    found = {ANNOTATORS: [one.ranks for one in judged]}
    several = [places(one.ranks) if len(one.ranks) > 1 else one.ranks[:0] for one in judged]
    if any(len(ranks) for ranks in several):
        found[MEAN] = [ranks.mean(0, keepdims=True) if len(ranks) else ranks for ranks in several]
        found[OTHERS] = [(ranks.sum(0) - ranks) / max(len(ranks) - 1, 1) for ranks in several]
    if gold is not None:
        found[JUDGE] = [-gold[one.rows][None] for one in judged]
    return found


def of_scorer(scores: Floats, judged: Sequence[RankedSet], reference: Sequence[Floats]) -> list[Compared]:
    """Return a scorer's scores (N,) beside each ranking of a reference."""
    return [
        Compared(prompt=one.prompt, scores=np.broadcast_to(scores[one.rows], ranks.shape), ranks=ranks)
        for one, ranks in zip(judged, reference, strict=True)
        if len(ranks)
    ]


def of_annotator(judged: Sequence[RankedSet], name: str, reference: Sequence[Floats]) -> list[Compared]:
    """Return what one annotator reaches: compared with each other, with the mean of the others, or with the judge.

    Weights are such that a set counts as much as it does for a scorer beside the same reference: A rankings, or once for the
    judge. A set of one annotator has only the judge. No annotator is compared with a mean that includes him.
    """
    assert name in (ANNOTATORS, OTHERS, JUDGE), f"no single annotator is comparable to a scorer beside {name}"
    found = []
    for one, ranks in zip(judged, reference, strict=True):
        number, scores, weight = len(one.ranks), -one.ranks, 1.0
        if name == JUDGE:
            ranks, weight = np.broadcast_to(ranks, scores.shape), 1 / number
        elif number < 2:
            continue
        elif name == ANNOTATORS:
            pairs = np.array([*permutations(range(number), 2)])
            scores, ranks, weight = scores[pairs[:, 0]], ranks[pairs[:, 1]], 1 / (number - 1)
        found.append(Compared(prompt=one.prompt, scores=scores, ranks=ranks, weight=weight))
    return found


# ---------------------------------------------------------------- the table


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
    metrics = ACCURACIES | SELECTION
    sums: Sums = {}
    for reference, ranks in reference_ranks.items():
        for rater, columns in scores.items():
            if (rater, reference) != (GOLD, JUDGE):
                sums |= reached(
                    rater, AS_IS, {reference: of_scorer(columns[0], judged, ranks)}, metrics, prompts
                )
        if reference != MEAN:
            sums |= reached(ONE, AS_IS, {reference: of_annotator(judged, reference, ranks)}, metrics, prompts)
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


def commonest_buckets(
    compared: Mapping[str, Sequence[Compared]], *, worst: bool
) -> tuple[int, dict[str, Floats]]:
    """Return the first rater's commonest number of images n in a set, and each rater's shares (n,) of the best or worst
    by place.
    """
    sizes = [one.scores.shape[1] for one in next(iter(compared.values()))]
    size = max(set(sizes), key=lambda n: (sizes.count(n), n))
    shares = {}
    for name, sets in compared.items():
        chosen = [one for one in sets if one.scores.shape[1] == size]
        if chosen:
            sums = np.sum(
                [one.weight * buckets(one.scores, one.ranks, worst=worst) for one in chosen], axis=0
            )
            shares[name] = sums / sum(one.weight * len(one.ranks) for one in chosen)
    return size, shares
