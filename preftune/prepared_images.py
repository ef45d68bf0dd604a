"""Images and prompts for scorers, prepared by worker processes: each image is read and decoded once, and travels in few bytes;
prompts are tokenised.

A worker gets a slice of a batch, so that many workers hold few images each. What it sends is 8-bit pixels of the size that a
scorer takes; or, where the device resizes (rewards.device_resize), the image as it is, once for all scorers.

Letters: V views of an item, W views of a slice, H W pixels of any size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from preftune.worker_processes import end_with_parent
from rewards import Preprocess
from rewards.device_resize import equals_the_authors
from rewards.pixels import can_wait, from_original, packed_from_pil, unpack
from rewards.readers import Reader

Item = TypeVar("Item")

SLICE = 16
"""Items that a worker process prepares at a time; at most two slices for each worker are in memory."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images are prepared: for which scorers, and whether the device resizes."""

    rules: tuple[Preprocess | None, ...]
    """The scorers' ways, each once; None = pixels of the image's own size."""
    on_device: bool = False

    def view(self, image: Image.Image, prompt: str) -> "View":
        """Return an image prepared in each way; ValueError for an image that cannot be."""
        waiting = [rule for rule in self.rules if rule is None or (self.on_device and can_wait(image, rule))]
        inputs = {rule: packed_from_pil(image, rule) for rule in self.rules if rule not in waiting}
        return View(prompt=prompt, inputs=inputs, original=packed_from_pil(image) if waiting else None)


@dataclass(frozen=True, kw_only=True)
class View:
    """An image to score, with its prompt."""

    prompt: str
    inputs: dict[Preprocess | None, Tensor]
    """Packed pixels (3, S, S) for each preprocessing that is done."""
    original: Tensor | None
    """The image (3, H, W) uint8, where a preprocessing is left to the device or a scorer takes images as they are."""


Prepare = Callable[[Item, Recipe], tuple[Item, list[View]]]
"""Function of a worker process: item -> item and its views. An item without views was rejected and holds
the reason.
"""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where the packed pixels of some of the views of a slice are, which are of one size."""

    rule: Preprocess | None
    """What they are prepared for; None = originals."""
    places: list[int]
    """Which of the W views."""
    dtype: torch.dtype
    start: int
    """In the slice's buffer of that type."""
    shape: torch.Size
    """(N, 3, H, W)."""


@dataclass(frozen=True, kw_only=True)
class PreparedSlice(Generic[Item]):
    """A slice of a batch from a worker process; W views in all."""

    items: list[Item]
    prompts: list[list[str]]
    """Of the views of each item."""
    stacks: list[Stack]
    buffers: dict[torch.dtype, Tensor]
    """All pixels of a type, one after another: one file handle between processes and one copy to a device."""
    tokens: list[dict[str, list[int]]]
    """The ids of each prompt, for each reader."""
    ends_batch: bool

    @property
    def texts(self) -> list[str]:
        """Return the prompts of the W views."""
        return [prompt for some in self.prompts for prompt in some]

    def pin_memory(self) -> "PreparedSlice[Item]":
        """Return it with pixels from which a GPU copies without waiting; the loader calls this in a thread."""
        return replace(self, buffers={dtype: pixels.pin_memory() for dtype, pixels in self.buffers.items()})

    def to(self, device: torch.device) -> "PreparedSlice[Item]":
        """Return it on a device, where the copy may still be under way."""
        moved = {dtype: pixels.to(device, non_blocking=True) for dtype, pixels in self.buffers.items()}
        return replace(self, buffers=moved)

    def inputs(self, rule: Preprocess) -> Tensor:
        """Return the pixels (W, 3, S, S) float32 of all views, of which there is one at least, for a preprocessing."""
        rows: dict[int, Tensor] = {}
        for stack in self.stacks:
            if stack.rule == rule:
                rows |= zip(stack.places, unpack(self._pixels(stack), rule), strict=True)
        for stack in self.stacks:
            waiting = [row for row, place in enumerate(stack.places) if place not in rows]
            if stack.rule is None and waiting:
                some = self._pixels(stack)
                some = some if len(waiting) == len(some) else torch.stack([some[row] for row in waiting])
                places = [stack.places[row] for row in waiting]
                rows |= zip(places, from_original(some, rule), strict=True)
        return torch.stack([rows[place] for place in range(len(rows))])

    def natives(self) -> list[tuple[int, Tensor]]:
        """Return the place and the pixels (3, H, W) float32 of each view that has its original."""
        found: list[tuple[int, Tensor]] = []
        for stack in self.stacks:
            if stack.rule is None:
                found += zip(stack.places, unpack(self._pixels(stack)), strict=True)
        return sorted(found, key=lambda pair: pair[0])

    def _pixels(self, stack: Stack) -> Tensor:
        """Packed pixels (N, 3, H, W)."""
        return self.buffers[stack.dtype][stack.start : stack.start + stack.shape.numel()].view(stack.shape)


