"""What is written of a study's answers: data that training reads, and all answers as they were given.

    rankings.jsonl    rankings and choices, one a line for each annotator, as preftune/records.py reads them
    metadata.jsonl    rated images with the mean points of their annotators, a column for each axis
    answers.jsonl     everything, second visits, skipped items and prompts too

Answers that were sent back are in answers.jsonl alone; of second visits nothing is learned.

Prompts with problems (ImageReward, arXiv 2304.05977, appendix A.3: unclear, sexual, ...) are asked about to the end and left out
here, so that who decides later decides with all answers. One mark is enough: what one annotator finds harmful should not be trained
on because two others overlooked it, and an inspector sends back a mark that is wrong.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.annotation.items import Item
from preftune.annotation.storage import Answer
from preftune.annotation.tasks import AXES, PromptProblem
from preftune.records import write_jsonl

RANKINGS, METADATA, ANSWERS = "rankings.jsonl", "metadata.jsonl", "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a study training reads."""

    accepted_only: bool = False
    """Only answers that an inspector has accepted."""
    drop_problems: tuple[PromptProblem, ...] = ()
    """No prompts that anybody has marked with one of these."""


def write_results(
    folder: Path, items: Mapping[str, Item], answers: Sequence[Answer], selection: Selection
) -> dict[str, int]:
    """Write the files of a study, each in one piece, and return how many lines each has, and how many prompts were left out for
    each problem; no file for which there are no answers.
    """
    states = ("accepted",) if selection.accepted_only else ("accepted", "given")
    problems = problems_of(items, answers)
    dropped = {prompt for prompt, names in problems.items() if names & {*selection.drop_problems}}
    kept = [
        one for one in answers
        if one.state in states and not one.visit and "skip" not in one.answer and items[one.item].prompt not in dropped
    ]  # fmt: skip
    found = {
        RANKINGS: list(ranking_rows(items, kept)),
        METADATA: list(rating_rows(items, kept)),
        ANSWERS: list(answer_rows(items, answers)),
    }
    for name, rows in found.items():
        if rows:
            write_jsonl(folder / name, rows)
        else:
            (folder / name).unlink(missing_ok=True)  # of answers that were sent back
    marks = Counter(name for names in problems.values() for name in names)
    counts = {f"prompts left out as {name}": marks[name] for name in selection.drop_problems}
    return {name: len(rows) for name, rows in found.items()} | counts


def problems_of(items: Mapping[str, Item], answers: Sequence[Answer]) -> dict[str, set[str]]:
    """Return prompt -> problems that anybody has marked; second visits and what was sent back count for nothing."""
    found: dict[str, set[str]] = defaultdict(set)
    for one in answers:
        if items[one.item].kind == "prompt" and one.state != "returned" and not one.visit:
            found[items[one.item].prompt].update(one.answer.get("problems", ()))
    return dict(found)


def ranking_rows(items: Mapping[str, Item], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the lines of rankings.jsonl."""
    for one in answers:
        if "ranks" in one.answer:
            item = items[one.item]
            yield {
                "prompt": item.prompt,
                "generations": [image.file for image in item.images],
                "ranking": one.answer["ranks"],
                "source": one.annotator,
                "task": item.kind,
                "state": one.state,
                "groups": [image.group for image in item.images],
            }


def rating_rows(items: Mapping[str, Item], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the lines of metadata.jsonl: an image under each of its prompts, with the mean points."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in answers:
        if "overall" in one.answer:
            found[one.item].append(one.answer)
    for identity, rated in found.items():
        image = items[identity].images[0]
        yield {
            "file_name": image.file,
            "text": items[identity].prompt,
            **{axis: sum(one[axis] for one in rated) / len(rated) for axis in AXES},
            "raters": len(rated),
            "problems": sorted({name for one in rated for name in one["problems"]}),
            "group": image.group,
        }


def answer_rows(items: Mapping[str, Item], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield the lines of answers.jsonl."""
    for one in answers:
        item = items[one.item]
        yield {
            "annotator": one.annotator,
            "task": item.kind,
            "prompt": item.prompt,
            "images": [image.file for image in item.images],
            "groups": [image.group for image in item.images],
            "visit": one.visit,
            **one.answer,
            "seconds": round(one.seconds, 2),
            "state": one.state,
            "note": one.note,
            "inspector": one.inspector,
            "revision": one.revision,
            "at": one.at,
        }
