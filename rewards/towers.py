"""The parts of a scorer's tower, from the input up, as training freezes them."""

from typing import NamedTuple

from torch import nn


class Tower(NamedTuple):
    """One tower, its layers from bottom to top."""

    embeddings: tuple[nn.Module | nn.Parameter, ...]
    layers: tuple[nn.Module, ...]
    rest: tuple[nn.Module, ...]
    """What follows the last layer: norm and projection."""
