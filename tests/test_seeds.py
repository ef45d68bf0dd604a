"""Seeds by numpy's rule, and that nothing random is shared by accident."""

import random

import numpy as np
import torch

from preftune import seeds
from preftune.seeds import Stream


def test_a_word_is_seed_sequences_first() -> None:
    sequence = np.random.SeedSequence((7, 2, 0, 3))
    assert seeds.word(7, Stream.IMAGE, 0, 3) == int(sequence.generate_state(1, np.uint64)[0])
    assert seeds.word(7, Stream.IMAGE, 0, 3, bits=32) == int(sequence.generate_state(1, np.uint32)[0])
    assert seeds.word(7, 1, bits=32) < 2**32 <= max(seeds.word(7, k) for k in range(4)) < 2**64


def test_a_generator_is_a_function_of_its_key() -> None:
    first = torch.randn(3, generator=seeds.generator(5, Stream.IMAGE, 0, 9))
    torch.randn(3)  # whatever else happens
    again = torch.randn(3, generator=seeds.generator(5, Stream.IMAGE, 0, 9))
    by_hand = torch.Generator().manual_seed(seeds.word(5, 2, 0, 9))
    assert torch.equal(first, again)
    assert torch.equal(first, torch.randn(3, generator=by_hand))
    assert seeds.rng(5, 3, 0, 1).random() == np.random.default_rng((5, 3, 0, 1)).random()


def test_keys_do_not_meet() -> None:
    keys = [
        (seed, stream, a, b) for seed in range(3) for stream in Stream for a in range(4) for b in range(8)
    ]
    assert len({seeds.word(*key) for key in keys}) == len(keys)
    assert sorted(stream.value for stream in Stream) == [0, 1, 2, 3], "recorded numbers depend on them"


def test_seed_everything_seeds_all_three_libraries() -> None:
    def numbers(*key: int) -> tuple[float, float, float]:
        seeds.seed_everything(*key)
        return random.random(), float(np.random.random()), torch.rand(()).item()

    one, other = numbers(1, Stream.STEP, 0, 2), numbers(1, Stream.STEP, 1, 2)
    assert one == numbers(1, Stream.STEP, 0, 2)
    assert all(a != b for a, b in zip(one, other, strict=True))
    seeds.seed_everything(1, Stream.STEP, 0, 2)
    by_hand = torch.Generator().manual_seed(seeds.word(1, 1, 0, 2, bits=32))
    assert torch.rand(()).item() == torch.rand((), generator=by_hand).item()
