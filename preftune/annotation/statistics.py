"""What a study has found: win rates, votes, agreement, points and problems, time; numbers and words for one page.

Letters: P prompts. Intervals are over prompts (`preftune/statistics/bootstrap.py`): the votes of one prompt are alike.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from preftune.annotation import votes as voting
from preftune.annotation.items import Item
from preftune.annotation.storage import Answer
from preftune.annotation.tasks import AXES, CATEGORIES, IMAGE_PROBLEMS, PROMPT_PROBLEMS, Kind
from preftune.annotation.votes import Agreement, Outcome, Votes
from preftune.statistics import bootstrap, krippendorff
from preftune.statistics.paired import sign_test, wins_ties_losses


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often the images of one group are preferred to those of another."""

    kind: Kind
    """Task: ranking or choice."""
    group: str
    against: str
    wins: int
    ties: int
    losses: int
    rate: float
    """Share of votes, ties half, all prompts together; in [0, 1]."""
    low: float
    high: float
    """95 % interval over prompts."""
    p: float
    """Sign test over prompts."""
    prompts: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many pairs got how many votes for one group (HPS, arXiv 2303.14420, Fig. 8)."""

    kind: Kind
    group: str
    against: str
    voters: int
    """Votes that each of these pairs has."""
    pairs: tuple[int, ...]
    """voters + 1: with 0, 1, ... votes for the group; ties are votes for neither."""

    @property
    def majority(self) -> float:
        """Return the share of pairs of which more than half of the votes are for the group."""
        return sum(self.pairs[at] for at in range(self.voters + 1) if 2 * at > self.voters) / sum(self.pairs)


def win_rates(outcomes: Sequence[Outcome], seed: int = 0) -> list[WinRate]:
    """Return the win rates of all two groups in each kind of task, the second of the alphabet against the first."""
    found = []
    for kind, groups in sorted({(one.kind, one.groups) for one in outcomes}):
        some = [one for one in outcomes if (one.kind, one.groups) == (kind, groups)]
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for one in some:
            by_prompt[one.prompt].append(one.vote)
        shares = np.array([sum(vote + 1 for vote in values) / 2 for values in by_prompt.values()])
        totals = np.array([float(len(values)) for values in by_prompt.values()])
        rate, low, high = bootstrap.ratios(shares[None], totals[None], seed)[0].tolist()
        wins, ties, losses = wins_ties_losses(np.array([float(one.vote) for one in some]))
        means = np.array([sum(values) for values in by_prompt.values()], dtype=np.float64)
        better, _, worse = wins_ties_losses(means)
        found.append(
            WinRate(
                kind=kind, group=groups[1], against=groups[0], wins=wins, ties=ties, losses=losses, rate=rate, low=low, high=high,
                p=sign_test(better, worse), prompts=len(by_prompt),
            )
        )  # fmt: skip
    return found


def histograms(outcomes: Sequence[Outcome]) -> list[Histogram]:
    """Return the histograms of all two groups in each kind of task, one for each number of voters that pairs have."""
    found = []
    for kind, groups in sorted({(one.kind, one.groups) for one in outcomes}):
        by_item: dict[str, list[int]] = defaultdict(list)
        for one in outcomes:
            if (one.kind, one.groups) == (kind, groups):
                by_item[one.item].append(one.vote)
        for voters in sorted({len(values) for values in by_item.values()}):
            some = [values for values in by_item.values() if len(values) == voters]
            counts = Counter(sum(vote > 0 for vote in values) for values in some)
            pairs = tuple(counts[at] for at in range(voters + 1))
            found.append(Histogram(kind=kind, group=groups[1], against=groups[0], voters=voters, pairs=pairs))
    return found


def alphas(
    items: Mapping[str, Item], answers: Sequence[Answer]
) -> list[tuple[str, str, float, float, float]]:
    """Return (what, level, alpha, low, high) of Krippendorff's alpha of all that is asked, first visits."""
    found = []
    people = voting.votes_by_rater(items, answers)
    if len(people) > 1:
        found.append(("preferences", "nominal", *voting.alpha_of_votes(people)))
    first = [answer for answer in answers if not answer.visit]
    for axis in AXES:
        values = _table(first, lambda answer, axis=axis: answer.get(axis))
        if len(values) > 1:
            found.append((f"points: {axis}", "ordinal", *krippendorff.with_interval(values, "ordinal")))
    values = _table(
        first, lambda answer: CATEGORIES.index(answer["category"]) if "category" in answer else None
    )
    if len(values) > 1:
        found.append(("category of the prompt", "nominal", *krippendorff.with_interval(values, "nominal")))
    for kind, names in (("prompt", PROMPT_PROBLEMS), ("rating", IMAGE_PROBLEMS)):
        part = [answer for answer in first if items[answer.item].kind == kind]
        for name in names:
            values = _table(part, lambda answer, name=name: _has(answer, name))
            if len(values) > 1 and np.nansum(values):
                found.append(
                    (f"problem: {name} ({kind})", "nominal", *krippendorff.with_interval(values, "nominal"))
                )
    return found


def _has(answer: Mapping[str, Any], name: str) -> int | None:
    return int(name in answer["problems"]) if "problems" in answer else None


