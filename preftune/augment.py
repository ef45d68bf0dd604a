"""Weak views of images: changes that should not change a preference (Stable Preference, section 3.2).

Shapes: B images, H W pixels; values in [0, 1].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

RATIO = (3 / 4, 4 / 3)
"""Aspect ratio (width / height) of a random crop before it is resized to H x W, log-uniform (Inception's,
and torchvision's default).
"""


def shifted(pixels: Tensor, generators: Sequence[Generator], most: int) -> Tensor:
    """Return images (B, 3, H, W) shifted at random by up to `most` pixels along each axis."""
    height, width = pixels.shape[2:]
    wide = F.pad(pixels, (most,) * 4, mode="replicate")
    corners = [torch.randint(2 * most + 1, (2,), generator=generator).tolist() for generator in generators]
    return torch.stack([wide[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)])


def weak_view(pixels: Tensor, generators: Sequence[Generator], least_area: float, flip: bool) -> Tensor:
    """Return one weak view of each image (B, 3, H, W): a random crop of area [least_area, 1], resized to H x W, and mirrored
    with probability 1/2 if `flip`.
    """
    return torch.stack(
        [
            _weak_view(image, generator, least_area, flip)
            for image, generator in zip(pixels, generators, strict=True)
        ]
    )


def _weak_view(image: Tensor, generator: Generator, least_area: float, flip: bool) -> Tensor:
    area, ratio, y, x, mirrored = torch.rand(5, generator=generator).tolist()
    height, width = image.shape[1:]
    area = (least_area + (1 - least_area) * area) * height * width
    low, high = map(math.log, RATIO)
    # A crop longer than the image is limited to its side: then only the other side is cut.
    aspect = math.exp(low + (high - low) * ratio)
    aspect = min(max(aspect, area / height**2), width**2 / area)
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    top, left = round(y * (height - h)), round(x * (width - w))
    crop = image[:, top : top + h, left : left + w]
    crop = crop.flip(2) if flip and mirrored < 0.5 else crop
    return F.interpolate(crop[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
