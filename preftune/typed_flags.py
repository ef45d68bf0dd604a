"""What is typed behind a program's name, written as the program has it."""

import itertools
from collections.abc import Iterator, Sequence

from preftune.flags import EXCLUSIVE


def undone(tokens: Sequence[str], later: Sequence[str]) -> bool:
    """Whether flags of a file are those of two that exclude each other, and the other one stands in a later place."""
    own, after = ({*_words(some)} for some in (tokens, later))
    return any(one in own and other in after for one, other in itertools.permutations(EXCLUSIVE, 2))


def _words(tokens: Sequence[str]) -> Iterator[str]:
    """Each flag alone and with its first value, written in one way: `--a-b` and `--a-b=c`."""
    for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue="--"):
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            flag = name.replace("_", "-")
            yield flag
            yield f"{flag}={value if equals else following}"
