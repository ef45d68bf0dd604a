"""Flags that take several files or folders: what is given twice counts twice, which nobody wants to find out from a result."""

import os
from collections.abc import Sequence
from pathlib import Path


def check_given_once(flag: str, given: Sequence[Path], kind: str, why: str) -> None:
    """Raise ValueError unless a flag names files or folders, each once, by whatever path.

    kind: what the flag needs, as "folder of rankings"; why: what a second one would do, as "its pairs would count twice".
    """
    if not given:
        raise ValueError(f"{flag} needs at least one {kind}")
    known: dict[str, Path] = {}
    for path in given:
        place = os.path.realpath(path)
        if place in known:
            first = "" if known[place] == path else f", first as {known[place]}"
            raise ValueError(f"{flag} names {path} twice{first}; {why}")
        known[place] = path
