"""Comparison of two models on the same prompts and seeds.

P prompts, S seeds. Scores are (P, S): row p holds the images of prompt p, column s those of its seed s, alike for both models. The
unit is the prompt: images of one prompt are alike, so P, and not P x S, says how sure a comparison is.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

_Z = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
_ROUNDING = 1e-7
"""Relative precision of float32, which scorers compute in: scores that differ by less are alike."""


def paired_differences(base: Floats, other: Floats) -> Floats:
    """Return how much better the other is for each prompt, (P,): the mean over seeds of other - base, both (P, S).

    Its mean and interval are `bootstrap.mean`. ValueError for shapes that differ.
    """
    _check(base, other)
    return (other - base).mean(1)


def standardised(differences: Floats, base: Floats) -> Floats:
    """Return differences (P,) in standard deviations of the base over prompts (of its means over seeds, divided by P - 1).

    Scorers then share a unit, and their mean is a measure of several. NaN where the base, (P, S), scores all prompts alike, and
    for a single prompt.
    """
    if len(base) < 2:
        return np.full(len(differences), np.nan)
    means = base.mean(1)
    std = means.std(ddof=1)
    differs = std > _ROUNDING * np.abs(means).max()
    return differences / std if differs else np.full(len(differences), np.nan)


def wins_ties_losses(differences: Floats) -> tuple[int, int, int]:
    """Return how many differences, of any shape, are positive, zero and negative."""
    return int((differences > 0).sum()), int((differences == 0).sum()), int((differences < 0).sum())


def win_shares(base: Floats, other: Floats) -> Floats:
    """Return for each prompt the share of seeds whose image is better than the base's, ties half, (P,) in [0, 1].

    With several seeds the interval of the win rate is `bootstrap.mean` of it, with one also `wilson`. ValueError for shapes that
    differ.
    """
    _check(base, other)
    return (np.sign(other - base) / 2 + 0.5).mean(1)


def win_rate(base: Floats, other: Floats) -> float:
    """Return the share of pairs (prompt, seed) that the other wins, ties half, in [0, 1], of scores (P, S)."""
    return float(win_shares(base, other).mean())


def wilson(wins: float, n: float) -> tuple[float, float]:
    """Return the 95 % score interval of a rate of `wins` in n independent trials (Wilson 1927), in [0, 1].

    Ties may count half. NaN without trials. ValueError for wins outside 0..n.
    """
    if not 0 <= wins <= n:
        raise ValueError(f"wins must lie in 0..{n:g}, got {wins:g}; count ties half in both")
    if n == 0:
        return math.nan, math.nan
    rate, square = wins / n, _Z**2 / n
    middle = (rate + square / 2) / (1 + square)
    half = math.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the p-value of the exact two-sided sign test (Dixon and Mood 1946); ties do not count; 1 where all are ties.

    `wins` and `losses` count independent pairs: prompts, by the sign of their difference.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several claims, adjusted so that all that are below a level hold together (Holm 1979).

    In the order given. The chance that any claim below the level is false is no more than the level, however they depend on
    each other. ValueError for a number outside [0, 1].
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values lie in [0, 1], got {wrong[0]:g}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _check(base: Floats, other: Floats) -> None:
    """Raise ValueError unless both are scores (P, S) of the same prompts and seeds."""
    if base.shape != other.shape or base.ndim != 2 or not base.size:
        raise ValueError(
            f"scores to pair must be two arrays (prompts, seeds) of one shape, got {base.shape} and {other.shape}"
        )
