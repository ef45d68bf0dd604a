"""What was asked and answered: a file to which a line is added for each question, so that nobody pays twice for an answer.

A line is {"key", "model", "text" or "error" and "detail", "usage", "attempts"}. The key is a digest of the question: of the
whole request, with digests of the images (questions.py). A line is written by one call of the system, so that of a process that
is killed at most the last line is broken off; it is left out by the next. Answers are read from the file when they are needed.
"""

import json
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from preftune.cli.notes import counted, say
from rewards.input_files import check_regular

MAX_LINE = 1 << 24
"""Bytes of a line."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What requests used, as the server counted it."""

    requests: int = 0
    """Requests that were answered with status 200."""
    uncounted: int = 0
    """Those whose tokens the server did not tell."""
    input: int = 0
    """Tokens of input."""
    output: int = 0
    """Tokens of output."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            requests=self.requests + other.requests,
            uncounted=self.uncounted + other.uncounted,
            input=self.input + other.input,
            output=self.output + other.output,
        )

    def cost(self, price_input: float, price_output: float) -> float:
        """Return the cost by the prices of a million tokens."""
        return (self.input * price_input + self.output * price_output) / 1e6


class CallLog:
    """The calls of a file, or of this process alone where there is no file. Threads may share it."""

    def __init__(self, path: Path | None, *, alone: bool = True) -> None:
        """`alone`: no other process writes the file, so that a line that was broken off may be cut away.

        ValueError for what is no file of calls.
        """
        self.path, self.alone = path, alone
        self.used, self.errors = Usage(), Counter[str]()
        """Of all lines, failed ones included: they were paid, too."""
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}
        self._kept: dict[str, dict[str, Any]] = {}
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_regular(path)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._read(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._kept

    @property
    def answered(self) -> bool:
        """Whether there is an answer to any question."""
        return bool(self._places or self._kept)

    def get(self, key: str) -> str | None:
        """Return the text that answered a question; None where none did."""
        with self._lock:
            if key in self._kept:
                return str(self._kept[key]["text"])
            if key not in self._places or self.path is None:
                return None
            with self.path.open("rb") as file:
                file.seek(self._places[key])
                row = _row(file.readline(MAX_LINE))
        return None if row is None or row.get("key") != key else str(row["text"])

    def add(self, row: dict[str, Any], usage: Usage) -> None:
        """Write a line: of an answer with its text, of a failure with its error."""
        row = row | {"usage": vars(usage)}
        line = (json.dumps(row, ensure_ascii=True) + "\n").encode()
        with self._lock:
            place = 0
            if self._file is not None:
                place = os.lseek(self._file, 0, os.SEEK_END)
                _write_all(self._file, line)
            self._note(row, place)

    def _note(self, row: dict[str, Any], place: int) -> None:
        """Remember a line: where an answer is, and what it used."""
        self.used += Usage(**row["usage"])
        if "text" not in row:
            self.errors[str(row["error"])] += 1
        elif self._file is None:
            self._kept[row["key"]] = row
        else:
            self._places[row["key"]] = place

    def _read(self, path: Path) -> None:
        """Read all lines; what is no line of such a file is left out and said, and a last one that was broken off is ended."""
        place = strange = 0
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if not line.endswith(b"\n"):
                    self._end_line(place)
                    break
                row = _row(line)
                if row is None:
                    strange += 1
                else:
                    self._note(row, place)
                place += len(line)
        if strange and not (self._places or self.errors):
            raise ValueError(f"{path} is no file of calls: its first line is no call")
        if strange:
            say(f"{path}: {counted(strange, 'line is no call', 'lines are no calls')} and left out")

    def _end_line(self, place: int) -> None:
        assert self._file is not None, "a file is read"
        if self.alone:
            os.ftruncate(self._file, place)
        else:
            _write_all(self._file, b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """The call of a line; None where it is none."""
    try:
        row = json.loads(line)
        Usage(**row["usage"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    sound = isinstance(row.get("key"), str) and isinstance(row.get("text", row.get("error")), str)
    numbers = all(type(value) is int for value in row["usage"].values())
    return row if sound and numbers else None


def _write_all(file: int, content: bytes) -> None:
    """Write bytes at the end of a file; a disk that is full takes a part, and raises for the rest."""
    while content:
        content = content[os.write(file, content) :]
