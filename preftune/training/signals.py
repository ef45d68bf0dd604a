"""Ctrl-C and SIGTERM during training: the first signal lets the update finish, a second one kills at once.

Images that are sampled need not be finished: there the first signal ends the batch under way (`until_stopped`).
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from tqdm import tqdm

from preftune.cli import are_errors_raised

Batch = TypeVar("Batch")


class Received:
    """The first signal that this process has received; 0 = none."""

    number = 0
    raises = False
    """Whether the first signal raises StoppedError, where the process is."""


class StoppedError(BaseException):
    """A signal came during work that is given up then; as KeyboardInterrupt, not what a library's `except Exception` means."""


def until_stopped(received: Received, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches until a signal comes: it ends the work on the next one, not what the caller does with the last."""
    while not received.number:
        received.raises = True
        try:
            batch = next(batches)
        except StopIteration:
            return
        except BaseException:
            if received.number:  # also where a library has made another error of it
                return
            raise
        finally:
            received.raises = False
        yield batch


@contextmanager
def caught() -> Iterator[Received]:
    """Context in which SIGINT and SIGTERM are noted; yields what was received.

    A second one, a second later or more, has its usual effect: sooner, it is the same request, sent by both the launcher and the
    cluster. That effect is the end of the process; in a call from Python it is that of the handler before, KeyboardInterrupt.
    Outside the main thread nothing is caught, since Python allows it there alone.
    """
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    first, from_python = 0.0, are_errors_raised()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if not received.number:
            received.number, first = number, now
            name = signal.Signals(number).name
            then = "stops" if from_python else "kills"
            tqdm.write(f"{name}: stopping after this update; once more {then} at once", file=sys.stderr)
            if received.raises:
                raise StoppedError
        elif now > first + 1:
            signal.signal(number, before[signal.Signals(number)] if from_python else signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
