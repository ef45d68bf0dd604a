"""Prompt files."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from preftune.cli.notes import counted, say
from preftune.typed_prompts import SUFFIXES, is_text
from rewards.input_files import check_regular, has_surrogate, parse_json

MAX_BYTES = 1 << 30
"""Of a prompt file, unpacked."""
ROWS, ROW_BYTES = 256, 64
"""Rows of a parquet file that are unpacked at a time, and the bytes that one takes beside its text."""
MAX_HEADER = 1 << 16
"""Of the first line of a csv file."""
FIELDS = ("text", "prompt", "caption")
"""Names of the field or column that holds the prompt, in order of preference; their case does not matter."""

MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
     "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
"""What an empty cell of a csv file may say, as pandas and so `datasets` read it."""

LONG = 2_000
"""Characters of a prompt above which it is said that text encoders read its beginning only: 77 tokens in Stable Diffusion."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one or more, in the file's order and with the file's own spacing; or those that `path` is itself.

    txt: one a line. json: a list of strings, or of objects with a field of FIELDS. jsonl: one such string
    or object a line. csv, tsv, parquet: a column of FIELDS; tsv is without quoting. Text is UTF-8. Blank
    prompts are left out; they, and what looks like a mistake, are said on stderr with their number. Raises ValueError that
    names the line or row, counted from 1.
    """
    if is_text(path):
        texts = [text for text in str(path).splitlines() if text.strip()]
        say(
            f"no prompt file has this name, it is taken as {counted(len(texts), 'prompt')}: {' / '.join(texts)[:200]}"
        )
        return texts
    rows = read_rows(path)
    prompts = [(place, text) for place, text in rows if text]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompts")
    blank = [place for place, text in rows if not text]
    if blank:
        say(f"{path}: {counted(len(blank), 'blank prompt')} left out, the first at {blank[0]}")
    _warn(path, [text for _, text in prompts])
    return [text for _, text in prompts]


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(line or row, prompt) of each row of a prompt file, as `read_prompts`; the prompt of a blank row is ''."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"prompt file {path} ends in {suffix or 'nothing'}; it must end in {', '.join(SUFFIXES)}"
            f"{'' if path.exists() else ' (a prompt of its own has several words, in quotes)'}"
        )
    if not path.is_file():
        raise ValueError(f"prompt file {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        if (size := check_regular(path, "prompt file ")) > MAX_BYTES:
            raise ValueError(f"prompt file {path} has {size} bytes; at most {MAX_BYTES}")
        rows = _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix)
        return [(place, _prompt(row, f"{path} {place}")) for place, row in rows]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror or error}") from error


def say_long(path: Path, texts: Iterable[str], noun: str) -> None:
    """Say how many of the texts in a file or folder are so long that their end counts for nothing; nothing where none is."""
    if long := sum(len(text) > LONG for text in texts):
        say(
            f"{path}: {counted(long, f'{noun} has', f'{noun}s have')} more than {LONG:,} characters; text encoders read the"
            " beginning only, 77 tokens in Stable Diffusion"
        )


def _warn(path: Path, prompts: Sequence[str]) -> None:
    """Say what is probably not meant: very long prompts, and what is no plain list of prompts in a txt file."""
    say_long(path, prompts, "prompt")
    if path.suffix.lower() != ".txt":
        return
    if comments := sum(prompt.lstrip().startswith("#") for prompt in prompts):
        say(
            f"{path}: {counted(comments, 'line begins', 'lines begin')} with # and is read as a prompt; a prompt file has no comments"
        )
    first = prompts[0].strip()
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        names = [name.strip().strip('"').lower() for name in first.split(separator)]
        if find_field(names, FIELDS) and (len(names) > 1 or suffix == ".csv"):
            say(
                f"{path} looks like a table: its first line is {first[:80]!r}; all {counted(len(prompts), 'line')} are read as"
                f" prompts, commas included; rename it to {path.stem}{suffix}"
            )
            return
    if first.startswith(("{", "[")):
        say(
            f"{path} looks like JSON, and its {counted(len(prompts), 'line')} are read as prompts; rename it to {path.stem}.jsonl or .json"
        )


def _text_rows(path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    """(place, content) of each row of a text file; content is a string or a dict."""
    with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
        if suffix == ".csv":
            delimiter = csv_delimiter(file.readline(MAX_HEADER), FIELDS)
            file.seek(0)
            yield from _table_rows(path, csv.DictReader(file, delimiter=delimiter, strict=True))
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
            yield f"line {reader.line_num}", None if row[column] in MISSING else row[column]
    except csv.Error as error:
        raise ValueError(f"{path} is malformed after line {reader.line_num}: {error}") from error


def csv_delimiter(header: str, wanted: Sequence[str]) -> str:
    """The delimiter of a csv table by its first line: that which gives a column of a wanted name, else most columns.

    A comma, or a semicolon or tab, which spreadsheets write where the comma is the decimal point.
    """
    columns = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in ",;\t"}
    for delimiter, names in columns.items():
        if find_field(names, wanted) or set(names) & set(wanted):
            return delimiter
    return max(columns, key=lambda delimiter: len(columns[delimiter]))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, prompt) of each row of a parquet file; only the prompt's column is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _field(file.schema_arrow.names, str(path))
            size, values = 0, list[Any]()
            for batch in file.iter_batches(ROWS, columns=[column]):  # a text that is repeated is stored once
                values += batch.column(0).to_pylist()
                size += sum(ROW_BYTES + len(str(value)) for value in values[-len(batch) :])
                if size > MAX_BYTES:
                    raise ValueError(f"prompt file {path} unpacks to more than {MAX_BYTES} bytes")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    yield from ((f"row {number}", value) for number, value in enumerate(values, 1))


def find_field(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names among the names, spelt as there, whatever its case; None where none is."""
    spelt = {name.lower(): name for name in reversed([*names])}
    return next((spelt[field] for field in wanted if field in spelt), None)


def _field(names: Iterable[str], place: str) -> str:
    """The first of FIELDS among the names, spelt as there."""
    found = find_field(names, FIELDS)
    if found is None:
        raise ValueError(
            f"{place} has no {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; it has {', '.join(names) or 'nothing'}"
        )
    return found


def _prompt(row: object, place: str) -> str:
    """The prompt of a row, '' where it is blank; refused where it is no text."""
    text = row[_field(row, place)] if isinstance(row, dict) else row
    if text is None or (isinstance(text, float) and text != text):  # pandas writes NaN for an empty cell
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{place} must be a text, not {type(text).__name__}")
    if not text.strip():
        return ""
    if has_surrogate(text):
        raise ValueError(f"{place} holds half of a surrogate pair, which is not a valid character")
    return text
