"""eval/agreement.py: each metric by hand, against a slow plain reading of its definition, and where the accuracies part."""

import math
from dataclasses import replace

import numpy as np
import pytest

from eval import agreement, correlation
from eval.agreement import (
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGES,
    JUDGE,
    MEAN,
    ONE,
    OTHERS,
    PER_PROMPT,
    TIES,
    Compared,
    RankedSet,
)
from eval.agreement_table import agreement_table
from preftune.statistics.bootstrap import mean, ratios


def rows(*values: list[float]) -> agreement.Floats:
    return np.array(values, dtype=np.float64)


def share(metric: agreement.Metric, compared: list[Compared], prompts: int) -> float:
    hits, totals = agreement.by_prompt(metric, compared, prompts)
    return float(hits.sum() / totals.sum())


def test_a_metric_that_disagrees() -> None:
    """Three prompts on which the published accuracies all differ.

    first:  places 1 2 3, scores 3 2 1. 3 of 3 pairs right; no inversion.
    second: places 1 2, scores tied. 0 of 1 right; in the order of the images no inversion either.
    third:  places 1 1 2, scores 1 3 2. Of the 2 untied pairs 1 is right; of all 3 pairs 1 is inverted.
    """
    compared = [
        Compared(prompt=0, scores=rows([3, 2, 1]), ranks=rows([1, 2, 3])),
        Compared(prompt=1, scores=rows([5, 5]), ranks=rows([1, 2])),
        Compared(prompt=2, scores=rows([1, 3, 2]), ranks=rows([1, 1, 2])),
    ]
    assert share(agreement.pooled_accuracy, compared, 3) == pytest.approx((3 + 0 + 1) / (3 + 1 + 2))
    assert share(agreement.prompt_accuracy, compared, 3) == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert share(agreement.inversion_score, compared, 3) == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert share(agreement.soft_agreement, compared, 3) == pytest.approx((3 + 0.5 + 0.5 + 0 + 1) / 7)


def test_rankings_of_ties_alone() -> None:
    """They have no untied pair: no part of an accuracy, and no inversion."""
    scores, ranks = rows([1, 2, 3]), rows([1, 1, 1])
    assert agreement.pooled_accuracy(scores, ranks) == (0, 0)
    assert agreement.prompt_accuracy(scores, ranks) == (0, 0)
    assert agreement.inversion_score(scores, ranks) == (1, 1)
    assert agreement.soft_agreement(scores, ranks) == (1.5, 3)
    assert agreement.soft_agreement(rows([2, 2, 2]), ranks) == (3, 3)
    assert agreement.recall(scores, ranks, 1) == agreement.filtering(scores, ranks, 1) == (0, 0), (
        "no best image"
    )
    assert agreement.buckets(rows([1, 2, 3], [1, 2, 3]), rows([1, 1, 1], [1, 2, 2])).tolist() == [0, 0, 1]
    alone = {"x": [Compared(prompt=0, scores=scores, ranks=ranks)]}
    assert agreement.commonest_buckets(alone, worst=False) == (0, {})


def plain(scores: list[float], ranks: list[float]) -> dict[str, tuple[float, float]]:
    """The metrics of one ranking, pair by pair."""
    n = len(scores)
    pairs = [(i, j) for i in range(n) for j in range(n) if ranks[i] < ranks[j]]
    right = sum(scores[i] > scores[j] for i, j in pairs)
    order = sorted(range(n), key=lambda i: -scores[i])
    inverted = sum(order.index(i) > order.index(j) for i, j in pairs)
    points = 0.0
    for j in range(n):
        for i in range(j):
            one, other = np.sign(scores[i] - scores[j]), np.sign(ranks[j] - ranks[i])
            points += 1.0 if one == other else 0.0 if one * other else 0.5
    return {
        "accuracy (ImageReward)": (right, len(pairs)),
        "accuracy per prompt (HPS v2)": (right / len(pairs), 1) if pairs else (0, 0),
        "inversion score (HPD v2)": (1 - inverted / (n * (n - 1) / 2), 1),
        "soft agreement": (points, n * (n - 1) / 2),
    }


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_against_the_plain_definitions(n: int) -> None:
    """40 comparisons with ties on both sides at once are the sums of the single ones."""
    rng = np.random.default_rng(n)
    scores, ranks = rng.integers(4, size=(2, 40, n)).astype(np.float64)
    singles = [plain(s, r) for s, r in zip(scores.tolist(), ranks.tolist(), strict=True)]
    for name, metric in agreement.ACCURACIES.items():
        assert metric(scores, ranks) == pytest.approx(np.sum([one[name] for one in singles], axis=0)), name


