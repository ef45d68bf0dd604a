"""Values that come more than once, so that work on them can be done once."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


def distinct(values: Sequence[Value]) -> tuple[list[Value], list[int]]:
    """Return the values that differ, in the order of their first, and for each value its place among these."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return [*places], [places[value] for value in values]
