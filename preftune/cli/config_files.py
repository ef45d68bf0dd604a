"""YAML files of a configuration, read as the flags that they write down."""

import typing
from collections.abc import Iterator
from pathlib import Path

import yaml

from preftune.cli.leaves import Leaf, element, flag_of
from preftune.cli.typed_flags import alias_of, instead
from rewards.input_files import read_text

MAX_YAML = 1 << 18
"""Bytes of a config file; PyYAML reads 100 KB a second."""


def read_yaml(file: Path, leaves: dict[str, Leaf]) -> dict[str, tuple[int, list[str]]]:
    """Name -> (line, flags) of a YAML file, in the file's order. Only text is read: no tag builds an object."""
    try:
        root = yaml.compose(read_text(file, MAX_YAML, "the config file "), Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError(f"{file} is not YAML of a configuration: it is nested too deep") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and "'\\t'" in str(error):
            raise ValueError(
                f"{file} line {mark.line + 1}: there is a tab; write spaces in its place"
            ) from error
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
    group: yaml.MappingNode, file: Path, leaves: dict[str, Leaf], prefix: str = ""
) -> Iterator[tuple[str, int, yaml.Node]]:
    """(name, line, value) of each leaf below a mapping."""
    for key, node in group.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):  # printed, an alias would grow at each level
            raise ValueError(f"{file} line {line}: a key must be a name, not a list or a mapping")
        name = prefix + str(key.value).replace("-", "_")
        name = alias_of(name, leaves) or name
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
            raise ValueError(f"{file} line {line}: unknown key {name}{instead(name, leaves)}; see --help")


def _tokens(name: str, leaf: Leaf, node: yaml.Node) -> list[str]:
    """The flags that say what a YAML value says."""
    if isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} takes a value, not a mapping")
    if isinstance(node, yaml.SequenceNode):
        if not leaf.is_list:
            raise ValueError(f"{name} takes one value, not a list")
        return [flag_of(name), *(_element(name, item) for item in node.value)]
    text = str(node.value)
    if _is_null(node):
        if not leaf.optional:
            raise ValueError(f"{name} has no value; give it one, or leave the line out for the default")
        return [f"{flag_of(name)}=None"]
    if leaf.hint is bool or bool in typing.get_args(leaf.hint):
        if text.lower() not in ("true", "yes", "on", "false", "no", "off"):
            raise ValueError(f"{name} is {text!r}; it must be true or false")
        truth = text.lower() in ("true", "yes", "on")
        return [flag_of(name, negated=not truth)] if leaf.hint is bool else [f"{flag_of(name)}={truth}"]
    return [f"{flag_of(name)}={text}"]


def _element(name: str, node: yaml.Node) -> str:
    """One element of a YAML list as a token of its own."""
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise ValueError(f"{name} takes a list of plain values")
    return element(name, str(node.value))


def _is_null(node: yaml.Node) -> bool:
    """Whether a YAML value is an unquoted null."""
    return (
        isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in ("", "~", "null")
    )
