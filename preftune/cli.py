"""Configuration by command-line flags and YAML files.

`--config file.yaml` is converted to `--a.b=value` flags that are placed before the command line, and one
parser reads both. The last value wins, also for list flags. There is thus one syntax and one set of error
messages, and `1e-4` is a float in both places: YAML's own type conversion (`no` becomes a boolean, `1e-4` a
string) is never used.

A Config is a frozen keyword-only dataclass with a docstring under each field. Its fields are values, tuples
of values, or dataclasses of values, nested once: `lora: LoRA` gives `--lora.rank` and the YAML keys `lora:
{rank: 4}` or `lora.rank: 4`; `run: Annotated[RunConfig, tyro.conf.arg(name="")]` gives `--output-dir` and a
top-level YAML key.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
import yaml

from preftune import disk, embedded_flags
from preftune.flags import ALIASES, ELSEWHERE, ONE_VALUE
from preftune.notes import say
from preftune.printable import printable
from preftune.typed_flags import undone
from rewards import embedded
from rewards.input_files import read_text
from rewards.own import OwnRewardError

Config = TypeVar("Config")

MAX_YAML = 1 << 18
"""Bytes of a config file; PyYAML reads 100 KB a second."""
_RAISED = contextvars.ContextVar("errors are raised", default=False)
_HELP = "--config FILE.yaml reads flags from a file, one `key: value` a line; it may be repeated, and the last value wins."


def parse(
    config_class: type[Config], argv: list[str] | None = None, *, default_config: Path | None = None
) -> Config:
    """The configuration that the command line describes; argv defaults to that of the process.

    `--config FILE` may be given several times. Where neither it nor --model is typed, default_config is read in its place, and a
    line on stderr says so. What the user typed wrongly, a ValueError of a __post_init__ included, ends the process with one
    sentence on stderr and exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    leaves = _leaves(config_class)
    with exit_on_user_error():
        files, typed = _split_config(argv)
        typed = _with_aliases(typed, leaves)
        _check_names(typed, leaves)
        if default_config is not None and not files and not _names_model(typed):
            files = [_shown(default_config)]
            if "--help" not in typed:
                say(
                    f"without --model the embedded model is tuned, by {files[0]} and the flags that follow; name another with --model"
                )
        read = [_read_yaml(file, leaves) for file in files]
        flags: list[str] = []
        origins: dict[str, str] = {}
        for at, (file, rows) in enumerate(zip(files, read, strict=True)):
            later = [
                *(token for after in read[at + 1 :] for _, own in after.values() for token in own),
                *typed,
            ]
            for name, (line, tokens) in rows.items():
                if not undone(tokens, later):
                    flags += tokens
                    origins[_flag(name)] = f"{file} line {line}"
        for token in typed:  # a value that the command line overrides cannot be an error of the file
            origins.pop(token.split("=")[0].replace("_", "-"), None)
        return embedded_flags.found(_tyro(config_class, flags + typed, origins))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a ValueError or OSError in the block into one sentence on stderr and exit code 2.

    For a driver's checks of what the user typed (paths, prompt files, scorer names), before the work begins. Keep the
    work itself outside the block: there a ValueError is a bug, and its traceback is needed.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in disk.WORDS:
            raise  # a write that failed: preftune/one_writer.py says so
        if isinstance(error, OwnRewardError) and not are_errors_raised():
            sys.stderr.write(printable(error.trace))
        _fail(str(error))


@contextlib.contextmanager
def errors_raised() -> Iterator[None]:
    """Context of a call from Python: what ends a program raises instead, a ValueError where the user typed something wrongly."""
    token = _RAISED.set(True)
    try:
        yield
    finally:
        _RAISED.reset(token)


def are_errors_raised() -> bool:
    """Return whether this is in the context of `errors_raised`."""
    return _RAISED.get()


def flag_types(config_class: type) -> dict[str, Any]:
    """Return the YAML name of each flag of a Config, such as `lora.rank`, with its type."""
    return {name: leaf.hint for name, leaf in _leaves(config_class).items()}


