"""Slices of images between worker processes and scorers, and the order in which batches are scored and handed out."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from preftune.prepared_images import SLICE, PreparedSlice, Recipe, View, _Preparing, prepared_slices
from preftune.score_files import _score, score_files
from rewards import CARDS, device_resize
from rewards.bert_reader import BertReader
from rewards.imagereward import ImageReward
from rewards.pixels import from_pil
from rewards.readers import readers_of
from transfers import DEVICE, Transfers

CPU = torch.device("cpu")
RULES = tuple(CARDS[name].preprocess for name in ("imagereward", "hpsv2.1", "pickscore"))


def noise(number: int) -> Image.Image:
    """Photographs of several sizes, transparent ones, a tall one, and one that is too large to travel as it is."""
    sizes = [(96, 96), (512, 384), (96, 96), (60, 200), (1400, 800), (333, 500)]
    width, height = sizes[number % len(sizes)]
    channels = 4 if number % 4 == 3 else 3
    values = np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def prepare(number: int, recipe: Recipe) -> tuple[int, list[View]]:
    """An image and its mirror image of even numbers, one image of odd ones, none of 5."""
    image = noise(number)
    views = [recipe.view(image, f"number {number}")]
    if number % 2 == 0:
        views.append(recipe.view(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), f"number {number}"))
    return number, views if number != 5 else []


def prepared(numbers: Sequence[int], *, on_device: bool) -> PreparedSlice[int]:
    recipe = Recipe(rules=(*RULES, None), on_device=on_device)
    return _Preparing(prepare, recipe, ())[(numbers, True)]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_slice_holds_what_the_authors_prepare(on_device: bool) -> None:
    """Whoever resizes: the worker process, or the device, which leaves transparent, tall and large images to the worker."""
    numbers = range(12)
    one = prepared(numbers, on_device=on_device)
    views = [
        view
        for number in numbers
        for view in (noise(number), noise(number).transpose(Image.Transpose.FLIP_LEFT_RIGHT))[
            : 2 - number % 2
        ]
        if number != 5
    ]
    assert [len(some) for some in one.prompts] == [2, 1, 2, 1, 2, 0, 2, 1, 2, 1, 2, 1]
    assert one.items == [*numbers]
    for rule in RULES:
        assert rule is not None
        expected = torch.stack([from_pil(view, rule) for view in views])
        tolerance = 1e-6 if on_device and rule.files == "tensor" else 0
        assert (one.inputs(rule) - expected).abs().max() <= tolerance
    assert [place for place, _ in one.natives()] == [*range(len(views))]
    assert all(
        torch.equal(pixels, from_pil(view)) for (_, pixels), view in zip(one.natives(), views, strict=True)
    )


def test_images_travel_in_few_bytes() -> None:
    """One byte a value where PIL resizes; for the device each image once, whatever the number of scorers."""
    recipe = Recipe(rules=RULES[::2])  # both by PIL
    worker = _Preparing(prepare, recipe, ())[([1], True)]
    assert {dtype: buffer.numel() for dtype, buffer in worker.buffers.items()} == {
        torch.uint8: 2 * 3 * 224**2
    }
    device = _Preparing(prepare, Recipe(rules=RULES, on_device=True), ())[([1], True)]
    assert {dtype: buffer.numel() for dtype, buffer in device.buffers.items()} == {torch.uint8: 3 * 512 * 384}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_cut_into_slices(workers: int) -> None:
    batches = [range(2 * SLICE + 1), range(3), range(SLICE)]
    slices = [*prepared_slices(lambda item, _: (item, []), batches, RULES, workers=workers, device=CPU)]
    assert [(len(one.items), one.ends_batch) for one in slices] == [
        (SLICE, False), (SLICE, False), (1, True), (3, True), (SLICE, True),
    ]  # fmt: skip


class Noting:
    """The mean of all pixels, which notes when it is asked."""

    def __init__(self, events: list[str]) -> None:
        self.card = CARDS["clipscore"]
        self.events = events

    def __call__(self, pixels: Any, prompts: Any) -> torch.Tensor:
        self.events.append(f"score {len(pixels)}")
        return pixels.mean((1, 2, 3))


def test_a_batch_is_handed_out_when_the_next_one_has_been_started() -> None:
    """So that a GPU has work while the caller writes."""
    events: list[str] = []
    found = []
    for batch in score_files(prepare, [[1], [0, 2], [5], [3]], [Noting(events)], CPU, workers=0):
        events.append(f"hand out {[one.item for one in batch]}")
        found += batch
    assert events == [
        "score 1",
        "score 4",
        "hand out [1]",
        "hand out [0, 2]",
        "score 1",
        "hand out [5]",
        "hand out [3]",
    ]
    assert [one.scores.shape for one in found] == [(1, 1), (2, 1), (2, 1), (0, 1), (1, 1)]
    rule = CARDS["clipscore"].preprocess
    assert found[1].scores[0, 0] == pytest.approx(from_pil(noise(0), rule).mean().item(), abs=1e-6)


def test_prompts_are_read_by_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by scorers themselves where there is none; scores are the same, and nothing stays behind."""
    scorer = rewards.load("imagereward-tiny")
    (reader,) = readers_of([scorer])
    mine, original, read_here = os.getpid(), BertReader._rows, []

    def rows(self: BertReader, texts: Sequence[str]) -> list[list[int]]:
        read_here.extend(texts if os.getpid() == mine else [])
        return original(self, texts)

    monkeypatch.setattr(BertReader, "_rows", rows)
    found = {}
    for workers in (0, 1):
        read_here.clear()
        batches = score_files(prepare, [[0, 1], [2, 3]], [scorer], CPU, workers=workers)
        found[workers] = np.concatenate([one.scores for batch in batches for one in batch])
        assert bool(read_here) is (workers == 0)
        assert not reader.ahead
    assert (found[0] == found[1]).all()


