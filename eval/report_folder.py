"""Folders of reports: what was measured is written beside the report, so that another report does not replace it unasked."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from preftune.files import replacing, write_text


def check_report(
    folder: Path, files: Collection[str], record_file: str, record: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Raise ValueError where one of a report's files is there and is not of this record, unless it may be overwritten."""
    there = [name for name in files if (folder / name).exists()]
    if overwrite or not there:
        return
    differs = difference(folder / record_file, json.loads(json.dumps(record)))
    if differs:
        raise ValueError(
            f"{folder} holds another report, {there[0]} ({differs}); add --overwrite-output-dir, or choose another --output-dir"
        )


def write_record(folder: Path, record_file: str, record: Mapping[str, Any]) -> None:
    """Write what a report is of, before its files."""
    write_text(folder / record_file, json.dumps(record, indent=1) + "\n")


def begin_folder(folder: Path, record_file: str, record: Mapping[str, Any]) -> None:
    """Make a folder that says what its files will be of; one that was begun alike is kept, and one of another record replaced."""
    if difference(folder / record_file, json.loads(json.dumps(record))):
        with replacing(folder) as begun:
            begun.mkdir()
            write_record(begun, record_file, record)


def difference(path: Path, record: Mapping[str, Any]) -> str:
    """Return what of a record is not that of a file, in words; empty where all is."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"it has no {path.name}"
    except ValueError:
        return f"its {path.name} is not JSON"
    keys = [key for key in record if not isinstance(found, dict) or found.get(key) != record[key]]
    return f"other {', '.join(keys)}" if keys else ""
