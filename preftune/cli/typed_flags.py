"""What is typed behind a program's name, written as the program has it."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from preftune.cli.leaves import Leaf, flag_of, positive_of
from preftune.cli.other_scripts import ALIASES, ELSEWHERE, EXCLUSIVE, ONE_VALUE, SAME, TEXTS
from preftune.typed_prompts import is_text

_SWITCH = ("True", "False", "None")
"""Values of a switch that may be left to the program."""
_TYPOGRAPHIC = ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019", "\u00ab", "\u00bb")
"""Quotes of a text."""


def undone(tokens: Sequence[str], later: Sequence[str]) -> bool:
    """Whether flags of a file are those of two that exclude each other, and the other one stands in a later place.

    The settings of a LoRA and --train full are such, too.
    """
    own, after = ({*_words(some)} for some in (tokens, later))
    if "--train=full" in after and any(word.startswith("--lora.") for word in own):
        return True
    return any(one in own and other in after for one, other in itertools.permutations(EXCLUSIVE, 2))


def _words(tokens: Sequence[str]) -> Iterator[str]:
    """Each flag alone and with its first value, written in one way: `--a-b` and `--a-b=c`."""
    for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue="--"):
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            flag = name.replace("_", "-")
            yield flag
            yield f"{flag}={value if equals else following}"


def as_here(typed: Sequence[str], leaves: Mapping[str, Leaf]) -> list[str]:
    """Return what was typed with flags and values of other scripts that mean the same written as here."""
    written: list[str] = []
    for token, values in _grouped(typed):
        written += _as_here(token, values, leaves) if token.startswith("--") else [token, *values]
    return written


def _grouped(typed: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words behind it."""
    starts = [at for at, token in enumerate(typed) if at == 0 or token.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(typed)]):
        yield typed[start], list(typed[start + 1 : end])


def _as_here(token: str, values: list[str], leaves: Mapping[str, Leaf]) -> list[str]:
    """One flag and its values, as `as_here`."""
    name, equals, value = token.partition("=")
    given = [value] * bool(equals) + values
    name = name.removeprefix("--").replace("-", "_")
    positive = positive_of(name)
    if positive != name and not given and positive in leaves and leaves[positive].is_optional_switch:
        return [f"{flag_of(positive)}=False"]
    if name not in leaves:
        same = SAME.get(f"{name}={given[0]}".lower() if given and given[0].lower() != "true" else name)
        if same is not None and len(given) < 2 and (not same or _name(same) in leaves):
            return [same] if same else []
        if (alias := alias_of(name, leaves)) is None:
            return [token, *values]
        name, token = alias, f"{flag_of(alias)}{equals}{value}"
    leaf = leaves[name]
    if leaf.hint is bool and len(given) == 1 and given[0].lower() in ("true", "false"):
        return [flag_of(name, negated=given[0].lower() == "false")]
    if leaf.is_optional_switch and len(given) < 2 and (word := (given or ["true"])[0].title()) in _SWITCH:
        return [f"{flag_of(name)}={word}"]
    if leaf.numbers and len(given) == 1:
        return [flag_of(name), *given[0].split(",")]
    if name in TEXTS and not leaf.is_list and len(given) > 1 and all(is_text(Path(one)) for one in given):
        return [f"{flag_of(name)}={chr(10).join(given)}"]
    return [token, *values]