def _table(answers: Sequence[Answer], value: Any) -> np.ndarray:
    """Values (annotators, items), NaN where there is none; only annotators who have one."""
    cells = {(one.annotator, one.item): found for one in answers if (found := value(one.answer)) is not None}
    names = sorted({name for name, _ in cells})
    items = sorted({item for _, item in cells})
    return np.array(
        [[cells.get((name, item), math.nan) for item in items] for name in names], dtype=np.float64
    )


def self_agreement(items: Mapping[str, Item], answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return annotator -> how alike the first and second answers are: `pairs` and the share `same` of those that neither answer
    ties; `points` and the mean difference `off` of ratings. Only what there is.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    first, second = (voting.votes_by_rater(items, answers, visit) for visit in (0, 1))
    for name in sorted(first.keys() & second.keys()):
        hits, total = voting.shared(first[name], second[name])
        if total:
            found[name] |= {"pairs": total, "same": hits / total}
    known = {(one.annotator, one.item): one.answer for one in answers if not one.visit}
    off: dict[str, list[int]] = defaultdict(list)
    for one in answers:
        before = known.get((one.annotator, one.item), {})
        if one.visit and "overall" in one.answer and "overall" in before:
            off[one.annotator] += [abs(one.answer[axis] - before[axis]) for axis in AXES]
    for name, values in off.items():
        found[name] |= {"points": len(values), "off": sum(values) / len(values)}
    return dict(found)


def times(
    items: Mapping[str, Item], answers: Sequence[Answer]
) -> list[tuple[str, str, int, float, float, float]]:
    """Return (annotator, kind, answers, and the quartiles of seconds an item); the annotator "all" first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in answers:
        kind = items[one.item].kind
        found["", kind].append(one.seconds)
        found[one.annotator, kind].append(one.seconds)
    return [
        (name or "all", kind, len(values), *np.percentile(values, [25, 50, 75]).tolist())
        for (name, kind), values in sorted(found.items())
    ]


def points(items: Mapping[str, Item], answers: Sequence[Answer], seed: int = 0) -> list[dict[str, Any]]:
    """Return for each group of images the mean points with intervals over prompts, and the share of ratings with each problem."""
    rated = [one for one in answers if not one.visit and "overall" in one.answer]
    groups = sorted({items[one.item].images[0].group for one in rated})
    found = []
    for group in groups:
        some = [one for one in rated if items[one.item].images[0].group == group]
        row: dict[str, Any] = {"group": group, "ratings": len(some)}
        for axis in AXES:
            sums: dict[str, list[int]] = defaultdict(list)
            for one in some:
                sums[items[one.item].prompt].append(one.answer[axis])
            hits = np.array([float(sum(values)) for values in sums.values()])
            totals = np.array([float(len(values)) for values in sums.values()])
            row[axis] = bootstrap.ratios(hits[None], totals[None], seed)[0].tolist()
        row["problems"] = {
            name: sum(name in one.answer["problems"] for one in some) / len(some) for name in IMAGE_PROBLEMS
        }
        found.append(row)
    return found


def prompt_counts(items: Mapping[str, Item], answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """Return how often each category and each problem of prompts was named, first visits."""
    some = [one.answer for one in answers if not one.visit and items[one.item].kind == "prompt"]
    some = [answer for answer in some if "category" in answer]
    return {
        "categories": dict(Counter(answer["category"] for answer in some).most_common()),
        "problems": dict(Counter(name for answer in some for name in answer["problems"]).most_common()),
    }


def summary(
    items: Mapping[str, Item],
    answers: Sequence[Answer],
    inspectors: Sequence[str],
    raters: Mapping[str, Votes],
) -> dict[str, Any]:
    """Return everything for the page and for statistics.json; answers that were sent back are left out, but counted.

    `raters`: votes that people are compared with, beside the columns of scores of the items.
    """
    kept = [one for one in answers if one.state != "returned"]
    told = [one for one in kept if "skip" not in one.answer]
    annotators = [one for one in told if one.annotator not in inspectors]
    outcomes = voting.outcomes(items, annotators)
    people = voting.votes_by_rater(items, told)
    scores = voting.votes_of_scores(items) | dict(raters)
    table: dict[tuple[str, str], Agreement] = (
        voting.agreement_table(people, inspectors, scores) if people else {}
    )
    return {
        "items": dict(Counter(item.kind for item in items.values())),
        "answers": len(answers),
        "skipped": len(kept) - len(told),
        "returned": len(answers) - len(kept),
        "accepted": sum(one.state == "accepted" for one in answers),
        "annotators": sorted({one.annotator for one in answers} - set(inspectors)),
        "win_rates": [asdict(one) for one in win_rates(outcomes)],
        "histograms": [asdict(one) | {"majority": one.majority} for one in histograms(outcomes)],
        "agreement": [{"of": row, "with": column, **asdict(cell)} for (row, column), cell in table.items()],
        "alpha": [
            dict(zip(("of", "level", "alpha", "low", "high"), row, strict=True))
            for row in alphas(items, annotators)
        ],
        "self_agreement": self_agreement(items, annotators),
        "points": points(items, annotators),
        "prompts": prompt_counts(items, annotators),
        "seconds": [
            dict(zip(("annotator", "kind", "answers", "q1", "median", "q3"), row, strict=True))
            for row in times(items, kept)
        ],
    }  # fmt: skip
