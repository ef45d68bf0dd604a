"""No edit that makes an image follow its caption worse may gain gold, and hardly any may when the image becomes clean, too.

The numbers of `LOG.md` are those of the same functions with twenty times as many edits.
"""

import pytest
import torch

from shape_edits import EDITS, QUALITIES, TINY, drawn, of_generated, sampled, tally

COUNT = 14
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


def test_spoilt_generated_images_lose() -> None:
    captions = (TINY / "held_out.txt").read_text().splitlines()[:64]
    images = sampled(captions)
    found = {kind: of_generated(kind, images, captions, seed=3) for kind in EDITS}
    assert all(
        len(edits) >= 5 for kind, edits in found.items() if kind != "side"
    )  # relations are rarely right
    for kind, edits in found.items():
        assert not edits or tally(edits).gains.max() < ROUGH, kind
    gains = torch.cat([tally(edits).cleaner_gains for edits in found.values() if edits])
    assert (gains > 0).float().mean() <= CLEANER
