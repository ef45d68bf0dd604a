"""Cache of the text vectors of a frozen text tower: drivers score many images of the same prompts."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MAX_PROMPTS = 4096
"""Prompts whose vectors are kept, the latest ones: 16 MB for the widest tower."""


class TextCache(nn.Module):
    """A cached function: B prompts to vectors (B, E) without gradient. For frozen weights only.

    `embed` is a method of the text tower, which remains a part of the scorer. The cache is a module, so
    that it is cleared when the scorer moves to another device or dtype.
    """

    def __init__(self, embed: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.known: OrderedDict[str, Tensor] = OrderedDict()

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Return the vectors (B, E) of B prompts; device is where the text tower is."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new:
            # Without autocast: what is kept must not depend on who asks first.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                self.known.update(zip(new, self.embed(new), strict=True))
        found = torch.stack([self.known[prompt] for prompt in prompts])
        for prompt in prompts:
            self.known.move_to_end(prompt)
        while len(self.known) > MAX_PROMPTS:
            self.known.popitem(last=False)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextCache":
        self.known.clear()
        return super()._apply(fn, recurse)