def _name(flag: str) -> str:
    """The name of a flag: `--lora.use-bias=no` -> `lora.use_bias`."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_")


def check_names(typed: Sequence[str], leaves: Mapping[str, Leaf]) -> None:
    """Refuse flags that do not exist, all of them in one sentence, and values for flags that take none."""
    unknown: dict[str, list[str]] = {}  # answer -> flags
    for token in dict.fromkeys(token.partition("=")[0] for token in typed if token.startswith("--")):
        positive = positive_of(name := _name(token))
        if not (name in leaves or (positive in leaves and leaves[positive].hint is bool) or name == "help"):
            unknown.setdefault(instead(name, leaves, flag_of), []).append(token)
    if unknown:
        several = "s" * (len([*itertools.chain(*unknown.values())]) > 1)
        answered = sorted(unknown.items(), key=lambda item: not item[0])  # those without an answer come last
        named = [f"{', '.join(tokens)}{answer}" for answer, tokens in answered]
        raise ValueError(f"unknown flag{several} {', '.join(named)}; see --help")
    for token, values in _grouped(typed):
        name, equals = _name(token), "=" in token
        _check_dashes(values, leaves)
        if name in leaves and leaves[name].hint is bool and values:
            raise ValueError(
                f"{flag_of(name)} takes no value, got {' '.join(map(repr, values))}: write {flag_of(name)} or {flag_of(name, negated=True)}"
            )
        given = [token.partition("=")[2]] * equals + values
        if name in leaves and leaves[name].is_optional_switch and len(given) == 1 and given[0] not in _SWITCH:
            raise ValueError(
                f"{flag_of(name)} is {given[0]!r}; write {flag_of(name)}, {flag_of(name, negated=True)}, or neither for the default"
            )
        if name in leaves and not leaves[name].is_list and len(values) + equals > 1:
            raise ValueError(
                f"{flag_of(name)} takes one value, got {len(values) + equals}: {' '.join(map(repr, values))};"
                f" {_hint(name, values)}"
            )
        if name in leaves and (wrong := _wrong_numbers(values, leaves[name])):
            raise ValueError(f"{flag_of(name)} takes {wrong}, got {' '.join(values) or 'none'}")
        if equals and name in leaves and leaves[name].hint is bool:
            raise ValueError(
                f"{flag_of(name)} takes no value: write {flag_of(name)} or {flag_of(name, negated=True)}"
            )


def _check_dashes(values: Sequence[str], leaves: Mapping[str, Leaf]) -> None:
    """Refuse a flag that begins with one hyphen, or with the dashes of a web page."""
    for value in values:
        match = re.match(r"[-\u2010-\u2015\u2212]+([A-Za-z][\w.-]*)", value)
        if match and ((name := _name(match[1])) in leaves or alias_of(name, leaves)):
            raise ValueError(f"unknown flag {value}: a flag begins with two hyphens, as in --{match[1]}")


def _hint(name: str, values: Sequence[str]) -> str:
    """What to do where one value was expected."""
    if values[:1] == ["="]:
        return "there are no spaces around ="
    if any(value[:1] in _TYPOGRAPHIC for value in values):
        return "quotes of a text are none for the shell: write \" or '"
    return ONE_VALUE.get(name, "a value with spaces stands in quotes")


def _wrong_numbers(values: Sequence[str], leaf: Leaf) -> str:
    """How many numbers a flag takes, where these are not so many numbers; else nothing."""
    kinds = leaf.numbers
    if not kinds or ... in kinds or (leaf.optional and [*values] == ["None"]):
        return ""
    whole = "whole numbers" if {*kinds} == {int} else "numbers"
    digits = r"[+-]?\d[\d_]*" if {*kinds} == {int} else r"[+-]?[\d._]+(e[+-]?\d+)?|[+-]?(inf|nan)"
    fit = len(values) == len(kinds) and all(re.fullmatch(digits, value, re.IGNORECASE) for value in values)
    return "" if fit else f"{len(kinds)} {whole}"


def instead(name: str, leaves: Mapping[str, Leaf], write: Callable[[str], str] = str) -> str:
    """What there is in place of an unknown name, as the end of a sentence; nothing where nobody knows."""
    other = ELSEWHERE.get(name) or (flag_of(ALIASES[name]) if name in ALIASES else "")
    for flag in re.findall(r"(?<!has )--[\w.-]*\w", other):  # another program has it
        if _name(flag) not in (*leaves, "config", "num_processes", "help"):
            if (sample := alias_of(_name(flag), leaves)) is None:
                return f" (this program has no {flag})"
            other = other.replace(flag, flag_of(sample))
    if other:
        return f" (here: {other})"
    near = difflib.get_close_matches(name, leaves, n=1)
    return f" (did you mean {write(near[0])}?)" if near else ""


def alias_of(name: str, leaves: Mapping[str, Leaf]) -> str | None:
    """The name here of another script's flag, or of one of --sample that is written without it; None for all others.

    --guidance-scale is --sample.guidance-scale where no other flag could be meant: none ends in these words.
    """
    if name in leaves:
        return None
    name = ALIASES.get(name, name)
    if name in leaves:
        return name
    ends = [leaf for leaf in leaves if leaf.replace(".", "_").endswith(f"_{name}")]
    return f"sample.{name}" if ends == [f"sample.{name}"] else None
