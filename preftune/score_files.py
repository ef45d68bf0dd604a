"""Scoring of image files: worker processes read, decode and prepare each image once, the main process runs the
scorers.

Used for data sets (data_build/scoring.py) and for evaluation (eval/view_scores.py). The caller defines what
an item is and how it is read. An item has one or several views, for example an image and its mirror image.

On a GPU nothing waits for anything else: while it scores a batch, workers decode, pixels of the next batch are copied from
pinned memory on a stream of their own, and the caller gets, and writes, the scores of the batch before. That is why a batch is
handed out when the next one has been started.

Letters: V views of an item, S scorers, H W pixels of any size.
"""

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from preftune.prepared_images import Prepare, PreparedSlice, prepared_slices
from rewards import Scorer
from rewards.on_device import Reading
from rewards.own_scorer import OwnReward
from rewards.readers import Reader, readers_of
from rewards.shared_towers import score_all

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ScoredItem(Generic[Item]):
    """An item and the scores of its views."""

    item: Item
    scores: NDArray[np.float64]
    """(V, S), raw units; NaN if a scorer gave none. V is 0 if the item was rejected."""
    refused: str = ""
    """Why a scorer rejected a view, as the judge does for captions outside the shapes world; else empty."""


def score_files(
    prepare: Prepare[Item],
    batches: Iterable[Sequence[Item]],
    scorers: Sequence[Scorer],
    device: torch.device,
    *,
    workers: int,
    first_view_only: Collection[str] = (),
) -> Iterator[list[ScoredItem[Item]]]:
    """Yield the items of each batch with their scores, in order.

    `prepare` must be picklable; with 0 workers it runs in this process. Scorers named in `first_view_only` score the first
    view of an item alone.
    """
    rules = [scorer.card.preprocess for scorer in scorers]
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    readers = readers_of(scorers)
    slices = prepared_slices(prepare, batches, rules, workers=workers, device=device, readers=readers)
    started: _Started[Item] | None = None
    gathered: list[PreparedSlice[Item]] = []
    while True:
        with record_function("receive"):
            received = next(slices, None)
        if received is None:
            break
        gathered.append(_copied(received, device, copies))
        if received.ends_batch:
            with record_function("score"), _read_ahead(readers, gathered):
                following = _score(gathered, scorers, first_view_only)
            if started is not None:
                yield started.finish()
            started, gathered = following, []
    if started is not None:
        yield started.finish()


@contextmanager
def _read_ahead(readers: Sequence[Reader], slices: Sequence[PreparedSlice[Item]]) -> Iterator[None]:
    """Context in which scorers know how the prompts of these slices are read."""
    for index, reader in enumerate(readers):
        reader.ahead = ChainMap(*(part.tokens[index] for part in slices if part.tokens))
    try:
        yield
    finally:
        for reader in readers:
            reader.ahead = {}


