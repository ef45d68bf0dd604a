"""Processes that a test may kill at any moment.

They are forked from a server of one thread, which is started afresh: a fork of the tests' own process would have locks
that its other threads hold. tqdm's lock is shared by all forks of a process, and a child that is killed while it holds it
would stop its parent for ever; so each child gets one of its own.
"""

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from tqdm import tqdm

WAIT = 120
"""Seconds after which a child hangs."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["data_build.diffusiondb", "data_build.score"])


def begin(call: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Start call(*arguments) in a process of its own; both must be picklable, so a function of a module."""
    process = _CONTEXT.Process(target=_alone, args=(call, *arguments))
    process.start()
    return process


def end(process: ForkServerProcess) -> int | None:
    """Wait for the end, and return the exit code; TimeoutError, with the process killed, where it hangs."""
    process.join(WAIT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the child did nothing for {WAIT} s")
    return process.exitcode


def _alone(call: Callable[..., object], *arguments: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in a program
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    call(*arguments)
