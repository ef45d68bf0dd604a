"""The command that goes on with a run that was stopped, to be copied and pasted."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from preftune.cli.launcher import is_launcher, parent

_ADDED = ["--resume-from-checkpoint", "latest"]


def resume_command(*, by_itself: bool) -> str:
    """Return what the user typed to start this process, launcher included, with the flag that makes it resume.

    by_itself: the configuration says so already, and the same command goes on.
    """
    words = typed(sys.orig_argv, parent().words, int(os.environ.get("WORLD_SIZE", "1")))
    return shlex.join(words if by_itself else [*_without_start(words), *_ADDED])


def typed(words: Sequence[str], starter: Sequence[str], processes: int) -> list[str]:
    """Return the command that was typed.

    Args:
        words: The command of this process, as `sys.orig_argv`.
        starter: That of the process which started this one.
        processes: Number of processes of the run.
    """
    start = 1
    while start < len(words) - 1 and words[start].startswith("-"):
        start += 1  # options of Python, such as -u and -m
    program = list(words[start:])
    launcher = list(starter[: -len(program)])
    if list(starter[-len(program) :]) == program and is_launcher(launcher):
        return [*_shown(launcher), *program]
    if processes > 1:
        module = ["-m"] if words[start - 1] == "-m" else []
        return ["accelerate", "launch", "--num_processes", str(processes), *module, *program]
    return _shown(words)


def _shown(words: Sequence[str]) -> list[str]:
    """The words without what the shell adds for a command of an environment, as /venv/bin/python /venv/bin/preftune."""
    script = Path(words[1]) if len(words) > 1 else Path()
    if script.parent == Path(words[0]).parent and script.is_absolute() and not script.suffix:
        return [script.name, *words[2:]]
    return list(words)


def _without_start(words: Sequence[str]) -> list[str]:
    """The words without the flags that say where a run starts."""
    return list(_other_flags(iter(words)))


def _other_flags(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name == _ADDED[0]:
            if not equals:
                next(words, None)
        elif name not in ("--overwrite-output-dir", "--no-overwrite-output-dir"):
            yield word
