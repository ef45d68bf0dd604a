"""Assignment of samples, prompts or rankings to the images of a run.

The order is a function of (seed, epoch) alone. Every rank can therefore compute the samples of every other
rank, and a run that is resumed, or continued with another number of processes, sees the same sequence.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import TypeVar

from preftune import seeds

Item = TypeVar("Item")


def items_at(items: Sequence[Item], indices: Iterable[int], seed: int) -> list[Item]:
    """The items (prompts, samples, rankings) of global image indices (0, 1, 2, ...) of a run.

    With n items, index i is number i % n of epoch i // n; each epoch is a permutation of all items drawn from
    (seed, epoch). Seed and indices are not negative.
    """
    assert items, "no items"
    count = len(items)
    return [items[_order(count, seed, index // count)[index % count]] for index in indices]


def image_indices(
    step: int, micro_batch: int, images_per_update: int, batch_size: int, rank: int, world: int
) -> range:
    """Global indices of the images of one process in one micro-batch of an update.

    Over all processes and micro-batches, step s has [s G, (s + 1) G) with G images per update, so that the images of a step do
    not depend on how G is divided.
    """
    first = step * images_per_update + (micro_batch * world + rank) * batch_size
    return range(first, first + batch_size)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    return seeds.rng(seed, epoch).permutation(count).tolist()
