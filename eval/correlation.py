"""Relations between scorers on ranked images: accuracy of mixtures of two scorers, and correlations.

Letters: N images, S scorers. Higher scores are better.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.agreement import Floats, RankedSet, of_scorer, pooled_accuracy


def interpolation(
    first: Floats, second: Floats, judged: Sequence[RankedSet], reference: Sequence[Floats], steps: int = 21
) -> tuple[Floats, Floats]:
    """Return weights w (steps,) and the pooled accuracies of (1 - w) first + w second, of scores (N,): ImageReward
    (arXiv 2304.05977), Fig. 17.

    Each is first divided by its deviation over the ranked images, since units differ; the paper does not say how it does it.
    """
    weights = np.linspace(0, 1, steps)
    rows = np.unique(np.concatenate([one.rows for one in judged]))
    first, second = (scores / (scores[rows].std() or 1.0) for scores in (first, second))
    found = []
    for weight in weights:
        compared = of_scorer((1 - weight) * first + weight * second, judged, reference)
        hits, totals = np.sum([pooled_accuracy(one.scores, one.ranks) for one in compared], axis=0)
        found.append(hits / totals if totals else np.nan)
    return weights, np.array(found)


def centred(columns: Floats, prompts: NDArray[np.intp]) -> Floats:
    """Return scores (S, N) less the mean of the images of the same prompt; `prompts` (N,) says whose each image is."""
    counts = np.maximum(np.bincount(prompts), 1)
    return np.stack([column - (np.bincount(prompts, column) / counts)[prompts] for column in columns])


def correlation(columns: Floats) -> Floats:
    """Return the correlations (S, S) of scores (S, N); NaN where a scorer gives all images the same.

    Stable Preference, Fig. 5, correlates scorers over generative models, HPS (arXiv 2303.14420), Fig. 6, over images,
    as here.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(columns))