def _copied(
    received: PreparedSlice[Item], device: torch.device, copies: torch.cuda.Stream | None
) -> PreparedSlice[Item]:
    """A slice on the device. On a GPU the copy goes beside what is being computed, and what is computed next waits for it."""
    with record_function("copy"), nullcontext() if copies is None else torch.cuda.stream(copies):
        copied = received.to(device)
    if copies is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        for pixels in copied.buffers.values():
            pixels.record_stream(current)
    return copied


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Scores of some views by a scorer, which a GPU may still be computing."""

    column: int
    places: Sequence[int]
    values: Reading


@dataclass(frozen=True, kw_only=True)
class _Started(Generic[Item]):
    """A batch whose scoring was started."""

    items: list[tuple[Item, int]]
    """And the number of their views."""
    scores: list[_Scores]
    scorers: int
    refused: dict[int, str]
    """Why a scorer rejected a view, by its place in the batch."""

    def finish(self) -> list[ScoredItem[Item]]:
        """Return the items with their scores, once those are there."""
        table = np.full((sum(views for _, views in self.items), self.scorers), np.nan)
        with record_function("wait"):
            for scores in self.scores:
                table[scores.places, scores.column] = scores.values.values().double().numpy()
        scored, start = [], 0
        for item, views in self.items:
            rows = range(start, start + views)
            why = next((self.refused[row] for row in rows if row in self.refused), "")
            scored.append(ScoredItem(item=item, scores=table[rows.start : rows.stop], refused=why))
            start = rows.stop
        return scored


@torch.no_grad()
def _score(
    slices: list[PreparedSlice[Item]],
    scorers: Sequence[Scorer],
    first_view_only: Collection[str],
) -> _Started[Item]:
    """Start the scoring of a batch, whose slices are on the device."""
    prompts = [prompt for part in slices for prompt in part.texts]
    columns = {scorer.card.name: column for column, scorer in enumerate(scorers)}
    found: list[_Scores] = []

    def keep(scorer: Scorer, places: Sequence[int], values: Tensor) -> None:
        column = columns[scorer.card.name]
        found.append(_Scores(column=column, places=places, values=Reading(values)))

    rules = dict.fromkeys(scorer.card.preprocess for scorer in scorers) if prompts else {}
    for rule in rules:
        if rule is not None:
            group = [scorer for scorer in scorers if scorer.card.preprocess == rule]
            inputs = torch.cat([part.inputs(rule) for part in slices if part.texts])
            for scorer, values in zip(group, score_all(group, inputs, prompts), strict=True):
                keep(scorer, range(len(prompts)), values)
    refused = _score_natives(slices, scorers, first_view_only, keep) if None in rules else {}
    items = [pair for part in slices for pair in zip(part.items, map(len, part.prompts), strict=True)]
    return _Started(items=items, scores=found, scorers=len(scorers), refused=refused)


def _score_natives(
    slices: Sequence[PreparedSlice[Item]],
    scorers: Sequence[Scorer],
    first_view_only: Collection[str],
    keep: Callable[[Scorer, Sequence[int], Tensor], None],
) -> dict[int, str]:
    """Start the scorers that take images as they are; returns why one rejected a view, by its place in the batch."""
    natives = _natives(slices)
    prompts = [prompt for part in slices for prompt in part.texts]
    is_first = [index == 0 for part in slices for some in part.prompts for index in range(len(some))]
    mine = [scorer for scorer in scorers if isinstance(scorer, OwnReward)]
    others = [scorer for scorer in scorers if scorer.card.preprocess is None and scorer not in mine]
    for places, group_scores in _score_by_size(natives if mine else [], prompts, mine):
        for own, values in zip(mine, group_scores, strict=True):
            keep(own, places, values)
    refused: dict[int, str] = {}
    for row, native in natives:  # each of its own size
        group = [scorer for scorer in others if is_first[row] or scorer.card.name not in first_view_only]
        try:
            scores = score_all(group, native[None], [prompts[row]])
        except ValueError as error:
            refused[row] = str(error)
            continue
        for scorer, values in zip(group, scores, strict=True):
            keep(scorer, [row], values)
    return refused


def _natives(slices: Sequence[PreparedSlice[Item]]) -> list[tuple[int, Tensor]]:
    """The place in the batch and the pixels (3, H, W) of each view."""
    found, start = [], 0
    for part in slices:
        found += [(start + place, pixels) for place, pixels in part.natives()]
        start += len(part.texts)
    return found


def _score_by_size(
    natives: Sequence[tuple[int, Tensor]], prompts: Sequence[str], scorers: Sequence[OwnReward]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield places of images of one size, which go through functions of the user's own together, with their scores."""
    by_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for place, native in natives:
        by_size.setdefault(native.shape, []).append((place, native))
    for group in by_size.values():
        places = [place for place, _ in group]
        pixels = torch.stack([native for _, native in group])
        yield places, score_all(scorers, pixels, [prompts[place] for place in places])
