"""Readers of images with prompts: imagefolders, plain folders, parquet tables and DiffusionDB's zip files.

A data set is a list of sources, and a source is a list of entries: images with a prompt, not yet read, or
rejected items with the reason. Entries are listed lazily, from any position, in an order that depends on
the data alone, so that a killed job can continue. `read_bytes` runs later, in other processes. Nothing is
unzipped to the disk.
"""

import contextlib
import functools
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_build.data_sets import DataSet, find_data_set
from data_build.decode import (
    BROKEN,
    MAX_RATIO,
    Entry,
    ImageEntry,
    UnusableError,
    check_row_group,
    made_of,
    open_zip,
    or_unusable,
)
from data_build.tars import count_images, tar_entries
from preftune.image_folders import ImageFolder
from preftune.images import MAX_BYTES, SUFFIXES
from preftune.records import (
    caption_field,
    captioned_rows,
    check_name,
    field,
    image_field,
    inside,
    is_empty,
    parse_object,
)
from rewards import input_files
from rewards.input_files import MAX_LINE, check_regular, has_surrogate

__all__ = ["DataSet", "entries", "find_data_set", "read_bytes", "survey"]

ROWS = 16
"""Rows of a table that are unpacked at a time; arrow holds the page that they are in, at most a row group."""
MAX_PROMPT = 20_000
"""Characters; tokenisers read a text to its end before they cut it."""
TAIL = 1 << 18
"""Bytes at the end of an archive or table that tell it from others: its directory, with digests or offsets, is there."""


