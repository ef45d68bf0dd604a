"""What protects a program from a pipeline folder of unknown origin, beside the checks of the families."""

import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rewards.input_files import MAX_JSON, parse_json, read_text

MAX_NUMBER = 1 << 20
"""Limit of a whole number in a model's config.json; the largest are vocabularies of 49,408 and more tokens."""
MAX_LAYERS = 1000
"""Limit of a number of layers or blocks; a model of a billion layers would be built for hours."""

_LIBRARY = (  # what diffusers, transformers and tokenizers raise for files that are damaged or not theirs
    RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, EOFError, OSError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


def check_files(folder: Path) -> None:
    """Raise ValueError where a JSON file of a pipeline, which the libraries will read, is none, too large or nested too deep,
    or a configuration holds a number that no model has.
    """
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            state = path.stat()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        _check_file(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=256)
def _check_file(path: Path, _modified: int, _size: int) -> None:
    """Read a file once as long as it stays the same; a vocabulary takes some 20 ms."""
    value = parse_json(read_text(path, MAX_JSON), str(path))
    if path.name == "config.json" and isinstance(value, dict):
        _check_numbers(value, path)


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_numbers(value, path)
        limit = MAX_LAYERS if "layers" in key or "blocks" in key else MAX_NUMBER
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_LAYERS:
            raise ValueError(f"{path} has {len(values)} values of {key}; at most {MAX_LAYERS}")
        for one in values:
            if isinstance(one, int) and abs(one) > limit:
                raise ValueError(f"{path} has {key} {one:.3g}; at most {limit}")


@contextmanager
def loading(model: object) -> Iterator[None]:
    """Context in which what a library raises for damaged files becomes a ValueError of one sentence."""
    try:
        yield
    except _LIBRARY as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"cannot load the model {model}: {type(error).__name__}: {first[:300]}; its files are damaged or of another kind"
        ) from error
