"""Which item belongs to which image of a run: epochs are permutations, whatever divides the work; which items are alike."""

import numpy as np
import pytest

from preftune.order import image_indices, items_at
from rewards.distinct import distinct

LETTERS = "abcdefg"


def test_an_epoch_is_numpys_permutation_by_seed_and_epoch() -> None:
    found = items_at(LETTERS, range(21), seed=3)
    for epoch in range(3):
        order = np.random.default_rng((3, epoch)).permutation(7)
        assert found[7 * epoch : 7 * epoch + 7] == [LETTERS[k] for k in order]
    assert found[:7] != found[7:14], "each epoch has an order of its own"
    assert items_at(LETTERS, range(7), seed=4) != found[:7]
    assert items_at("abcdefgh", range(16), seed=0) == list("cedgfabhbdhgaecf"), (
        "as recorded: runs resume by it"
    )


def test_any_index_stands_alone() -> None:
    every = items_at(LETTERS, range(50), seed=0)
    assert items_at(LETTERS, [49, 3, 3, 20], seed=0) == [every[49], every[3], every[3], every[20]]
    assert items_at(["only"], [0, 5], seed=0) == ["only", "only"]


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(2, 3, 1), (1, 4, 2), (3, 2, 4), (1, 1, 24)])
def test_a_step_has_the_same_images_however_it_is_divided(batch: int, accumulation: int, world: int) -> None:
    each = batch * accumulation * world
    for step in (0, 5):
        seen = [
            index
            for micro_batch in range(accumulation)
            for rank in range(world)
            for index in image_indices(step, micro_batch, each, batch, rank, world)
        ]
        assert seen == list(range(step * each, (step + 1) * each))


def test_values_that_come_again_have_the_place_of_the_first() -> None:
    assert distinct(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])
    assert distinct(()) == ([], [])
