"""What is typed behind a program's name, written as the program has it."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from preftune.flags import ALIASES, ELSEWHERE, EXCLUSIVE, ONE_VALUE
from preftune.leaves import Leaf, flag_of


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


def check_names(typed: list[str], leaves: dict[str, Leaf]) -> None:
    """Refuse flags that do not exist, and values for flags that take none."""
    for at, token in enumerate(typed):
        if not token.startswith("--"):
            continue
        name, equals, _ = token.removeprefix("--").replace("-", "_").partition("=")
        positive = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name)
        known = name in leaves or (positive in leaves and leaves[positive].hint is bool) or name == "help"
        if not known:
            raise ValueError(
                f"unknown flag {token.partition('=')[0]}{instead(name, leaves, flag_of)}; see --help"
            )
        values = [*itertools.takewhile(lambda other: not other.startswith("--"), typed[at + 1 :])]
        if name in leaves and not leaves[name].is_list and len(values) + bool(equals) > 1:
            raise ValueError(
                f"{flag_of(name)} takes one value, got {len(values) + bool(equals)}: {' '.join(map(repr, values))};"
                f" {ONE_VALUE.get(name, 'a value with spaces stands in quotes')}"
            )
        if equals and name in leaves and leaves[name].hint is bool:
            raise ValueError(
                f"{flag_of(name)} takes no value: write {flag_of(name)} or {flag_of(name, negated=True)}"
            )


def instead(name: str, leaves: dict[str, Leaf], write: Callable[[str], str] = str) -> str:
    """What there is in place of an unknown name, as the end of a sentence; nothing where nobody knows."""
    other = ELSEWHERE.get(name, "")
    first = other.split(maxsplit=1)[0].removeprefix("--").replace("-", "_") if other.startswith("--") else ""
    if first in leaves or (other and not first):  # do not suggest a flag that this program lacks
        return f" (here: {other})"
    near = difflib.get_close_matches(name, leaves, n=1)
    return f" (did you mean {write(near[0])}?)" if near else ""


def with_aliases(typed: list[str], leaves: dict[str, Leaf]) -> list[str]:
    """The tokens with flags of other scripts that mean the same written as here."""
    written = []
    for token in typed:
        name, equals, value = token.partition("=")
        alias = alias_of(name.removeprefix("--").replace("-", "_"), leaves) if name.startswith("--") else None
        written.append(f"{flag_of(alias)}{equals}{value}" if alias else token)
    return written


def alias_of(name: str, leaves: dict[str, Leaf]) -> str | None:
    """The name here of another script's flag, or of one of --sample that is written without it; None for all others.

    --guidance-scale is --sample.guidance-scale where no other flag could be meant: none ends in these words.
    """
    if name in leaves:
        return None
    if ALIASES.get(name) in leaves:
        return ALIASES[name]
    ends = [leaf for leaf in leaves if leaf.replace(".", "_").endswith(f"_{name}")]
    return f"sample.{name}" if ends == [f"sample.{name}"] else None
