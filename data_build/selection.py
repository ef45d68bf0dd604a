"""Selection of preferred and non-preferred images of a prompt by their scores.

The published rule (HPS v1, arXiv 2303.14420, section 6): of the n images B of a prompt T, the best one I*
is preferred if

    p = exp(s(I*, T)) / sum over I in B of exp(s(I, T)) > alpha / n,

and the worst one is non-preferred by the same rule with -s. At most one image of each kind is selected per
prompt. alpha is 2. The released code uses only groups of four or more, which the paper does not state. s is
100 times the cosine of HPS v1. Scorers here return plain cosines, so scores are multiplied by `scale` = 100
first; with plain cosines p would be close to 1 / n, and nothing would be selected.

Cases that the formula leaves open: an image is never both, so nothing is selected if all scores are equal
(or n = 1). Among equal scores the first in the order of the data is used. Nothing is selected if alpha >=
n, since p is at most 1 and must be greater than alpha / n. A score that is not finite is an error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["preferred", "non_preferred"]
KINDS: tuple[Kind, Kind] = ("preferred", "non_preferred")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A rule and its numbers."""

    rule: Literal["softmax", "top-k", "threshold"] = "softmax"
    """softmax: the published rule, at most the best and the worst image of a prompt; top-k: the k best and
    the k worst; threshold: all scores of at least --high, and all of at most --low.
    """
    min_group: int = 4
    """Minimum number of images of a prompt."""
    alpha: float = 2.0
    """softmax: p must be greater than alpha / n."""
    scale: float | None = None
    """Factor of the scores before exp; None = 100 for cosines (HPS, CLIP and BLIP score), 1 for others."""
    k: int = 1
    """top-k: number of images of each kind; fewer if a prompt has fewer than 2 k images."""
    high: float | None = None
    """threshold: minimum score of a preferred image, in units of the scorer; None = none."""
    low: float | None = None
    """threshold: maximum score of a non-preferred image; None = none."""

    def __post_init__(self) -> None:
        for name, least in (("min_group", self.min_group), ("k", self.k)):
            if least < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {least}")
        for name, value in (("alpha", self.alpha), ("scale", self.scale)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} must be a positive number, got {value}")
        for name, value in (("high", self.high), ("low", self.low)):
            if value is not None and self.rule != "threshold":
                raise ValueError(f"--{name} is for --rule threshold, not {self.rule}")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--{name} must be a finite number, got {value}")
        if self.rule == "threshold" and self.high is None and self.low is None:
            raise ValueError("--rule threshold needs --high, --low or both")
        if self.high is not None and self.low is not None and not self.low < self.high:
            raise ValueError(f"--low must be less than --high, got {self.low} and {self.high}")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An image that was taken."""

    index: int
    """Its place among all scores."""
    kind: Kind
    confidence: float
    """p of the formula: the softmax of its score, or of its negated one, in its group; in [0, 1]."""
    group_size: int


def select(
    prompts: NDArray[np.uint64], scores: NDArray[np.float64], rule: Selection, scale: float
) -> Iterator[Chosen]:
    """Yield what a rule takes of N images; prompts (N,) are equal where prompts are, scores (N,) in the data's order.

    `scale` is that of the rule, or what its None stands for. ValueError for a score that is not finite.
    """
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"score {index} is {scores[index]}; only finite scores can be selected from")
    take = RULES[rule.rule]
    for group in groups(prompts):
        n = len(group)
        if n < rule.min_group:
            continue
        inside = scores[group]
        shares = {kind: softmax(sign * scale * inside) for kind, sign in zip(KINDS, (1, -1), strict=True)}
        for kind, place in take(inside, shares, rule):
            yield Chosen(
                index=int(group[place]), kind=kind, confidence=float(shares[kind][place]), group_size=n
            )


def groups(prompts: NDArray[np.uint64]) -> Iterator[NDArray[np.intp]]:
    """Yield the places of equal prompts, rising; groups come in the order of their numbers."""
    order = np.argsort(prompts, kind="stable")
    ends = np.flatnonzero(np.diff(prompts[order])) + 1
    for start, end in zip([0, *ends], [*ends, len(order)], strict=True):
        if end > start:
            yield order[start:end]


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return exp(values) / sum(exp(values)); the largest is subtracted first, which changes nothing but overflow."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


Shares = dict[Kind, NDArray[np.float64]]
"""p of each image of a group, as a preferred one and as a non-preferred one."""


def published(scores: NDArray[np.float64], shares: Shares, rule: Selection) -> list[tuple[Kind, int]]:
    """Return the best and the worst of a group, each if its p > alpha / n."""
    best, worst = int(scores.argmax()), int(scores.argmin())
    if scores[best] == scores[worst]:
        return []
    ends = zip(KINDS, (best, worst), strict=True)
    return [(kind, place) for kind, place in ends if shares[kind][place] > rule.alpha / len(scores)]


def top_k(scores: NDArray[np.float64], _: Shares, rule: Selection) -> list[tuple[Kind, int]]:
    """Return the k best of a group, and the k worst of those that score less than all of them; none where all are equal."""
    if scores.max() == scores.min():
        return []
    k = min(rule.k, len(scores) // 2)
    best = np.argsort(-scores, kind="stable")[:k].tolist()
    worst = [
        place for place in np.argsort(scores, kind="stable").tolist() if scores[place] < scores[best[-1]]
    ][:k]
    return [("preferred", place) for place in best] + [("non_preferred", place) for place in worst]


def threshold(scores: NDArray[np.float64], _: Shares, rule: Selection) -> list[tuple[Kind, int]]:
    """Return all of a group from `high` up and all from `low` down."""
    high = math.inf if rule.high is None else rule.high
    low = -math.inf if rule.low is None else rule.low
    best, worst = np.flatnonzero(scores >= high).tolist(), np.flatnonzero(scores <= low).tolist()
    return [("preferred", place) for place in best] + [("non_preferred", place) for place in worst]


RULES: dict[str, Callable[[NDArray[np.float64], Shares, Selection], list[tuple[Kind, int]]]] = {
    "softmax": published,
    "top-k": top_k,
    "threshold": threshold,
}
