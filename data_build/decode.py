"""Reading and decoding of one image of a data set; unusable images are rejected with a reason.

The content of a data set is untrusted: file names may lead outside the folder, archives and images may
expand without bound, and captions may not be text. A bad image, archive or table costs one row and is
recorded.
"""

import contextlib
import lzma
import math
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
from PIL import ExifTags, Image, ImageOps

from preftune import images
from rewards.input_files import check_regular

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

MAX_DIRECTORY = 1 << 24
"""Bytes of the list of members at the end of an archive."""
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")

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


def open_zip(path: Path) -> zipfile.ZipFile:
    """Return an archive for reading. ValueError where it is no regular file, or lists more than MAX_DIRECTORY allows; else as
    `zipfile.ZipFile`, which holds half a kilobyte for each member.
    """
    check_regular(path)
    if (listed := _directory_bytes(path)) > MAX_DIRECTORY:
        raise ValueError(
            f"{path} lists its members in {listed} bytes; at most {MAX_DIRECTORY}, about 200,000"
        )
    return zipfile.ZipFile(path)


def _directory_bytes(path: Path) -> int:
    """The size of an archive's list of members as its last record says; 0 where there is none, which zipfile refuses."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _END.size - 0xFFFF))  # a comment may follow
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) < at + _END.size:
            return 0
        size = int(_END.unpack_from(tail, at)[5])
        if size == 0xFFFFFFFF or tail[max(0, at - 20) : at].startswith(
            b"PK\6\7"
        ):  # more than 4 GB, or 65,535 members
            file.seek(max(0, end - len(tail) + at - 20 - _END64.size))
            record = file.read(_END64.size)
            if record.startswith(b"PK\6\6") and len(record) == _END64.size:
                size = int(_END64.unpack(record)[8])
    return size


def check_row_group(group: Any) -> None:
    """Raise UnusableError for a row group (pyarrow's metadata) with a column that unpacks to too much: pages are unpacked as a whole."""
    for index in range(group.num_columns):
        column = group.column(index)
        packed, size = column.total_compressed_size, column.total_uncompressed_size
        if size > MAX_RATIO * packed + images.MAX_BYTES:
            raise UnusableError(
                "too large",
                f"{column.path_in_schema}: {size} bytes packed into {packed}; at most {MAX_RATIO} times as many",
            )


def decode(content: bytes) -> Image.Image:
    """Return the image, all its pixels read; UnusableError if it is not an image, truncated or too large."""
    try:
        return images.decode(content)
    except images.ImageError as error:
        raise UnusableError(error.reason, error) from error