def test_recall_filter_and_buckets_by_hand() -> None:
    """The rater puts the best of four images second and the worst third; ties share."""
    scores, ranks = rows([3, 4, 2, 1]), rows([1, 2, 4, 3])
    assert agreement.buckets(scores, ranks).tolist() == [0, 1, 0, 0]
    assert agreement.buckets(scores, ranks, worst=True).tolist() == [0, 0, 1, 0]
    assert agreement.recall(scores, ranks, 1) == (0, 1)
    assert agreement.recall(scores, ranks, 2) == (1, 1)
    assert agreement.filtering(scores, ranks, 1) == (0, 1)
    assert agreement.filtering(scores, ranks, 2) == (1, 1)
    assert agreement.recall(scores, ranks, 4) == (0, 0), "of four images all four say nothing"
    assert agreement.filtering(scores, ranks, 4) == (0, 0)
    assert agreement.filtering(scores, ranks, 3) == (1, 1)
    tied = rows([2, 2, 2, 1])
    assert agreement.buckets(tied, ranks) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert agreement.buckets(tied, rows([1, 2, 3, 1])) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    constant = np.zeros((1, 8))
    for k in (1, 2, 4):
        chance = pytest.approx((k / 8, 1))
        assert agreement.recall(constant, rows([*range(1, 9)]), k) == chance
        assert agreement.filtering(constant, rows([*range(1, 9)]), k) == chance


def test_the_commonest_buckets() -> None:
    """Two sets of three and one of two: only those of three are counted."""
    compared = {
        "x": [
            Compared(prompt=0, scores=rows([3, 2, 1]), ranks=rows([1, 2, 3])),
            Compared(prompt=0, scores=rows([2, 1]), ranks=rows([2, 1])),
            Compared(prompt=0, scores=rows([3, 2, 1], [3, 2, 1]), ranks=rows([2, 1, 3], [3, 1, 2])),
        ],
        "y": [Compared(prompt=0, scores=rows([2, 1]), ranks=rows([2, 1]))],
    }
    size, shares = agreement.commonest_buckets(compared, worst=False)
    assert size == 3
    assert list(shares) == ["x"]
    assert shares["x"] == pytest.approx([1 / 3, 2 / 3, 0])
    assert agreement.commonest_buckets(compared, worst=True)[1]["x"] == pytest.approx([1 / 3, 0, 2 / 3])
    compared["x"][0] = replace(compared["x"][0], weight=4.0)
    assert agreement.commonest_buckets(compared, worst=False)[1]["x"] == pytest.approx([4 / 6, 2 / 6, 0])


@pytest.fixture
def judged() -> list[RankedSet]:
    """Two sets: three images that three annotators ranked, and two images with one annotator."""
    return [
        RankedSet(prompt=0, rows=np.array([0, 1, 2]), ranks=rows([1, 2, 3], [1, 3, 2], [2, 1, 3])),
        RankedSet(prompt=1, rows=np.array([3, 4]), ranks=rows([2, 1])),
    ]


def test_references(judged: list[RankedSet]) -> None:
    gold = np.array([0.9, 0.5, 0.1, 0.2, 0.6])
    found = agreement.references(judged, gold)
    assert list(found) == [ANNOTATORS, MEAN, OTHERS, JUDGE]
    assert found[MEAN][0] == pytest.approx(rows([4 / 3, 2, 8 / 3]))
    assert found[OTHERS][0] == pytest.approx(rows([1.5, 2, 2.5], [1.5, 1.5, 3], [1, 2.5, 2.5]))
    for name in (MEAN, OTHERS):
        assert found[name][1].shape == (0, 2), "the mean of one is not a mean"
    assert found[JUDGE][1].tolist() == [[-0.2, -0.6]]
    assert list(agreement.references(judged[1:], None)) == [ANNOTATORS]
    compared = agreement.of_scorer(gold, judged, found[ANNOTATORS])
    assert [one.scores.shape for one in compared] == [(3, 3), (1, 2)]
    assert share(agreement.pooled_accuracy, compared, 2) == pytest.approx((3 + 2 + 2 + 1) / 10)


