"""Metrics of a run: rows of numbers by step, in metrics.jsonl and for the trackers of --report-to; and images for those."""

import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from preftune import files
from preftune.training.report_to import chosen
from preftune.training.run_config import RunConfig
from preftune.training.tracker_images import names, with_caption
from preftune.training.trackers import HURRY, Trackers

FILE = "metrics.jsonl"


class Metrics:
    """metrics.jsonl and the trackers, written row by row; a row that the disk has no space for is not written in part.

    Tensorboard's events are written here and not by accelerate, whose writer loses seconds of rows when it is killed.

    Opening drops the rows at or past `start`, which will be written again, and a last line torn by a kill.

    Raises:
        ValueError: a line other than the last is not a row.
    """

    def __init__(self, config: RunConfig, trackers: Trackers, *, start: int) -> None:
        folder = config.output_dir
        path = folder / FILE
        kept = _rows_before(path, start)
        if path.exists():
            files.write_text(path, kept, durable=True)
        self._file = path.open("ab", buffering=0)
        self._digest, self._bytes = hashlib.sha256(kept.encode()), len(kept.encode())
        self._board = (
            _Board(folder / "tensorboard", start) if "tensorboard" in chosen(config.report_to) else None
        )
        self._trackers = trackers

    def write(self, row: dict[str, float], *, complete: bool = True) -> None:
        """Append one row. A number that is not finite becomes null, as JSON has no name for it.

        One that is not complete is written again in the run that resumes: trackers, which keep what they have, get it then.
        """
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        line = (json.dumps(dict.fromkeys(row) | finite) + "\n").encode()
        _append(self._file, line)
        self._digest.update(line)
        self._bytes += len(line)
        step, values = int(row["step"]), {name: value for name, value in finite.items() if name != "step"}
        if self._board is not None:
            self._board.write(values, step)
        if complete:
            self._trackers.write(values, step)

    def images(self, key: str, images: Mapping[Path, str], step: int) -> None:
        """Show image files with captions in the trackers, as of a step; before the first, -1."""
        if self._board is not None:
            self._board.images(key, images, step)
        self._trackers.images(key, images, step)

    def sync(self) -> dict[str, object]:
        """Flush the rows to the disk, so that they survive a power cut. Returns their number of bytes and SHA-256."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self, *, hurry: bool = False) -> None:
        """Close the files, then the trackers, which may take two minutes, or, in a hurry, 20 seconds."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._trackers.close(*([HURRY] if hurry else []))


def start_trackers(
    config: RunConfig, flags: Mapping[str, Any], source: Path | None, row: Mapping[str, float]
) -> Trackers:
    """Start the trackers of a run; where it goes on from a `source` in its own folder, with the steps that they do not have.

    They have what metrics.jsonl has, but for `row`, the one that a signal kept incomplete, if it is the last.
    """
    folder = config.output_dir
    inside = source is not None and source.resolve().parent == folder.resolve()
    if not inside or config.overwrite_output_dir:
        return Trackers(config, flags, first=None)
    rows = _rows_before(folder / FILE, sys.maxsize).splitlines()
    last = int(json.loads(rows[-1])["step"]) if rows else -1
    return Trackers(config, flags, first=last if row and row["step"] == last else last + 1)


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
    """A file of events for tensorboard, made with the first of them. Written at once, and not by a thread of its own: a kill loses
    no row, and a full disk is noticed where it occurs.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self._folder, self._start = folder, start
        self._file: io.FileIO | None = None

    def _open(self) -> io.FileIO:
        """A new file, the last of the folder, with what each begins with."""
        folder = self._folder
        folder.mkdir(exist_ok=True)
        # Tensorboard reads the files in the order of their names, which begin with the time: the clock may have been set back.
        stamps = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.iterdir()]
        stamp = max([int(time.time()), *(int(match[1]) + 1 for match in stamps if match)])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        file = (folder / name).open("xb", buffering=0)
        _append(file, _record(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")))
        begin = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # hides what an earlier file has from this step on
        _append(file, _record(event_pb2.Event(wall_time=time.time(), step=self._start, session_log=begin)))
        return file

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def images(self, key: str, images: Mapping[Path, str], step: int) -> None:
        for name, (path, caption) in names(key, images).items():
            image, content = with_caption(path, caption), io.BytesIO()
            image.save(content, format="JPEG", quality=90)
            shown = summary_pb2.Summary.Image(
                height=image.height, width=image.width, colorspace=3, encoded_image_string=content.getvalue()
            )
            value = summary_pb2.Summary.Value(tag=name, image=shown)
            self._write(
                event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=[value]))
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, event: Any) -> None:
        self._file = self._file or self._open()
        _append(self._file, _record(event))


def _record(event: Any) -> bytes:
    """An event as it stands in a file."""
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
