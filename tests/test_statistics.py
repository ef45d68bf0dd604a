"""Statistics by hand, against scipy, and by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from preftune.statistics import best_of_n, bootstrap, diversity, image_statistics, paired

BASE = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [2.0, 2.0], [5.0, 4.0], [1.0, 1.0]])
OTHER = np.array([[2.0, 3.0], [1.0, 0.0], [2.0, 1.0], [2.0, 2.0], [8.0, 4.0], [1.0, 3.0]])
"""Six prompts, two seeds. Differences by prompt: 1, .5, -.5, 0, 1.5, 1."""


def test_six_prompts_by_hand() -> None:
    found = paired.paired_differences(BASE, OTHER)
    assert found.tolist() == [1.0, 0.5, -0.5, 0.0, 1.5, 1.0]
    assert paired.wins_ties_losses(found) == (4, 1, 1)
    assert paired.sign_test(4, 1) == pytest.approx(2 * (1 + 5) / 32), "P(4 or 5 of 5) twice"
    assert paired.win_shares(BASE, OTHER).tolist() == [1.0, 0.75, 0.25, 0.5, 0.75, 0.75]
    assert paired.win_rate(BASE, OTHER) == pytest.approx(4 / 6), "5 wins and 6 ties, half each, of 12"


def test_standardised_by_the_base() -> None:
    """The base's means over seeds are 1.5, 0, 2, 2, 4.5, 1: mean 11/6, squares about it 11.3333, std sqrt(11.3333 / 5)."""
    differences = paired.paired_differences(BASE, OTHER)
    std = math.sqrt((2.25 + 4 + 4 + 20.25 + 1 - 11**2 / 6) / 5)
    assert paired.standardised(differences, BASE) == pytest.approx(differences / std)
    assert np.isnan(paired.standardised(differences[:1], BASE[:1])).all(), "one prompt has no deviation"
    assert np.isnan(paired.standardised(differences, np.ones((6, 2)))).all()
    rounded = np.full((6, 2), 0.1) * (1 + 1e-16 * np.arange(12).reshape(6, 2))
    assert np.isnan(paired.standardised(differences, rounded)).all(), "rounding is no difference"


def test_unequal_shapes_are_not_paired() -> None:
    with pytest.raises(ValueError, match=r"\(6, 2\) and \(6, 1\)"):
        paired.paired_differences(BASE, OTHER[:, :1])
    with pytest.raises(ValueError, match=r"\(6,\) and \(6,\)"):
        paired.win_rate(BASE[:, 0], OTHER[:, 0])


def test_wilson_by_hand_and_as_scipy() -> None:
    assert paired.wilson(60, 100) == pytest.approx((0.502, 0.691), abs=5e-4)
    for wins, n in ((0, 1), (0, 7), (7, 7), (3, 8), (60, 100)):
        theirs = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
        assert paired.wilson(wins, n) == pytest.approx((theirs.low, theirs.high))
    low, high = paired.wilson(2.5, 5)
    assert low + high == pytest.approx(1), "ties count half"
    assert np.isnan(paired.wilson(0, 0)).all()
    with pytest.raises(ValueError, match=r"must lie in 0\.\.5, got 6"):
        paired.wilson(6, 5)


def test_sign_test_by_hand() -> None:
    assert paired.sign_test(60, 40) == pytest.approx(0.0569, abs=5e-5)
    tail = sum(math.comb(100, k) for k in range(60, 101))
    assert paired.sign_test(40, 60) == pytest.approx(2 * tail / 2**100)
    assert paired.sign_test(5, 0) == 2 / 32
    assert paired.sign_test(3, 3) == 1
    assert paired.sign_test(0, 0) == 1


def test_holm_by_hand() -> None:
    """Sorted .005, .01, .03, .04 times 4, 3, 2, 1 are .02, .03, .06, .04; the last is lifted to .06."""
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0]
    assert paired.holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        paired.holm([0.1, 1.5])