def test_places_mean_the_same_however_ties_are_written() -> None:
    ways = rows([1, 1, 1, 2], [1, 1, 1, 4], [3, 3, 3, 9])
    assert agreement.places(ways).tolist() == [[2, 2, 2, 4]] * 3
    assert agreement.places(rows([2, 1, 2, 7], [4, 3, 2, 1])).tolist() == [[2.5, 1, 2.5, 4], [4, 3, 2, 1]]
    for one in ways:
        judged = [RankedSet(prompt=0, rows=np.arange(4), ranks=np.stack([one, [4, 3, 2, 1]]))]
        found = agreement.references(judged, None)
        assert found[MEAN][0].tolist() == [[3, 2.5, 2, 2.5]]
        assert found[OTHERS][0].tolist() == [[4, 3, 2, 1], [2, 2, 2, 4]]


def test_what_one_annotator_reaches(judged: list[RankedSet]) -> None:
    """Orders of the pairs (0 1), (0 2), (1 2): a says 0 0 1, b 0 0 2, c 1 0 1. So a-b and a-c share 2 of 3, b-c 1 of 3.

    The mean of b and c is 1.5 2 2.5 (a: 3 of 3); of a and c 1.5 1.5 3 (b: 1 of the 2 untied); of a and b 1 2.5 2.5
    (c: 1 of the 2 untied). The judge says 0 0 1: 3, 2, 2 of 3, that is 7/3 on average, and 4 of the other pair, as does its
    annotator.
    """
    found = agreement.references(judged, np.array([0.9, 0.5, 0.1, 0.2, 0.6]))
    expected = {ANNOTATORS: 2 * (2 + 2 + 1) / 18, OTHERS: (3 + 1 + 1) / 7, JUDGE: (7 / 3 + 1) / 4}
    for name, value in expected.items():
        compared = agreement.of_annotator(judged, name, found[name])
        assert share(agreement.pooled_accuracy, compared, 2) == pytest.approx(value), name
    with pytest.raises(AssertionError, match="annotators' mean"):
        agreement.of_annotator(judged, MEAN, found[MEAN])


def test_a_scorer_that_answers_as_a_fresh_annotator_reaches_what_one_annotator_does() -> None:
    """From sets of 2 and of 5 annotators, prompts with 2 being easier: by the same weights, or the numbers part.

    1000 sets of each kind and four images; the deviation of a share of 12,000 dependent pairs is below 0.01.
    """
    rng = np.random.default_rng(0)
    judged, fresh, gold = [], [], []
    for prompt in range(2000):
        number, noise = ((2, 0.3), (5, 2.0))[prompt % 2]
        truth = rng.normal(size=4)
        said = truth + noise * rng.normal(size=(number + 1, 4))
        judged.append(
            RankedSet(
                prompt=prompt, rows=np.arange(4 * prompt, 4 * prompt + 4), ranks=agreement.places(-said[1:])
            )
        )
        fresh.append(said[0])
        gold.append(truth)
    found = agreement.references(judged, np.concatenate(gold))
    for name in (ANNOTATORS, OTHERS, JUDGE):
        for title, metric in agreement.PUBLISHED.items():
            scorer, one = (
                agreement.by_prompt(metric, compared, 2000)
                for compared in (
                    agreement.of_scorer(np.concatenate(fresh), judged, found[name]),
                    agreement.of_annotator(judged, name, found[name]),
                )
            )
            assert one[1] == pytest.approx(scorer[1]), "every set weighs alike"
            shares = [pair[0].sum() / pair[1].sum() for pair in (scorer, one)]
            assert shares[0] == pytest.approx(shares[1], abs=0.015), (name, title)


