"""What a study has found: win rates, votes, agreement, points and problems, time; numbers and words for one page.

Letters: P prompts. Intervals are over prompts (`preftune/statistics/bootstrap.py`): the votes of one prompt are alike. Where prompts are
few or all alike, resampling them gives intervals that are too short, or have no width: there is Wilson's or none then, and why.
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
from preftune.cli.notes import counted
from preftune.statistics import bootstrap, krippendorff
from preftune.statistics.paired import sign_test, wilson, wins_ties_losses

FEWEST = 10
"""Prompts, or units of alpha, below which they are not resampled for an interval."""
Interval = tuple[float, float, float, str]
"""A value, the bounds of its 95 % interval, and why there is none."""
_PAIRS, _PROMPTS, _IMAGES = ("pair of images", "pairs of images"), ("prompt", "prompts"), ("image", "images")


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
    """95 % interval over prompts; NaN for a single one."""
    method: str
    """bootstrap; Wilson where prompts are fewer than FEWEST or all alike, each prompt being one trial."""
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
        method = "bootstrap"
        if len(by_prompt) > 1 and (len(by_prompt) < FEWEST or not high > low):
            method, (low, high) = "Wilson", wilson(rate * len(by_prompt), len(by_prompt))
        wins, ties, losses = wins_ties_losses(np.array([float(one.vote) for one in some]))
        means = np.array([sum(values) for values in by_prompt.values()], dtype=np.float64)
        better, _, worse = wins_ties_losses(means)
        found.append(
            WinRate(
                kind=kind, group=groups[1], against=groups[0], wins=wins, ties=ties, losses=losses, rate=rate, low=low, high=high,
                method=method, p=sign_test(better, worse), prompts=len(by_prompt),
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
) -> list[tuple[str, str, float, float, float, str]]:
    """Return (what, level, alpha, low, high, why there is no alpha or interval) of Krippendorff's alpha of all that is asked, first
    visits.
    """
    found: list[tuple[str, str, float, float, float, str]] = []
    people = voting.votes_by_rater(items, answers)
    if len(people) > 1:
        voters = Counter(pair for votes in people.values() for pair in votes)
        both = sum(number > 1 for number in voters.values())
        row = _explained(*voting.alpha_of_votes(people), both, _PAIRS)
        found.append(("preferences", "nominal", *row))
    first = [answer for answer in answers if not answer.visit]

    def add(what: str, level: krippendorff.Level, values: np.ndarray, units: tuple[str, str]) -> None:
        both = int(((~np.isnan(values)).sum(0) > 1).sum())
        row = _explained(*krippendorff.with_interval(values, level), both, units)
        found.append((what, level, *row))

    for axis in AXES:
        values = _table(first, lambda answer, axis=axis: answer.get(axis))
        if len(values) > 1:
            add(f"points: {axis}", "ordinal", values, _IMAGES)
    values = _table(
        first, lambda answer: CATEGORIES.index(answer["category"]) if "category" in answer else None
    )
    if len(values) > 1:
        add("category of the prompt", "nominal", values, _PROMPTS)
    kinds: list[tuple[Kind, Mapping[Any, str]]] = [("prompt", PROMPT_PROBLEMS), ("rating", IMAGE_PROBLEMS)]
    for kind, names in kinds:
        part = [answer for answer in first if items[answer.item].kind == kind]
        for name in names:
            values = _table(part, lambda answer, name=name: _has(answer, name))
            if len(values) > 1 and np.nansum(values):
                add(f"problem: {name} ({kind})", "nominal", values, _PROMPTS if kind == "prompt" else _IMAGES)
    return found


def _explained(value: float, low: float, high: float, number: int, units: tuple[str, str]) -> Interval:
    """A value and its interval over so many units, without one where it would say too much, and why."""
    if math.isnan(value) and not number:
        why = f"no {units[0]} that two people answered"
    elif math.isnan(value):
        why = "all answers are the same, by chance they would agree as often"
    elif number < FEWEST:
        why = f"no interval: {counted(number, *units)}, fewer than {FEWEST}"
    elif not high > low:
        why = f"no interval: all {units[1]} are alike"
    else:
        return value, low, high, ""
    return value, math.nan, math.nan, why


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
    """Return for each group of images the mean points with intervals over prompts (Interval), and the share of ratings with each problem."""
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
            value, low, high = bootstrap.ratios(hits[None], totals[None], seed)[0].tolist()
            row[axis] = _explained(value, low, high, len(sums), _PROMPTS)
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
            dict(zip(("of", "level", "alpha", "low", "high", "why"), row, strict=True))
            for row in alphas(items, annotators)
        ],
        "self_agreement": self_agreement(items, annotators),
        "second": sum(one.visit > 0 for one in annotators),
        "fewest": FEWEST,
        "points": points(items, annotators),
        "prompts": prompt_counts(items, annotators),
        "seconds": [
            dict(zip(("annotator", "kind", "answers", "q1", "median", "q3"), row, strict=True))
            for row in times(items, kept)
        ],
    }  # fmt: skip
