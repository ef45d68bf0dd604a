"""Reading files that others wrote: regular files of a bounded size, and JSON of a bounded depth.

A folder from elsewhere may hold a pipe, which nobody writes into, a link to /dev/zero, or a file that
takes all memory. Each of them is a ValueError of one sentence here.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 25
"""Bytes of a configuration; the largest are tokenizers."""
MAX_LINE = 1 << 24
"""Bytes of a line of a table."""
MAX_DEPTH = 100
"""Lists and objects inside each other in JSON."""

_POINTER = b"version https://git-lfs"
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def check_regular(path: Path, what: str = "") -> int:
    """Return the number of bytes of a file, links followed. ValueError for what is no regular file; OSError as `stat`."""
    info = path.stat()
    for is_kind, name in _KINDS:
        if is_kind(info.st_mode):
            raise ValueError(f"{what}{path} is {name}, not a file")
    return info.st_size


def check_pointer(path: Path) -> None:
    """Raise ValueError for a file that Git LFS left in the place of large weights, or as `check_regular`; OSError as `stat`."""
    if check_regular(path) > 1024:
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or fetch the model with"
                " `hf download`"
            )


def read_bytes(path: Path, max_bytes: int, what: str = "") -> bytes:
    """Return the content of a file. ValueError, with `what` before its name, where it cannot be read, is no regular file or
    has more bytes.
    """
    try:
        check_regular(path, what)
        # O_NONBLOCK: what became a pipe since then does not block
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot read {what}{path}: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise ValueError(
            f"{what}{path} has more than {max_bytes} bytes, which is too much for a file of its kind"
        )
    return content


def read_text(path: Path, max_bytes: int = MAX_JSON, what: str = "") -> str:
    """Return the content of a UTF-8 file; a mark at its start (BOM) is left out. ValueError as `read_bytes`, and for other text."""
    return _decoded(read_bytes(path, max_bytes, what), path)


def read_text_lines(path: Path, max_line: int = MAX_LINE) -> str:
    """Return the text of a file of any size whose lines are bounded; ValueError that names a longer line, or as `read_text`."""
    try:
        check_regular(path)
        lines = list[bytes]()
        with path.open("rb") as file:
            while line := file.readline(max_line + 1):
                lines.append(line)
                if len(line) > max_line:
                    raise ValueError(f"{path} line {len(lines)} has more than {max_line} bytes")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return _decoded(b"".join(lines), path)


def _decoded(content: bytes, path: Path) -> str:
    """UTF-8 with the line ends of any system."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def has_surrogate(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which is no character: it can be neither encoded nor written."""
    return _SURROGATE.search(text) is not None


def parse_json(text: str, place: str) -> Any:
    """Return what JSON says; ValueError, naming the place, for other text and for lists that are nested too deep."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = "" if " line " in place else f" line {error.lineno}"
        raise ValueError(f"{place}{where} is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deep; at most {MAX_DEPTH} levels are read") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{place} is not JSON: {error}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"{place} is nested too deep; at most {MAX_DEPTH} levels are read")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are more than MAX_DEPTH inside each other: level by level, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError where there is none, or as `read_text`."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