def test_the_table(judged: list[RankedSet]) -> None:
    """A perfect scorer, the judge, and a view that turns one of the four choices between two images."""
    scores = {
        "x": rows([3, 2, 1, 0, 1], [2, 3, 1, 0, 1]),
        "shapes": rows([0.9, 0.5, 0.1, 0.2, 0.6], [np.nan] * 5),
    }
    found = {
        (row.rater, row.reference, row.view, row.metric): row
        for row in agreement_table(judged, scores, [AS_IS, "crop"], 2)
    }
    assert found["x", JUDGE, AS_IS, ACCURACY].value == 1
    assert found["x", ANNOTATORS, AS_IS, ACCURACY].value == pytest.approx(0.8)
    assert found[ONE, JUDGE, AS_IS, ACCURACY].value == pytest.approx((7 / 3 + 1) / 4)
    assert found[ONE, OTHERS, AS_IS, ACCURACY].value == pytest.approx(5 / 7)
    assert found["x", OTHERS, AS_IS, ACCURACY].value == pytest.approx((3 + 2 + 2) / 7)
    row = found["x", ANNOTATORS, AS_IS, ACCURACY]
    assert (row.prompts, row.total) == (2, 10)
    assert (row.low, row.high) == pytest.approx((7 / 9, 1)), "resamples are one prompt twice, or both"
    assert ("shapes", JUDGE, AS_IS, ACCURACY) not in found, "nobody is measured against themselves"
    assert (ONE, MEAN, AS_IS, ACCURACY) not in found, "an annotator is part of that mean"
    assert ("x", MEAN, AS_IS, ACCURACY) in found
    assert not any(key[0] == "shapes" and key[2] == "crop" for key in found), "the judge has no views"
    assert not any(key[3] == "recall@4" for key in found), "there are no sets of more than four"


def test_an_annotator_who_ties_has_no_accuracy_that_counts_ties_as_wrong() -> None:
    """Of the pairs (0 1), (0 2), (1 2), a ties the first, b none, and they agree on the rest: 2 of 3 for a, 2 of 2 for b."""
    tied = [
        RankedSet(prompt=p, rows=np.array([0, 1, 2]) + 3 * p, ranks=rows([1, 1, 2], [1, 2, 3]))
        for p in range(2)
    ]
    scores = {"x": np.stack([np.array([3.0, 2, 1, 3, 2, 1])])}
    found = {
        (row.rater, row.reference, row.metric): row.value for row in agreement_table(tied, scores, [AS_IS], 2)
    }
    assert found[ONE, ANNOTATORS, TIES] == pytest.approx(1 / 5)
    assert found["x", ANNOTATORS, TIES] == 0
    assert found["x", ANNOTATORS, ACCURACY] == 1
    for metric in (ACCURACY, PER_PROMPT):
        assert (ONE, ANNOTATORS, metric) not in found
    assert found[ONE, ANNOTATORS, "soft agreement"] == pytest.approx(5 / 6)
    rare = [RankedSet(prompt=0, rows=np.arange(30), ranks=rows([1, 1, *range(3, 31)], [*range(1, 31)]))]
    scores = {"x": np.arange(30.0)[None]}
    found = {(row.rater, row.metric): row.value for row in agreement_table(rare, scores, [AS_IS], 1)}
    assert found[ONE, TIES] < 0.01
    assert found[ONE, ACCURACY] > 0.99, "one tie in 870 pairs does not matter"


