"""From what a model says of several aspects to one ranking of images: pure functions of numbers.

An aspect gives n images scores, or their pairs preferences; each follows from the other. None is where the model gave no answer.
An image without an answer that a rule needs is in no ranking; it is never worse, and never better, for that.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RULES = ("sum", "mean", "majority", "each")
"""sum: of the aspects' scores, of images that have all. mean: of the aspects that were answered for all images of the prompt. majority: of two
images that is better which more such aspects prefer, and images are ranked by how many others they are better than, ties half. each: one
ranking for each aspect and order, as by raters of their own, whose shares of votes are soft labels. Besides these, the name of an aspect is
a rule: its scores alone."""

Pairs = Mapping[tuple[int, int], float | None]
"""(i, j), i < j -> how far image i is preferred: 1, 0.5 for a tie, 0, or between them as the mean of several answers."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one aspect says of n images."""

    scores: tuple[float | None, ...]
    preferences: Pairs


def of_scores(scores: Sequence[float | None]) -> Verdict:
    """Return the verdict of scores: of two images the one with more points is preferred."""
    pairs = itertools.combinations(range(len(scores)), 2)
    preferences = {(i, j): _preferred(scores[i], scores[j]) for i, j in pairs}
    return Verdict(scores=tuple(scores), preferences=preferences)


def of_preferences(count: int, preferences: Pairs) -> Verdict:
    """Return the verdict of preferences between n images: the score of one is the sum of those over all others."""
    scores: list[float | None] = []
    for image in range(count):
        points: list[float] = []
        for (i, j), share in preferences.items():
            if share is not None and image in (i, j):
                points.append(share if image == i else 1 - share)
        scores.append(sum(points) if len(points) == count - 1 else None)
    return Verdict(scores=tuple(scores), preferences=preferences)


def averaged(values: Sequence[float | None]) -> float | None:
    """Return the mean of the answers that there are; None where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def ranked(verdicts: Mapping[str, Verdict], rule: str) -> tuple[list[int], list[int]]:
    """Return the places of the images that a rule ranks, and their ranks, 1 = best, equal ones being ties; both may be empty.

    `rule` is sum, mean, majority or an aspect.
    """
    assert rule != "each", "each verdict has a ranking of its own"
    count = len(next(iter(verdicts.values())).scores)
    values: list[float | None]
    if rule == "majority":
        values = _majority([one for one in verdicts.values() if None not in one.preferences.values()], count)
    elif rule == "mean":
        whole = [one.scores for one in verdicts.values() if None not in one.scores]
        values = [averaged([scores[image] for scores in whole]) for image in range(count)]
    else:
        used = [one.scores for name, one in verdicts.items() if rule in ("sum", name)]
        values = [_sum([scores[image] for scores in used]) for image in range(count)]
    places = [image for image, value in enumerate(values) if value is not None]
    numbers = [value for value in values if value is not None]
    return places, [1 + sum(other > value for other in numbers) for value in numbers]


def _preferred(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return 0.5 if one == other else float(one > other)


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _majority(verdicts: Sequence[Verdict], count: int) -> list[float | None]:
    """For each image the number of others that more aspects find worse than better, ties half; None without an aspect."""
    if not verdicts:
        return [None] * count
    won: dict[tuple[int, int], float | None] = {}
    for pair in itertools.combinations(range(count), 2):
        shares = [share for one in verdicts if (share := one.preferences[pair]) is not None]
        votes = sum((share > 0.5) - (share < 0.5) for share in shares)
        won[pair] = 0.5 if votes == 0 else float(votes > 0)
    return list(of_preferences(count, won).scores)