def dump(config: Any) -> str:
    """YAML text that replays a configuration: parsing it with `--config` gives an equal one."""
    rows: dict[str, Any] = {}
    for name, leaf in _leaves(type(config)).items():
        value = config
        for attribute in leaf.attributes:
            value = getattr(value, attribute)
        *parents, key = name.split(".")
        group = rows
        for parent in parents:
            group = group.setdefault(parent, {})
        group[key] = _plain(value)
    return yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _plain(value: Any) -> Any:
    """A field's value in YAML's types."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(embedded.portable(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # YAML writes infinity as `.inf`, which float() does not read
    assert value is None or isinstance(value, str | int | float), (
        f"a config field holds a {type(value).__name__}"
    )
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A value of the configuration: the attributes that lead to it, and its type."""

    attributes: tuple[str, ...]
    hint: Any

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.hint) or None in typing.get_args(self.hint)

    @property
    def is_list(self) -> bool:
        return any(
            typing.get_origin(hint) in (tuple, list) for hint in (self.hint, *typing.get_args(self.hint))
        )


def _leaves(config_class: type) -> dict[str, _Leaf]:
    """The values of a Config under their YAML names, such as `lora.rank`."""
    leaves: dict[str, _Leaf] = {}
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in (field for field in dataclasses.fields(config_class) if field.init):
        hint, extras = hints[field.name], list[Any]()
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            prefix = "" if tyro.conf.arg(name="") in extras else f"{field.name}."
            inner = {
                prefix + name: _Leaf(attributes=(field.name, *leaf.attributes), hint=leaf.hint)
                for name, leaf in _leaves(typing.cast(type, hint)).items()
            }
        else:
            inner = {field.name: _Leaf(attributes=(field.name,), hint=hint)}
        assert not inner.keys() & leaves.keys(), (
            f"two fields of {config_class.__name__} share a flag: {field.name}"
        )
        assert all(name.count(".") <= 1 for name in inner), f"{field.name} nests too deep"
        leaves |= inner
    assert "config" not in leaves, "--config is taken"
    return leaves


def _flag(name: str, negated: bool = False) -> str:
    """The flag of a YAML name: `lora.use_bias` -> `--lora.use-bias`, negated `--lora.no-use-bias`."""
    group, dot, leaf = name.rpartition(".")
    return f"--{group}{dot}{'no-' if negated else ''}{leaf}".replace("_", "-")


def _split_config(argv: list[str]) -> tuple[list[Path], list[str]]:
    """The files of --config, and the other tokens in their order."""
    files: list[Path] = []
    typed: list[str] = []
    at_start = True  # here a bare word would join a list flag of the file, which nobody means
    tokens = iter(argv)
    for token in tokens:
        if token == "--config" or token.startswith("--config="):
            file = token.partition("=")[2] if "=" in token else next(tokens, "")
            if not file or file.startswith("--"):
                raise ValueError("--config needs a file: --config FILE.yaml")
            files.append(embedded.find(file))
            at_start = True
            continue
        if at_start and not token.startswith("-"):
            raise ValueError(f"unexpected {token!r}: values follow a flag, as in --seed 1; see --help")
        typed.append(token)
        at_start = False
    return files, typed


def _names_model(typed: list[str]) -> bool:
    """Whether the command line names a model, where a program has a default one."""
    return any(token.partition("=")[0] == "--model" for token in typed)


