"""The layers of a tower, in order from the input, for freezing in training."""

from typing import NamedTuple

from torch import nn


class Tower(NamedTuple):
    """One tower, its layers from bottom to top."""

    embeddings: tuple[nn.Module | nn.Parameter, ...]
    layers: tuple[nn.Module, ...]
    rest: tuple[nn.Module, ...]
    """What follows the last layer: norm and projection."""