def test_bootstrap_covers_what_it_says() -> None:
    """1,000 comparisons of two models on 60 prompts with 2 seeds, whose prompts differ more than the models do."""
    rng, truth, inside = np.random.default_rng(0), 0.3, 0
    for repeat in range(1000):
        prompts = rng.normal(size=(60, 1))
        base = prompts + 0.5 * rng.normal(size=(60, 2))
        other = prompts + truth + 0.3 * rng.normal(size=(60, 1)) + 0.5 * rng.normal(size=(60, 2))
        differences = paired.paired_differences(base, other)
        _, low, high = bootstrap.mean(differences, seed=repeat, resamples=500)
        inside += low <= truth <= high
    assert 930 <= inside <= 970


def test_fewer_resamples_are_the_first_of_more() -> None:
    (rows, few), *others = bootstrap.counts(7, seed=3, resamples=5)
    assert (rows, others, few.shape) == (slice(0, 5), [], (5, 7))
    assert (few.sum(1) == 7).all()
    assert [rows.stop - rows.start for rows, _ in bootstrap.counts(7, resamples=2300)] == [1000, 1000, 300]


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_best_of_n_is_the_mean_over_all_choices(n: int) -> None:
    from itertools import combinations

    scores = np.array([[2.0, -1.0, 0.5, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0, 9.0]])
    every = np.array([[max(chosen) for chosen in combinations(row, n)] for row in scores.tolist()])
    assert best_of_n.expected_best(scores, n) == pytest.approx(every.mean(1))
    assert best_of_n.curve(scores)[:, n - 1] == pytest.approx(every.mean(1))


def test_best_of_n_of_thousands_does_not_overflow() -> None:
    pool, n = 5000, 1200
    found = best_of_n.weights(pool, n)
    exact = [Fraction(math.comb(i - 1, n - 1), math.comb(pool, n)) for i in (pool, pool - 3, pool - 40)]
    assert found[[-1, -4, -41]] == pytest.approx([float(one) for one in exact], rel=1e-12)
    assert found.sum() == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match=r"1\.\.3, the images in the pool, got 4"):
        best_of_n.weights(3, 4)


def _largest(n: float) -> float:
    """The mean of the largest of n normals by its density x n p(x) P(x)^(n - 1), on a fine grid."""
    x = np.linspace(-10, 12, 200_001)
    density = n * np.exp((n - 1) * scipy.stats.norm.logcdf(x)) * scipy.stats.norm.pdf(x)
    return float(np.trapezoid(x * density, x))


def test_best_of_n_constants() -> None:
    found = [best_of_n.normal_maximum(n) for n in (1, 2, 4, 8, 16)]
    assert found == pytest.approx([0, 0.564, 1.029, 1.424, 1.766], abs=5e-4)
    assert best_of_n.normal_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert best_of_n.normal_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    assert best_of_n.normal_maximum(1e6) == pytest.approx(_largest(1e6), rel=1e-6)
    assert [best_of_n.kl(n) for n in (1, 2, 4, 8, 16)] == pytest.approx(
        [0, 0.193, 0.636, 1.204, 1.835], abs=5e-4
    )
    assert best_of_n.kl(math.inf) == math.inf
    for function in (best_of_n.kl, best_of_n.normal_maximum):
        with pytest.raises(ValueError, match=r"at least 1, got 0.5"):
            function(0.5)


def test_the_estimator_is_unbiased() -> None:
    """The mean over many pools of 6 normals is the expected maximum of 4, where the plain maximum of 6 is not."""
    scores = np.random.default_rng(1).normal(size=(20_000, 6))
    assert best_of_n.expected_best(scores, 4).mean() == pytest.approx(best_of_n.normal_maximum(4), abs=0.02)


