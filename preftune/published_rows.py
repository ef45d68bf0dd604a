"""The rows of published files, read a few at a time: JSON lists, JSON lines, CSV, parquet, and the zip files of ImageRewardDB.

A row is (place for messages, object). Files hold up to millions of rows, so none is read as a whole; where rows have to be
gathered into groups, those are rows of text. Every fault of a file is a ValueError that names it.
"""

import contextlib
import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from preftune.records import parse_object

Row = tuple[str, dict[str, Any]]

CHUNK = 1 << 16
"""Characters of a JSON list that are read at a time."""
MAX_ROW = 1 << 24
"""Characters that one element of a JSON list may take."""
MAX_JSON = 1 << 26
"""Bytes of the JSON in a zip file."""
BATCH = 16
"""Rows of a table that are unpacked at a time; they may hold pictures."""

_BETWEEN = re.compile(r"[\s,]*")


def of_json(path: Path) -> Iterator[Row]:
    """The objects of a JSON list."""
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        yield from _elements(file, str(path))


def of_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file; blank lines are passed over."""
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", parse_object(line, f"{path} line {number}")


def of_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file whose first line names its columns; a value that a short row lacks is None."""
    with _reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _check_columns(path, columns, reader.fieldnames or ())
        for row in reader:
            yield f"{path} line {reader.line_num}", row


def of_parquet(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table, only these columns of it."""
    with (
        _reading(path),
        pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table,
    ):
        names = table.schema_arrow.names
        _check_columns(path, columns, names)
        wanted = [*columns, *(name for name in optional if name in names)]
        number = 0
        for batch in table.iter_batches(BATCH, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def of_archive(path: Path) -> Iterator[Row]:
    """The objects of the one JSON list in a zip file."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        lists = [member for member in archive.infolist() if member.filename.endswith(".json")]
        if len(lists) != 1:
            raise ValueError(f"{path} holds {len(lists)} JSON files; a part of ImageRewardDB has one")
        if lists[0].file_size > MAX_JSON:
            raise ValueError(
                f"{path}: {lists[0].filename} has {lists[0].file_size} bytes; at most {MAX_JSON}"
            )
        with archive.open(lists[0]) as member, io.TextIOWrapper(member, encoding="utf-8-sig") as file:
            yield from _elements(file, f"{path} {lists[0].filename}")


def grouped(rows: Iterable[Row], *keys: str) -> Iterator[Row]:
    """One row {"rows": [rows]} for all that are equal in these fields, wherever they stand, in the order of the first."""
    groups: dict[str, tuple[str, list[Row]]] = {}
    for place, row in rows:
        key = repr([row.get(key) for key in keys])
        groups.setdefault(key, (place, []))[1].append((place, row))
    yield from ((place, {"rows": members}) for place, members in groups.values())


def _elements(file: IO[str], place: str) -> Iterator[Row]:
    """The objects of a JSON list, parsed one by one."""
    decoder, number = json.JSONDecoder(), 0
    text = file.read(CHUNK).lstrip()
    if not text.startswith("["):
        raise ValueError(f"{place} must hold a JSON list of objects")
    at = 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if text.startswith("]", at):
            return
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # wrong, or cut off
            more = file.read(max(CHUNK, len(text) - at)) if len(text) - at < MAX_ROW else ""
            if not more:
                raise ValueError(f"{place} element {number + 1} is not JSON: {error}") from error
            text, at = text[at:] + more, 0
            continue
        number += 1
        if not isinstance(row, dict):
            raise ValueError(f"{place} element {number} must be an object, not a {type(row).__name__}")
        yield f"{place} element {number}", row
        at = end


def _check_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError for a column that a table lacks."""
    for column in columns:
        if column not in names:
            raise ValueError(f"{path} has no column {column}; it has {', '.join(names) or 'none'}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What fails in the block is a fault of the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (pyarrow.ArrowException, zipfile.BadZipFile, zlib.error, EOFError, csv.Error) as error:
        raise ValueError(f"{path} is broken, or of another kind: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
