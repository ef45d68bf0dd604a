"""Image grids: rows of images with captions, drawn as one image."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from preftune.images import AnyImage, thumbnail, to_pil

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def captioned_grid(
    rows: Sequence[Sequence[AnyImage | Path]],
    row_captions: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell_captions: Sequence[Sequence[str]] = (),
    cell_size: int = 192,
) -> Image.Image:
    """Rows of images on white: titles above the columns, captions left of the rows and under the cells.

    An image is a PIL image, a float tensor (3, H, W) in [0, 1], or a file, which is read when it is placed: only the sheet
    itself is in memory.
    Each image is scaled to fit a square of cell_size pixels. Captions are wrapped to their column, and cut with "..."
    where a row caption is longer than its row, or another text than twice its cell. All pieces of text are optional; rows may differ in length.
    """
    assert rows, "no rows"
    for texts, name in ((row_captions, "row captions"), (cell_captions, "rows of cell captions")):
        assert len(texts) in (0, len(rows)), f"{len(texts)} {name} for {len(rows)} rows"
    columns = max(len(row) for row in rows)
    assert len(column_titles) in (0, columns), f"{len(column_titles)} titles for {columns} columns"
    text_size = max(11, cell_size // 13)
    font, title_font = ImageFont.load_default(text_size), ImageFont.load_default(round(text_size * 1.15))
    gap, line = max(6, cell_size // 16), round(text_size * 1.35)
    most = 2 * cell_size // line  # lines of a title, or of a caption under a cell
    captions = [[_wrap(text, font, cell_size, most) for text in row] for row in cell_captions]
    captions = captions or [[] for _ in rows]
    titles = [_wrap(title, title_font, cell_size, most) for title in column_titles]
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
            lines = _wrap(row_captions[index], font, cell_size, cell_size // line)
            _write(draw, lines, (gap, y + (cell_size - line * len(lines)) // 2), font, line, "la")
        for column, image in enumerate(row):
            _place(sheet, draw, image, (left + column * (cell_size + gap), y), cell_size)
        for column, lines in enumerate(captions[index]):
            middle = left + column * (cell_size + gap) + cell_size // 2
            _write(draw, lines, (middle, y + cell_size + gap // 2), font, line, "ma", ink="#444444")
        y += heights[index] + gap
    return sheet


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: AnyImage | Path,
    corner: tuple[int, int],
    cell_size: int,
) -> None:
    """Paste an image into the middle of the cell whose left upper corner is given, with a thin frame."""
    if isinstance(image, Path):
        image = thumbnail(image, cell_size, cell_size)
    image = image.convert("RGB") if isinstance(image, Image.Image) else to_pil(image)
    image = ImageOps.contain(image, (cell_size, cell_size), Image.Resampling.BICUBIC)
    x, y = corner[0] + (cell_size - image.width) // 2, corner[1] + (cell_size - image.height) // 2
    # else a white image border would be invisible on the white sheet
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline="#dddddd")
    sheet.paste(image, (x, y))


def _broken(word: str, font: _Font, width: int, max_parts: int) -> list[str]:
    """A word in parts of at most width pixels, one letter or more each; what exceeds max_parts is all in the last."""
    parts: list[str] = []
    start = 0
    while len(parts) <= max_parts and start < len(word) - 1:
        part = word[start : start + width]  # a letter takes a pixel or more; marks above letters take none
        if start + len(part) == len(word) and font.getlength(part) <= width:
            break
        cut = bisect_right(range(1, len(part)), width, key=lambda end: math.ceil(font.getlength(part[:end])))
        parts.append(part[: cut or 1])
        start += cut or 1
    return [*parts, word[start : start + width]]


def _wrap(text: str, font: _Font, width: int, max_lines: int) -> list[str]:
    """The text in lines of at most width pixels; a longer word is broken, and what exceeds max_lines is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if (
                len(joined) <= width and font.getlength(joined) <= width
            ):  # what has more letters than pixels is broken
                line = joined
                continue
            lines += [line] if line else []
            *parts, line = _broken(word, font, width, max_lines - len(lines))
            lines += parts
            if len(lines) > max_lines:
                break
        lines.append(line)
        if len(lines) > max_lines:
            break
    if len(lines) <= max_lines:
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
