"""Pairs of images with the label that raters give them, out of rankings or of scores: training data of DPO.

A *rater* is a person, the `source` of rankings in a rankings.jsonl, or a column of scores in a metadata.jsonl: a person's ratings, or a
scorer's, which `preftune score --add-to-metadata` writes. Images of one caption are then ranked by their scores.
"""

import filecmp
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune.cli.notes import counted, say
from preftune.image_folders import Columns, hub_hint
from preftune.records import (
    CaptionedImage,
    Ranking,
    Skipped,
    check_captioned,
    read_usable_rankings,
)
from preftune.training import data

Labels = Literal["each", "majority", "soft"]
Ties = Literal["drop", "half"]
SHOWN = 8
"""Number of raters that an error names."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images of a prompt."""

    prompt: str
    first: Path
    """The one that the label prefers."""
    second: Path
    label: float
    """Share of raters who prefer the first, in [0.5, 1]; 0.5 is a tie."""
    weight: float
    """Weight of its loss."""


@dataclass
class _Votes:
    """Weights of the raters of a pair, by what they say."""

    first: float = 0.0
    second: float = 0.0
    tied: float = 0.0
    raters: int = 0


def check(folders: Sequence[Path], raters: Sequence[str]) -> None:
    """Raise ValueError for a folder without rankings or scores that could be used; opens no image."""
    for folder in folders:
        if _has_rankings(folder):
            read_usable_rankings(folder)
        elif not folder.is_dir():
            raise ValueError(
                f"{folder} is a file; --data names folders, with rankings.jsonl or captioned images"
                if folder.exists()
                else f"there is no data at {folder}{hub_hint(folder)}"
            )
        else:
            check_captioned(folder, Columns())
            if not raters:
                raise ValueError(
                    f"{folder} has no rankings.jsonl; of captioned images --raters names the columns of scores that order them"
                )


def read(folders: Sequence[Path], raters: Sequence[str]) -> tuple[list[Ranking], list[Skipped]]:
    """Return the rankings of folders by these raters, by all where none is named, and what was set aside.

    ValueError for a rater who is in none of the folders, and as the readers of the folders.
    """
    rankings, skipped, known = list[Ranking](), list[Skipped](), Counter[str]()
    for folder in folders:
        if _has_rankings(folder):
            found, bad = data.read_rankings(folder)
            known.update(ranking.source for ranking in found if ranking.source)
            found = [ranking for ranking in found if not raters or ranking.source in raters]
        else:
            samples, bad = data.read(folder, Columns())
            known.update(
                name for sample in samples for name, value in sample.extra.items() if _is_score(value)
            )
            found, alone = by_scores(samples, raters)
            bad = bad + alone
        rankings, skipped = rankings + found, skipped + bad
    unknown = [name for name in raters if name not in known]
    if unknown:
        names = [name for name, _ in known.most_common(SHOWN)]
        more = f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
        raise ValueError(
            f"--raters {unknown[0]} is neither a source of rankings nor a column of scores in --data; there are"
            f" {', '.join(names) or 'none with a name'}{more}"
        )
    if not rankings:
        raise ValueError(f"no prompt in --data has two images to compare; the first: {skipped[0].reason}")
    return rankings, skipped


def _has_rankings(folder: Path) -> bool:
    return (folder / "rankings.jsonl").exists()


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def by_scores(
    samples: Sequence[CaptionedImage], raters: Sequence[str]
) -> tuple[list[Ranking], list[Skipped]]:
    """Return one ranking for each rater of the images of a caption that have this rater's score, equal scores being ties; and the
    images without another to compare with.

    ValueError for a score that is no number; one that is missing, or not finite, rates nothing.
    """
    groups: dict[str, dict[Path, CaptionedImage]] = {}
    for sample in samples:
        groups.setdefault(sample.text, {})[sample.path] = sample
    rankings, skipped = list[Ranking](), list[Skipped]()
    for prompt, images in groups.items():
        compared = set[Path]()
        for rater in raters:
            scores = {path: sample.extra[rater] for path, sample in images.items() if _rates(sample, rater)}
            if len(scores) < 2:
                continue
            compared |= scores.keys()
            ranks = tuple(1 + sum(other > score for other in scores.values()) for score in scores.values())
            rankings.append(Ranking(prompt=prompt, paths=tuple(scores), ranks=ranks, source=rater))
        for place in (sample.place for path, sample in images.items() if path not in compared):
            reason = f"{place}: no other image of its caption has a score by the same rater"
            skipped.append(Skipped(place=place, reason=reason))
    if skipped:
        say(f"{counted(len(skipped), 'image')} without another to compare set aside: {skipped[0].reason}")
    return rankings, skipped


