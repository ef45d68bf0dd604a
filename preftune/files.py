"""Atomic writes of files and folders: written under a temporary name, then renamed.

The temporary name of `a/b.json` is `a/.b.json.tmp-PID`. A killed process leaves it behind; `tidy` removes it.
While a folder is replaced, the old one is called `a/.b.tmp-old-PID` between two renames. If the process is killed there,
`tidy` puts it back.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rewards.atomic_folder import sync

__all__ = ["is_leftover", "remove", "replacing", "sync", "tidy", "write_text"]


_LEFTOVER = re.compile(r"\..+\.tmp-(?:(?:old-)?(\d+)|shared|gone)")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary name to write a file or folder under; at the end of the block it is renamed to
    `path`.

    The parent folder is created. If the block raises, `path` is unchanged and the temporary file is
    removed. An existing folder is replaced. durable: the content is flushed to the disk before the rename,
    so that it also survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    remove(temporary)
    try:
        yield temporary
        if durable:
            for inside in temporary.rglob("*") if temporary.is_dir() else ():
                sync(inside)
            sync(temporary)
        if path.is_dir() and not path.is_symlink():
            old = path.with_name(f".{path.name}.tmp-old-{os.getpid()}")
            path.rename(old)  # renamed first: half removed, it must not look complete
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        remove(temporary)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file in one piece."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def is_leftover(path: Path) -> bool:
    """Return whether a killed process left this behind while it wrote."""
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    pid = int(match[1]) if match[1] else 0
    return not (pid and pid != os.getpid() and _is_alive(pid))


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def tidy(folder: Path) -> None:
    """Remove what killed processes left in a folder; where one was killed while a folder took another's place, put that back."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_leftover(path):
            continue
        name, _, kind = path.name.removeprefix(".").rpartition(".tmp-")
        if kind.startswith("old-") and not (folder / name).exists():
            path.rename(folder / name)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
