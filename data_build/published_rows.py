"""Rows of published files, read a few at a time: JSON lists, JSON lines, CSV, parquet, and the zip files of
ImageRewardDB.

A row is (place for messages, object). Files have up to millions of rows, so none is read as a whole. When
rows must be grouped, only text is kept for all rows, and images are read for one group at a time. Every
error of a file is a ValueError that names it; a row with other fields than those of the layout is a
SchemaError. In a file of lines, a line that is no row (such as the last of a file that was cut) costs itself alone:
it is given as {BROKEN: the reason}.
"""

import bisect
import contextlib
import csv
import io
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from data_build.decode import open_zip
from preftune import records
from rewards.input_files import check_regular

PlacedRow = tuple[str, dict[str, Any]]

CHUNK = 1 << 16
"""Characters of a JSON list that are read at a time."""
MAX_ROW = 1 << 24
"""Characters that one element of a JSON list, or a line, may take."""
MAX_JSON = 1 << 26
"""Bytes of the JSON in a zip file."""
BATCH = 16
"""Rows of a table that are unpacked at a time; they may hold images."""

BROKEN = "broken line"
"""The one key of what stands for a line that is no row; its value says what is wrong."""

_BETWEEN = re.compile(r"[\s,]*")


class SchemaError(ValueError):
    """A row has no such field, or holds a value of another type in it, as all rows of another layout do."""


def field(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    """A field of the right type. SchemaError where it is missing or of another type; null is a bad value, a ValueError."""
    try:
        return records.field(row, key, kind, place)
    except ValueError as error:
        if key in row and row[key] is None:
            raise
        raise SchemaError(str(error)) from error


def text_field(row: dict[str, Any], key: str, place: str) -> str:
    """A field that holds words; SchemaError as in `field`, ValueError where it is empty."""
    field(row, key, str, place)
    return records.text_field(row, key, place)


def of_json(path: Path) -> Iterator[PlacedRow]:
    """The objects of a JSON list."""
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        yield from _elements(file, str(path))


def of_jsonl(path: Path) -> Iterator[PlacedRow]:
    """The objects of a JSON-lines file; blank lines are passed over. ValueError where the first is not JSON."""
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        sound = 0
        for number, line in enumerate(_lines(file, path), 1):
            place = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = records.parse_object(line, place)
            except ValueError as error:
                if not sound:
                    raise
                row = {BROKEN: str(error)}
            sound += 1
            yield place, row


def of_csv(path: Path, columns: Sequence[str]) -> Iterator[PlacedRow]:
    """The rows of a CSV file whose first line names its columns; a value that a short row lacks is None.

    ValueError for a quote that is never closed, unless it was opened in the last line: all that follows it would be lost.
    """
    with _reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file, path), strict=True)
        _check_columns(path, columns, reader.fieldnames or ())
        while True:
            begin = reader.reader.line_num + 1
            place = f"{path} line {begin}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                more = reader.reader.line_num - begin
                if more > 0:
                    raise ValueError(
                        f"{place} is no row of a CSV file, and takes the {more} lines after it along: {error}; close its quote, or"
                        " remove it"
                    ) from error
                row = {BROKEN: f"{place} is no row of a CSV file: {error}"}
            else:
                place = f"{path} line {reader.line_num}"
            yield place, row


def of_parquet(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[PlacedRow]:
    """The rows of a table, only these columns of it."""
    with _reading(path), _table(path) as table:
        names = table.schema_arrow.names
        _check_columns(path, columns, names)
        wanted = [*columns, *(name for name in optional if name in names)]
        number = 0
        for batch in table.iter_batches(BATCH, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def of_archive(path: Path) -> Iterator[PlacedRow]:
    """The objects of the one JSON list in a zip file."""
    with _reading(path), open_zip(path) as archive:
        lists = [member for member in archive.infolist() if member.filename.endswith(".json")]
        if len(lists) != 1:
            raise ValueError(f"{path} holds {len(lists)} JSON files; a part of ImageRewardDB has one")
        if lists[0].file_size > MAX_JSON:
            raise ValueError(
                f"{path}: {lists[0].filename} has {lists[0].file_size} bytes; at most {MAX_JSON}"
            )
        with archive.open(lists[0]) as member, io.TextIOWrapper(member, encoding="utf-8-sig") as file:
            yield from _elements(file, f"{path} {lists[0].filename}")


def grouped(rows: Iterable[PlacedRow], *keys: str) -> Iterator[PlacedRow]:
    """One row {"rows": [rows]} for all that are equal in these fields, wherever they stand, in the order of the first.

    A row that lacks one of them belongs to no other, and stands alone. A line that is no row stays what it is.
    """
    groups: dict[tuple[str, str], tuple[str, list[PlacedRow]]] = {}
    for place, row in rows:
        values = [row.get(key) for key in keys]
        group = (repr(values), place if None in values else "")
        groups.setdefault(group, (place, []))[1].append((place, row))
    for place, members in groups.values():
        broken = BROKEN in members[0][1]
        yield place, members[0][1] if broken else {"rows": members}


def grouped_of_parquet(path: Path, columns: Sequence[str], key: str, images: str) -> Iterator[PlacedRow]:
    """The rows of a table as `grouped` gives them, with a column of images, of which only those of one group are held.

    The table is read twice, first without its images. Groups whose rows stand together cost one pass over these; for each
    step back, or over a row group, reading begins again with the row group of that row, so a shuffled table is slow.
    """
    rows = enumerate(of_parquet(path, columns))
    with _reading(path), _table(path) as table:
        groups = [*grouped(((place, row | {"number": number}) for number, (place, row) in rows), key)]
        cells = _cells(table, images, (row["number"] for _, group in groups for _, row in group["rows"]))
        for place, group in groups:
            yield place, {"rows": [(where, row | {images: next(cells)}) for where, row in group["rows"]]}


def has_column(path: Path, column: str) -> bool:
    """Whether a table has this column."""
    with _reading(path), _table(path) as table:
        return column in table.schema_arrow.names


def _table(path: Path) -> pyarrow.parquet.ParquetFile:
    """A table, read in pieces."""
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _cells(table: pyarrow.parquet.ParquetFile, column: str, numbers: Iterable[int]) -> Iterator[Any]:
    """The values of a column in the rows of these numbers, from 0; as long as they grow, no value is read twice."""
    sizes = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
    ends = [*itertools.accumulate(sizes)]
    ahead: Iterator[Any] = iter(())
    at = sum(sizes)  # the number of the first value ahead
    for number in numbers:
        index = bisect.bisect_right(ends, number)
        start = ends[index] - sizes[index]
        if not start <= at <= number:
            batches = table.iter_batches(BATCH, row_groups=range(index, len(sizes)), columns=[column])
            ahead, at = (value for batch in batches for value in batch.column(0)), start
        yield next(itertools.islice(ahead, number - at, None)).as_py()
        at = number + 1


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    """The lines of a file, each of a bounded length."""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise ValueError(f"{path} line {number} has more than {MAX_ROW} characters")
        yield line


def _elements(file: IO[str], place: str) -> Iterator[PlacedRow]:
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
        check_regular(path)
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (pyarrow.ArrowException, zipfile.BadZipFile, zlib.error, EOFError, csv.Error) as error:
        raise ValueError(f"{path} is broken, or of another kind: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
