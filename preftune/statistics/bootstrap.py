"""Percentile-bootstrap confidence intervals of means and rates over prompts (Efron and Tibshirani 1993,
chapter 13).

P prompts, M measures, R resamples.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Of every interval."""
_AT_ONCE = 1000  # resamples whose counts are in memory together

Floats = NDArray[np.float64]


def mean(differences: Floats, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Return the mean of P differences and its 95 % interval; NaN bounds for a single prompt."""
    value, low, high = ratios(differences[None], np.ones((1, len(differences))), seed, resamples)[0].tolist()
    return value, low, high


def counts(prompts: int, seed: int = 0, resamples: int = RESAMPLES) -> Iterator[tuple[slice, Floats]]:
    """Yield, some resamples at a time, which they are, and how often each has each of P prompts: (rows, P), which sum to P.

    A statistic that is no ratio of sums is computed of them: the means over prompts of values (P, M) are counts @ values / P.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        chosen = rng.integers(prompts, size=(rows, prompts)) + prompts * np.arange(rows)[:, None]
        found = np.bincount(chosen.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        yield slice(start, start + rows), found.astype(np.float64)


def ratios(hits: Floats, totals: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Return (M, 3): sum(hits) / sum(totals) over prompts, both (M, P), and the 95 % interval of it.

    All M are resampled alike. NaN where the totals are 0; resamples whose totals are 0 do not count. The bounds are NaN, too,
    where fewer than two prompts have a total: all resamples are equal then, and an interval without width would read as certainty.
    """
    resampled = np.full((resamples, len(hits)), np.nan)
    for rows, times in counts(hits.shape[1], seed, resamples):
        below = times @ totals.T
        np.divide(times @ hits.T, below, out=resampled[rows], where=below > 0)
    found = np.full((len(hits), 3), np.nan)
    counting = (totals > 0).sum(1)
    some, several = counting > 0, counting > 1
    found[some, 0] = hits[some].sum(1) / totals[some].sum(1)
    if several.any():
        found[several, 1:] = np.nanpercentile(resampled[:, several], [2.5, 97.5], axis=0).T
    return found


def interval(low: float, high: float, form: str) -> str:
    """Return "[low, high]", each in a format such as "+.3f"; empty for bounds of NaN, where there is no interval."""
    return "" if np.isnan(low) else f"[{low:{form}}, {high:{form}}]"
