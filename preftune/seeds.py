"""Seeds of all random numbers: derived with numpy's SeedSequence from (seed, stream, ...).

Random numbers depend only on the image or the step that they are for, never on the batch, the process or
earlier steps.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Second word of every seed of a run: different streams never share random numbers."""

    SETUP = 0
    """Once, before training."""
    STEP = 1
    """(rank, step): the global generators of libraries."""
    IMAGE = 2
    """(stream, index): one image of a run."""
    CHOICE = 3
    """(0, step, micro-batch): choices shared by all processes; RAFT's images use (iteration, image), DDPO's steps (1, epoch)."""


def word(seed: int, *key: int, bits: int = 64) -> int:
    """Return the first word of SeedSequence((seed, *key)): 64 bits, or 32 for consumers of 32-bit seeds."""
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
