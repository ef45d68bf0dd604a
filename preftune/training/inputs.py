"""What the inputs of a run hold, in short: two runs with equal digests have read the same model, data and scorers."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rewards
from preftune.families.digest import digest as digest_of_pipeline
from preftune.families.digest import digest_of_part
from preftune.families.locate import locate, locate_vae
from preftune.families.source import Source
from preftune.image_folders import CAPTION_FILES
from preftune.lora import files as lora_files
from preftune.typed_prompts import is_text
from rewards import embedded, own
from rewards.digests import sampled_sha256_of
from rewards.terms import parse_files, parse_weights

FLAGS = (
    "model", "vae", "weights", "vocab", "image_tower", "data", "regularisation", "pretraining_data", "prompts", "validation_prompts",
    "reward_stats", "reward_vae", "lora_start",
)  # fmt: skip
"""Flags that name files and folders, whose content counts and not their place."""

_NAMES_COUNT = ("data", "regularisation", "pretraining_data")
_CONTENT_COUNTS = {
    ".json", ".jsonl", ".csv", ".tsv", *CAPTION_FILES, ".parquet", ".tar", ".zip", ".safetensors", ".bin", ".pt", ".pth", ".ckpt",
}  # fmt: skip


def digests(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return flag, or `scorer NAME`, -> digest of what it names, for those that name something on this machine.

    Of a data set count the names and sizes of its files, its captions and its metadata, but not the pixels of its images; of a
    file above 1 GiB, a sample.
    """
    found = {}
    for name in FLAGS:
        value = flags.get(name)
        paths = [embedded.find(one) for one in (value if isinstance(value, list) else [value]) if one]
        if name == "model" and value in rewards.CARDS:  # a scorer that is trained
            found[name] = _digest(rewards.check(str(value), _path(flags.get("weights"))), with_names=False)
        elif name == "model" and value and (source := _pipeline(flags)) is not None:
            found[name] = digest_of_pipeline(source)
        elif name in ("vae", "reward_vae") and value:  # it may be a hub id
            found[name] = digest_of_part(locate_vae(str(value)))
        elif paths and all(not is_text(path) and path.exists() for path in paths):
            found[name] = _digest(paths, with_names=name in _NAMES_COUNT)
    if start := _path(flags.get("lora_start")):
        found["lora_start"] = lora_files.digest(start)
    terms = [flags[name] for name in ("rewards", "holdout_rewards") if flags.get(name)]
    scorers = [name for some in terms for name in parse_weights(some)]
    files = parse_files(flags.get("reward_files") or (), scorers)
    for name in scorers:
        read = rewards.check(name, files.get(name))
        given = own.is_given(name)  # a callable, which is in no file
        found[f"scorer {name}"] = own.source_digest(name) if given else _digest(read, with_names=False)
    return found


def _pipeline(flags: Mapping[str, Any]) -> Source | None:
    """The model that is tuned; None where --model names a scorer."""
    try:
        return locate(str(flags["model"]), flags.get("revision"), flags.get("variant"))
    except ValueError:
        return None


def _path(value: str | None) -> Path | None:
    return embedded.find(value) if value else None


def _digest(paths: Sequence[Path], *, with_names: bool) -> str:
    """SHA-256 of files and folders in their order."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(sampled_sha256_of(path).encode())
            continue
        for folder, inside, names in os.walk(path):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                file = Path(folder, name)
                counts = file.suffix.lower() in _CONTENT_COUNTS and file.is_file()  # not a pipe, say
                if counts or with_names:
                    found.update(f"{file.relative_to(path).as_posix()}\0".encode(errors="surrogateescape"))
                if counts:
                    found.update(sampled_sha256_of(file).encode())
                elif with_names and file.is_file():
                    found.update(f"{file.stat().st_size}\0".encode())
    return found.hexdigest()
