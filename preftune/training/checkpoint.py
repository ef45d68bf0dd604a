"""Checkpoints and metrics of a run, written so that a kill at any moment loses no complete checkpoint.

A checkpoint is a folder `step_000500` (500 updates done). It gets this name in one rename, so a folder with
that name is always complete. The next start removes what a killed write leaves behind. `state.pt` in it
holds only tensors, numbers and strings and is read with `weights_only=True`: nothing is unpickled.
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from preftune import files

_STEP = re.compile(r"step_(\d{6,})")
_RUN_FILES = (
    "config.yaml", "metrics.jsonl", "tensorboard", "samples", "lora", "unet", "pipeline", "scorer", "vae",
    "before_after.png", "reconstructions.png", "accuracy.png", "skipped.jsonl",
)  # fmt: skip


def updates_of(folder: Path) -> int | None:
    """Updates that made the checkpoint, from its name: `step_000500` -> 500; None where the name is no checkpoint's."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def find_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; empty where there are none."""
    found = [(updates_of(path), path) for path in output.glob("step_*") if (path / "state.pt").is_file()]
    return [path for _, path in sorted((updates, path) for updates, path in found if updates is not None)]


def holds_run(output: Path) -> bool:
    """Whether a new run in `output` would mix with, or hide, an earlier run."""
    return (output / "metrics.jsonl").exists() or bool(find_checkpoints(output))


def clear(
    output: Path, *, resume_from: Path | None, overwrite: bool, driver_files: Sequence[str] = ()
) -> None:
    """Remove what killed writes left behind and, to overwrite, the earlier run.

    Only a run's own files go, and those of the driver's patterns, so that a mistyped folder keeps everything else. Where the new
    run starts from a checkpoint in this very folder, only the later checkpoints go.
    """
    files.tidy(output)
    files.tidy(output / "samples")
    if not overwrite or not holds_run(output):
        return
    inside = resume_from is not None and resume_from.resolve().parent == output.resolve()
    kept = (updates_of(resume_from) or 0) if inside and resume_from is not None else -1
    for path in output.glob("step_*"):
        if (updates_of(path) or 0) > kept:
            files.remove(path)
    for pattern in () if inside else (*_RUN_FILES, *driver_files):
        for path in output.glob(pattern):
            files.remove(path)


def write(
    output: Path, updates: int, state: dict[str, Any], extra: Callable[[Path], None] | None, keep: int
) -> None:
    """Write the checkpoint `step_<updates>` in one piece, then remove all but the newest `keep` (0 keeps all).

    `extra` is given the unfinished folder and adds what the driver wants to find there, such as `lora/`.
    """
    target = output / f"step_{updates:06d}"
    assert not target.exists(), f"{target} is already saved: call save() once per step"
    with files.replacing(target, durable=True) as unfinished:
        unfinished.mkdir()
        torch.save(state, unfinished / "state.pt")
        if extra is not None:
            extra(unfinished)
    for old in find_checkpoints(output)[:-keep] if keep else []:
        files.remove(
            old.rename(old.with_name(f".{old.name}.tmp-gone"))
        )  # half removed, it must not look complete


def read(folder: Path) -> dict[str, Any]:
    """The state that `write` stored, on the CPU."""
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return state


def refuse_mismatch(folder: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Compare settings, or shapes by parameter name, of a checkpoint with the present ones.

    Raises:
        ValueError: they differ; names the first three differences.
    """
    names = [*then, *(name for name in now if name not in then)]
    differ = [
        f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if (name in then, then.get(name)) != (name in now, now.get(name))
    ]
    if differ or list(then) != list(now):
        what = "; ".join(differ[:3]) or "the parameters come in another order"
        raise ValueError(
            f"cannot resume from {folder}: {what}; give the settings that wrote it, or start afresh with another --output-dir"
        )


class Metrics:
    """Rows of numbers by step, in metrics.jsonl and for tensorboard.

    Opening drops the rows at or past `start`, which will be written again, and a last line torn by a kill.

    Raises:
        ValueError: a line other than the last is not a row.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            files.write_text(path, _rows_before(path, start), durable=True)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, row: dict[str, float]) -> None:
        """Append one row. A number that is not finite becomes null, as JSON has no name for it."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._file.write(json.dumps(dict.fromkeys(row) | finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def sync(self) -> None:
        """Flush the rows to the disk, so that they survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def _rows_before(path: Path, start: int) -> str:
    kept: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not a row of metrics: {line[:80]!r}; repair or remove it"
            ) from error
        if step < start:
            kept.append(line + "\n")
    return "".join(kept)


def commit() -> str:
    """Commit of this checkout, with `+` where files differ from it; `unknown` outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
