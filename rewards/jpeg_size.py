"""The size of an image as a JPEG file, the rewards without a gradient of DDPO's first experiments (arXiv 2305.13301)."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rewards.card import Card
from rewards.pixels import takes_images

QUALITY = 95
"""Of the JPEG file, as in DDPO."""


class JpegSize:
    """Scores an image by the size of its JPEG file in kB (1000 bytes), or by minus that; ignores the prompt."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._sign = -1 if card.name == "jpeg-compressibility" else 1

    @takes_images
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of pixels (B, 3, H, W), which are clamped and rounded to 8 bits."""
        values = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        sizes = []
        for image in values:
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
            sizes.append(self._sign * file.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32, device=pixels.device)


def load_scorer(card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype) -> JpegSize:
    """Return the scorer; there are no weights to place on a device or to hold in a dtype."""
    return JpegSize(card)
