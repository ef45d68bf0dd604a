"""Reading and writing images, and the captioned grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from preftune import images


def corner(size: tuple[int, int] = (8, 6)) -> Image.Image:
    """A black image whose left upper quarter is red."""
    image = Image.new("RGB", size, "black")
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    return image


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_round_trip_is_exact(tmp_path: Path) -> None:
    levels = torch.arange(256).float().reshape(1, 16, 16).repeat(3, 1, 1) / 255
    images.save_image(levels, tmp_path / "new" / "a.png")
    assert torch.equal(images.load_pixels(tmp_path / "new/a.png"), levels)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_to_pil_clamps_and_rounds() -> None:
    pixels = torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0]).reshape(1, 2, 2).repeat(3, 1, 1)
    assert np.asarray(images.to_pil(pixels.requires_grad_()))[..., 0].tolist() == [[0, 0], [1, 255]]
    with pytest.raises(FloatingPointError, match="not finite"):
        images.to_pil(torch.full((3, 2, 2), float("nan")))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "I", "F", "LAB"])
def test_every_mode(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (4, 4), 255).convert("RGB")
    image = grey.convert("L").convert(mode) if mode in ("I", "F", "1", "LA") else grey.convert("RGB")
    if mode == "LAB":
        image = Image.new("LAB", (4, 4), (255, 128, 128))
    name = "x.tiff" if mode not in ("P", "1", "L", "LA", "RGB", "RGBA") else "x.png"
    image = image if image.mode == mode else image.convert(mode)
    pixels = images.load_pixels(saved(tmp_path, image, name))
    assert (pixels.shape, pixels.dtype) == ((3, 4, 4), torch.float32)
    assert pixels.min() > 0.97
    assert pixels.max() <= 1


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 257 * 100], [65535, 257 * 200]], dtype=np.uint16))
    pixels = images.load_pixels(saved(tmp_path, image))
    assert torch.allclose(pixels[0] * 255, torch.tensor([[0.0, 100.0], [255.0, 200.0]]))


def test_transparency_is_over_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (images.load_pixels(saved(tmp_path, clear)) == 1).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0] * 256)
    assert (images.load_pixels(saved(tmp_path, palette, "p.png", transparency=0)) == 1).all()


def test_exif_turns(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left upper corner comes right
    pixels = images.load_pixels(saved(tmp_path, corner(), exif=exif))
    assert pixels.shape == (3, 8, 6)
    assert pixels[0, 0, -1] == 1
    assert pixels[0, 0, 0] == 0


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (10, 10)])
def test_size_cuts_the_middle_square(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste("white", (left, top, left + side, top + side))
    pixels = images.load_pixels(saved(tmp_path, image), 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 1:-1, 1:-1].min() > 0.99
    assert pixels.min() > 0.9  # the edge is resampled before the cut, with its neighbours


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.png does not exist"):
        images.load_pixels(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no")
    with pytest.raises(ValueError, match=r"cannot read the image .*b\.png"):
        images.load_pixels(tmp_path / "b.png")
    whole = saved(tmp_path, Image.effect_noise((64, 64), 50)).read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*c\.png"):
        images.load_pixels(tmp_path / "c.png")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.save_image(corner(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def torn(self: Image.Image, path: Path, format: str) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        images.save_image(corner((2, 2)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_grid_places_images_and_text() -> None:
    blue, red = Image.new("RGB", (16, 16), (0, 0, 255)), torch.zeros(3, 32, 16)
    red[0] = 1
    captions = ["a blue square beside a red one " * 3, "second"]
    sheet = np.asarray(
        images.captioned_grid([[blue, red], [red]], captions, ["base", "tuned"], [["0.5", "0.7"], ["1"]], 96)
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
    sheet = images.captioned_grid([[corner((8, 8))] * 3] * 2, cell_size=32)
    assert sheet.size == (4 * 6 + 3 * 32, 3 * 6 + 2 * 32)
    with pytest.raises(AssertionError, match="1 row captions for 2 rows"):
        images.captioned_grid([[corner()]] * 2, ["one"])


def test_wrapping() -> None:
    font = ImageFont.load_default(12)
    lines = images._wrap("a red circle above a blue square on a white background", font, 90)
    assert len(lines) > 2
    assert " ".join(lines) == "a red circle above a blue square on a white background"
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(images._wrap("x" * 100, font, 90)) == "x" * 100
    cut = images._wrap("word " * 50, font, 90, max_lines=2)
    assert len(cut) == 2
    assert cut[1].endswith("...")
    assert font.getlength(cut[1]) <= 90
    assert images._wrap("", font, 90) == [""]
    assert images._wrap("wide", font, 1) == list("wide")
