"""The process that started this one, where it is a launcher as accelerate launch is."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NAMES = {
    "accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip
"""A word of the command line of a launcher: a console command, or a module after -m."""


@dataclass(frozen=True)
class Parent:
    """The process that started this one: its id, and its command line, empty where the system does not tell."""

    pid: int = 0
    words: tuple[str, ...] = ()


@functools.cache
def parent() -> Parent:
    """Return the process that started this one.

    It is asked for once, early: Ctrl-C ends a launcher, too, before the run has written its checkpoint.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process().parent()
        if process is not None:
            return Parent(process.pid, tuple(process.cmdline()))
    return Parent()


def is_launcher(words: Sequence[str]) -> bool:
    """Return whether these words of a command line start a launcher."""
    return any(Path(word).name in _NAMES for word in words)
