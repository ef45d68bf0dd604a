"""Which steps of a trajectory carry a gradient: the random choices of AlignProp, DRTune, LeapAlign and FlowBP.

Steps count from 0, the first call at pure noise, to N - 1. Where an authors' constant is a step of their N, it is scaled to ours.
"""

import numpy as np

from preftune.training.direct_config import Truncation

GAUSSIAN_MEAN, GAUSSIAN_STD = 42 / 50, 5 / 50
"""Of the first live step in AlignProp's released configuration, in units of N."""


def first_live_step(rng: np.random.Generator, num_steps: int, truncation: Truncation, last: int) -> int:
    """Return the first step with gradient; all after it have one, too.

    last: the last `last` steps (DRaFT-K). uniform: each of 1..N-1 alike, gaussian: int(normal) around 0.84 N, both drawn again
    until they lie in 1..N-1, as AlignProp's released code does; its paper (arXiv 2310.03739) has the uniform one. A trajectory of a
    single step has a gradient there.
    """
    if truncation == "last":
        return num_steps - min(last, num_steps)
    if num_steps == 1:
        return 0
    if truncation == "uniform":
        return int(rng.integers(1, num_steps))
    while True:
        step = int(rng.normal(GAUSSIAN_MEAN * num_steps, GAUSSIAN_STD * num_steps))
        if 1 <= step < num_steps:
            return step


def early_stop(rng: np.random.Generator, num_steps: int, share: float) -> int:
    """Return the step whose predicted clean image is scored: one of the last round(share N), each alike (DRTune); share 0: the last."""
    return num_steps - int(rng.integers(1, max(1, round(share * num_steps)) + 1))


def spaced(rng: np.random.Generator, num_steps: int, count: int) -> list[int]:
    """Return `count` equally spaced steps of 0..num_steps-1 with a random start (DRTune); all where there are fewer."""
    count = min(count, num_steps)
    stride = num_steps // count
    start = int(rng.integers(0, num_steps - (count - 1) * stride))
    return [start + i * stride for i in range(count)]


def late_biased(rng: np.random.Generator, first: int, end: int, count: int, bias: float) -> list[int]:
    """Return `count` different steps of first..end-1, step first + i with weight (i + 1)^bias (FlowBP); all where there are fewer."""
    weights = np.arange(1, end - first + 1, dtype=float) ** bias
    chosen = rng.choice(end - first, size=min(count, end - first), replace=False, p=weights / weights.sum())
    return sorted(first + int(i) for i in chosen)


def around_anchor(
    rng: np.random.Generator, num_steps: int, anchor: int, count: int, bias: float
) -> list[int]:
    """Return `count` steps (2 or more) before and after an anchor, in proportion to both lengths; one before at least, and the anchor.

    FlowBP-Bridge: late-biased on both sides.
    """
    after = num_steps - anchor
    count = min(count, num_steps)
    before = min(max(round(count * anchor / num_steps), 1, count - after), anchor, count - 1)
    earlier = late_biased(rng, 0, anchor, before, bias)
    if count - before == 1:
        return [*earlier, anchor]
    return [*earlier, anchor, *late_biased(rng, anchor + 1, num_steps, count - before - 1, bias)]


def pair(rng: np.random.Generator, num_steps: int) -> tuple[int, int]:
    """Return two different steps in order, each pair alike (LeapAlign)."""
    first, second = sorted(int(i) for i in rng.choice(num_steps, size=2, replace=False))
    return first, second


DIRICHLET = (2.5, 6.0, 2.0)
"""Of the lengths after the second step, between both and before the first: FlowBP-Lagrange for SD3.5."""
LATE_SHARE = 10 / 25
"""The second step is one of the last, this share of N."""


def dirichlet_pair(rng: np.random.Generator, num_steps: int) -> tuple[int, int]:
    """Return two different steps in order whose distances from both ends and each other are Dirichlet distributed (FlowBP-Lagrange)."""
    if num_steps < 3:
        return pair(rng, num_steps)
    lengths = np.rint(rng.dirichlet(DIRICHLET) * num_steps).astype(int)
    lengths[lengths.argmax()] += num_steps - lengths.sum()
    lengths = lengths.clip(min=1)
    lengths[lengths.argmax()] += num_steps - lengths.sum()
    after, between = int(lengths[0]), int(lengths[1])
    after = min(after, max(1, round(LATE_SHARE * num_steps) - 1))
    return num_steps - 1 - after - between, num_steps - 1 - after
