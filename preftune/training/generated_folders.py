"""Folders of a run with what its model generated for a stretch of updates: RAFT's iterations, AWM's epochs, DDPO's rollouts.

A folder gets its name in one rename, once all processes have written their part, and has digests.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from preftune import files
from preftune.cli.notes import say
from preftune.files import manifest
from preftune.training.run import Run


def partial_folder(folder: Path) -> Path:
    """Return where the processes write their parts of a folder."""
    return folder.with_name(f".{folder.name}.tmp-shared")


def publish(run: Run, folder: Path, join: Callable[[Path], None] | None = None, **more: object) -> None:
    """Give a folder its name once every process has written its part; `join` first makes one of the parts, `more` is for the manifest."""
    run.wait()
    if run.is_main:
        partial = partial_folder(folder)
        if join is not None:
            join(partial)
        manifest.write(partial, **more)
        partial.rename(folder)
    run.wait()


def remove_stale(
    run: Run, folders: Mapping[int, Path], current: Path, updates: int, again: str | None
) -> None:
    """Remove the folders, by number from 0, that are not of the weights from which a run begins, with so many updates each.

    `current` is the folder of the update from which it goes on. Where that is gone or damaged: ValueError with `again`, what can be done
    about it, unless the weights of its beginning are those of now; with None it can be generated again at any update.
    """
    now, within = divmod(run.start, updates)
    run.wait()
    if run.is_main:
        if run.resumed and (current.is_dir() or (within and again is not None)):
            try:
                manifest.verify(current)
            except ValueError as error:
                if again is None:
                    say(f"{error}; generating it again")
                elif within:
                    raise ValueError(f"{error}, and {again}") from error
                files.remove(current)
        for number, folder in folders.items():
            if not run.resumed or number > now:
                files.remove(folder)
    run.wait()
