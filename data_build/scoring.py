"""Images to scores: worker processes read, decode and prepare each image once, this process runs the scorers.

What goes in is batches of entries of a data set, what comes out a row for each entry, in order: its scores, or why it was
set aside or filtered. What is in a batch is the caller's business.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rewards
from data_build import score_folder
from data_build.decode import Entry, Filtered, ImageEntry, Rejected, UnusableError, decode, or_unusable
from data_build.readers import DataSet, read
from rewards import Preprocess, Scorer
from rewards.pixels import from_pil
from rewards.shared_towers import score_all
from rewards.weights import sha256_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Unwanted = Callable[[Image.Image], str | None]
"""What filters decoded images in the worker processes: the name of the filter that one does not pass, or None."""


def digests(names: Sequence[str], files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the digests of the weights of scorers, which tell a job from others; ValueError where some are not here."""
    return {
        name: {path.name: sha256_of(path) for path in rewards.check(name, files.get(name))} for name in names
    }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Entries that are prepared and scored together; a chunk is a whole number of them."""

    entries: list[Entry]
    next: tuple[int, int]
    """Source and entry where the next one begins."""
    ends_chunk: bool


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch with its P images decoded; those that failed are among the rejected now."""

    batch: Batch
    inputs: dict[Preprocess, Tensor]
    """(P, 3, S, S), one for each way to prepare an image."""
    natives: list[NDArray[np.float32]]
    """(3, H, W) each, P of them where a scorer takes images as they are."""


class Preparing(Dataset[Prepared]):
    """What worker processes do: a batch of entries to a batch of inputs, each image read and decoded once."""

    def __init__(
        self, data: DataSet, rules: Sequence[Preprocess | None], unwanted: Unwanted | None = None
    ) -> None:
        self.data = data
        self.rules = rules
        self.unwanted = unwanted

    def __getitem__(self, batch: Batch) -> Prepared:
        """Return the prepared batch; the loader's sampler yields batches in place of numbers."""
        listed: list[Entry] = []
        prepared: list[list[Tensor]] = []  # an image, its ways
        for entry in batch.entries:
            if isinstance(entry, ImageEntry):
                try:
                    image = decode(read(self.data, entry))
                    with or_unusable("undecodable"):
                        filtered = self.unwanted(image) if self.unwanted is not None else None
                        if filtered is None:
                            prepared.append([from_pil(image, rule) for rule in self.rules])
                    entry = replace(entry, content=None, size=image.size)
                    if filtered is not None:
                        entry = Filtered(file=entry.file, member=entry.member, filter=filtered)
                except UnusableError as unusable:
                    entry = unusable.of(entry.file, entry.member)
            listed.append(entry)
        ways = dict(zip(self.rules, zip(*prepared, strict=True), strict=True)) if prepared else {}
        return Prepared(
            batch=replace(batch, entries=listed),
            inputs={rule: torch.stack(pixels) for rule, pixels in ways.items() if rule is not None},
            natives=[pixels.numpy() for pixels in ways.get(None, ())],
        )


def end_with_parent(_: int) -> None:
    """Let a worker process end when its parent was killed; else it would wait for ever to hand over what nobody reads."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def by_rule(scorers: Sequence[Scorer]) -> dict[Preprocess | None, list[Scorer]]:
    """Return the scorers by how they want images prepared; None = as they are."""
    groups: dict[Preprocess | None, list[Scorer]] = {}
    for scorer in scorers:
        groups.setdefault(scorer.card.preprocess, []).append(scorer)
    return groups


def score_batch(
    scorers: Sequence[Scorer], prepared: Prepared, device: torch.device
) -> list[score_folder.Row]:
    """Return the rows of a batch, one for each entry: scores, or why it was set aside or filtered.

    A scorer that takes images as they are may refuse some: the judge of the shapes world reads its own sizes and captions.
    """
    images = [entry for entry in prepared.batch.entries if isinstance(entry, ImageEntry)]
    prompts = [image.text for image in images]
    found: list[dict[str, float]] = [{} for _ in images]
    refused: dict[int, Rejected] = {}
    for rule, group in by_rule(scorers).items():
        names = [scorer.card.name for scorer in group]
        if rule is not None and images:
            columns = score_all(group, prepared.inputs[rule].to(device), prompts)
            for scores, row in zip(found, torch.stack(columns, dim=1).tolist(), strict=True):
                scores.update(zip(names, row, strict=True))
        for index, native in enumerate(prepared.natives if rule is None else ()):
            image, pixels = (
                images[index],
                torch.from_numpy(native)[None].to(device),
            )  # each of its own size
            try:
                columns = score_all(group, pixels, [image.text])
            except ValueError as error:
                refused[index] = UnusableError("refused", error).of(image.file, image.member)
            else:
                found[index].update(zip(names, torch.stack(columns, dim=1)[0].tolist(), strict=True))
    rows = (
        asdict(refused[index]) if index in refused else scored_row(image, scores, scorers)
        for index, (image, scores) in enumerate(zip(images, found, strict=True))
    )
    return [
        next(rows) if isinstance(entry, ImageEntry) else asdict(entry) for entry in prepared.batch.entries
    ]


def scored_row(image: ImageEntry, scores: dict[str, float], scorers: Sequence[Scorer]) -> score_folder.Row:
    """Return an image's row; FloatingPointError names scorer and image for a score that is no finite number."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} gave {value} for {image.file} {image.member} with the prompt {image.text!r}; look at the"
                " image, and at --precision"
            )
    ordered = [scores[scorer.card.name] for scorer in scorers]
    row = {"file": image.file, "member": image.member, "text": image.text, "scores": ordered}
    return row | ({"made": [*image.made, *(image.size or ())]} if image.made else {})


def score_batches(
    preparing: Preparing,
    batches: Iterable[Batch],
    scorers: Sequence[Scorer],
    device: torch.device,
    *,
    workers: int,
) -> Iterator[tuple[Batch, list[score_folder.Row]]]:
    """Yield each batch with its rows."""
    loader = DataLoader(
        preparing,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=end_with_parent if workers else None,
    )
    for prepared in loader:
        yield prepared.batch, score_batch(scorers, prepared, device)


def score_chunks(
    folder: Path,
    preparing: Preparing,
    batches: Iterable[Batch],
    scorers: Sequence[Scorer],
    device: torch.device,
    *,
    workers: int,
) -> Iterator[int]:
    """Write the chunks of these batches after those that the folder has; yields how many entries are done, batch by batch."""
    done, rows = score_folder.progress(folder)[0], list[score_folder.Row]()
    for batch, more in score_batches(preparing, batches, scorers, device, workers=workers):
        rows += more
        if batch.ends_chunk:
            score_folder.write_chunk(folder, done, rows, batch.next)
            done, rows = done + 1, []
        yield len(batch.entries)
    if rows:
        score_folder.write_chunk(folder, done, rows, (len(preparing.data.sources), 0))
