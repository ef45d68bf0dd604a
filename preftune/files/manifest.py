"""A list of digests in a folder, `manifest.json`, by which a reader sees that all files are there and are as they were written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.digests import sha256_now

FILE = "manifest.json"


def write(folder: Path, **more: object) -> None:
    """Write the manifest of a folder: the SHA-256 of every file in it, what else is given, and the SHA-256 of itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    content = {**more, "files": {path.relative_to(folder).as_posix(): sha256_now(path) for path in paths}}
    text = json.dumps({**content, "sha256": _seal(content)}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder whose files are all as they were written; other files may be beside them.

    ValueError, in one sentence, where anything is missing or is not as it was written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'no folder' if folder.exists() else 'gone'}")
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {FILE}: a part was removed, or an earlier version wrote it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / FILE} cannot be read: {error}") from error
    try:
        content = json.loads(text)
        if content.pop("sha256") != _seal(content):
            raise ValueError("another digest")
        listed: dict[str, str] = content["files"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / FILE} is damaged") from error
    for name, digest in listed.items():
        try:
            found = sha256_now(folder / name)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no {name} any more") from error
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one that {FILE} says")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
