"""One rule for everything random: numpy's SeedSequence of (seed, stream, ...) gives the seed of each thing.

So what is random is a function of what it belongs to: an image, or a step; never of the batch, the process or the past.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Second word of every seed of a run: things of different streams never share their random numbers."""

    SETUP = 0
    """Once, before training."""
    STEP = 1
    """(rank, step): the global generators of libraries."""
    IMAGE = 2
    """(stream, index): what belongs to one image of a run."""
    CHOICE = 3
    """(0, step, micro-batch): what all processes choose alike; RAFT's images, (iteration, image)."""


def word(seed: int, *key: int, bits: int = 64) -> int:
    """Return the first word of SeedSequence((seed, *key)): 64 bits, or 32 for what takes no more."""
    kind = np.uint64 if bits == 64 else np.uint32
    return int(np.random.SeedSequence((seed, *key)).generate_state(1, kind)[0])


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator of torch."""
    return torch.Generator().manual_seed(word(seed, *key))


def rng(seed: int, *key: int) -> np.random.Generator:
    """Return a generator of numpy."""
    return np.random.default_rng((seed, *key))


def seed_everything(seed: int, *key: int) -> None:
    """Seed the global generators of Python, numpy and torch, for libraries that use them."""
    first = word(seed, *key, bits=32)
    random.seed(first)
    np.random.seed(first)
    torch.manual_seed(first)