def survey(data: DataSet) -> tuple[str, int]:
    """Return a digest that tells a data set from others, and about how many entries it has."""
    digest, count = hashlib.sha256(), 0
    if data.kind in ("imagefolder", "images"):
        for *_, entry in entries(data):
            size = (data.root / entry.file).stat().st_size if isinstance(entry, ImageEntry) else 0
            digest.update(repr((entry, size)).encode("utf-8", "backslashreplace"))
            count += 1
        return digest.hexdigest(), count
    for name in data.sources:
        if not (data.root / name).is_file():  # a pipe or a device, which is set aside when its turn comes
            count += 1
            continue
        with (data.root / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            digest.update(repr((name, size)).encode("utf-8", "backslashreplace") + file.read())
        try:
            if data.kind == "parquet":
                count += pyarrow.parquet.read_metadata(data.root / name).num_rows
            elif data.kind == "tar":
                count += count_images(data.root / name) or 1
            else:
                with open_zip(data.root / name) as archive:
                    count += len(archive.namelist()) - 1
        except BROKEN:
            count += 1
    return digest.hexdigest(), count


# ---------------------------------------------------------------- listing


def entries(data: DataSet, source: int = 0, start: int = 0) -> Iterator[tuple[int, int, Entry]]:
    """(number of the source, number in it, entry) of all entries from a place on; numbers grow, and some may be left out."""
    listers = {
        "imagefolder": _of_imagefolder,
        "images": _of_image,
        "parquet": _of_table,
        "zip": _of_archive,
        "tar": _of_tar,
    }
    for index in range(source, len(data.sources)):
        for number, entry in listers[data.kind](data, data.sources[index], start):
            yield index, number, _with_prompt(entry, prompted=data.prompted)
        start = 0


def _with_prompt(entry: Entry, *, prompted: bool) -> Entry:
    """The entry, set aside where its prompt is no text, or is needed and empty."""
    if not isinstance(entry, ImageEntry):
        return entry
    if has_surrogate(entry.text):
        why = UnusableError(
            "bad metadata", "the prompt holds half of a surrogate pair, which is no character"
        )
        return why.of(entry.file, entry.member)
    if len(entry.text) > MAX_PROMPT:
        why = UnusableError(
            "bad metadata", f"the prompt has {len(entry.text)} characters; at most {MAX_PROMPT}"
        )
        return why.of(entry.file, entry.member)
    if prompted and not entry.text.strip():
        return UnusableError("no prompt", "the prompt is empty").of(entry.file, entry.member)
    return entry


def _of_image(data: DataSet, name: str, start: int) -> Iterator[tuple[int, Entry]]:
    """The one entry of an image without a caption."""
    if start == 0:
        try:
            _locate(data.root, name, "the folder")
            yield 0, ImageEntry(file=name, member="", text=data.prompt)
        except FileNotFoundError:  # it was listed: a link that leads nowhere
            yield 0, UnusableError("missing", f"{name!r} does not exist").of(name)
        except UnusableError as unusable:
            yield 0, unusable.of(name)


def _of_imagefolder(data: DataSet, name: str, start: int) -> Iterator[tuple[int, Entry]]:
    """The rows of a table of metadata, or images beside their captions."""
    assert data.folder is not None, "an imagefolder has captions"
    table = data.folder.table
    for number, (place, row) in enumerate(captioned_rows(data.folder, data.columns)):
        if number < start:
            continue
        place = place.removeprefix(f"{table} ")
        where = (name, place) if table is not None else (place, "")  # until the image's name is known
        try:
            with or_unusable("bad metadata"):
                if isinstance(row, ValueError):
                    raise UnusableError("bad metadata", str(row).removeprefix(f"{table} "))
                file = field(row, image_field(row, data.columns, place), str, place)
            where = (file, "")
            file = _located(data.folder, file, place)
            with or_unusable("bad metadata"):
                text = _text(row, data, place)
            yield number, ImageEntry(file=file, member="", text=text)
        except UnusableError as unusable:
            yield number, unusable.of(*where)


def _text(row: dict[str, Any], data: DataSet, place: str) -> str:
    """The caption of a row, '' where it has none; ValueError where it is no text, or the field is missing and needed."""
    try:
        name = caption_field(row, data.columns, place)
    except ValueError:
        if data.prompted:
            raise
        return ""
    if is_empty(row[name]):
        return ""
    text: str = field(row, name, str, place)
    return text


def _located(folder: ImageFolder, name: str, place: str) -> str:
    """The file that a row names, relative to the root; UnusableError unless it is below the root."""
    for candidate in folder.candidates(name):
        with contextlib.suppress(FileNotFoundError):
            _locate(folder.root, candidate, place)
            return candidate
    raise UnusableError("missing", f"{place}: {name!r} does not exist")


def _locate(root: Path, name: str, place: str) -> None:
    """Raise UnusableError unless a name is that of a file below the root; FileNotFoundError where there is none."""
    with or_unusable("unsafe name"):
        check_name(name, place)
        name.encode()  # a file system may hold names that are no text
        if os.path.isfile(root / name):
            inside(root, name, place)
            return
    if os.path.exists(root / name):
        raise UnusableError("missing", f"{place}: {name!r} is no file")
    raise FileNotFoundError(name)


def _of_table(data: DataSet, name: str, start: int) -> Iterator[tuple[int, Entry]]:
    """The rows of a parquet table, read a few at a time; a row group that breaks off gives one entry for what is lost."""
    columns = [column for column in (data.image_column, data.text_column) if column is not None]
    try:
        with or_unusable("broken file"):
            check_regular(data.root / name)
            table = pyarrow.parquet.ParquetFile(data.root / name, pre_buffer=False, buffer_size=1 << 20)
            groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            if lacking := set(columns) - set(table.schema_arrow.names):
                raise UnusableError("broken file", f"has no column {min(lacking)}")
    except UnusableError as unusable:
        yield 0, unusable.of(name)
        return
    with table:
        first = 0
        for group, count in enumerate(groups):
            done = first
            try:
                with or_unusable("broken file"):
                    check_row_group(table.metadata.row_group(group))
                    batches = table.iter_batches(ROWS, row_groups=[group], columns=columns)
                    for batch in batches if start < first + count else ():
                        for row in range(batch.num_rows):
                            if done + row >= start:
                                yield done + row, _row(data, name, done + row, batch, row)
                        done += batch.num_rows
            except UnusableError as unusable:
                if done >= start:
                    yield done, unusable.of(name, f"{done} to {first + count - 1}")
            first += count


def _row(data: DataSet, name: str, number: int, batch: pyarrow.RecordBatch, row: int) -> Entry:
    """The entry of a row of a table."""
    try:
        with or_unusable("bad metadata"):
            text = batch.column(data.text_column)[row].as_py() if data.text_column is not None else ""
        if not isinstance(text, str | None):
            raise UnusableError("bad metadata", f"the prompt is a {type(text).__name__}, not a text")
        with or_unusable("missing"):
            value = batch.column(data.image_column)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise UnusableError("missing", "the row holds no bytes; a path alone is not followed")
        return ImageEntry(file=name, member=str(number), text=text or "", content=content)
    except UnusableError as unusable:
        return unusable.of(name, str(number))


def _of_tar(data: DataSet, name: str, start: int) -> Iterator[tuple[int, Entry]]:
    """The samples of a webdataset archive."""
    yield from tar_entries(data.root / name, name, data.columns, start)


def _of_archive(data: DataSet, name: str, start: int) -> Iterator[tuple[int, Entry]]:
    """The images of a zip file in its order, then those that only its JSON knows."""
    try:
        with or_unusable("broken file"), open_zip(data.root / name) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            notes = _notes(archive, members)
    except UnusableError as unusable:
        listed: list[Entry] = [unusable.of(name)]
    else:
        counts = Counter(member.filename for member in members)
        images = [member for member in members if not member.filename.endswith(".json")]
        listed = [_member(name, member, notes, repeated=counts[member.filename] > 1) for member in images]
        lost = UnusableError("missing", "the archive's JSON has an entry, but there is no such image")
        listed += [lost.of(name, member) for member in notes if member not in counts]
    yield from list(enumerate(listed))[start:]


def _notes(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> dict[str, Any]:
    """What a DiffusionDB archive says of its images: {file name: {"p": prompt, "se": seed, ...}}."""
    files = [member for member in members if member.filename.endswith(".json")]
    if len(files) != 1:
        raise UnusableError(
            "bad metadata", f"{len(files)} JSON files among {len(members)} members; there must be one"
        )
    if files[0].file_size > MAX_LINE:
        raise UnusableError("bad metadata", f"{files[0].file_size} bytes of JSON; at most {MAX_LINE}")
    _check_size(files[0])
    with or_unusable("bad metadata"):
        return parse_object(_unpacked(archive, files[0]).decode(), files[0].filename)


def _member(file: str, member: zipfile.ZipInfo, notes: dict[str, Any], *, repeated: bool) -> Entry:
    """The entry of an image in an archive."""
    name = member.filename
    try:
        with or_unusable("unsafe name"):
            check_name(name, file)
        if repeated:
            raise UnusableError("unsafe name", "the name is in the archive more than once")
        if not name.lower().endswith(SUFFIXES):
            raise UnusableError("undecodable", f"the name is not that of an image ({', '.join(SUFFIXES)})")
        _check_size(member)
        with or_unusable("bad metadata"):
            note = field(notes, name, dict, "the archive's JSON")
            text = "" if is_empty(note.get("p", 0)) else field(note, "p", str, name)
        return ImageEntry(file=file, member=name, text=text, made=made_of(note))
    except UnusableError as unusable:
        return unusable.of(file, name)


def _check_size(member: zipfile.ZipInfo) -> None:
    """Raise UnusableError for a member that unpacks to too much, if what the archive says of it is true."""
    packed, size = member.compress_size, member.file_size
    if size > MAX_BYTES or (size > 1 << 20 and size > MAX_RATIO * packed):
        raise UnusableError(
            "too large",
            f"{size} bytes packed into {packed}; at most {MAX_BYTES}, and {MAX_RATIO} times as many",
        )


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's bytes, never more than it announces; without a limit zipfile unpacks up to 2 GB first and cuts then."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the limit works for these
        raise UnusableError(
            "undecodable", f"packed by method {member.compress_type}, neither stored nor deflated"
        )
    with archive.open(member) as file:
        return file.read(member.file_size)


# ---------------------------------------------------------------- reading


def read_bytes(data: DataSet, image: ImageEntry) -> bytes:
    """Return the encoded image; UnusableError where it is broken, or larger than MAX_BYTES."""
    if image.content is not None:
        return image.content
    path = data.root / image.file
    if image.member and data.kind in ("parquet", "tar"):
        lister = _of_table if data.kind == "parquet" else _of_tar
        _, again = next(lister(data, image.file, int(image.member)), (0, None))
        if not isinstance(again, ImageEntry) or again.content is None:
            raise UnusableError("broken file", f"row {image.member} can no longer be read")
        return again.content
    with or_unusable("undecodable"):
        if image.member:
            archive = _open(path)
            return _unpacked(archive, archive.getinfo(image.member))
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UnusableError("too large", f"{size} bytes; at most {MAX_BYTES}")
        return input_files.read_bytes(path, MAX_BYTES)


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> zipfile.ZipFile:
    """An archive that stays open while its images are read, in each process."""
    return open_zip(path)


# A worker that shared an open archive's place in the file would move it under the others.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.cache_clear)
