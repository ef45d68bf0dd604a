"""Webdataset archives: tar files whose members of one sample share a name up to the first dot, and follow each other.

    000000001.jpg   the image
    000000001.txt   its prompt; else the field of 000000001.json that prompt files use, too

The layout is that of github.com/webdataset/webdataset and of img2dataset. Members are read in the archive's order, so that a
compressed archive is unpacked once.
"""

import contextlib
import gzip
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_build.decode import MAX_RATIO, Entry, ImageEntry, UnusableError, or_unusable
from preftune.image_folders import CAPTION_FILES, Columns
from preftune.images import MAX_BYTES, SUFFIXES
from preftune.records import caption_field, check_name, is_empty, parse_object
from rewards.input_files import check_regular

MAX_TEXT = 1 << 20
"""Bytes of a member that describes an image."""
MAX_PARTS = 16
"""Images and descriptions of one sample."""


def tar_entries(path: Path, name: str, columns: Columns, start: int = 0) -> Iterator[tuple[int, Entry]]:
    """(number, entry) of the samples of an archive from one on; entries hold their bytes, and `member` is the number.

    An archive that breaks off gives one entry for what is lost.
    """
    number, key, parts = -1, "", dict[str, bytes | UnusableError]()
    try:
        with or_unusable("broken file"), _opened(path) as archive:
            for member in _members(archive, path):
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                new, suffix = _split(member.name)
                if new != key:
                    if number >= start:
                        yield number, _entry(name, number, parts, columns)
                    number, key, parts = number + 1, new, {}
                if number >= start and _is_read(suffix):
                    if len(parts) >= MAX_PARTS:
                        parts[suffix] = UnusableError(
                            "too large", f"more than {MAX_PARTS} members of one name"
                        )
                        continue
                    parts[suffix] = _content(archive, member, name)
            if path.suffix.lower() == ".tar" and path.stat().st_size % tarfile.BLOCKSIZE:
                raise UnusableError(
                    "broken file", "the archive is cut off"
                )  # tarfile takes half a header for the end
    except UnusableError as unusable:
        yield max(number + 1, start), unusable.of(name, f"{max(number, 0)} and all that follow")
        return
    if number >= start:
        yield number, _entry(name, number, parts, columns)


def count_images(path: Path) -> int:
    """Return the number of images in an archive."""
    with _opened(path) as archive:
        try:
            return sum(member.name.lower().endswith(SUFFIXES) for member in _members(archive, path))
        except UnusableError:
            return 1


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an archive; UnusableError where it unpacks to too much. tarfile would keep them all."""
    limit = MAX_RATIO * path.stat().st_size + MAX_TEXT
    for member in archive:
        if member.offset_data + member.size > limit:
            raise UnusableError("too large", f"it unpacks to more than {MAX_RATIO} times its bytes")
        yield member
        archive.members.clear()  # type: ignore[attr-defined]  # as webdataset does


def _is_read(suffix: str) -> bool:
    """Whether a member can be the image, or say something of it."""
    return suffix.endswith((*SUFFIXES, *CAPTION_FILES, ".json"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Yield an archive, compressed or not."""
    check_regular(path)
    with path.open("rb") as raw:
        file: Any = _Bounded(raw if path.suffix.lower() == ".tar" else gzip.GzipFile(fileobj=raw))
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive


class _Bounded:
    """A file of which nobody reads more than MAX_BYTES at a time: tarfile reads long names and extended headers as a whole."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        """Return at most size bytes; OSError for more than an image may have."""
        if not 0 <= size <= MAX_BYTES:
            raise OSError(f"a header of {size} bytes; at most {MAX_BYTES}")
        content: bytes = self._read(size)
        return content


def _split(member: str) -> tuple[str, str]:
    """The name of the sample and the suffix of a member, as webdataset splits them: at the first dot of the last part."""
    folder, slash, last = member.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes | UnusableError:
    limit = MAX_BYTES if member.name.lower().endswith(SUFFIXES) else MAX_TEXT
    if member.size > limit:
        return UnusableError("too large", f"{member.name}: {member.size} bytes; at most {limit}")
    try:
        check_name(member.name, name)
    except ValueError as error:
        return UnusableError("unsafe name", error)
    file = archive.extractfile(member)
    assert file is not None, "a regular file has a content"
    content = file.read()
    if len(content) < member.size:
        raise UnusableError("broken file", f"{member.name} is cut off")
    return content


def _entry(name: str, number: int, parts: dict[str, bytes | UnusableError], columns: Columns) -> Entry:
    """The entry of a sample; it has no prompt where there is none."""
    try:
        for part in parts.values():
            if isinstance(part, UnusableError):
                raise part
        contents = {suffix: part for suffix, part in parts.items() if isinstance(part, bytes)}
        image = next((suffix for suffix in contents if suffix.endswith(SUFFIXES)), None)
        if image is None:
            raise UnusableError("missing", f"no image among {', '.join(contents)}")
        with or_unusable("bad metadata"):
            text = _text(contents, columns)
        return ImageEntry(file=name, member=str(number), text=text, content=contents[image])
    except UnusableError as unusable:
        return unusable.of(name, str(number))


def _text(contents: dict[str, bytes], columns: Columns) -> str:
    """The prompt of a sample, '' where it has none."""
    for suffix in CAPTION_FILES if columns.caption_column is None else ():
        if suffix in contents:
            return contents[suffix].decode("utf-8-sig").strip()
    if ".json" not in contents:
        return ""
    row: dict[str, Any] = parse_object(contents[".json"].decode("utf-8-sig"), "its .json")
    try:
        value = row[caption_field(row, columns, "its .json")]
    except ValueError:
        return ""
    if not isinstance(value, str) and not is_empty(value):
        raise ValueError(f"the prompt is {json.dumps(value)[:80]}, not a text")
    return value or "" if isinstance(value, str) else ""
