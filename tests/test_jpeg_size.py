"""JPEG sizes as rewards: those of the files that Pillow writes, in kB, and their opposites."""

import io

import pytest
import torch
from PIL import Image

import rewards


def size(image: Image.Image) -> float:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return len(file.getvalue()) / 1000


def test_the_score_is_the_size_of_the_file() -> None:
    pixels = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    pixels[1] = 0.5
    images = [
        Image.fromarray((one * 255).round().byte().permute(1, 2, 0).contiguous().numpy()) for one in pixels
    ]
    expected = [size(image) for image in images]
    assert expected[0] > 2 * expected[1], "noise against grey"
    large, small = (rewards.load(f"jpeg-{name}compressibility") for name in ("in", ""))
    assert large(pixels, ["", ""]).tolist() == pytest.approx(expected)
    assert small(pixels, ["", ""]).tolist() == pytest.approx([-value for value in expected])
    assert large(images, "").tolist() == pytest.approx(expected)
    overshot = pixels.clone()
    overshot[1] = 1.2
    white = Image.new("RGB", (24, 40), "white")
    assert large(overshot, ["", ""])[1].item() == pytest.approx(size(white)), "clamped, not wrapped around"
