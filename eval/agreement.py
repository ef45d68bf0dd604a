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


def predicted_ties(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """The share of the reference's untied pairs that the rater ties, which the two accuracies above count as wrong."""
    untied = choices(-ranks) != 0
    return float(((choices(scores) == 0) & untied).sum()), float(untied.sum())


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
    where the reference ties several as best, each has its part of the 1. A ranking of nothing but ties has no best
    image, and does not count.
    """
    told = untied_rankings(ranks)
    scores, ranks = scores[told], ranks[told]
    marked = ranks == (ranks.max(1) if worst else ranks.min(1))[:, None]
    higher = (scores[:, None, :] > scores[:, :, None]).sum(2)[..., None]
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)[..., None]
    place = np.arange(scores.shape[1])
    spread = ((higher <= place) & (place < higher + equal)) / equal  # (K, n images, n places)
    counted: Floats = np.einsum("kip,ki->p", spread, marked / marked.sum(1, keepdims=True))
    return counted


def untied_rankings(ranks: Floats) -> NDArray[np.bool_]:
    """Return which of K rankings are more than ties, (K,)."""
    told: NDArray[np.bool_] = ranks.max(1) > ranks.min(1)
    return told


def recall(scores: Floats, ranks: Floats, k: int) -> tuple[float, float]:
    """Recall@k: how often the best image is among the rater's k best (ImageReward, arXiv 2304.05977, Table 3 and C.2);
    for more than k images.
    """
    total = float(untied_rankings(ranks).sum())
    return (float(buckets(scores, ranks)[:k].sum()), total) if scores.shape[1] > k else (0.0, 0.0)


def filtering(scores: Floats, ranks: Floats, k: int) -> tuple[float, float]:
    """Filter@k: how often the worst image is among the rater's k worst (ImageReward, arXiv 2304.05977, Table 3 and C.2)."""
    found = buckets(scores, ranks, worst=True)[-k:].sum()
    return (float(found), float(untied_rankings(ranks).sum())) if scores.shape[1] > k else (0.0, 0.0)


def flips(scores: Floats, ranks: Floats) -> tuple[float, float]:
    """The share of choices between two images that differ; a choice that becomes a tie, or ceases to be one, differs."""
    changed = choices(scores) != choices(-ranks)
    return float(changed.sum()), float(changed.size)


ACCURACY, INVERSION = "accuracy (ImageReward)", "inversion score (HPD v2)"
PER_PROMPT, TIES = "accuracy per prompt (HPS v2)", "ties of the rater"
PUBLISHED: dict[str, Metric] = {
    ACCURACY: pooled_accuracy,
    PER_PROMPT: prompt_accuracy,
    INVERSION: inversion_score,
}
"""The three accuracies that papers report."""
TIES_ALLOWED = 0.01
"""With a larger share of ties, an annotator has no accuracy by metrics that count them as wrong: scorers never tie, and
would order half of such pairs rightly by chance.
"""
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
    judge. A set of one annotator has only the judge. No annotator is compared with a mean that includes them.
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


def commonest_buckets(
    compared: Mapping[str, Sequence[Compared]], *, worst: bool
) -> tuple[int, dict[str, Floats]]:
    """Return the first rater's commonest number of images n in a set, and each rater's shares (n,) of the best or worst
    by place. Rankings of nothing but ties do not count; where there are no others, nobody has shares.
    """
    compared = {
        name: [one for one in sets if untied_rankings(one.ranks).any()] for name, sets in compared.items()
    }
    sizes = [one.scores.shape[1] for one in next(iter(compared.values()))]
    if not sizes:
        return 0, {}
    size = max(set(sizes), key=lambda n: (sizes.count(n), n))
    shares = {}
    for name, sets in compared.items():
        chosen = [one for one in sets if one.scores.shape[1] == size]
        if chosen:
            sums = np.sum(
                [one.weight * buckets(one.scores, one.ranks, worst=worst) for one in chosen], axis=0
            )
            shares[name] = sums / sum(one.weight * untied_rankings(one.ranks).sum() for one in chosen)
    return size, shares
