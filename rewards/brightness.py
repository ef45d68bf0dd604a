"""Mean brightness: the simplest scorer, for testing that a driver can raise a reward."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewards.card import Card
from rewards.pixels import takes_images


class Brightness:
    """Scores an image by the mean of its pixels over channels, rows and columns; ignores the prompt."""

    def __init__(self, card: Card) -> None:
        self.card = card

    @takes_images
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the means (B,) float32 of pixels (B, 3, H, W)."""
        return pixels.float().mean(dim=(1, 2, 3))


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> Brightness:
    """Return the scorer; there are no weights to place on a device or to hold in a dtype."""
    return Brightness(card)