def prepared_slices(
    prepare: Prepare[Item],
    batches: Iterable[Sequence[Item]],
    rules: Sequence[Preprocess | None],
    *,
    workers: int,
    device: torch.device,
    readers: Sequence[Reader] = (),
) -> Iterator[PreparedSlice[Item]]:
    """Yield the slices of each batch, decoded and prepared in each of these ways by worker processes, in order.

    `prepare` and readers must be picklable; with 0 workers this process does the work, and scorers read their prompts. For a CUDA device pixels are in pinned memory.
    """
    on_cuda = device.type == "cuda"
    recipe = Recipe(rules=tuple(dict.fromkeys(rules)), on_device=on_cuda and equals_the_authors(device))
    yield from DataLoader(
        _Preparing(prepare, recipe, readers if workers else ()),
        sampler=_slices(batches),
        batch_size=None,
        num_workers=workers,
        pin_memory=on_cuda,
        worker_init_fn=_begin_worker if workers else None,
    )


def _slices(batches: Iterable[Sequence[Item]]) -> Iterator[tuple[Sequence[Item], bool]]:
    """Slices of each batch, and whether one is the last of its batch."""
    for batch in batches:
        for start in range(0, len(batch), SLICE):
            yield batch[start : start + SLICE], start + SLICE >= len(batch)


class _Preparing(Dataset[PreparedSlice[Item]]):
    """A slice of items to a prepared one; the loader's sampler yields slices in place of numbers."""

    def __init__(self, prepare: Prepare[Item], recipe: Recipe, readers: Sequence[Reader]) -> None:
        self.prepare = prepare
        self.recipe = recipe
        self.readers = readers

    def __getitem__(self, taken: tuple[Sequence[Item], bool]) -> PreparedSlice[Item]:
        listed, ends_batch = taken
        items, views = zip(*(self.prepare(item, self.recipe) for item in listed), strict=True)
        every = [view for some in views for view in some]
        prompts = dict.fromkeys(view.prompt for view in every)
        stacks, buffers = _stacked(every)
        return PreparedSlice(
            items=list(items),
            prompts=[[view.prompt for view in some] for some in views],
            stacks=stacks,
            buffers=buffers,
            tokens=[{prompt: reader.encode(prompt) for prompt in prompts} for reader in self.readers],
            ends_batch=ends_batch,
        )


def _stacked(views: Sequence[View]) -> tuple[list[Stack], dict[torch.dtype, Tensor]]:
    """The pixels of views in a buffer for each type, those of one size beside each other, and where they are."""
    groups = defaultdict[tuple[Preprocess | None, torch.Size], list[tuple[int, Tensor]]](list)
    for place, view in enumerate(views):
        originals = {} if view.original is None else {None: view.original}
        for rule, pixels in (view.inputs | originals).items():
            groups[rule, pixels.shape].append((place, pixels))
    stacks: list[Stack] = []
    parts: dict[torch.dtype, list[Tensor]] = {}
    for (rule, shape), group in groups.items():
        dtype = group[0][1].dtype
        before = parts.setdefault(dtype, [])
        places, start = [place for place, _ in group], sum(part.numel() for part in before)
        before += [pixels.reshape(-1) for _, pixels in group]
        whole = torch.Size((len(group), *shape))
        stacks.append(Stack(rule=rule, places=places, dtype=dtype, start=start, shape=whole))
    return stacks, {dtype: torch.cat(some) for dtype, some in parts.items()}


def _begin_worker(_: int) -> None:
    """Let a worker process end with its parent; else it would wait forever to hand over its batch."""
    end_with_parent()
