"""Reading and writing image files. Inside the package an image is a (3, H, W) float tensor in [0, 1].

Files of a data set are untrusted: only this module opens them, and it enforces the size limits.
"""

from __future__ import annotations  # torch is named in annotations alone, so that flags are read without it

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

from preftune.files import replacing
from preftune.resolution import Framing, Resolution
from rewards.input_files import read_bytes

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

AnyImage: TypeAlias = "Image.Image | torch.Tensor"
"""A PIL image, or a float tensor (3, H, W) in [0, 1]."""

_AVIF = features.check("avif")  # an optional part of PIL
SUFFIXES = (
    ".png", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    *((".avif",) if _AVIF else ()),
)  # fmt: skip
"""Suffixes that identify image files in a folder."""
FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))
"""Formats that are decoded: rasters, in this process. PIL knows 36 more, of which EPS starts another program (Ghostscript)."""
MAX_BYTES = 64 << 20
"""Of an encoded image."""
MAX_PIXELS = 1 << 26
MAX_ASPECT = 100
"""Limit of long to short side: scorers resize the short side, so a one-pixel-wide image would become huge."""

UNREADABLE = (  # what PIL's decoders raise; UnidentifiedImageError is an OSError
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class ImageError(ValueError):
    """An image that cannot be used, and why in a word or two."""

    def __init__(self, reason: Literal["no bytes", "too large", "undecodable"], detail: object) -> None:
        super().__init__(str(detail) or type(detail).__name__)
        self.reason = reason


def decode(content: bytes) -> Image.Image:
    """Return an encoded image with all its pixels read; ImageError if it is invalid or too large."""
    if len(content) > MAX_BYTES:
        raise ImageError("too large", f"{len(content)} bytes; at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's limit only warns, and ours is lower
            image = _open(content)
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its message ends in an address in memory, another each time
        raise ImageError("undecodable", f"none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too large", error) from error
    except UNREADABLE as error:
        raise ImageError("undecodable", error) from error
    return image


def _open(content: bytes) -> Image.Image:
    """An encoded image of a known format and a legal size, whose pixels are read when they are asked for.

    Nothing else opens images in this package (tests/test_layout.py). Of an animation only the first frame is read. PIL bounds
    the texts of a PNG itself.
    """
    if not content:
        raise ImageError("no bytes", "the image has no bytes")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    check_size(image)
    return image


def check_size(image: Image.Image) -> None:
    """Raise ImageError for an image with too many pixels, or with sides that differ too much."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            "too large", f"{width} x {height} pixels; at most {MAX_PIXELS}, and {MAX_ASPECT} : 1"
        )


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Yield an image file as PIL reads it.

    ValueError that names the file where it is missing, no image, too large or damaged, also inside the block.
    """
    if not path.exists():
        raise ValueError(f"image {path} does not exist")
    content = read_bytes(path, MAX_BYTES, "the image ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's limit only warns, and ours is lower
            with _open(content) as file:
                yield file
    except UnidentifiedImageError as error:  # its message ends in an address in memory
        raise ValueError(f"cannot read the image {path}: it is none of {', '.join(FORMATS)}") from error
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def load_pixels(path: Path, resolution: Resolution | int | None = None) -> torch.Tensor:
    """An image file as (3, H, W) float32 in [0, 1]: any PIL mode, turned as EXIF says, transparency over white.

    With a resolution it is resampled (bicubic) until it just covers height and width, and the middle is cut out; one
    number is a square. Raises ValueError that names a file which is missing or no image.
    """
    image = _load(path)
    if resolution is not None:
        image = _fitted(
            image, Resolution(resolution, resolution) if isinstance(resolution, int) else resolution
        )
    return to_pixels(np.array(image))


def load_levels(path: Path, resolution: Resolution) -> tuple[NDArray[np.uint8], Framing]:
    """What `load_pixels` with a resolution reads, in the 256 levels of the file, (H, W, 3): a quarter of the bytes, and no torch; and
    what was cut off.
    """
    image = _load(path)
    original = Resolution(image.height, image.width)
    scale = max(resolution.height / original.height, resolution.width / original.width)
    top, left = (
        round((length * scale - wanted) / 2) for length, wanted in zip(original, resolution, strict=True)
    )
    return np.array(_fitted(image, resolution)), Framing(original, top, left)


def _load(path: Path) -> Image.Image:
    with opened(path) as file:
        return _rgb(ImageOps.exif_transpose(file))


def _fitted(image: Image.Image, resolution: Resolution) -> Image.Image:
    return ImageOps.fit(image, (resolution.width, resolution.height), Image.Resampling.BICUBIC)


def to_pixels(levels: NDArray[np.uint8]) -> torch.Tensor:
    """Levels (..., H, W, 3) as pixels (..., 3, H, W), float32 in [0, 1]."""
    import torch

    return torch.from_numpy(levels).movedim(-1, -3).float() / 255


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """A (3, H, W) float tensor as a PIL image: clamped to [0, 1] and rounded to the nearest of 256 levels."""
    import torch

    assert pixels.ndim == 3, f"pixels have shape {tuple(pixels.shape)}, not (3, H, W)"
    assert pixels.shape[0] == 3, f"pixels have {pixels.shape[0]} channels, not 3"
    pixels = pixels.detach().float().cpu()
    if not pixels.isfinite().all():
        raise FloatingPointError("the image holds a value that is not finite")
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def thumbnail(path: Path, width: int, height: int) -> Image.Image:
    """Return an image file in RGB, made smaller where it exceeds width x height pixels; ValueError as `opened`."""
    with opened(path) as file:
        file.draft("RGB", (width, height))  # a JPEG is decoded at a smaller size at once
        image = _rgb(ImageOps.exif_transpose(file))
    image.thumbnail((width, height), Image.Resampling.BICUBIC)
    return image


def save_image(image: AnyImage, path: Path) -> None:
    """Write a PNG in one piece; makes the folder."""
    image = image if isinstance(image, Image.Image) else to_pil(image)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG in one piece, and close it."""
    from matplotlib.pyplot import close  # not for everybody who loads images

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    close(figure)


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; 16-bit grey is scaled, which PIL's own conversion would clip to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
