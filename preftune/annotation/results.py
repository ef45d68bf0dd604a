"""What is written of a study's answers: data that training reads, and all answers as they were given.

    rankings.jsonl    rankings and choices, one a line for each annotator, as preftune/records.py reads them
    metadata.jsonl    rated images with the mean points of their annotators, a column for each axis
    answers.jsonl     everything, second visits, skipped items and prompts too

Answers that were sent back are in answers.jsonl alone; of second visits nothing is learned.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.annotation.items import Item
from preftune.annotation.storage import Answer
from preftune.annotation.tasks import AXES
from preftune.records import write_jsonl

RANKINGS, METADATA, ANSWERS = "rankings.jsonl", "metadata.jsonl", "answers.jsonl"


def write_results(
    folder: Path, items: Mapping[str, Item], answers: Sequence[Answer], *, accepted_only: bool
) -> dict[str, int]:
    """Write the files of a study, each in one piece, and return how many lines each has; none for which there are no answers."""
    states = ("accepted",) if accepted_only else ("accepted", "given")
    kept = [one for one in answers if one.state in states and not one.visit and "skip" not in one.answer]
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
    return {name: len(rows) for name, rows in found.items()}


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
