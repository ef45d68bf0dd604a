"""What the main function of every program that writes a folder does around its work: lock, say why a write failed, tidy."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from preftune import disk, files, lock
from preftune.cli import are_errors_raised, exit_on_user_error
from preftune.printable import printable
from rewards.own import OwnRewardError

Config = TypeVar("Config")
Code = TypeVar("Code")


def one_writer(main: Callable[[Config], Code]) -> Callable[[Config], Code]:
    """Make main(config) the only writer of its --output-dir while it runs.

    The lock is taken before anything is done. A failed write, on a full disk for example, and a number that is not finite
    end the program with one sentence and exit code 1; what was being written is removed. Of several processes only the
    main one holds the lock: where it is refused, the launcher ends the others.
    """

    @functools.wraps(main)
    def locked(config: Config) -> Code:
        folder = _output_dir(config)
        if not lock.is_main_process():
            with exit_on_failed_write(folder):
                return main(config)
        with exit_on_user_error():
            lock.acquire(folder)
        try:
            with exit_on_failed_write(folder):
                files.tidy_beside(folder)
                return main(config)
        finally:
            lock.release(folder)

    return locked


@contextlib.contextmanager
def exit_on_failed_write(folder: Path) -> Iterator[None]:
    """Turn a failed write in the block into one sentence on stderr and exit code 1, and remove what was being written.

    Also a FloatingPointError, which is a loss, gradient or score that is not finite, and an error in a reward of the user's own,
    below its traceback, on each process that raises it.
    In the context of cli.errors_raised the error itself goes on; what its sentence says more is its note.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        if lock.is_main_process():
            with contextlib.suppress(OSError):  # a read-only file system, say
                files.tidy(folder, folder / "samples")
                files.tidy_beside(folder)
        for bar in list(getattr(tqdm, "_instances", ())):  # else it would be drawn again below the sentence
            bar.close()
        if are_errors_raised():
            if more := reason.removeprefix(str(error)).removeprefix("; "):
                error.add_note(more)
            raise
        if isinstance(error, OwnRewardError):
            sys.stderr.write(printable(error.trace))
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {reason}\n")
        raise SystemExit(1) from error


def _reason(error: Exception, folder: Path) -> str | None:
    """What ended the program, and what to do; None for a fault of the program."""
    checkpoints = sorted(path.parent for path in folder.glob("step_*/manifest.json"))
    last = f"; the last complete checkpoint is {checkpoints[-1]}" if checkpoints else ""
    if isinstance(error, FloatingPointError | OwnRewardError):
        return f"{error}{last}"
    if (reason := disk.reason(error, folder)) is None:
        return None
    if not (folder / "config.yaml").is_file():
        return f"{reason}; make room there or repair it, then start the same command again"
    if not last:
        return (
            f"{reason}; there is no complete checkpoint yet: make room there or repair it, then start again"
        )
    return f"{reason}{last}: make room there or repair it, then go on with --resume-from-checkpoint latest"


def _output_dir(config: Any) -> Path:
    """The folder that a program writes."""
    folder: Path = config.output_dir if hasattr(config, "output_dir") else config.run.output_dir
    return folder
