"""Reading and decoding of one image of a data set; unusable images are rejected with a reason.

The content of a data set is untrusted: file names may lead outside the folder, archives and images may
expand without bound, and captions may not be text. A bad image, archive or table costs one row and is
recorded.
"""

import contextlib
import lzma
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow
from PIL import ExifTags, Image, ImageOps

from preftune import images

Reason = Literal[
    "broken file",
    "unsafe name",
    "missing",
    "bad metadata",
    "no prompt",
    "no bytes",
    "too large",
    "undecodable",
    "refused",
]
"""Short reasons for rejection; `refused` is for an image or a prompt that a scorer cannot judge."""

MAX_RATIO = 100
"""Unpacked to packed bytes of a member above 1 MiB; images hardly shrink."""

BROKEN = (  # what reading a file, archive or table can raise
    OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    struct.error, pyarrow.ArrowException, tarfile.TarError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """An image of a data set that `read` and `decode` can try."""

    file: str
    """Its file, or the archive or table that holds it, relative to the data set."""
    member: str
    """Its name in the archive or its row in the table, from 0; empty for a file that is the image."""
    text: str
    content: bytes | None = None
    """The encoded image, where listing had to read it: in tables."""
    made: tuple[int | float | str | None, ...] = ()
    """In DiffusionDB its seed, guidance scale, number of steps and sampler; None where that is not known."""
    size: tuple[int, int] | None = None
    """Width and height, once it is decoded."""
    turned: bool = False
    """Whether it was turned as its EXIF data say, once it is decoded."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A rejected image, or with an empty member a rejected file with all its images."""

    file: str
    member: str
    reason: Reason
    detail: str


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """A valid image that a filter removes."""

    file: str
    member: str
    filter: str
    """The name of what it did not pass."""


Entry = ImageEntry | Rejected | Filtered


class UnusableError(Exception):
    """Why something is set aside, in a word and in a sentence."""

    def __init__(self, reason: Reason, detail: object) -> None:
        super().__init__(str(detail) or type(detail).__name__)
        self.reason: Reason = reason

    def of(self, file: str, member: str = "") -> Rejected:
        """Return the row for rejected.jsonl; hostile text in it becomes short lines of characters that a file can hold."""
        texts = [text.encode("utf-8", "backslashreplace").decode() for text in (file, member, str(self))]
        file, member, detail = (" ".join(text[:500].splitlines()) for text in texts)
        return Rejected(file=file, member=member, reason=self.reason, detail=detail)


def made_of(note: dict[str, Any]) -> tuple[int | float | str | None, ...]:
    """Return what a DiffusionDB archive says of how an image was made; None for what is of another type, or no number."""
    kinds: tuple[tuple[str, type | tuple[type, ...]], ...] = (
        ("se", int), ("c", (int, float)), ("st", int), ("sa", str),
    )  # fmt: skip
    values: list[int | float | str | None] = []
    for key, kind in kinds:
        value = note.get(key)
        sound = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, str):  # it may hold halves of surrogate pairs
            value = value[:100].encode("utf-8", "backslashreplace").decode()
        elif isinstance(value, float):
            sound = sound and math.isfinite(value)
        values.append(value if sound else None)
    return tuple(values)


@contextlib.contextmanager
def or_unusable(reason: Reason) -> Iterator[None]:
    """What fails in the block is unusable for this reason."""
    try:
        yield
    except BROKEN as error:
        raise UnusableError(reason, error) from error


def upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image turned as its EXIF data say, and whether that differs from how it is stored."""
    with or_unusable("undecodable"):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return (ImageOps.exif_transpose(image) if turned else image), turned


def decode(content: bytes) -> Image.Image:
    """Return the image, all its pixels read; UnusableError if it is not an image, truncated or too large."""
    try:
        return images.decode(content)
    except images.ImageError as error:
        raise UnusableError(error.reason, error) from error
