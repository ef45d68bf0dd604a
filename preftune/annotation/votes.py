"""Preferences out of answers: which of two images a rater prefers, and how raters agree on it.

A *pair* is two images of a prompt, and a *vote* on it 1 where the first is preferred, -1 where the second is, 0 for a tie. A
rater is an annotator, an inspector who has answered too, or a column of scores.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from preftune.annotation.items import Item
from preftune.annotation.storage import Answer
from preftune.annotation.tasks import Kind
from preftune.statistics import krippendorff

Floats = NDArray[np.float64]
Pair = tuple[str, str, str]
"""Prompt, and the ids of two images, the smaller first."""
Votes = dict[Pair, int]
"""What one rater says."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A vote on an item between images of two groups."""

    kind: Kind
    """ranking or choice."""
    prompt: str
    item: str
    annotator: str
    groups: tuple[str, str]
    """In alphabetical order."""
    vote: int
    """1: the second group's image is preferred."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often raters of two kinds, or of one, prefer the same image of a pair that neither ties."""

    mean: float
    """Over the pairs of raters, in [0, 1]; NaN where there are none."""
    std: float
    """Over the pairs of raters, divided by their number - 1; NaN for a single one."""
    raters: int
    """Number of pairs of raters."""
    pairs: int
    """Number of comparisons, all pairs of raters together."""


def votes_of_ranks(item: Item, ranks: Sequence[float]) -> Votes:
    """Return the votes of ranks of an item's images, 1 = best."""
    found: Votes = {}
    for i, j in combinations(range(len(ranks)), 2):
        a, b = item.images[i].id, item.images[j].id
        vote = int(np.sign(ranks[j] - ranks[i]))
        found[(item.prompt, a, b) if a < b else (item.prompt, b, a)] = vote if a < b else -vote
    return found


def votes_by_rater(items: Mapping[str, Item], answers: Sequence[Answer], visit: int = 0) -> dict[str, Votes]:
    """Return annotator -> votes of rankings and choices of one visit; of a pair in several items, the last counts."""
    found: dict[str, Votes] = defaultdict(dict)
    for answer in answers:
        if answer.visit == visit and "ranks" in answer.answer:
            found[answer.annotator] |= votes_of_ranks(items[answer.item], answer.answer["ranks"])
    return dict(found)


def votes_of_scores(items: Mapping[str, Item]) -> dict[str, Votes]:
    """Return column of scores -> votes on the pairs of rankings and choices; images without a score have none."""
    found: dict[str, Votes] = defaultdict(dict)
    for item in items.values():
        if item.kind in ("ranking", "choice"):
            for name in {name for image in item.images for name in image.scores}:
                ranks = [-image.scores.get(name, math.nan) for image in item.images]
                known = [at for at, rank in enumerate(ranks) if not math.isnan(rank)]
                part = Item(
                    id=item.id,
                    kind=item.kind,
                    prompt=item.prompt,
                    images=tuple(item.images[at] for at in known),
                )
                found[name] |= votes_of_ranks(part, [ranks[at] for at in known])
    return dict(found)


def ensemble(votes: Sequence[Votes]) -> Votes:
    """Return the votes of the majority of raters, ties being abstentions; 0 where both sides have as many."""
    sums: dict[Pair, int] = defaultdict(int)
    for one in votes:
        for pair, vote in one.items():
            sums[pair] += vote
    return {pair: int(np.sign(total)) for pair, total in sums.items()}


def shared(one: Votes, other: Votes) -> tuple[int, int]:
    """Return on how many pairs that neither ties two raters agree, and the number of these pairs."""
    products = [vote * other[pair] for pair, vote in one.items() if vote and other.get(pair)]
    return sum(product > 0 for product in products), len(products)


def agreement(raters: Sequence[tuple[Votes, Votes]]) -> Agreement:
    """Return the agreement of these pairs of raters, each of which counts alike; those without a pair of images do not."""
    counts = [count for one, other in raters if (count := shared(one, other))[1]]
    shares = np.array([hits / total for hits, total in counts])
    return Agreement(
        mean=float(shares.mean()) if counts else math.nan,
        std=float(shares.std(ddof=1)) if len(counts) > 1 else math.nan,
        raters=len(counts),
        pairs=sum(total for _, total in counts),
    )


def agreement_table(
    people: Mapping[str, Votes], inspectors: Sequence[str], scores: Mapping[str, Votes]
) -> dict[tuple[str, str], Agreement]:
    """Return (row, column) -> agreement, as ImageReward's Table 2 (arXiv 2304.05977).

    Rows are annotators, inspectors and the ensemble of annotators; columns also each column of scores. An annotator is
    compared with the ensemble of all other annotators: one's own vote would agree with itself.
    """
    annotators = {name: votes for name, votes in people.items() if name not in inspectors}
    checkers = {name: votes for name, votes in people.items() if name in inspectors}
    whole = ensemble([*annotators.values()])
    others = {
        name: ensemble([votes for other, votes in annotators.items() if other != name]) for name in annotators
    }
    across = agreement([(one, other) for one in annotators.values() for other in checkers.values()])
    found = {
        ("annotator", "annotator"): agreement([*combinations(annotators.values(), 2)]),
        ("annotator", "inspector"): across,
        ("annotator", "ensemble"): agreement([(votes, others[name]) for name, votes in annotators.items()]),
        ("inspector", "annotator"): across,
        ("inspector", "inspector"): agreement([*combinations(checkers.values(), 2)]),
        ("inspector", "ensemble"): agreement([(votes, whole) for votes in checkers.values()]),
        ("ensemble", "annotator"): agreement([(votes, others[name]) for name, votes in annotators.items()]),
        ("ensemble", "inspector"): agreement([(votes, whole) for votes in checkers.values()]),
    }
    for model, votes in scores.items():
        found["annotator", model] = agreement([(one, votes) for one in annotators.values()])
        found["inspector", model] = agreement([(one, votes) for one in checkers.values()])
        found["ensemble", model] = agreement([(whole, votes)])
    return found


def alpha_of_votes(people: Mapping[str, Votes], seed: int = 0) -> tuple[float, float, float]:
    """Return Krippendorff's nominal alpha of votes and its interval over pairs.

    Each pair counts in both directions, so that alpha does not depend on which of its images is named first.
    """
    pairs = sorted({pair for votes in people.values() for pair in votes})
    values = np.array([[votes.get(pair, math.nan) for pair in pairs] for votes in people.values()])
    if not values.size:
        return math.nan, math.nan, math.nan
    scale = np.array([-1.0, 0.0, 1.0])
    both = (krippendorff.coincidences(values, scale)[0] + krippendorff.coincidences(-values, scale)[0]) / 2
    return krippendorff.of_coincidences(both, scale, "nominal", seed)


def outcomes(items: Mapping[str, Item], answers: Sequence[Answer]) -> list[Outcome]:
    """Return the votes of first visits between images of different groups."""
    found = []
    for answer in answers:
        if answer.visit or "ranks" not in answer.answer:
            continue
        item, ranks = items[answer.item], answer.answer["ranks"]
        for i, j in combinations(range(len(ranks)), 2):
            a, b = item.images[i].group, item.images[j].group
            if a != b:
                vote = int(np.sign(ranks[i] - ranks[j])) * (1 if a < b else -1)
                groups = (a, b) if a < b else (b, a)
                found.append(
                    Outcome(
                        kind=item.kind,
                        prompt=item.prompt,
                        item=f"{item.id} {i} {j}",
                        annotator=answer.annotator,
                        groups=groups,
                        vote=vote,
                    )
                )
    return found