def _rates(sample: CaptionedImage, rater: str) -> bool:
    value = sample.extra.get(rater)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"{sample.place}: --raters {rater} is {value!r}, not a number")
    return _is_score(value)


def label(rankings: Sequence[Ranking], labels: Labels, ties: Ties) -> tuple[list[Pair], list[Skipped]]:
    """Return the labelled pairs of rankings, their weights 1 on average, and pairs of equal images, which teach nothing.

    - each: one pair for each rater, who weighs as the ranking does. A tie of a rater is a tie.
    - majority: one pair for two images of a prompt, by the greater weight of raters; it weighs as one rater on average. A rater's tie is
      an abstention, equal weights are a tie.
    - soft: one pair for two images, labelled by the share of weight; it weighs as its raters together.

    Ties, of a rater or of two sides, are dropped, or with `half` count half for each side: of soft labels the raters' ties, too.
    ValueError where no pair is left.
    """
    found, skipped, tied = list[Pair](), list[Skipped](), 0
    equal: dict[tuple[Path, Path], bool] = {}
    for prompt, paths, votes in _polls(rankings, apart=labels == "each"):
        pair = _labelled(prompt, paths, votes, labels, ties)
        if pair is None:
            tied += 1
        elif _same(paths, equal):
            place = f"pair of {prompt!r}"
            skipped.append(Skipped(place=place, reason=f"{paths[0]} and {paths[1]} are the same image"))
        else:
            found.append(pair)
    total = tied + len(skipped) + len(found)
    if not found:
        why = (
            f"{skipped[0].reason}"
            if skipped
            else "all are ties, from which --ties half learns to tell no difference"
        )
        raise ValueError(f"none of {counted(total, 'pair')} can be used: {why}")
    dropped = f"; {counted(tied, 'tie')} dropped" * bool(tied)
    same = (
        f"; {counted(len(skipped), 'pair')} of equal images set aside: {skipped[0].reason}" if skipped else ""
    )
    say(
        f"{counted(len(found), 'pair')} of {counted(len(rankings), 'ranking')}, --labels {labels}{dropped}{same}"
    )
    return _weighted(found), skipped


def _polls(rankings: Sequence[Ranking], *, apart: bool) -> Iterator[tuple[str, tuple[Path, Path], _Votes]]:
    """The prompt, images and votes of all pairs, in the order of their first vote; `apart`: one for each vote."""
    polls: dict[tuple[str, Path, Path], _Votes] = {}
    for ranking in rankings:
        for i, one in enumerate(ranking.paths):
            for j in range(i + 1, len(ranking.paths)):
                other = ranking.paths[j]
                a, b = (one, other) if str(one) <= str(other) else (other, one)
                votes = _Votes() if apart else polls.setdefault((ranking.prompt, a, b), _Votes())
                votes.raters += 1
                if ranking.ranks[i] == ranking.ranks[j]:
                    votes.tied += ranking.weight
                elif (ranking.ranks[i] < ranking.ranks[j]) == (a == one):
                    votes.first += ranking.weight
                else:
                    votes.second += ranking.weight
                if apart:
                    yield ranking.prompt, (a, b), votes
    for (prompt, a, b), votes in polls.items():
        yield prompt, (a, b), votes


def _labelled(
    prompt: str, paths: tuple[Path, Path], votes: _Votes, labels: Labels, ties: Ties
) -> Pair | None:
    """A pair with its label, turned so that the first is preferred; None for a tie that is dropped."""
    half = votes.tied / 2 if ties == "half" else 0.0
    for_first, for_second = votes.first + half, votes.second + half
    if for_first == for_second and ties == "drop":
        return None
    weight = for_first + for_second
    share = for_first / weight
    if labels != "soft":
        share = 0.5 if for_first == for_second else float(for_first > for_second)
        weight = (votes.first + votes.second + votes.tied) / votes.raters
    first, second = paths if share >= 0.5 else paths[::-1]
    return Pair(prompt=prompt, first=first, second=second, label=max(share, 1 - share), weight=weight)


def _same(paths: tuple[Path, Path], known: dict[tuple[Path, Path], bool]) -> bool:
    """Whether two files hold the same bytes, which several raters ask; files of different sizes are not read."""
    if paths not in known:
        known[paths] = filecmp.cmp(*paths, shallow=False)
    return known[paths]


def _weighted(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, their weights divided by the mean."""
    mean = math.fsum(pair.weight for pair in pairs) / len(pairs)
    return [
        Pair(prompt=p.prompt, first=p.first, second=p.second, label=p.label, weight=p.weight / mean)
        for p in pairs
    ]
