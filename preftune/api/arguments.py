"""Arguments of a call from Python as flags, and sentences about flags as sentences about arguments.

As a YAML file is, the arguments are a list of flags written down: the one parser of preftune/cli/parser.py reads them. The name of
an argument is that of the flag with underscores, --lora.rank is `lora_rank`, or `lora={"rank": 16}` as in a YAML file.
"""

import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preftune.cli.leaves import element, flag_of, positive_of, words_of

_NUMBER = r"-?\d[\d.]*(?:e-?\d+)?(?![\w.]*\w)"


def flags(arguments: Mapping[str, Any], types: Mapping[str, Any]) -> list[str]:
    """Return the flags that say what the arguments say; `types` are those of cli.flag_types. ValueError for a value that no flag has."""
    written: list[str] = []
    for name, value in _flat(arguments, types):
        if name == "config":
            several = value if isinstance(value, list | tuple) else [value]
            written += [token for file in several for token in ("--config", _text("config", file))]
        else:
            written += _tokens(name, value, types.get(name))
    return written


def in_python(sentence: str, types: Mapping[str, Any], call: str) -> str:
    """Return a sentence that names flags as one that names the arguments of `call`.

    --pretraining off is pretraining="off", --overwrite-output-dir is overwrite_output_dir=True, --lora.rank is lora_rank.
    """

    def argument(match: re.Match[str]) -> str:
        flag, value = match[1].replace("-", "_"), match[2]
        name = flag if flag in types else positive_of(flag)
        if any(leaf.startswith(f"{name}.") for leaf in types):
            return f"{name}{value or ''}"
        if name not in types:
            return match[0]
        python, choices = name.replace(".", "_"), words_of(types[name])
        if types[name] is bool:
            return f"{python}={name == flag}{value or ''}"
        if value and value.strip() in choices:
            return f'{python}="{value.strip()}"'
        if value and re.fullmatch(rf"{_NUMBER}(?: {_NUMBER})*", value.strip()):
            several = ", ".join(value.split())
            return f"{python}=({several})" if "," in several else f"{python}={several}"
        return f"{python}{value or ''}"

    sentence = re.sub(
        r"unknown flag --([\w.-]+)", lambda match: f"unknown argument {match[1].replace('-', '_')}", sentence
    )
    sentence = re.sub(rf"--([a-z][\w.-]*\w)( (?:{_NUMBER}(?: {_NUMBER})*|\w+))?", argument, sentence)
    return sentence.replace("see --help", f"see help(preftune.{call})")


def _flat(
    arguments: Mapping[str, Any], types: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(name of the flag in YAML, value) of each argument."""
    dotted = {name.replace(".", "_"): name for name in types}
    for key, value in arguments.items():
        name = f"{prefix}{key}".replace("-", "_")
        name = name if name in types else dotted.get(name, name)
        if not re.fullmatch(r"[A-Za-z]\w*(\.\w+)?", name) or name == "help":
            raise ValueError(f"unknown flag --{name}; see --help")
        positive = positive_of(name)
        if name not in types and types.get(positive) is bool:
            raise ValueError(f"unknown argument {name} (did you mean {positive.replace('.', '_')}=False?)")
        is_group = any(leaf.startswith(f"{name}.") for leaf in types)
        if is_group and isinstance(value, Mapping):
            yield from _flat(value, types, f"{name}.")
        elif is_group and name not in types:
            inside = ", ".join(leaf.partition(".")[2] for leaf in types if leaf.startswith(f"{name}."))
            raise ValueError(
                f"{name} is {value!r}; it is a group of arguments, given as a dict with {inside}"
            )
        else:
            yield name, value


def _tokens(name: str, value: Any, hint: Any) -> list[str]:
    """One flag with its value or values."""
    flag = flag_of(name)
    if isinstance(value, bool) and (hint is bool or hint is None):
        return [flag_of(name, negated=not value)]
    if hint is bool:
        raise ValueError(f"{name} is {value!r}; it must be True or False")
    if isinstance(value, Mapping):  # as rewards={"imagereward": 1, "brightness": 0.5}
        value = [f"{key}={_text(name, one)}" for key, one in value.items()]
    if isinstance(value, set | frozenset):
        raise ValueError(f"{name} is a set, which has no order; give a list")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [flag, *(element(name, _text(name, one)) for one in value)]
    return [f"{flag}={_text(name, value)}"]


def _text(name: str, value: Any) -> str:
    """A single value as it stands behind a flag."""
    if value is None or isinstance(value, str | bool):
        return str(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, numbers.Integral):  # also numpy's
        return str(int(value))
    if isinstance(value, numbers.Real):
        return str(float(value))
    raise ValueError(
        f"{name} is a {type(value).__name__}; give a number, a string, a path, True, False, None, or a list of such"
    )
