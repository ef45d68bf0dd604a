"""Rewards of the user's own: a function in a Python file, `FILE.py:FUNCTION`, or a callable that a program is given.

A reward is a callable f(pixels, prompts) -> (B,): rewards.own_scorer says what it gets and what it may return.
A file runs only if the user named it in --rewards of this process (`named_by_user`). A name from anywhere else, such as a
data set or the summary of a run, makes nothing run. `find_card` only parses the file. Needs no torch.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType
from typing import Any

from rewards.card import Card
from rewards.digests import sha256_now
from rewards.input_files import read_text

MODULE = "rewards.own_scorer"
"""The module of all cards of such rewards."""
NOT_RUN = (
    "{name} is a function in a file, and such a file runs only where --rewards names it; in Python import the function and give"
    " it to the program, as rewards={{'{function}': {function}}}"
)
MAX_FILE = 1 << 22
"""Bytes of a file with rewards."""

_OURS = ("rewards", "preftune")
_FILE = re.compile(r"(.+\.py)(?::([^=:/\\]*))?", re.DOTALL)
_PROMPTS, _PIXELS = ("prompt", "text", "caption"), ("pixel", "image", "img")
"""Beginnings of the names of arguments."""
_WORD = re.compile(r"[^\W\d][\w.-]*")
_GIVEN: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("given", default=MappingProxyType({}))
_named: set[tuple[Path, str]] = set()
_modules: dict[tuple[Path, str], dict[str, Any]] = {}


class OwnRewardError(ValueError):
    """What a reward of the user's own did wrong, in one sentence; `trace` is the traceback of an exception in it, or empty.

    It is empty, too, for a ValueError that this package raised: its words are for the user, and say all.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


