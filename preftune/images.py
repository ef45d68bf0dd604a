"""Images in and out, and the captioned grid. Inside the suite an image is a (3, H, W) float tensor in [0, 1]."""

import math
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from preftune.resolution import Framing, Resolution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AnyImage = Image.Image | torch.Tensor
"""A PIL image, or a float tensor (3, H, W) in [0, 1]."""

_UNREADABLE = (  # what PIL's decoders raise; UnidentifiedImageError is an OSError
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file as PIL reads it. ValueError that names it where it is missing, no image or damaged, also inside the block."""
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"image {path} does not exist") from error
    except _UNREADABLE as error:
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
    return _to_tensor(image)


def load_with_framing(path: Path, resolution: Resolution) -> tuple[torch.Tensor, Framing]:
    """An image file as `load_pixels` with a resolution reads it, and what was cut off."""
    image = _load(path)
    original = Resolution(image.height, image.width)
    scale = max(resolution.height / original.height, resolution.width / original.width)
    top, left = (
        round((length * scale - wanted) / 2) for length, wanted in zip(original, resolution, strict=True)
    )
    return _to_tensor(_fitted(image, resolution)), Framing(original, top, left)


def _load(path: Path) -> Image.Image:
    with opened(path) as file:
        return _rgb(ImageOps.exif_transpose(file))


def _fitted(image: Image.Image, resolution: Resolution) -> Image.Image:
    return ImageOps.fit(image, (resolution.width, resolution.height), Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """A (3, H, W) float tensor as a PIL image: clamped to [0, 1] and rounded to the nearest of 256 levels."""
    assert pixels.ndim == 3, f"pixels have shape {tuple(pixels.shape)}, not (3, H, W)"
    assert pixels.shape[0] == 3, f"pixels have {pixels.shape[0]} channels, not 3"
    pixels = pixels.detach().float().cpu()
    if not pixels.isfinite().all():
        raise FloatingPointError("the image holds a value that is not finite")
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_image(image: AnyImage, path: Path) -> None:
    """Write a PNG, whole or not at all; makes the folder."""
    image = image if isinstance(image, Image.Image) else to_pil(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        image.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all, and close it."""
    from matplotlib.pyplot import close  # not for everybody who loads images

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    close(figure)
    temporary.replace(path)


def captioned_grid(
    rows: Sequence[Sequence[AnyImage]],
    row_captions: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell_captions: Sequence[Sequence[str]] = (),
    cell_size: int = 192,
) -> Image.Image:
    """Rows of images on white: titles above the columns, captions left of the rows and under the cells.

    Each image is scaled to fit a square of cell_size pixels. Captions are wrapped to their column, and cut with "..."
    where a row caption is longer than its row. All pieces of text are optional; rows may differ in length.
    """
    assert rows, "no rows"
    for texts, name in ((row_captions, "row captions"), (cell_captions, "rows of cell captions")):
        assert len(texts) in (0, len(rows)), f"{len(texts)} {name} for {len(rows)} rows"
    columns = max(len(row) for row in rows)
    assert len(column_titles) in (0, columns), f"{len(column_titles)} titles for {columns} columns"
    text_size = max(11, cell_size // 13)
    font, title_font = ImageFont.load_default(text_size), ImageFont.load_default(round(text_size * 1.15))
    gap, line = max(6, cell_size // 16), round(text_size * 1.35)
    captions = [[_wrap(text, font, cell_size) for text in row] for row in cell_captions] or [[] for _ in rows]
    titles = [_wrap(title, title_font, cell_size) for title in column_titles]
    left = 2 * gap + (cell_size if row_captions else -gap)
    top = 2 * gap + (line * max(map(len, titles)) + gap // 2 if titles else -gap)
    heights = [cell_size + (line * max(map(len, row)) + gap // 2 if row else 0) for row in captions]
    width = left + columns * (cell_size + gap)
    sheet = Image.new("RGB", (width, top + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        middle = left + column * (cell_size + gap) + cell_size // 2
        _write(draw, lines, (middle, top - gap // 2 - line * len(lines)), title_font, line, "ma", bold=True)
    y = top
    for index, row in enumerate(rows):
        if row_captions:
            lines = _wrap(row_captions[index], font, cell_size, max_lines=cell_size // line)
            _write(draw, lines, (gap, y + (cell_size - line * len(lines)) // 2), font, line, "la")
        for column, image in enumerate(row):
            x = left + column * (cell_size + gap)
            image = image.convert("RGB") if isinstance(image, Image.Image) else to_pil(image)
            image = ImageOps.contain(image, (cell_size, cell_size), Image.Resampling.BICUBIC)
            corner = (x + (cell_size - image.width) // 2, y + (cell_size - image.height) // 2)
            frame = (corner[0] - 1, corner[1] - 1, corner[0] + image.width, corner[1] + image.height)
            draw.rectangle(
                frame, outline="#dddddd"
            )  # else an image with a white edge would melt into the sheet
            sheet.paste(image, corner)
        for column, lines in enumerate(captions[index]):
            middle = left + column * (cell_size + gap) + cell_size // 2
            _write(draw, lines, (middle, y + cell_size + gap // 2), font, line, "ma", ink="#444444")
        y += heights[index] + gap
    return sheet


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; 16-bit grey is scaled, which PIL's own conversion would clip to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(text: str, font: _Font, width: int, max_lines: int | None = None) -> list[str]:
    """The text in lines of at most width pixels; a longer word is broken, and what exceeds max_lines is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while len(word) > 1 and font.getlength(word) > width:
                part = word
                cut = (
                    bisect_right(
                        range(1, len(part)), width, key=lambda end: math.ceil(font.getlength(part[:end]))
                    )
                    or 1
                )
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if max_lines is None or len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "..."]


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    at: tuple[int, int],
    font: _Font,
    line_height: int,
    anchor: str,
    *,
    ink: str = "#111111",
    bold: bool = False,
) -> None:
    """Draw lines of text downwards from a point; the anchor is PIL's, "la" left or "ma" centred."""
    x, y = at
    for number, text in enumerate(lines):
        # The only font that comes with Pillow has one weight; a thin outline in the same ink makes it bolder.
        draw.text((x, y + number * line_height), text, ink, font, anchor, stroke_width=0.4 if bold else 0)