def test_berts_reader_equals_the_tokeniser() -> None:
    """With padding of its own, also for texts that hold special tokens, and for those that were read elsewhere."""
    scorer = rewards.load("imagereward-tiny")
    (reader,) = readers_of([scorer])
    assert isinstance(reader, BertReader)
    texts = [
        "a red circle",
        "",
        "[PAD] and [SEP]",
        "a red circle",
        "long " * 100,
        "\u00dcn\u00efcode \u4f60\u597d",
    ]
    theirs = reader.tokenizer(
        texts, padding="max_length", truncation=True, max_length=reader.length, return_tensors="pt"
    )
    ahead = {text: reader.encode(text) for text in texts[1:4]}
    for known in ({}, ahead):
        reader.ahead = known
        ids, mask = reader(texts)
        assert torch.equal(ids, theirs["input_ids"])
        assert torch.equal(mask, theirs["attention_mask"])
    reader.ahead = {"a red circle": [1, 2, 3]}
    assert reader(["a red circle"])[0][0, :4].tolist() == [1, 2, 3, 0]


def test_scoring_waits_for_nothing() -> None:
    """A GPU gets the pixels and the prompts of a batch, resizes and scores; what it found is on its way when the next batch starts."""
    scorer = rewards.load("imagereward-tiny")
    assert isinstance(scorer, ImageReward)
    recipe = Recipe(rules=(scorer.card.preprocess,), on_device=True)
    one = _Preparing(prepare, recipe, ())[(range(3), True)]
    expected = _score([one], [scorer], ()).finish()
    device_resize._pil_weights.cache_clear()
    with Transfers() as transfers:
        scorer.to(DEVICE)
        _score([one.to(DEVICE)], [scorer], ())  # the weights of a size are made once
        transfers.uploads.clear()
        transfers.waits.clear()
        started = _score([one.to(DEVICE)], [scorer], ())
        found = started.finish()
    device_resize._pil_weights.cache_clear()
    assert len(transfers.waits) == 2, "the range of the pixels, and the scores"
    assert all("rewards/on_device.py" in place for place in transfers.waits), (
        "copies that were begun, and read later"
    )
    assert len(transfers.uploads) == len(one.buffers) + 2, "pixels, ids and mask"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
