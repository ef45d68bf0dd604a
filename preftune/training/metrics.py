"""Metrics of a run: rows of numbers by step, in metrics.jsonl and for tensorboard."""

import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from preftune import files

FILE = "metrics.jsonl"


class Metrics:
    """The two files, written row by row; a row that the disk has no space for is not written in part.

    Opening drops the rows at or past `start`, which will be written again, and a last line torn by a kill.

    Raises:
        ValueError: a line other than the last is not a row.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        path = folder / FILE
        kept = _rows_before(path, start)
        if path.exists():
            files.write_text(path, kept, durable=True)
        self._file = path.open("ab", buffering=0)
        self._digest, self._bytes = hashlib.sha256(kept.encode()), len(kept.encode())
        self._board = _Board(folder / "tensorboard", start)

    def write(self, row: dict[str, float]) -> None:
        """Append one row. A number that is not finite becomes null, as JSON has no name for it."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        line = (json.dumps(dict.fromkeys(row) | finite) + "\n").encode()
        _append(self._file, line)
        self._digest.update(line)
        self._bytes += len(line)
        self._board.write({name: value for name, value in finite.items() if name != "step"}, int(row["step"]))

    def sync(self) -> dict[str, object]:
        """Flush the rows to the disk, so that they survive a power cut. Returns their number of bytes and SHA-256."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def check(folder: Path, recorded: Mapping[str, Any], checkpoint: Path) -> str:
    """Return a sentence where the metrics are gone, else nothing.

    ValueError where a line is no row, or where the file does not begin with what `Metrics.sync` recorded for a checkpoint.
    """
    path = folder / FILE
    if not path.exists():
        return f"{path} is gone: it begins anew" if recorded["bytes"] else ""
    _rows_before(path, 0)
    begin = path.read_bytes()[: recorded["bytes"]]
    if hashlib.sha256(begin).hexdigest() != recorded["sha256"]:
        raise ValueError(
            f"{path} is damaged, or was edited: it does not begin with the rows that {checkpoint} recorded; restore it, or"
            " remove it to go on without the earlier rows"
        )
    return ""


def _rows_before(path: Path, start: int) -> str:
    """The lines of the rows before a step; none where there is no file."""
    kept: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not a row of metrics: {line[:80]!r}; repair the line, or remove the file to go on"
                " without the earlier rows"
            ) from error
        if step < start:
            kept.append(line + "\n")
    return "".join(kept)


def _append(file: io.FileIO, data: bytes) -> None:
    """Append all of the bytes, or, where that fails, none."""
    before = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise


_files = itertools.count()


class _Board:
    """A file of events for tensorboard. Written at once, and not by a thread of its own: a kill loses no row, and a full disk is
    noticed where it occurs.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(exist_ok=True)
        # Tensorboard reads the files in the order of their names, which begin with the time: the clock may have been set back.
        stamps = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.iterdir()]
        stamp = max([int(time.time()), *(int(match[1]) + 1 for match in stamps if match)])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        begin = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # hides what an earlier file has from this step on
        self._write(event_pb2.Event(wall_time=time.time(), step=start, session_log=begin))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        _append(self._file, record.getvalue())
