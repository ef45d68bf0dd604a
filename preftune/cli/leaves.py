"""The values of a configuration, their names in YAML and their flags."""

import dataclasses
import re
import typing
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A value of the configuration: the attributes that lead to it, and its type."""

    attributes: tuple[str, ...]
    hint: Any

    @property
    def optional(self) -> bool:
        """Whether it may be None."""
        return type(None) in typing.get_args(self.hint) or None in typing.get_args(self.hint)

    @property
    def is_optional_switch(self) -> bool:
        """Whether it is True, False, or None where the program chooses."""
        return self.optional and bool in typing.get_args(self.hint)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return any(
            typing.get_origin(hint) in (tuple, list) for hint in (self.hint, *typing.get_args(self.hint))
        )

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The types of the numbers that it takes, `...` for any more of them; nothing where it takes no list of numbers."""
        for hint in (self.hint, *typing.get_args(self.hint)):
            members = typing.get_args(hint)
            if typing.get_origin(hint) is tuple and {*members} <= {int, float, ...}:
                return members
        return ()


def leaves_of(config_class: type) -> dict[str, Leaf]:
    """The values of a Config under their YAML names, such as `lora.rank`."""
    leaves: dict[str, Leaf] = {}
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in (field for field in dataclasses.fields(config_class) if field.init):
        hint, extras = hints[field.name], list[Any]()
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            prefix = "" if tyro.conf.arg(name="") in extras else f"{field.name}."
            inner = {
                prefix + name: Leaf(attributes=(field.name, *leaf.attributes), hint=leaf.hint)
                for name, leaf in leaves_of(typing.cast(type, hint)).items()
            }
        else:
            inner = {field.name: Leaf(attributes=(field.name,), hint=hint)}
        assert not inner.keys() & leaves.keys(), (
            f"two fields of {config_class.__name__} share a flag: {field.name}"
        )
        assert all(name.count(".") <= 1 for name in inner), f"{field.name} nests too deep"
        leaves |= inner
    assert "config" not in leaves, "--config is taken"
    return leaves


def words_of(hint: Any) -> list[str]:
    """The words that a value of this type may be, in the order of the type; None is not one."""
    if typing.get_origin(hint) is Literal:
        return [str(word) for word in typing.get_args(hint) if word is not None]
    return [word for inner in typing.get_args(hint) if typing.get_origin(inner) for word in words_of(inner)]


def flag_of(name: str, negated: bool = False) -> str:
    """The flag of a YAML name: `lora.use_bias` -> `--lora.use-bias`, negated `--lora.no-use-bias`."""
    group, dot, leaf = name.rpartition(".")
    return f"--{group}{dot}{'no-' if negated else ''}{leaf}".replace("_", "-")


def positive_of(name: str) -> str:
    """The YAML name of a flag that is written negated: `lora.no_use_bias` -> `lora.use_bias`; any other name as it is."""
    return re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name)


def element(name: str, text: str) -> str:
    """Return an element of a list as a token of its own; ValueError where it would read as a flag."""
    if text.startswith("-") and not re.fullmatch(r"-[\d.].*", text):
        raise ValueError(
            f"{name} holds {text!r}, which would read as a flag; an element may not begin with -"
        )
    return text