def _shown(file: Path) -> Path:
    """The path of a file of this package, short where it lies below the working directory."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _check_names(typed: list[str], leaves: dict[str, _Leaf]) -> None:
    """Refuse flags that do not exist, and values for flags that take none."""
    for at, token in enumerate(typed):
        if not token.startswith("--"):
            continue
        name, equals, _ = token.removeprefix("--").replace("-", "_").partition("=")
        positive = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name)
        known = name in leaves or (positive in leaves and leaves[positive].hint is bool) or name == "help"
        if not known:
            raise ValueError(
                f"unknown flag {token.partition('=')[0]}{_instead(name, leaves, _flag)}; see --help"
            )
        values = [*itertools.takewhile(lambda other: not other.startswith("--"), typed[at + 1 :])]
        if name in leaves and not leaves[name].is_list and len(values) + bool(equals) > 1:
            raise ValueError(
                f"{_flag(name)} takes one value, got {len(values) + bool(equals)}: {' '.join(map(repr, values))};"
                f" {ONE_VALUE.get(name, 'a value with spaces stands in quotes')}"
            )
        if equals and name in leaves and leaves[name].hint is bool:
            raise ValueError(
                f"{_flag(name)} takes no value: write {_flag(name)} or {_flag(name, negated=True)}"
            )


def _instead(name: str, leaves: dict[str, _Leaf], write: typing.Callable[[str], str] = str) -> str:
    """What there is in place of an unknown name, as the end of a sentence; nothing where nobody knows."""
    other = ELSEWHERE.get(name, "")
    first = other.split(maxsplit=1)[0].removeprefix("--").replace("-", "_") if other.startswith("--") else ""
    if first in leaves or (other and not first):  # do not suggest a flag that this program lacks
        return f" (here: {other})"
    near = difflib.get_close_matches(name, leaves, n=1)
    return f" (did you mean {write(near[0])}?)" if near else ""


def _with_aliases(typed: list[str], leaves: dict[str, _Leaf]) -> list[str]:
    """The tokens with flags of other scripts that mean the same written as here."""
    written = []
    for token in typed:
        name, equals, value = token.partition("=")
        alias = _alias(name.removeprefix("--").replace("-", "_"), leaves) if name.startswith("--") else None
        written.append(f"{_flag(alias)}{equals}{value}" if alias else token)
    return written


def _alias(name: str, leaves: dict[str, _Leaf]) -> str | None:
    """The name here of another script's flag, or of one of --sample that is written without it; None for all others.

    --guidance-scale is --sample.guidance-scale where no other flag could be meant: none ends in these words.
    """
    if name in leaves:
        return None
    if ALIASES.get(name) in leaves:
        return ALIASES[name]
    ends = [leaf for leaf in leaves if leaf.replace(".", "_").endswith(f"_{name}")]
    return f"sample.{name}" if ends == [f"sample.{name}"] else None


def _read_yaml(file: Path, leaves: dict[str, _Leaf]) -> dict[str, tuple[int, list[str]]]:
    """Name -> (line, flags) of a YAML file, in the file's order. Only text is read: no tag builds an object."""
    try:
        root = yaml.compose(read_text(file, MAX_YAML, "the config file "), Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError(f"{file} is not YAML of a configuration: it is nested too deep") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must hold `key: value` lines, one for each flag")
    rows: dict[str, tuple[int, list[str]]] = {}
    for name, line, node in _flatten(root, file, leaves):
        if name in rows:
            raise ValueError(
                f"{file} line {line}: {name} is there twice, first on line {rows[name][0]}; keep one"
            )
        try:
            rows[name] = (line, _tokens(name, leaves[name], node))
        except ValueError as error:
            raise ValueError(f"{file} line {line}: {error}") from error
    return rows


def _flatten(
    group: yaml.MappingNode, file: Path, leaves: dict[str, _Leaf], prefix: str = ""
) -> Iterator[tuple[str, int, yaml.Node]]:
    """(name, line, value) of each leaf below a mapping."""
    for key, node in group.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):  # printed, an alias would grow at each level
            raise ValueError(f"{file} line {line}: a key must be a name, not a list or a mapping")
        name = prefix + str(key.value).replace("-", "_")
        name = _alias(name, leaves) or name
        members = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
        if name in leaves:
            yield name, line, node
        elif members and isinstance(node, yaml.MappingNode):
            yield from _flatten(node, file, leaves, f"{name}.")
        elif members:
            raise ValueError(
                f"{file} line {line}: {name} is a group and has no value; set {', '.join(members)}"
            )
        else:
            raise ValueError(f"{file} line {line}: unknown key {name}{_instead(name, leaves)}; see --help")


