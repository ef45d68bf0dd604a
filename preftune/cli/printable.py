"""Text of data, file names and messages on a terminal."""

import re
import sys

MAX = 4_000
"""Characters of a line."""
# control characters but tab and line end, which could move the cursor, recolour or rename the terminal; marks that reverse the
# direction of what follows; line ends that terminals do not know; halves of surrogate pairs, which cannot be encoded
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return a text that no terminal obeys: control characters become escapes such as \x1b, and a long line is cut."""
    lines = [
        line if len(line) <= MAX else f"{line[:MAX]}... ({len(line)} characters)" for line in text.split("\n")
    ]
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), "\n".join(lines))


def show(text: str) -> None:
    """Print a result, which may hold names and texts of data, on stdout."""
    encoding = sys.stdout.encoding or "utf-8"  # in some locales ASCII
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)  # noqa: T201
