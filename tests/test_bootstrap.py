"""Intervals by hand, and against scipy's bootstrap."""

import numpy as np
import pytest
import scipy.stats

from preftune.statistics import bootstrap


def test_mean_of_two_by_hand() -> None:
    """Resamples of (0, 1) have the mean 0, 0.5 or 1 with chances 1/4, 1/2, 1/4: both ends are within 95 %."""
    assert bootstrap.mean(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)


def test_one_in_eight_by_hand() -> None:
    """The mean of resamples of seven 0 and one 8 is binomial(8, 1/8): P(0) = 0.344, P(<= 2) = 0.933, P(<= 3) = 0.989."""
    value, low, high = bootstrap.mean(np.array([8.0, *[0.0] * 7]))
    assert (value, low, high) == (1.0, 0.0, 3.0)


def test_mean_is_scipys() -> None:
    differences = np.random.default_rng(1).gamma(1.5, size=40)
    value, low, high = bootstrap.mean(differences)
    theirs = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=bootstrap.RESAMPLES, method="percentile", rng=2
    ).confidence_interval
    assert value == pytest.approx(differences.mean())
    # The bounds of two sets of 10,000 resamples differ by their own error, some hundredths of the interval's width.
    width = theirs.high - theirs.low
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_ratios_are_scipys() -> None:
    """The ratio of sums, whose numerator and denominator belong to the same prompt; the second measure is nearly full."""
    rng = np.random.default_rng(3)
    totals = rng.integers(1, 6, size=(2, 30)).astype(float)
    hits = np.minimum(totals, rng.integers(0, 6, size=(2, 30)))
    found = bootstrap.ratios(hits, totals)
    for (value, low, high), own, all_ in zip(found, hits, totals, strict=True):
        theirs = scipy.stats.bootstrap(
            (own, all_),
            lambda h, t, axis: h.sum(axis) / t.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=bootstrap.RESAMPLES,
            method="percentile",
            rng=4,
        ).confidence_interval
        assert value == pytest.approx(own.sum() / all_.sum())
        width = theirs.high - theirs.low
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_without_an_interval_there_is_none() -> None:
    value, *bounds = bootstrap.mean(np.array([0.25]))
    assert value == 0.25
    assert np.isnan(bounds).all(), "one prompt"
    hits = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    totals = np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 4.0, 0.0]])
    nothing, one, two = bootstrap.ratios(hits, totals)
    assert np.isnan(nothing).all(), "no total at all"
    assert one[0] == 0.5
    assert np.isnan(one[1:]).all(), "the resamples with a total are all equal"
    assert two.tolist() == [0.6, 0.5, 1.0], "resamples of the first alone give 1, of the second alone 0.5"


def test_the_seed_alone_decides() -> None:
    hits, totals = np.random.default_rng(0).random((2, 3, 20))
    once = bootstrap.ratios(hits, totals, seed=1)
    assert np.array_equal(once, bootstrap.ratios(hits, totals, seed=1))
    assert not np.array_equal(once, bootstrap.ratios(hits, totals, seed=2))
    assert np.array_equal(once[1:2], bootstrap.ratios(hits[1:2], totals[1:2], seed=1)), "all resampled alike"


def test_an_interval_in_words() -> None:
    assert bootstrap.interval(-0.01234, 0.5, "+.3f") == "[-0.012, +0.500]"
    assert bootstrap.interval(float("nan"), float("nan"), "+.3f") == ""
