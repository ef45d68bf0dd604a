"""What the main function of every program that writes a folder does around its work: lock, say why a write failed, tidy."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from preftune import disk, files, lock
from preftune.cli import exit_on_user_error
from preftune.resume_command import command_of_parent, resume_command

Config = TypeVar("Config")
Code = TypeVar("Code")

_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes after a signal."""


def one_writer(main: Callable[[Config], Code]) -> Callable[[Config], Code]:
    """Make main(config) the only writer of its --output-dir while it runs.

    The lock is taken before anything is done. A failed write, on a full disk for example, and a number that is not finite
    end the program with one sentence and exit code 1; what was being written is removed. Of several processes only the
    main one holds the lock: where it is refused, the launcher ends the others. After Ctrl-C or SIGTERM the command is printed
    that goes on.
    """

    @functools.wraps(main)
    def locked(config: Config) -> Code:
        folder = _output_dir(config)
        command_of_parent()  # the launcher, which may end before this process
        if not lock.is_main_process():
            with exit_on_failed_write(folder, config):
                return main(config)
        with exit_on_user_error():
            lock.acquire(folder)
        try:
            with exit_on_failed_write(folder, config):
                files.tidy_beside(folder)
                code = main(config)
        except KeyboardInterrupt:  # during what no checkpoint is written after, as the loading of a model
            if not _is_program(config):
                raise
            _tidy(folder)
            _say(_stopped(config))
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            lock.release(folder)
        if code in _STOPPED:
            _say(_stopped(config))
        return code

    return locked


@contextlib.contextmanager
def exit_on_failed_write(folder: Path, config: Any = None) -> Iterator[None]:
    """Turn a failed write in the block into one sentence on stderr and exit code 1, and remove what was being written.

    Also a FloatingPointError, which is a loss, gradient or score that is not finite, on each process that raises it.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder, config)
        if reason is None:
            raise
        if lock.is_main_process():
            _tidy(folder)
        _say(f"error: {reason}")
        raise SystemExit(1) from error


def _tidy(folder: Path) -> None:
    """Remove what was being written."""
    with contextlib.suppress(OSError):  # a read-only file system, say
        files.tidy(folder, folder / "samples")
        files.tidy_beside(folder)


def _say(text: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # else it would be drawn again below the sentence
        bar.close()
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {text}\n")


def _reason(error: Exception, folder: Path, config: Any) -> str | None:
    """What ended the program, and what to do; None for what is neither a failed write nor a number that is not finite."""
    checkpoints = _checkpoints(folder)
    last = f"; the last complete checkpoint is {checkpoints[-1]}" if checkpoints else ""
    if isinstance(error, FloatingPointError):
        return f"{error}{last}"
    if (reason := disk.reason(error, folder)) is None:
        return None
    if not hasattr(config, "run") or not (folder / "config.yaml").is_file():
        return f"{reason}; make room there or repair it, then start the same command again"
    last = last or "; there is no complete checkpoint yet"
    return f"{reason}{last}: make room there or repair it, then {_go_on(config)}"


def _stopped(config: Any) -> str:
    """What to do after a signal."""
    if not hasattr(config, "run"):
        return "stopped; start the same command again to go on"
    checkpoints = _checkpoints(config.run.output_dir)
    done = (
        f"after {int(checkpoints[-1].name[5:])} of {config.run.max_train_steps} updates"
        if checkpoints
        else "before the first update"
    )
    return f"stopped {done}; {_go_on(config)}"


def _go_on(config: Any) -> str:
    """How a run is resumed: the command stands alone on the last line. A call from Python has none."""
    if not _is_program(config):
        return "go on with --resume-from-checkpoint latest"
    by_itself = config.run.resume_from_checkpoint == "latest"
    return f"go on with:\n{resume_command(by_itself=by_itself)}"


def _is_program(config: Any) -> bool:
    """Whether this process was started as the program of a configuration, and not to call it from Python."""
    return type(config).__module__ == "__main__"


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    complete = (path.parent for path in folder.glob("step_*/manifest.json"))
    return sorted(complete, key=lambda path: (len(path.name), path.name))


def _output_dir(config: Any) -> Path:
    """The folder that a program writes."""
    folder: Path = config.output_dir if hasattr(config, "output_dir") else config.run.output_dir
    return folder
