"""Best of n: what a tuning is worth in images generated and thrown away, a unit without scale.

A pool has N images of a prompt. The best of n of them scores more, the larger n is; a tuned model whose one image scores as much
as the best of 3.4 of the base is "worth best of 3.4".
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special

Floats = NDArray[np.float64]


def weights(pool: int, n: int) -> Floats:
    """Return (N,) the weights of a pool's scores in rising order in the mean of the best of n: C(i - 1, n - 1) / C(N, n).

    The share of all draws of n without replacement in which the i-th score is the largest. The largest score has n / N; each
    lower one (i - n) / (i - 1) of the weight above it, so that no binomial overflows. ValueError unless 1 <= n <= N.
    """
    if not 1 <= n <= pool:
        raise ValueError(f"n must lie in 1..{pool}, the images in the pool, got {n}")
    ranks = np.arange(pool, 1, -1, dtype=np.float64)
    falling = np.concatenate([[1.0], np.cumprod(np.maximum(ranks - n, 0) / (ranks - 1))])
    return n / pool * falling[::-1]


def expected_best(scores: Floats, n: int) -> Floats:
    """Return the mean score of the best of n images drawn from each pool, (...), of scores (..., N).

    The unbiased estimator sum_i C(i - 1, n - 1) / C(N, n) r_(i) over scores r in rising order; n = 1 is their mean, n = N their
    maximum. ValueError unless 1 <= n <= N.
    """
    found: Floats = np.sort(scores, axis=-1) @ weights(scores.shape[-1], n)
    return found


def curve(scores: Floats) -> Floats:
    """Return the mean score of the best of 1, 2, ... N images, (..., N), of scores (..., N)."""
    pool = scores.shape[-1]
    table = np.stack([weights(pool, n) for n in range(1, pool + 1)], axis=1)
    found: Floats = np.sort(scores, axis=-1) @ table
    return found


def normal_maximum(n: float) -> float:
    """Return the mean of the largest of n standard normal numbers: .564, 1.029, 1.424, 1.766 for n = 2, 4, 8, 16.

    The integral over x > 0 of 1 - P(x)^n - (1 - P(x))^n, with P the normal distribution function. n may be broken. ValueError for
    n below 1.
    """
    if not n >= 1:
        raise ValueError(f"n must be at least 1, got {n:g}")
    value, _ = integrate.quad(
        lambda x: -math.expm1(n * special.log_ndtr(x)) - special.ndtr(-x) ** n,
        0,
        40,
        points=(1, 5),
        limit=200,
    )
    return float(value)


def kl(n: float) -> float:
    """Return log n - (n - 1) / n, in nats: how far the distribution of the best of n is from that of one image.

    Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3. ValueError for n below 1.
    """
    if not n >= 1:
        raise ValueError(f"n must be at least 1, got {n:g}")
    return math.log(n) - (n - 1) / n if math.isfinite(n) else math.inf


def equivalent(best: Floats, value: float) -> float:
    """Return n for which the best of n scores `value`: the inverse of a curve (N,), linear in log n between whole n.

    inf where value is above the best of N, which is beyond the pool; NaN where it is below the mean of one image, and for a
    value that is NaN.
    """
    if not value >= best[0]:
        return math.nan
    if value > best[-1]:
        return math.inf
    above = int(np.searchsorted(best, value))  # the first n whose best reaches the value
    if above == 0:
        return 1.0
    low, high = best[above - 1], best[above]
    share = (value - low) / (high - low)
    return float(math.exp((1 - share) * math.log(above) + share * math.log(above + 1)))


def in_words(n: float, pool: int) -> str:
    """Return what a tuning is worth, such as "best of 3.4", "more than best of 16" or "less than one image"."""
    if math.isnan(n):
        return "less than one image"
    return f"more than best of {pool}" if math.isinf(n) else f"best of {n:.1f}"
