"""Reading and writing images, and the captioned grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
