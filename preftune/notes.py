"""Notes to the user on stderr: one line each, from one process of a run."""

import os
import sys

from preftune.printable import printable


def say(text: str) -> None:
    """Write one line to stderr; of several processes of a run only the first one writes."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(printable(f"note: {' '.join(text.splitlines())}") + "\n")


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 row, 1,000 rows."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
