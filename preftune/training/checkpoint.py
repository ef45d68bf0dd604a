"""Checkpoints of a run, written so that a kill at any moment loses no complete one, and read only when they are as written.

A checkpoint is a folder `step_000500` (500 updates done). It gets this name in one rename, so a folder with
that name was complete. `state.pt` in it holds only tensors, numbers and strings and is read with
`weights_only=True`: nothing is unpickled. `manifest.json` holds the SHA-256 of every file, its own included, of
the rows of metrics so far, and what makes the run (see resume.py).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from preftune import files
from preftune.files import manifest

STATE = "state.pt"
_STEP = re.compile(r"step_(\d{6,})")


def updates_of(folder: Path) -> int | None:
    """Updates that made the checkpoint, from its name: `step_000500` -> 500; None where the name is no checkpoint's."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def find_checkpoints(output: Path, *, damaged: bool = False) -> list[Path]:
    """Checkpoints of a run, oldest first; empty where there are none.

    damaged: with all that only have the name of one. Otherwise those that have a state; `verify` says whether they are sound.
    """
    named = [(updates, path) for path in output.glob("step_*") if (updates := updates_of(path)) is not None]
    return [path for _, path in sorted(named) if damaged or (path / STATE).is_file()]


def write(
    output: Path,
    updates: int,
    state: dict[str, Any],
    extra: Callable[[Path], None] | None,
    keep: int,
    notes: Mapping[str, object],
) -> None:
    """Write the checkpoint `step_<updates>` in one piece, then remove all but the newest `keep` (0 keeps all).

    `extra` is given the unfinished folder and adds what the driver wants to find there, such as `lora/`. `notes` are
    what `verify` returns.
    """
    target = output / f"step_{updates:06d}"
    assert not target.exists(), f"{target} is already saved: call save() once per step"
    with files.replacing(target, durable=True) as unfinished:
        unfinished.mkdir()
        with (unfinished / STATE).open("wb") as file:  # a file object, so that a failed write is an OSError
            torch.save(state, file)
        if extra is not None:
            extra(unfinished)
        manifest.write(unfinished, updates=updates, **notes)
    prune(output, keep)


def prune(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all. A start does it, too: a broken disk may have prevented it."""
    for old in find_checkpoints(output)[:-keep] if keep else []:
        gone = old.with_name(f".{old.name}.tmp-gone")  # half removed, it must not look complete
        files.remove(gone)
        files.remove(old.rename(gone))


def verify(folder: Path) -> dict[str, Any]:
    """Return the notes of a checkpoint that is as it was written. ValueError, in one sentence, for another one."""
    notes = manifest.verify(folder)
    if not {"updates", "metrics", "run"} <= notes.keys():
        raise ValueError(f"{folder} was written by an earlier version")
    if notes["updates"] != updates_of(folder):
        raise ValueError(f"{folder} is the checkpoint of {notes['updates']} updates under another name")
    return notes


def read(folder: Path) -> dict[str, Any]:
    """The state that `write` stored, on the CPU. ValueError for a file that holds no such state."""
    try:
        state: Any = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch has no error of its own for a file that is not what it should be
        raise ValueError(f"{folder / STATE} cannot be read: {str(error).splitlines()[0][:200]}") from error
    needed = {"parameters", "optimizer", "average", "averaged", "scaler", "skipped", "driver", "row"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise ValueError(f"{folder / STATE} is not the state of a run, but a {type(state).__name__}")
    return state