@contextlib.contextmanager
def given(callables: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let these names, each a word such as "mine", be scorers in the block, for this thread or task.

    ValueError for a name that is no word, and for what cannot be called. A name of the table is refused by `find_card`.
    """
    for name, function in callables.items():
        if not _WORD.fullmatch(name) or name.endswith(".py"):
            raise ValueError(f"{name!r} cannot name a reward; give it a word of letters, digits, - and _")
        check_callable(name, function)
    token = _GIVEN.set(MappingProxyType({**_GIVEN.get(), **callables}))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def is_given(name: str) -> bool:
    """Return whether `given` has this name now."""
    return name in _GIVEN.get()


def is_in_file(name: str) -> bool:
    """Return whether a name is written as FILE.py:FUNCTION, or as FILE.py alone, which lacks its function."""
    return _FILE.fullmatch(name) is not None and not Path(name).is_dir()


def is_own(name: str) -> bool:
    """Return whether a name is that of a reward of the user's own."""
    return is_given(name) or is_in_file(name)


def named_by_user(name: str) -> None:
    """Note that the user named this scorer in --rewards: if it is FILE.py:FUNCTION, the file may run in this process."""
    if not is_given(name) and is_in_file(name):
        path, function = _parts(name)
        _named.add((path.resolve(), function))


def path_of(name: str) -> Path | None:
    """Return the file of FILE.py:FUNCTION; None for a callable that was given."""
    return None if is_given(name) else _parts(name)[0]


def source_digest(name: str) -> str:
    """Return the SHA-256 of the source text of a callable that was given; of no text where Python does not know it."""
    function = _GIVEN.get()[name]
    try:
        text = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        text = ""
    return hashlib.sha256(text.encode()).hexdigest()


def card_of(name: str) -> Card:
    """Return the card; ValueError, before anything runs, for a missing file, a syntax error, or a file without that function."""
    if not is_given(name):
        _check_file(*_parts(name))
    return Card(
        name=name,
        module=MODULE,
        summary="a reward of your own",
        prompted=True,
        differentiable=True,  # until it is tried: rewards.own_scorer.try_out
        typical_range=(-math.inf, math.inf),
        mean=math.nan,
        std=math.nan,
        licence="your own",
        paper="none",
    )


def function_of(name: str) -> Callable[..., Any]:
    """Return the callable; FILE.py runs once, and again after an edit.

    ValueError for a file that the user did not name; OwnRewardError where it fails, or has no such callable.
    """
    if is_given(name):
        return _GIVEN.get()[name]
    path, function = _parts(name)
    if (path.resolve(), function) not in _named:
        raise ValueError(NOT_RUN.format(name=name, function=function))
    namespace = namespace_of(name)
    if function not in namespace:
        raise OwnRewardError(_lacks(path, function, [key for key in namespace if not key.startswith("_")]))
    check_callable(name, namespace[function])
    found: Callable[..., Any] = namespace[function]
    return found


def namespace_of(name: str) -> dict[str, Any]:
    """Return the top level of the file that FILE.py:FUNCTION names, run; empty for a callable that was given."""
    if is_given(name):
        return {}
    path = _parts(name)[0].resolve()
    key = (path, sha256_now(path))
    if key not in _modules:
        _modules[key] = _run(path, f"own_rewards_{path.stem}_{key[1][:12]}")
    return _modules[key]


def check_callable(name: str, value: object) -> None:
    """Raise ValueError unless a value can be called with pixels and prompts."""
    if isinstance(value, type):
        raise OwnRewardError(
            f"{name} is a class; make an object of it, as reward = {value.__name__}(), and name that"
        )
    if not callable(value):
        raise OwnRewardError(
            f"{name} is {value!r:.80} ({type(value).__name__}), which cannot be called; name a function of pixels and prompts"
        )
    if inspect.iscoroutinefunction(value):
        raise OwnRewardError(f"{name} is an async function; name a plain function of pixels and prompts")
    try:
        signature = inspect.signature(getattr(value, "forward", value))  # of a module, its forward
    except (ValueError, TypeError):  # of a function in C there may be none
        return
    try:
        signature.bind("pixels", "prompts")
    except TypeError as error:
        raise OwnRewardError(
            f"{name}{signature} cannot be called as f(pixels, prompts): {error}; define it as def f(pixels, prompts)"
        ) from error
    first, second, *_ = [*signature.parameters, "", ""]
    if first.startswith(_PROMPTS) and second.startswith(_PIXELS):
        raise OwnRewardError(
            f"{name}{signature} takes the prompts first, but is called as f(pixels, prompts); swap the two"
        )


def failure(name: str, file: str | None, error: BaseException) -> OwnRewardError:
    """Return the error that says where a reward, defined in this file, raised another one, in its words.

    The traceback of that one begins in the user's code from now on. A ValueError of this package, as of a judge that cannot be asked,
    is a sentence to the user already: it needs no traceback, and of its place only the line in the user's file.
    """
    tb = error.__traceback__ = _after_ours(error.__traceback__)
    frames = traceback.extract_tb(tb)
    inner = [frame for frame in frames if frame.filename == file] or frames[-1:]
    where = f" at {inner[-1].filename}:{inner[-1].lineno} ({inner[-1].line})" if inner else ""
    words = " ".join(str(error).split())[:500]
    seen = [(_is_ours(frame), frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(tb)]
    if isinstance(error, ValueError) and not isinstance(error, OwnRewardError) and seen and seen[-1][0]:
        lines = [line for ours, place, line in seen if place == file and not ours]
        return OwnRewardError(f"{name}{f' ({file}:{lines[-1]})' if lines else ''}: {words}")
    trace = "".join(traceback.format_exception(type(error), error, tb, chain=False))
    return OwnRewardError(
        f"{name} failed{where}: {type(error).__name__}{': ' if words else ''}{words}", trace
    )


def place_of(function: object) -> tuple[str | None, int | None]:
    """Return the file and line where a callable is defined, None where that is not known."""
    kind: Any = type(function)
    for found in (function, getattr(function, "forward", None), kind.__call__):
        code = getattr(inspect.unwrap(found), "__code__", None) if callable(found) else None
        if code is not None and not str(getattr(found, "__module__", "")).startswith("torch."):
            return code.co_filename, code.co_firstlineno
    return None, None


def _parts(name: str) -> tuple[Path, str]:
    """Split FILE.py:FUNCTION; ValueError without a function."""
    match = _FILE.fullmatch(name)
    assert match is not None, f"{name} is no FILE.py:FUNCTION"
    path, function = Path(match[1]), match[2] or ""
    if not function.isidentifier():
        _check_file(path, function)
    return path, function


def _check_file(path: Path, function: str) -> None:
    """Raise ValueError for a file that is missing, is no Python, or does not define the function; does not run it."""
    if not path.exists():
        raise ValueError(
            f"there is no file {path}; --rewards takes FILE.py:FUNCTION, as in my_rewards.py:brightness=0.5"
        )
    try:
        tree = ast.parse(read_text(path, MAX_FILE), str(path))
    except SyntaxError as error:
        line = f": {error.text.strip()}" if error.text and error.text.strip() else ""
        raise ValueError(f"{path}:{error.lineno} is not Python: {error.msg}{line}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is nested too deep to be read as Python") from error
    names = _top_level(tree.body)
    if "*" not in names and function not in names:
        raise ValueError(_lacks(path, function, [name for name, kind in names.items() if kind == "def"]))


def _top_level(body: list[ast.stmt]) -> dict[str, str]:
    """Return the names that a file binds at its top level, and "def" for functions and values; "*" for a star import."""
    found: dict[str, str] = {}
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found[name] = "def"
            case ast.ClassDef(name=name):
                found[name] = "class"
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found |= {(alias.asname or alias.name).split(".")[0]: "import" for alias in aliases}
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Expr():
                stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
                found |= {part.id: "value" for part in stored if isinstance(part.ctx, ast.Store)}
            case _:
                for inner in ("body", "orelse", "finalbody"):
                    found |= _top_level(getattr(node, inner, []))
                for handler in getattr(node, "handlers", []):
                    found |= _top_level(handler.body)
    return found


def _lacks(path: Path, function: str, names: list[str]) -> str:
    """Say that a file has no such function, and which it has."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    has = (
        f"it has {', '.join(names[:12])}{more}" if names else "it has none; write def reward(pixels, prompts)"
    )
    if not function:
        return f"{path} needs the name of a function behind it, as {path}:{names[0] if names else 'reward'}; {has}"
    near = difflib.get_close_matches(function, names, n=1)
    return f"{path} has no function {function!r}{f', did you mean {near[0]}?' if near else ''}; {has}"


def _run(path: Path, module_name: str) -> dict[str, Any]:
    """Run a file as a module; its folder is the last place where it finds modules of its own."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, f"{path} is a Python file"
    assert spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look for it there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise failure(f"running {path.name}", str(path), error) from error
    return vars(module)


def _is_ours(frame: FrameType) -> bool:
    """Return whether a frame is of a module whose ValueErrors are sentences to the user."""
    return str(frame.f_globals.get("__name__")).split(".")[0] in _OURS


def _after_ours(tb: TracebackType | None) -> TracebackType | None:
    """Leave out the first frames of a traceback: those of this package and of Python's import."""
    ours, rest = f"{Path(__file__).parent}{os.sep}", tb
    while rest is not None and (rest.tb_frame.f_code.co_filename.startswith((ours, "<frozen importlib"))):
        rest = rest.tb_next
    return rest or tb
