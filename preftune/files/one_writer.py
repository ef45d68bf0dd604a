"""What the main function of every program that writes a folder does around its work: lock, say why a write failed, tidy."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from preftune import files
from preftune.cli import are_errors_raised, end_if_interrupted, exit_on_user_error
from preftune.cli.last_word import last_word
from preftune.cli.launcher import parent
from preftune.cli.notes import end_bars
from preftune.cli.printable import printable
from preftune.cli.resume_command import resume_command
from preftune.files import disk, lock
from rewards.own import OwnRewardError

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
        end_if_interrupted()
        folder = _output_dir(config)
        parent()  # the launcher, which may end before this process
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
            _say(_stopped(config), 128 + signal.SIGINT)
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            lock.release(folder)
        if code in _STOPPED and not are_errors_raised():
            _say(_stopped(config), int(code))
        return code

    return locked


@contextlib.contextmanager
def exit_on_failed_write(folder: Path, config: Any = None) -> Iterator[None]:
    """Turn a failed write in the block into one sentence on stderr and exit code 1, and remove what was being written.

    Also a FloatingPointError, which is a loss, gradient or score that is not finite, and an error in a reward of the user's own,
    below its traceback, on each process that raises it.
    In the context of cli.errors_raised the error itself goes on; what its sentence says more is its note.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder, config)
        if reason is None:
            raise
        if lock.is_main_process():
            _tidy(folder)
        end_bars()
        if are_errors_raised():
            if more := reason.removeprefix(str(error)).removeprefix("; "):
                error.add_note(more)
            raise
        if isinstance(error, OwnRewardError):
            sys.stderr.write(printable(error.trace))
        _say(f"error: {reason}", code=1)
        raise SystemExit(1) from error


def _tidy(folder: Path) -> None:
    """Remove what was being written."""
    with contextlib.suppress(OSError):  # a read-only file system, say
        files.tidy(folder, folder / "samples")
        files.tidy_beside(folder)


def _say(text: str, code: int) -> None:
    """Print what the program ends with: an exit code and its reason."""
    end_bars()
    text = f"{Path(sys.argv[0]).name}: {text}\n"
    sys.stderr.write(text)
    last_word(text, code)


def _reason(error: Exception, folder: Path, config: Any) -> str | None:
    """What ended the program, and what to do; None for a fault of the program."""
    checkpoints = _checkpoints(folder)
    last = f"; the last complete checkpoint is {checkpoints[-1]}" if checkpoints else ""
    if isinstance(error, FloatingPointError | OwnRewardError):
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
    by_itself = config.run.resume_from_checkpoint == "latest"
    if are_errors_raised():
        return f"go on with the same call{'' if by_itself else ' and --resume-from-checkpoint latest'}"
    if not _is_program(config):
        return "go on with --resume-from-checkpoint latest"
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
