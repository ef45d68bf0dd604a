"""Prompt files."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rewards.input_files import check_regular, has_surrogate, parse_json

MAX_BYTES = 1 << 30
"""Of a prompt file."""
FIELDS = ("text", "prompt", "caption")
"""Names of the field or column that holds the prompt, in order of preference; their case does not matter."""

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""File types that read_prompts reads."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one or more, in the file's order and with the file's own spacing.

    txt: one a line. json: a list of strings, or of objects with a field of FIELDS. jsonl: one such string
    or object a line. csv, tsv, parquet: a column of FIELDS; tsv is without quoting. Text is UTF-8. Blank
    lines are allowed at the end of a file only. Raises ValueError that names the line or row, counted from
    1.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"prompt file {path} ends in {suffix or 'nothing'}; it must end in {', '.join(SUFFIXES)}"
            f"{'' if path.exists() else ' (prompts stand in a .txt file, one a line)'}"
        )
    if not path.is_file():
        raise ValueError(f"prompt file {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        if (size := check_regular(path, "prompt file ")) > MAX_BYTES:
            raise ValueError(f"prompt file {path} has {size} bytes; at most {MAX_BYTES}")
        rows = _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix)
        prompts = [_prompt(row, f"{path} {place}") for place, row in rows]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompts")
    return prompts


def _text_rows(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """(place, content) of each row of a text file; content is a string or a dict."""
    with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
        if suffix == ".csv":
            yield from _table_rows(path, csv.DictReader(file, strict=True))
        elif suffix == ".tsv":
            yield from _table_rows(path, csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        elif suffix == ".json":
            rows = parse_json(file.read(), str(path))
            if not isinstance(rows, list):
                raise ValueError(f"{path} must hold a list of prompts, not a {type(rows).__name__}")
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        else:
            lines = file.read().rstrip().split("\n")  # str.splitlines would split at form feeds too
            for number, line in enumerate(lines if lines != [""] else [], 1):
                place = f"line {number}"
                yield (
                    place,
                    parse_json(line, f"{path} {place}") if suffix == ".jsonl" and line.strip() else line,
                )


def _table_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[str, str | None]]:
    """(place, prompt) of each row of a csv or tsv file."""
    try:
        column = _field(reader.fieldnames or (), f"{path} line 1")
        for row in reader:
            yield f"line {reader.line_num}", row[column]
    except csv.Error as error:
        raise ValueError(f"{path} is malformed after line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, prompt) of each row of a parquet file; only the prompt's column is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _field(file.schema_arrow.names, str(path))
            values = file.read(columns=[column]).column(column).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    yield from ((f"row {number}", value) for number, value in enumerate(values, 1))


def _field(names: Iterable[str], place: str) -> str:
    """The first of FIELDS among the names, spelt as there."""
    spelt = {name.lower(): name for name in reversed([*names])}
    for field in FIELDS:
        if field in spelt:
            return spelt[field]
    raise ValueError(
        f"{place} has no {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; it has {', '.join(names) or 'nothing'}"
    )


def _prompt(row: object, place: str) -> str:
    """The prompt of a row, refused where it is empty or no text."""
    text = row[_field(row, place)] if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f"{place} must be a text, not {'null' if text is None else type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{place} is empty; remove it or write a prompt there")
    if has_surrogate(text):
        raise ValueError(f"{place} holds half of a surrogate pair, which is not a valid character")
    return text