def test_equivalent_inverts_the_curve() -> None:
    best = np.array([0.0, 1.0, 1.0, 2.0])
    assert [best_of_n.equivalent(best, value) for value in (0.0, 1.0, 2.0)] == pytest.approx([1, 2, 4])
    assert best_of_n.equivalent(best, 0.5) == pytest.approx(math.sqrt(2)), "half way in log n"
    assert best_of_n.equivalent(best, 1.5) == pytest.approx(math.sqrt(12))
    assert best_of_n.equivalent(best, 2.1) == math.inf
    assert math.isnan(best_of_n.equivalent(best, -0.1))
    assert math.isnan(best_of_n.equivalent(best, math.nan))
    assert best_of_n.equivalent(np.zeros(3), 0.0) == 1
    words = [best_of_n.in_words(n, 8) for n in (3.4, math.inf, math.nan)]
    assert words == ["best of 3.4", "more than best of 8", "less than one image"]


def test_vendi_by_hand() -> None:
    equal = np.repeat(np.eye(4)[:1], 5, axis=0)
    sixty = np.array([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert diversity.vendi(equal) == pytest.approx(1)
    assert diversity.vendi(np.eye(4)) == pytest.approx(4)
    assert diversity.vendi(sixty) == pytest.approx(1.7548, abs=5e-5)
    assert diversity.vendi(np.stack([np.eye(3), np.eye(3)[[0, 0, 0]]])) == pytest.approx([3, 1])
    many = np.random.default_rng(0).normal(size=(40, 3))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(many @ many.T / 40).clip(1e-300)
    assert diversity.vendi(many) == pytest.approx(math.exp(-(values * np.log(values)).sum())), "by D x D"


def test_vendi_across_prompts_takes_one_image_of_each() -> None:
    """Three prompts, two seeds: all alike for the first seed, orthogonal for the second."""
    features = np.eye(3)[[[0, 0], [0, 1], [0, 2]]]
    assert diversity.vendi_across(features) == pytest.approx((1 + 3) / 2)
    assert diversity.vendi(features) == pytest.approx([1, 2, 2]), "within a prompt"


def test_pairwise_distance_by_hand() -> None:
    """Of (1, 0), (0, 1), (-1, 0) the pairs are 1, 1 and 2 apart."""
    three = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert diversity.mean_pairwise_distance(np.stack([three, three[[1, 1, 1]]])) == pytest.approx([4 / 3, 0])
    with pytest.raises(ValueError, match=r"2 images or more, got \(1, 2\)"):
        diversity.mean_pairwise_distance(three[:1])
    with pytest.raises(ValueError, match=r"unit vectors, got lengths 2 to 2"):
        diversity.vendi(2 * three)


def test_image_statistics_by_hand() -> None:
    black, grey = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.4)
    red = torch.tensor([0.5, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    pale = torch.tensor([0.8, 0.6, 0.4])[:, None, None].expand(3, 8, 8)
    rows = torch.arange(8)
    board = ((rows[:, None] + rows[None]) % 2).float().expand(3, 8, 8)
    wave = (0.5 + 0.5 * torch.sin(2 * math.pi * rows / 8)).expand(3, 8, 8)
    stripes = (rows // 4 % 2).float().expand(3, 8, 8)  # black and white halves
    pixels = torch.stack([black, grey, red, pale, board, wave, stripes])
    found = image_statistics.image_statistics(pixels)
    assert found["saturation"].tolist() == pytest.approx([0, 0, 1, 0.5, 0, 0, 0], abs=1e-6)
    assert found["contrast"].tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5 / math.sqrt(2), 0.5], abs=1e-6)
    # A square wave of period 8 has odd multiples of 1/8 alone: of them 3/8 is high, and its power is 2 (1/8 / sin(3 pi / 8))^2.
    third = 2 * (0.125 / math.sin(3 * math.pi / 8)) ** 2
    energy = found["high-frequency energy"].tolist()
    assert energy == pytest.approx([0, 0, 0, 0, 0.25, 0, third], abs=1e-6)


def test_a_pattern_of_four_pixels_is_high() -> None:
    wave = (0.5 + 0.5 * torch.sin(2 * math.pi * torch.arange(16) / 4 + 0.3)).expand(1, 3, 12, 16)
    variance = image_statistics.contrast(wave).square()
    assert image_statistics.high_frequency_energy(wave) == pytest.approx(variance, abs=1e-6)
