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
import io
import math
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from preftune.cli import embedded_flags
from preftune.cli.config_files import read_yaml
from preftune.cli.help_text import help_text
from preftune.cli.last_word import last_word
from preftune.cli.leaves import flag_of, leaves_of, words_of
from preftune.cli.notes import end_bars, say
from preftune.cli.printable import printable
from preftune.cli.typed_flags import as_here, check_names, undone
from preftune.files import disk
from rewards import embedded
from rewards.own import OwnRewardError

Config = TypeVar("Config")

_RAISED = contextvars.ContextVar("errors are raised", default=False)
_CHOICES = r"invalid choice (?P<value>.*) for argument '(?P<flag>--[\w.-]+)'\. Expected one of \(.*\) ?\."
_HELP = "--config FILE.yaml reads flags from a file, one `key: value` a line; it may be repeated, and the last value wins."


def parse(
    config_class: type[Config],
    argv: list[str] | None = None,
    *,
    default_config: Path | None = None,
    needs: str = "",
) -> Config:
    """The configuration that the command line describes; argv defaults to that of the process.

    `--config FILE` may be given several times. Where neither it nor --model is typed, default_config is read in its place, and a
    line on stderr says so. `needs` is said to a user who typed nothing, where flags are required: where their values come from. What the user typed wrongly, a ValueError of a __post_init__ included, ends the process with one
    sentence on stderr and exit code 2.
    """
    if argv is None:
        sys.excepthook = _interrupted
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _note)
        argv = sys.argv[1:]
    leaves = leaves_of(config_class)
    with exit_on_user_error():
        files, typed = _split_config(argv)
        typed = as_here(typed, leaves)
        check_names(typed, leaves)
        if default_config is not None and not files and not _names_model(typed):
            files = [_shown(default_config)]
            if "--help" not in typed:
                say(
                    f"without --model the embedded model is tuned, by {files[0]} and the flags that follow; name another with --model"
                )
        read = [read_yaml(file, leaves) for file in files]
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
                    origins[flag_of(name)] = f"{file} line {line}"
        for token in typed:  # a value that the command line overrides cannot be an error of the file
            origins.pop(token.split("=")[0].replace("_", "-"), None)
        if needs and not argv:
            with _explained(needs):
                return embedded_flags.found(_tyro(config_class, [], {}))
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
            raise  # a write that failed: preftune/files/one_writer.py says so
        if isinstance(error, OwnRewardError) and not are_errors_raised():
            sys.stderr.write(printable(error.trace))
        _fail(str(error))


@contextlib.contextmanager
def _explained(more: str) -> Iterator[None]:
    """Context in which the sentence of a ValueError goes on."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('; see --help')}; {more}; see --help") from error


_noted: list[int] = []
"""Ctrl-C since the flags were read."""


def _note(number: int, frame: FrameType | None) -> None:
    """Remember a Ctrl-C: an import may swallow the KeyboardInterrupt."""
    _noted.append(number)
    raise KeyboardInterrupt


def end_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that an import has swallowed; from here on Ctrl-C is Python's own."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _noted:
            raise KeyboardInterrupt


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one sentence for a Ctrl-C while libraries are imported, before anything has been done; else as Python does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sentence = f"{Path(sys.argv[0]).name}: stopped; start the same command again to go on\n"
    sys.stderr.write(sentence)
    last_word(sentence, code=128 + signal.SIGINT)
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the exit code that a shell expects
    signal.raise_signal(signal.SIGINT)


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
    return {name: leaf.hint for name, leaf in leaves_of(config_class).items()}


def dump(config: Any) -> str:
    """YAML text that replays a configuration: parsing it with `--config` gives an equal one."""
    rows: dict[str, Any] = {}
    for name, leaf in leaves_of(type(config)).items():
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


def _tyro(config_class: type[Config], args: list[str], origins: dict[str, str]) -> Config:
    """Parse the flags; tyro's boxed complaint becomes a ValueError of one sentence that says where the flag came from."""
    if {"-h", "--help"} & {*args}:
        sys.stdout.write(help_text(config_class, _HELP))
        raise SystemExit(0)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(config_class, args=args)
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
        reason = _plainly(reason, config_class)
        flag = re.search(r"--[\w.-]*\w", reason)
        origin = origins.get(flag.group()) if flag else None
        raise ValueError(f"{origin}: {reason}" if origin else reason) from stop
    sys.stderr.write(box.getvalue())
    return config


def _plainly(reason: str, config_class: type) -> str:
    """A sentence of tyro's about a choice or a missing value in the words of all others, choices in the order of the Config."""
    if wrong := re.fullmatch(_CHOICES, reason):
        hints = {flag_of(name): leaf.hint for name, leaf in leaves_of(config_class).items()}
        *first, last = words_of(hints[wrong["flag"]])
        return f"{wrong['flag']} is {wrong['value']}; it must be {', '.join(first)}{' or ' if first else ''}{last}"
    return re.sub(
        r"Missing value for argument '(--[\w.-]+)'\. Expected (\d+) values\.",
        lambda match: f"{match[1]} needs {'a value' if match[2] == '1' else f'{match[2]} values'}",
        reason,
    )


def _unboxed(text: str) -> str:
    """What stands in the first section of a box that tyro drew, as one line; the box is of Unicode or of ASCII lines."""
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line).strip("\u2502 ") for line in text.splitlines()]
    lines = [line for line in plain if line]
    rules = [at for at, line in enumerate(lines) if line[0] in "\u256d\u2570" or not line.strip("\u2500-")]
    section = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    text = re.sub(r"^Error parsing (?=--)", "", " ".join(section))
    text = re.sub(
        r" no type matching .* could be instantiated from .* - <class '\w+'>: ", " ", text
    )  # None or a number
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)


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
    end_bars()
    sentence = printable(f"{Path(sys.argv[0]).name}: error: {' '.join(reason.splitlines())}") + "\n"
    sys.stderr.write(sentence)
    last_word(sentence, code=2)
    raise SystemExit(2)
