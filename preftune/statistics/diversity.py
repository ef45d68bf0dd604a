"""How different images are: mean pairwise distance and Vendi score, of images of one prompt and of images of different prompts.

G groups of m images each, D features of an image. Features are unit vectors (preftune/statistics/image_features.py makes them).
A Vendi score depends on m, so only scores of the same m compare.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def mean_pairwise_distance(features: Floats) -> Floats:
    """Return the mean of 1 - cosine over all pairs of the images of each group, (...) in [0, 2], of features (..., m, D).

    ValueError for m below 2, and for vectors of another length than 1.
    """
    count = features.shape[-2]
    _check(features, 2)
    # |sum x|^2 holds the m squares, which are 1, and each pair twice.
    total = np.square(features.sum(-2)).sum(-1)
    found: Floats = 1 - (total - count) / (count * (count - 1))
    return found


def vendi(features: Floats) -> Floats:
    """Return the Vendi score of each group, (...) in [1, m]: exp of the entropy of the eigenvalues of K / m, K the m cosines by m.

    Friedman and Dieng 2022 (arXiv 2210.02410), definition 3.1: m equal images have 1, m orthogonal ones m. Features are
    (..., m, D). ValueError for vectors of another length than 1.
    """
    _check(features, 1)
    count, width = features.shape[-2:]
    rows = features / np.sqrt(count)
    across = np.swapaxes(rows, -1, -2)
    # K / m and the covariance (D, D) have the same eigenvalues but for zeros; the smaller one is quicker.
    values = np.linalg.eigvalsh(rows @ across if count <= width else across @ rows).clip(0)
    logs = np.log(values, where=values > 0, out=np.zeros_like(values))
    found: Floats = np.exp(-(values * logs).sum(-1))
    return found


def vendi_across(features: Floats) -> float:
    """Return the mean over seeds of the Vendi score of one image of each prompt, of features (P, S, D): low where a style takes over.

    ValueError as `vendi`.
    """
    return float(vendi(np.swapaxes(features, 0, 1)).mean())


def _check(features: Floats, least: int) -> None:
    """Raise ValueError unless there are `least` images or more in a group, and all features are unit vectors."""
    if features.ndim < 2 or features.shape[-2] < least:
        raise ValueError(
            f"diversity needs features (images, width) of {least} images or more, got {features.shape}"
        )
    lengths = np.linalg.norm(features, axis=-1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ValueError(
            f"features must be unit vectors, got lengths {lengths.min():.3g} to {lengths.max():.3g}; divide each by its length"
        )
