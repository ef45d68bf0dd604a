"""The output folder of a run: what in it belongs to a run, and what goes when another run takes its place."""

import importlib.metadata
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preftune import files
from preftune.training import checkpoint
from rewards import embedded

_RESULTS = (
    "lora", "lora_kohya.safetensors", "unet", "pipeline", "scorer", "vae", "before_after.png", "reconstructions.png", "accuracy.png",
    "best", "guard.png", "progress.png",
)  # fmt: skip
_OTHERS = ("config.yaml", "metrics.jsonl", "skipped.jsonl", "trackers.json")
_CHECKPOINT = re.compile(r"step_(\d{6,})(\.damaged)?")
_SAMPLES = re.compile(r"step_(\d{6,})(_\w+)?(\.png)?")


def holds_run(output: Path) -> bool:
    """Whether a new run in `output` would mix with, or hide, an earlier run."""
    there = any((output / name).exists() for name in ("metrics.jsonl", *_RESULTS))
    return there or bool(checkpoint.find_checkpoints(output, damaged=True))


def check_not_mixed(output: Path, source: Path | None) -> None:
    """Raise ValueError where a new run, or one that goes on from `source`, would mix with an earlier one."""
    if not holds_run(output):
        return
    if source is None:
        raise ValueError(
            f"--output-dir {output} already holds a run: continue it with --resume-from-checkpoint latest, remove it with --overwrite-output-dir, "
            "or choose another --output-dir"
        )
    if [source.resolve()] != [newest.resolve() for newest in checkpoint.find_checkpoints(output)[-1:]]:
        raise ValueError(
            f"--output-dir {output} holds work that does not lead to --resume-from-checkpoint {source}: remove it with --overwrite-output-dir, "
            "or choose another --output-dir"
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    source: Path | None = None
    """The checkpoint that it goes on from."""
    damaged: tuple[Path, ...] = ()
    """Newer checkpoints that cannot be used."""
    said: tuple[str, ...] = ()
    """What the user should know."""


def clear(output: Path, start: Start, *, overwrite: bool, driver_files: Sequence[str] = ()) -> None:
    """Make the folder, remove what killed writes left behind and, to overwrite, the earlier run; rename damaged checkpoints to NAME.damaged.

    Only a run's own files go, and those of the driver's patterns, so that a mistyped folder keeps everything else. Where the new
    run starts from a checkpoint in this very folder, only what is later than that goes.
    """
    for damaged in start.damaged:
        place = damaged.with_name(f"{damaged.name}.damaged")
        files.remove(place)
        damaged.rename(place)
    source = start.source
    output.mkdir(parents=True, exist_ok=True)
    files.tidy(output, output / "samples")
    if not overwrite or not holds_run(output):
        return
    inside = source is not None and source.resolve().parent == output.resolve()
    kept = (checkpoint.updates_of(source) or 0) if inside and source is not None else -1
    for name in (
        _RESULTS if inside else (*_RESULTS, *_OTHERS)
    ):  # the guard makes RUN/best again of a checkpoint
        files.remove(output / name)
    for pattern in () if inside else driver_files:
        for path in output.glob(pattern):
            files.remove(path)
    _remove_later(output, _CHECKPOINT, kept)
    _remove_later(output / "samples", _SAMPLES, kept)
    if not inside:
        for path in (output / "tensorboard").glob("events.out.tfevents.*"):
            files.remove(path)
    for name in ("samples", "tensorboard"):
        if (output / name).is_dir() and not any((output / name).iterdir()):
            (output / name).rmdir()


def _remove_later(folder: Path, pattern: re.Pattern[str], kept: int) -> None:
    """Remove what has a name with more updates than these."""
    for path in folder.glob("step_*"):
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) > kept:
            files.remove(path)


def write_config(output: Path, text: str, driver: str, circumstances: str) -> None:
    """Write the YAML that replays a configuration as config.yaml, below a line that says what made the run."""
    made_by = f"driver {driver}, commit {commit()}, {circumstances}"
    files.write_text(output / "config.yaml", f"# {made_by}\n{text}", durable=True)


def commit() -> str:
    """Commit of this checkout, with `+` where files differ from it; outside git, as of a wheel, the version.

    A wheel may lie in a folder of another project's repository, whose commit says nothing.
    """
    if not (embedded.ROOT / ".git").exists():
        try:
            return f"unknown (version {importlib.metadata.version('preftune')})"
        except importlib.metadata.PackageNotFoundError:
            return "unknown"
    where = ["git", "-C", str(Path(__file__).parent)]
    command = [*where, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
