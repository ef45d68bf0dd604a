"""What a run folder or a data set holds, in a form in which two that were made differently can be compared exactly."""

import hashlib
import io
import json
import pickle
import re
from pathlib import Path

import torch

_CLOCK = ("images_per_s", "sampling_time", "scoring_time", "update_time")
"""Columns of metrics.jsonl that depend on the clock."""
_LOCK = re.compile(r"(\..+)?\.lock")
_RESUMING = re.compile(r"^(resume_from_checkpoint|overwrite_output_dir): .*\n|^# .*\n", re.MULTILINE)


def contents(folder: Path) -> dict[str, str]:
    """Relative name -> digest of every file below a folder, and "" for folders; empty where it does not exist.

    Left out is what a resume may change: lock files, which do not block once nobody holds them, the event files of tensorboard, the
    clock's columns of metrics, metrics in a checkpoint that may go on, and the flags of resuming and overwriting in
    config.yaml. The place of the folder in config.yaml is replaced. Of a manifest, whose digests cover such bytes, what it
    says of the run is compared.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "tensorboard" in path.relative_to(folder).parts or _LOCK.fullmatch(path.name):
            continue
        if not path.exists():
            found[name] = "a link to nothing"
            continue
        try:
            content = b"" if path.is_dir() else _bytes(path, folder)
        except (
            ValueError,
            AttributeError,
            KeyError,
            TypeError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ):  # damaged
            content = path.read_bytes()
        found[name] = "" if path.is_dir() else hashlib.sha256(content).hexdigest()
    return found


def _bytes(path: Path, folder: Path) -> bytes:
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        plain = [{name: value for name, value in row.items() if name not in _CLOCK} for row in rows]
        return json.dumps(plain, sort_keys=True).encode()
    if path.name == "state.pt":  # a checkpoint after a signal also has its step's metrics, which may go on
        state = torch.load(path, weights_only=True)
        buffer = io.BytesIO()
        torch.save({name: value for name, value in state.items() if name != "row"}, buffer)
        return buffer.getvalue()
    if path.name == "manifest.json":  # its digests are of bytes that the clock and a hash table are in
        manifest = json.loads(path.read_text(encoding="utf-8"))
        run = manifest.get("run", {})
        kept = [
            manifest.get("updates"),
            run.get("settings"),
            run.get("digests"),
            sorted(manifest.get("files", {})),
        ]
        return json.dumps(kept).encode()
    if path.name == "config.yaml":
        text = path.read_text(encoding="utf-8").replace(str(folder), "RUN")
        return _RESUMING.sub("", text).encode()
    if path.suffix == ".safetensors":  # the order of the names in its header is that of a hash table
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    return path.read_bytes()


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """What two contents do not share, in words."""
    return [
        f"{name} {'is missing' if name not in other else 'is new' if name not in one else 'differs'}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def is_leftover(name: str) -> bool:
    """Whether a relative name is that of an unfinished file or folder."""
    return any(
        re.fullmatch(r"\..+\.(tmp-.+|unfinished|previous)", part) or part.endswith((".tmp", ".part"))
        for part in Path(name).parts
    )