def test_robustness_by_every_published_accuracy_and_reference(judged: list[RankedSet]) -> None:
    """The view swaps images 0 and 1: a and b lose a pair, c gains one.

    Annotators, pooled: 3 2 2 and 1 of 10 pairs become 2 1 3 and 1. Per ranking and inversions: the same, over 4 rankings.
    Mean 4/3 2 8/3: 3 of 3 pairs become 2. Mean of the others: 3 2 2 of 7 untied pairs become 2 2 1. The judge says
    0 0 1 and 4: 4 of 4 pairs become 3.
    """
    scores = {"x": rows([3, 2, 1, 0, 1], [2, 3, 1, 0, 1]), "shapes": rows([0.9, 0.5, 0.1, 0.2, 0.6], [0] * 5)}
    found = {
        (row.reference, row.view, row.metric): row.value
        for row in agreement_table(judged, scores, [AS_IS, "crop"], 2)
        if row.rater == "x"
    }
    pooled, ranked, inverted = agreement.PUBLISHED
    expected = {
        (ANNOTATORS, pooled): (8 / 10, 7 / 10),
        (ANNOTATORS, ranked): ((3 + 2 + 2 + 3) / 12, (2 + 1 + 3 + 3) / 12),
        (ANNOTATORS, inverted): ((3 + 2 + 2 + 3) / 12, (2 + 1 + 3 + 3) / 12),
        (MEAN, pooled): (1, 2 / 3),
        (MEAN, ranked): (1, 2 / 3),
        (MEAN, inverted): (1, 2 / 3),
        (OTHERS, pooled): (7 / 7, 5 / 7),
        (OTHERS, ranked): (1, (2 / 3 + 1 + 1 / 2) / 3),
        (OTHERS, inverted): (1, (2 / 3 + 1 + 2 / 3) / 3),
        (JUDGE, pooled): (1, 3 / 4),
        (JUDGE, ranked): (1, (2 / 3 + 1) / 2),
        (JUDGE, inverted): (1, (2 / 3 + 1) / 2),
    }
    for (reference, metric), (before, after) in expected.items():
        assert found[reference, AS_IS, metric] == pytest.approx(before), (reference, metric)
        assert found[reference, "crop", metric] == pytest.approx(after), (reference, metric)
        assert found[reference, "crop", CHANGES[metric]] == pytest.approx(after - before), (reference, metric)
    assert found[ANNOTATORS, "crop", agreement.FLIPPED] == pytest.approx(1 / 4)
    assert sum(key[2] == agreement.FLIPPED for key in found) == 1, "it has no reference"


def test_an_interval_needs_two_prompts(judged: list[RankedSet]) -> None:
    """One prompt is all resamples: a width of 0 would read as certainty. Prompts that have nothing to count do not help."""
    found = agreement_table(judged, {"x": rows([3, 2, 1, 0, 1])}, [AS_IS], 2)
    assert {row.prompts for row in found} == {1, 2}
    for row in found:
        assert math.isnan(row.low) == math.isnan(row.high) == (row.prompts == 1), row


def test_flips() -> None:
    """Of three choices one is kept, one turns and one becomes a tie."""
    assert agreement.flips(rows([2, 1, 2]), -rows([3, 2, 1])) == (2, 3)


def test_interpolation_by_hand() -> None:
    """Scorers of equal deviation, one always right and one always wrong: they cancel in the middle, and a tie is wrong."""
    judged = [RankedSet(prompt=0, rows=np.array([0, 1]), ranks=rows([1, 2]))]
    good, bad, flat = np.array([20.0, 10.0]), np.array([1.0, 2.0]), np.array([4.0, 4.0])
    weights, values = correlation.interpolation(good, bad, judged, [judged[0].ranks], steps=5)
    assert weights.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert values.tolist() == [1, 1, 0, 0, 0]
    _, values = correlation.interpolation(good, flat, judged, [judged[0].ranks], steps=3)
    assert values.tolist() == [1, 1, 0], "a scorer that gives all the same only adds a constant"


def test_correlation_over_images_and_within_prompts() -> None:
    """Two scorers that agree on prompts and disagree on the images of each."""
    columns = rows([10, 12, 20, 22], [12, 10, 22, 20], [7, 7, 7, 7])
    prompts = np.array([0, 0, 1, 1])
    over = correlation.correlation(columns)
    assert over[0, 1] == pytest.approx((25 - 1) / (25 + 1)), "deviations -6 -4 4 6 and -4 -6 6 4: 96 / 104"
    assert math.isnan(over[0, 2])
    within = correlation.correlation(correlation.centred(columns, prompts))
    assert within[0, 1] == pytest.approx(-1)


def test_ratios_resample_prompts() -> None:
    """Prompts of 1 of 1 and 0 of 3: pooled 1/4, and what resamples give lies in 0, 1/4, 1. A mean is a ratio, too."""
    hits, totals = rows([1, 0], [0, 0]), rows([1, 3], [0, 0])
    (pooled, low, high), nothing = ratios(hits, totals).tolist()
    assert (pooled, low, high) == (0.25, 0, 1)
    assert np.isnan(nothing).all()
    values = np.random.default_rng(0).normal(size=(1, 50))
    value, low, high = mean(values[0])
    assert value == pytest.approx(values.mean())
    deviation = values.std() / math.sqrt(50)
    assert (high - low) / deviation == pytest.approx(2 * 1.96, rel=0.1), "as the normal distribution has it"
