"""Notes to the user on stderr: one line each, from one process of a run."""

import contextlib
import contextvars
import os
import sys
from collections.abc import Callable, Iterator

from preftune.cli.printable import printable

_WORDING: contextvars.ContextVar[Callable[[str], str]] = contextvars.ContextVar("wording", default=str)


def say(text: str, kind: str = "note: ") -> None:
    """Write one line to stderr; of several processes of a run only the first one writes."""
    if os.environ.get("RANK", "0") == "0":
        text = _WORDING.get()(" ".join(text.splitlines()))
        sys.stderr.write(printable(f"{kind}{text}") + "\n")


@contextlib.contextmanager
def worded(wording: Callable[[str], str]) -> Iterator[None]:
    """Context in which each line is what `wording` makes of it: a call from Python names arguments instead of flags."""
    token = _WORDING.set(wording)
    try:
        yield
    finally:
        _WORDING.reset(token)


def end_bars() -> None:
    """End progress bars: what is printed next has a line of its own, and no bar is drawn again below it."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 row, 1,000 rows."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
