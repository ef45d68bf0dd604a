"""No edit that makes an image follow its caption worse may gain gold, and hardly any may when the image becomes clean, too.

The numbers of `LOG.md` are those of the same functions with twenty times as many edits.
"""

import pytest
import torch

from rewards.shapes import Floats
from shape_edits import EDITS, QUALITIES, TINY, drawn, of_generated, sampled, tally

COUNT = 18
"""Edits of each kind and quality."""
ROUGH = 0.02
"""What an edit of a badly drawn image may gain; of clean ones it may gain nothing, and most lose half a point and more."""
CLEANER = 0.05
"""The share of images that may gain by being spoilt and drawn cleanly at once."""


@pytest.mark.parametrize("quality", QUALITIES)
def test_spoilt_drawings_lose(quality: str) -> None:
    for kind in EDITS:
        edits = drawn(kind, quality, COUNT, seed=1)
        gains = tally(edits).gains
        worst = f"{kind}: {edits[int(gains.argmax())].caption}"
        assert gains.max() < (-0.4 if quality == "clean" else ROUGH), worst


@pytest.mark.parametrize("quality", [name for name in QUALITIES if name != "clean"])
def test_no_cleanness_buys_a_thing_back(quality: str) -> None:
    gains = torch.cat([tally(drawn(kind, quality, COUNT // 2, seed=2)).cleaner_gains for kind in EDITS])
    assert (gains > 0).float().mean() <= CLEANER


@pytest.fixture(scope="module")
def made() -> tuple[list[Floats], list[str]]:
    captions = (TINY / "held_out.txt").read_text().splitlines()[:64]
    return sampled(captions), captions


@pytest.mark.parametrize("kind", EDITS)
def test_spoilt_generated_images_lose(made: tuple[list[Floats], list[str]], kind: str) -> None:
    edits = of_generated(kind, *made, seed=3)
    if kind == "side" and not edits:
        pytest.skip("the model drew no relation as its caption says")
    assert len(edits) >= 5 * (kind != "side")
    found = tally(edits)
    assert found.gains.max() < ROUGH
    assert (found.cleaner_gains > 0).float().mean() <= max(CLEANER, 1 / len(edits))
