"""The resolution of an image, and the crop that a training image comes from.

A user writes a resolution as one number ("512") or as WIDTHxHEIGHT ("768x512"); the code passes (height, width).
"""

import re
from typing import NamedTuple

MULTIPLE = 8
"""Height and width are multiples of this, the factor of the autoencoders of Stable Diffusion."""


class Resolution(NamedTuple):
    """Height and width of an image in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """Return what `parse` reads: "512", or "768x512" for a width of 768 and a height of 512."""
        return str(self.height) if self.height == self.width else f"{self.width}x{self.height}"


class Framing(NamedTuple):
    """Size conditioning of a training image: its original size, and the corner of the crop in the resized
    image.

    SDXL was trained with these six numbers as an input (Podell et al. 2023, arXiv 2307.01952, section 2.2);
    `top` and `left` are in pixels of the resized image.
    """

    original: Resolution
    top: int = 0
    left: int = 0


def parse(text: str) -> Resolution:
    """Return the resolution that a user wrote: "512" is square, "768x512" is WIDTHxHEIGHT, as is "768,512". ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})(?:[x,]([0-9]{1,6}))?", text.strip().lower())
    if match is None:
        raise ValueError(
            f"resolution {text!r} is neither a number, as in 512, nor WIDTHxHEIGHT, as in 768x512"
        )
    width = int(match[1])
    height = int(match[2]) if match[2] else width
    if min(width, height) < MULTIPLE or width % MULTIPLE or height % MULTIPLE:
        raise ValueError(f"resolution {text!r}: width and height must be positive multiples of {MULTIPLE}")
    return Resolution(height=height, width=width)
