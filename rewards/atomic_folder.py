"""Atomic replacement of a folder, so that new weights are never read with old statistics; needs no torch.

The new folder is written next to the old one as `.NAME.unfinished` and put in place by two renames. Between
them the old folder is called `.NAME.previous`. A kill leaves either the old or the new folder, complete. If
it happens between the renames, only `.NAME.previous` exists: the next write restores it, and `left_behind`
finds it.
"""

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path


def replace_folder(folder: Path, names: Collection[str], write: Callable[[Path], None]) -> None:
    """Let `write` put files of these names into an empty folder, which then replaces `folder`.

    Files with other names, such as a user's notes, are kept. For a link, the target is replaced. Leftovers
    of an earlier, killed call are removed. ValueError for a folder that is a file.
    """
    place = Path(os.path.realpath(folder))
    if place.exists() and not place.is_dir():
        raise ValueError(f"{folder} is a file, where a folder is to be written; move it away")
    place.parent.mkdir(parents=True, exist_ok=True)
    _tidy(place)
    unfinished, previous = _unfinished(place), _previous(place)
    unfinished.mkdir()
    try:
        write(unfinished)
        for name in names:  # the content must reach the disk before the folder's name does
            sync(unfinished / name)
        sync(unfinished)
        if place.is_dir():
            _link_others(place, unfinished, names)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if place.is_dir():
        os.rename(place, previous)
    os.rename(unfinished, place)
    sync(place.parent)
    _tidy(place)


def left_behind(folder: Path) -> Path | None:
    """Return the old folder where a kill between the two renames left it, and none in its place; None where all is well."""
    place = Path(os.path.realpath(folder))
    return _previous(place) if _previous(place).is_dir() and not place.exists() else None


def _unfinished(place: Path) -> Path:
    return place.with_name(f".{place.name}.unfinished")


def _previous(place: Path) -> Path:
    return place.with_name(f".{place.name}.previous")


def _tidy(place: Path) -> None:
    """Put the previous folder back where there is no other, and remove what is of no use any more."""
    unfinished, previous = _unfinished(place), _previous(place)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    if previous.exists() and not place.exists():
        os.rename(previous, place)
    elif previous.exists():
        os.rename(previous, unfinished)  # half removed, it must not look like a complete one
        shutil.rmtree(unfinished)


def _link_others(place: Path, unfinished: Path, names: Collection[str]) -> None:
    """Give the unfinished folder all files of the present one but these: second names, which take neither time nor space."""
    shutil.copytree(
        place,
        unfinished,
        symlinks=True,
        ignore=lambda inside, _: names if Path(inside) == place else (),
        copy_function=link,
        dirs_exist_ok=True,
    )


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:  # a file system that knows no second names
        shutil.copy2(source, target)


def sync(path: Path) -> None:
    """Let a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