def _tokens(name: str, leaf: _Leaf, node: yaml.Node) -> list[str]:
    """The flags that say what a YAML value says."""
    if isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} takes a value, not a mapping")
    if isinstance(node, yaml.SequenceNode):
        if not leaf.is_list:
            raise ValueError(f"{name} takes one value, not a list")
        return [_flag(name), *(_element(name, item) for item in node.value)]
    text = str(node.value)
    if _is_null(node):
        if not leaf.optional:
            raise ValueError(f"{name} has no value; give it one, or leave the line out for the default")
        return [f"{_flag(name)}=None"]
    if leaf.hint is bool or bool in typing.get_args(leaf.hint):
        if text.lower() not in ("true", "yes", "on", "false", "no", "off"):
            raise ValueError(f"{name} is {text!r}; it must be true or false")
        truth = text.lower() in ("true", "yes", "on")
        return [_flag(name, negated=not truth)] if leaf.hint is bool else [f"{_flag(name)}={truth}"]
    return [f"{_flag(name)}={text}"]


def _element(name: str, node: yaml.Node) -> str:
    """One element of a YAML list as a token of its own."""
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise ValueError(f"{name} takes a list of plain values")
    if node.value.startswith("-") and not re.fullmatch(r"-[\d.].*", node.value):
        raise ValueError(
            f"{name} holds {node.value!r}, which would read as a flag; an element may not begin with -"
        )
    return str(node.value)


def _is_null(node: yaml.Node) -> bool:
    """Whether a YAML value is an unquoted null."""
    return (
        isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in ("", "~", "null")
    )


def _tyro(config_class: type[Config], args: list[str], origins: dict[str, str]) -> Config:
    """Parse the flags; tyro's boxed complaint becomes a ValueError of one sentence that says where the flag came from."""
    box = io.StringIO()
    description = f"{inspect.getdoc(config_class) or ''}\n\n{_HELP}"
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(config_class, args=args, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = _missing(box.getvalue()) or _unboxed(box.getvalue())
        cause: BaseException | None = stop.__context__
        if re.match(
            r"Error parsing (?!-)", reason
        ):  # a __post_init__ spoke: its words, without the box's line breaks
            while cause is not None and not isinstance(cause, ValueError):
                cause = cause.__context__
            reason = str(cause) if cause is not None else reason
        flag = re.search(r"--[\w.-]*\w", reason)
        origin = origins.get(flag.group()) if flag else None
        raise ValueError(f"{origin}: {reason}" if origin else reason) from stop
    sys.stderr.write(box.getvalue())
    return config


def _unboxed(text: str) -> str:
    """What stands in the first section of a box that tyro drew, as one line; the box is of Unicode or of ASCII lines."""
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line).strip("\u2502 ") for line in text.splitlines()]
    lines = [line for line in plain if line]
    rules = [at for at, line in enumerate(lines) if line[0] in "\u256d\u2570" or not line.strip("\u2500-")]
    section = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return re.sub(r"^Error parsing (?=--)", "", " ".join(section))


def _missing(text: str) -> str:
    """Which required flags are missing, where that is what a box of tyro's says; else nothing."""
    if "Missing from " not in text:
        return ""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    flags = re.findall(r"(?m)^[^\w-]{1,7}(--[a-z][\w.-]*)", plain)  # their help stands further to the right
    if len(flags) == 1:
        return f"{flags[0]} is missing; see --help"
    return f"{', '.join(flags[:-1])} and {flags[-1]} are missing; see --help"


def _fail(reason: str) -> NoReturn:
    """Print one line on stderr and leave with exit code 2; ValueError in the context of `errors_raised`."""
    if are_errors_raised():
        raise ValueError(" ".join(reason.splitlines()))
    sys.stderr.write(printable(f"{Path(sys.argv[0]).name}: error: {' '.join(reason.splitlines())}") + "\n")
    raise SystemExit(2)
