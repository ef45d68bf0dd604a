"""The layout of captioned grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from preftune import grid, images
from test_images import corner


def test_grid_places_images_and_text() -> None:
    blue, red = Image.new("RGB", (16, 16), (0, 0, 255)), torch.zeros(3, 32, 16)
    red[0] = 1
    captions = ["a blue square beside a red one " * 3, "second"]
    sheet = np.asarray(
        grid.captioned_grid([[blue, red], [red]], captions, ["base", "tuned"], [["0.5", "0.7"], ["1"]], 96)
    ).astype(int)
    is_blue = (sheet == [0, 0, 255]).all(-1)
    is_red = (sheet == [255, 0, 0]).all(-1)
    assert is_blue.sum() == 96 * 96
    assert is_red.sum() == 2 * 96 * 48  # 1:2 images keep their shape
    rows, columns = np.nonzero(is_blue)
    dark = (sheet.max(-1) < 120) & ~is_blue & ~is_red
    assert dark[: rows.min()].any(), "column titles"
    assert dark[rows.min() : rows.max(), : columns.min()].any(), "row captions"
    assert dark[rows.max() + 1 :, columns.min() : columns.max()].any(), "cell captions"
    edge = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    assert (edge == 255).all(), "a white margin all round"


def test_grid_without_text_is_images_and_margins() -> None:
    sheet = grid.captioned_grid([[corner((8, 8))] * 3] * 2, cell_size=32)
    assert sheet.size == (4 * 6 + 3 * 32, 3 * 6 + 2 * 32)
    with pytest.raises(AssertionError, match="1 row captions for 2 rows"):
        grid.captioned_grid([[corner()]] * 2, ["one"])


def test_wrapping() -> None:
    font = ImageFont.load_default(12)
    lines = grid._wrap("a red circle above a blue square on a white background", font, 90, 9)
    assert len(lines) > 2
    assert " ".join(lines) == "a red circle above a blue square on a white background"
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(grid._wrap("x" * 100, font, 90, 99)) == "x" * 100
    cut = grid._wrap("word " * 50, font, 90, 2)
    assert len(cut) == 2
    assert cut[1].endswith("...")
    assert font.getlength(cut[1]) <= 90
    assert grid._wrap("", font, 90, 9) == [""]
    assert grid._wrap("wide", font, 1, 9) == list("wide")


def test_a_file_is_the_same_cell_as_its_pixels(tmp_path: Path) -> None:
    """Files are read when they are placed, made smaller at once; one that is smaller than its cell is enlarged all the same."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype(np.float32) / 255
    pixels = torch.from_numpy(levels)
    images.save_image(pixels, tmp_path / "a.png")
    for cell in (64, 96):
        one, other = (
            grid.captioned_grid([[cell_image]], cell_size=cell) for cell_image in (pixels, tmp_path / "a.png")
        )
        assert (np.asarray(one) == np.asarray(other)).all()
    small = np.asarray(grid.captioned_grid([[tmp_path / "a.png"]], cell_size=32)).astype(int)
    exact = np.asarray(grid.captioned_grid([[pixels]], cell_size=32)).astype(int)
    assert np.abs(small - exact).max() <= 2
    with pytest.raises(ValueError, match=r"b\.png does not exist"):
        grid.captioned_grid([[tmp_path / "b.png"]])
