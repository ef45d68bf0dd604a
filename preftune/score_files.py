"""Scoring of image files: worker processes read, decode and preprocess each image once, the main process
runs the scorers.

Used for data sets (data_build/scoring.py) and for evaluation (eval/view_scores.py). The caller defines what
an item is and how it is read. An item has one or several views, for example an image and its mirror image.

Letters: V views of an item, S scorers, H W pixels of any size.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rewards import Preprocess, Scorer
from rewards.own_scorer import OwnReward
from rewards.pixels import from_pil
from rewards.shared_towers import score_all

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class View:
    """An image to score, with its prompt."""

    prompt: str
    inputs: dict[Preprocess | None, Tensor]
    """Pixels for each preprocessing: (3, size, size), or with None (3, H, W), in [0, 1]."""


Prepare = Callable[[Item, Sequence[Preprocess | None]], tuple[Item, list[View]]]
"""Function of a worker process: item -> item and its views. An item without views was rejected and holds
the reason.
"""


@dataclass(frozen=True, kw_only=True)
class ScoredItem(Generic[Item]):
    """An item and the scores of its views."""

    item: Item
    scores: NDArray[np.float64]
    """(V, S), raw units; NaN if a scorer gave none. V is 0 if the item was rejected."""
    refused: str = ""
    """Why a scorer rejected a view, as the judge does for captions outside the shapes world; else empty."""


def prepared_view(image: Image.Image, prompt: str, rules: Sequence[Preprocess | None]) -> View:
    """Return an image prepared in each way; ValueError for an image that cannot be."""
    return View(prompt=prompt, inputs={rule: from_pil(image, rule) for rule in rules})


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
    view of an item alone. At most 2 batches for each worker are in memory.
    """
    rules = [scorer.card.preprocess for scorer in scorers]
    for prepared in prepared_batches(prepare, batches, rules, workers=workers):
        yield _score(prepared, scorers, device, first_view_only)


def prepared_batches(
    prepare: Prepare[Item],
    batches: Iterable[Sequence[Item]],
    rules: Sequence[Preprocess | None],
    *,
    workers: int,
) -> "Iterator[PreparedBatch[Item]]":
    """Yield each batch, decoded and prepared in each of these ways by worker processes, in order."""
    yield from DataLoader(
        _Preparing(prepare, list(dict.fromkeys(rules))),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_end_with_parent if workers else None,
    )


@dataclass(frozen=True, kw_only=True)
class PreparedBatch(Generic[Item]):
    """A batch from a worker process; W views in all."""

    items: list[Item]
    prompts: list[list[str]]
    """Of the views of each item."""
    inputs: dict[Preprocess, Tensor]
    """(W, 3, size, size) for each way to prepare an image."""
    natives: list[NDArray[np.float32]]
    """W of (3, H, W), where a scorer takes images as they are."""


class _Preparing(Dataset[PreparedBatch[Item]]):
    """A batch of items to a batch of inputs; the loader's sampler yields batches in place of numbers."""

    def __init__(self, prepare: Prepare[Item], rules: Sequence[Preprocess | None]) -> None:
        self.prepare = prepare
        self.rules = rules

    def __getitem__(self, batch: Sequence[Item]) -> PreparedBatch[Item]:
        items, views = zip(*(self.prepare(item, self.rules) for item in batch), strict=True)
        every = [view for some in views for view in some]
        return PreparedBatch(
            items=list(items),
            prompts=[[view.prompt for view in some] for some in views],
            inputs={
                rule: torch.stack([view.inputs[rule] for view in every])
                for rule in self.rules
                if rule is not None and every
            },
            natives=[view.inputs[None].numpy() for view in every if None in view.inputs],
        )


@torch.no_grad()
def _score(
    prepared: PreparedBatch[Item],
    scorers: Sequence[Scorer],
    device: torch.device,
    first_view_only: Collection[str],
) -> list[ScoredItem[Item]]:
    prompts = [prompt for some in prepared.prompts for prompt in some]
    is_first = [index == 0 for some in prepared.prompts for index in range(len(some))]
    table = np.full((len(prompts), len(scorers)), np.nan)
    columns = {scorer.card.name: column for column, scorer in enumerate(scorers)}
    for rule, inputs in prepared.inputs.items():
        group = [scorer for scorer in scorers if scorer.card.preprocess == rule]
        for scorer, found in zip(group, score_all(group, inputs.to(device), prompts), strict=True):
            table[:, columns[scorer.card.name]] = found.double().cpu().numpy()
    mine = [scorer for scorer in scorers if isinstance(scorer, OwnReward)]
    for places, group_scores in _score_by_size(prepared.natives, prompts, mine, device):
        for scorer, found in zip(mine, group_scores, strict=True):
            table[places, columns[scorer.card.name]] = found.double().cpu().numpy()
    refused: dict[int, str] = {}
    for row, native in enumerate(prepared.natives):
        pixels = torch.from_numpy(native)[None].to(device)  # each of its own size
        group = [scorer for scorer in scorers if scorer.card.preprocess is None and scorer not in mine]
        group = [scorer for scorer in group if is_first[row] or scorer.card.name not in first_view_only]
        try:
            scores = score_all(group, pixels, [prompts[row]])
        except ValueError as error:
            refused[row] = str(error)
            continue
        for scorer, found in zip(group, scores, strict=True):
            table[row, columns[scorer.card.name]] = found.item()
    scored, start = [], 0
    for item, some in zip(prepared.items, prepared.prompts, strict=True):
        rows = range(start, start + len(some))
        why = next((refused[row] for row in rows if row in refused), "")
        scored.append(ScoredItem(item=item, scores=table[rows.start : rows.stop], refused=why))
        start = rows.stop
    return scored


def _score_by_size(
    natives: Sequence[NDArray[np.float32]],
    prompts: Sequence[str],
    scorers: Sequence[OwnReward],
    device: torch.device,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield places of images of one size, which go through functions of the user's own together, with their scores."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, native in enumerate(natives if scorers else ()):
        by_size.setdefault(native.shape, []).append(place)
    for places in by_size.values():
        pixels = torch.from_numpy(np.stack([natives[place] for place in places])).to(device)
        yield places, score_all(scorers, pixels, [prompts[place] for place in places])


def _end_with_parent(_: int) -> None:
    """Let a worker process end when its parent was killed; else it would wait forever to hand over its batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
