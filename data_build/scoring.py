"""Scoring of the entries of a data set, chunk by chunk; the scoring pipeline is preftune/score_files.py.

The input is batches of entries of a data set. The output is one row per entry, in order: its scores, or why
it was rejected or filtered. The caller decides how entries are batched.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch.profiler import record_function

from data_build import score_folder
from data_build.decode import Entry, Filtered, ImageEntry, UnusableError, decode, or_unusable, upright
from data_build.readers import DataSet, entries, read_bytes
from data_build.score_folder import ScoreRow
from preftune.prepared_images import Recipe, View
from preftune.score_files import ScoredItem, score_files
from rewards import Scorer
from rewards.shapes import check_judgeable

JUDGE = "shapes"
"""The scorer that reads images of one world only."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Unwanted = Callable[[Image.Image], str | None]
"""What filters decoded images in the worker processes: the name of the filter that one does not pass, or None."""


def check_judge(names: Sequence[str], data: DataSet) -> None:
    """Raise ValueError where the judge of the shapes world is to score images of which the first ones are none of it.

    Single foreign images are set aside later; where the first 20 are foreign, every row would be.
    """
    if JUDGE not in names:
        return
    faults = []
    for *_, entry in itertools.islice(entries(data), 20):
        if not isinstance(entry, ImageEntry):
            continue
        try:
            size = decode(read_bytes(data, entry)).size
            check_judgeable(
                [entry.text], size, f"{data.root / entry.file} {entry.member}".strip() + " and others"
            )
        except UnusableError:
            continue
        except ValueError as error:
            faults.append(error)
        else:
            return
    if faults:
        raise faults[0]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Entries that are prepared and scored together; a chunk is a whole number of them."""

    entries: list[Entry]
    next: tuple[int, int]
    """Source and entry where the next one begins."""
    ends_chunk: bool


@dataclass(frozen=True, kw_only=True)
class PrepareEntry:
    """What worker processes do with an entry: read, decode and filter its image, and prepare it for the scorers."""

    data: DataSet
    unwanted: Unwanted | None = None

    def __call__(self, entry: Entry, recipe: Recipe) -> tuple[Entry, list[View]]:
        """Return the entry with its size and its one view; what it is now instead, where it is set aside or filtered."""
        if not isinstance(entry, ImageEntry):
            return entry, []
        try:
            image, turned = upright(decode(read_bytes(self.data, entry)))
            with or_unusable("undecodable"):
                filtered = self.unwanted(image) if self.unwanted is not None else None
                if filtered is not None:
                    return Filtered(file=entry.file, member=entry.member, filter=filtered), []
                view = recipe.view(image, entry.text)
                return replace(entry, content=None, size=image.size, turned=turned), [view]
        except UnusableError as unusable:
            return unusable.of(entry.file, entry.member), []


def score_row(scored: ScoredItem[Entry], scorers: Sequence[Scorer]) -> ScoreRow:
    """Return the row of an entry: its scores, or why it was set aside or filtered.

    FloatingPointError names scorer and image for a score that is no finite number.
    """
    image = scored.item
    if not isinstance(image, ImageEntry):
        return asdict(image)
    if scored.refused:
        return asdict(UnusableError("refused", scored.refused).of(image.file, image.member))
    scores = scored.scores[0].tolist()
    for scorer, value in zip(scorers, scores, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{scorer.card.name} gave {value} for {image.file} {image.member} with the prompt {image.text!r}; look at"
                " the image, and at --precision"
            )
    row = {"file": image.file, "member": image.member, "text": image.text, "scores": scores}
    row |= {"made": [*image.made, *(image.size or ())]} if image.made else {}
    return row | ({"turned": True} if image.turned else {})


def score_batches(
    prepare: PrepareEntry,
    batches: Iterable[Batch],
    scorers: Sequence[Scorer],
    device: torch.device,
    *,
    workers: int,
) -> Iterator[tuple[Batch, list[ScoreRow]]]:
    """Yield each batch, without its entries, with its rows."""
    ahead: deque[Batch] = deque()  # what the workers are at

    def entries() -> Iterator[list[Entry]]:
        for batch in batches:
            ahead.append(replace(batch, entries=[]))
            yield batch.entries

    for scored in score_files(prepare, entries(), scorers, device, workers=workers):
        yield ahead.popleft(), [score_row(one, scorers) for one in scored]


def write_score_chunks(
    folder: Path,
    prepare: PrepareEntry,
    batches: Iterable[Batch],
    scorers: Sequence[Scorer],
    device: torch.device,
    *,
    workers: int,
) -> Iterator[int]:
    """Write the chunks of these batches after those that the folder has; yields how many entries are done, batch by
    batch.
    """
    done, rows = score_folder.progress(folder)[0], list[ScoreRow]()
    for batch, more in score_batches(prepare, batches, scorers, device, workers=workers):
        rows += more
        if batch.ends_chunk:
            with record_function("write"):
                score_folder.write_chunk(folder, done, rows, batch.next)
            done, rows = done + 1, []
        yield len(more)
    if rows:
        with record_function("write"):
            score_folder.write_chunk(folder, done, rows, (len(prepare.data.sources), 0))
