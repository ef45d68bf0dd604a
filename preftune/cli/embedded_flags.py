"""The paths of a configuration that name files of the package, such as assets/tiny/prompts.txt: found from any folder."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from rewards import embedded

Config = TypeVar("Config")

_WRITTEN = ("output", "output_dir")
"""Fields that name what a program writes, which is never in the package."""


def found(config: Config) -> Config:
    """Return the configuration with each path to an embedded file that is not in the working directory made absolute.

    `preftune.cli.dump` writes them as they were. A model and a scorer are texts, which may name one of a table or of the
    hub; they are found where they are read.
    """
    changed: dict[str, Any] = {}
    values: Any = config
    for field in dataclasses.fields(values):
        value = getattr(config, field.name)
        new = _found(value) if field.init and field.name not in _WRITTEN else value
        if new is not value and new != value:
            changed[field.name] = new
    return dataclasses.replace(values, **changed) if changed else config


def _found(value: Any) -> Any:
    """Return a field's value with its paths found."""
    if isinstance(value, Path):
        return embedded.find(value)
    if isinstance(value, tuple):
        return tuple(_found(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return found(value)
    return value
