"""Krippendorff's alpha: agreement of any number of observers, who need not all see all units (Krippendorff, Content
Analysis, 4th ed. 2019, chapter 12).

R observers, U units, V different values. 1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from preftune.statistics import bootstrap

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]
RESAMPLES = 2_000
"""Of an interval."""


def alpha(values: Floats, level: Level) -> float:
    """Return alpha of values (R, U), NaN where an observer has not seen a unit; NaN where nothing can be compared.

    1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck, with coincidences o, their sums n_c and n, and squared differences d. Where all
    values are alike there was no chance to disagree, and alpha is NaN.
    """
    found, scale = coincidences(values)
    return float(_alphas(found.sum(0)[None], scale, level)[0])


def with_interval(values: Floats, level: Level, seed: int = 0) -> tuple[float, float, float]:
    """Return alpha of values (R, U) and its 95 % percentile interval over resampled units, see `of_coincidences`."""
    return of_coincidences(*coincidences(values), level, seed)


def of_coincidences(found: Floats, scale: Floats, level: Level, seed: int = 0) -> tuple[float, float, float]:
    """Return alpha and its interval of the coincidences of units (U, V, V); bounds of NaN for fewer than two units that count."""
    value = float(_alphas(found.sum(0)[None], scale, level)[0])
    found = found[found.any((1, 2))]
    if len(found) < 2:
        return value, math.nan, math.nan
    flat = found.reshape(len(found), -1)
    sums = np.concatenate([times @ flat for _, times in bootstrap.counts(len(found), seed, RESAMPLES)])
    alphas = _alphas(sums.reshape(-1, *found.shape[1:]), scale, level)
    if np.isnan(alphas).all():
        return value, math.nan, math.nan
    low, high = np.nanpercentile(alphas, [2.5, 97.5]).tolist()
    return value, low, high


def coincidences(values: Floats, scale: Floats | None = None) -> tuple[Floats, Floats]:
    """Return the coincidences of each unit, (U, V, V), and the V values in their order, those that there are where not given.

    Each ordered pair of values that two observers give a unit counts 1 / (number of its observers - 1).
    """
    scale = np.unique(values[~np.isnan(values)]) if scale is None else scale
    counts = (values[..., None] == scale).sum(0).astype(np.float64)  # (U, V)
    pairs = counts[:, :, None] * counts[:, None, :]
    diagonal = range(len(scale))
    pairs[:, diagonal, diagonal] -= counts  # nobody is compared with themselves
    return pairs / np.maximum(counts.sum(1) - 1, 1)[:, None, None], scale


def _alphas(found: Floats, scale: Floats, level: Level) -> Floats:
    """Alpha of each of N tables of coincidences (N, V, V)."""
    sums = found.sum(2)  # (N, V)
    total = sums.sum(1)
    difference = _squared_differences(sums, scale, level)
    observed = (found * difference).sum((1, 2))
    expected = (sums[:, :, None] * sums[:, None, :] * difference).sum((1, 2))
    alphas = np.full(len(found), np.nan)
    np.divide(observed * (total - 1), expected, out=alphas, where=expected > 0)
    return 1 - alphas


def _squared_differences(sums: Floats, scale: Floats, level: Level) -> Floats:
    """(N or 1, V, V): nominal 0 or 1; interval (c - k)^2; ordinal the squared number of values from c to k, both ends half."""
    if level == "nominal":
        return 1 - np.eye(len(scale))[None]
    if level == "interval":
        return (scale[:, None] - scale[None])[None] ** 2
    middles = np.cumsum(sums, 1) - sums / 2
    return (middles[:, :, None] - middles[:, None, :]) ** 2
