"""Atomic writes of files and folders: written under a temporary name, then renamed.

The temporary name of `a/b.json` is `a/.b.json.tmp-PID`. A killed process leaves it behind; `tidy` removes it.
While a folder is replaced, the old one is called `a/.b.tmp-old-PID` between two renames. If the process is killed there,
`tidy` puts it back. Only the process that holds the folder's lock (preftune/files/lock.py) may tidy it: what another one is
writing looks the same.
"""

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from preftune.files import lock
from rewards.atomic_folder import link, replace_folder, sync

__all__ = ["copy_into", "is_leftover", "remove", "replacing", "sync", "tidy", "tidy_beside", "write_text"]


_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?:tmp-(?:(?P<old>old-)?\d+|shared|gone)|unfinished|(?P<previous>previous))"
)


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
    """Return whether a killed process left this behind while it wrote, by its name."""
    return _LEFTOVER.fullmatch(path.name) is not None


def tidy(*folders: Path) -> None:
    """Remove what killed processes left in these folders, but not below them; where one was killed while a folder took another's
    place, put that back. Only for the process that is their writer, while it writes nothing there.
    """
    for folder in folders:
        _remove_leftovers(folder.iterdir() if folder.is_dir() else ())


def tidy_beside(folder: Path) -> None:
    """Do what `tidy` does for what was left beside a folder while that was written itself under a temporary name."""
    if folder.name and folder.parent.is_dir():
        _remove_leftovers(folder.parent.glob(f".{glob.escape(folder.name)}.*"), only=folder.name)


def _remove_leftovers(paths: Iterable[Path], only: str | None = None) -> None:
    for path in list(paths):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or only not in (None, match["name"]):
            continue
        if (match["previous"] is not None or path.suffix == ".unfinished") and not path.is_dir():
            continue  # a file of the user: these names are of folders
        place = path.with_name(match["name"])
        if lock.is_held_elsewhere(place):
            continue  # another process writes this very file or folder
        if (match["old"] or match["previous"]) and not os.path.lexists(place):
            path.rename(place)
        else:
            remove(path)


def check_writable(folder: Path, flag: str = "--output-dir") -> None:
    """Raise ValueError for a flag's folder that cannot be written, or made where it is not there; nothing is left on the disk."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written: {error.strerror or error}; choose another folder"
        ) from error


def copy_into(source: Path, folder: Path) -> None:
    """Give a folder the files of another one, all together; files with other names stay. They are second names where the file
    system has such: neither folder's files may be changed in place.
    """
    names = [path.name for path in source.iterdir() if path.is_file()]

    def write(unfinished: Path) -> None:
        for name in names:
            link(source / name, unfinished / name)

    replace_folder(folder, names, write)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
