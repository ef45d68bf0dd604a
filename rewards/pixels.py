"""Preprocessing: a differentiable path for tensors, and the authors' steps for PIL images.

Shapes: B batch, H W pixels of any size, S = preprocess.size. Pixels are float, (B, 3, H, W), in [0, 1].
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.card import Preprocess


def prepare(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the normalised input (B, 3, S, S) of a tower, at least float32; gradients flow back to pixels.

    Bicubic overshoot is kept, not clamped: a clamp would zero the gradient exactly where an image is pure
    white or black. ValueError when pixels are not a float batch of RGB images, or end up in another size
    than S x S.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be a float tensor (B, 3, H, W) in [0, 1], got {pixels.dtype} {tuple(pixels.shape)};"
            " rewards.pixels.from_pil makes one from an image"
        )
    fitted = _fit(_resize(at_least_float32(pixels), preprocess), preprocess)
    mean, std = (fitted.new_tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (fitted - mean) / std


def check_prompts(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless there are as many prompts as images."""
    if len(prompts) != len(pixels):
        raise ValueError(f"{len(pixels)} images need as many prompts, got {len(prompts)}")


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32 and others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def from_pil(image: Image.Image, preprocess: Preprocess | None = None) -> Tensor:
    """Return an image as pixels (3, H, W) in [0, 1]; with preprocess resized and cut by PIL to (3, S, S).

    The published scorers resize and crop in the file's own mode and convert to RGB last, which matters for
    transparent and palette images, and PIL rounds to 8 bits in between. With preprocess the result equals
    theirs, and `prepare` then only normalises it. Two of them differ: see `Preprocess.files`. Rotations in
    the EXIF data are ignored, as the authors do. A 16-bit grey image is read by its upper eight bits, where
    PIL, and they with it, takes nearly all of it for white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if preprocess is not None and preprocess.files == "tensor":
        return _fit(_resize(from_pil(image)[None], preprocess), preprocess)[0]
    if preprocess is not None:
        if preprocess.files == "rgb":
            image = image.convert("RGB")
        height, width = _resized(image.height, image.width, preprocess)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if preprocess.crop == "center" and min(height, width) >= preprocess.size:
            left, top = (_offset(side, preprocess) for side in (width, height))
            image = image.crop((left, top, left + preprocess.size, top + preprocess.size))
    values = np.array(image.convert("RGB"), dtype=np.uint8)
    # Contiguous, as theirs: how a tensor lies in memory changes the last bits of sums over it.
    pixels = torch.from_numpy(values).permute(2, 0, 1).contiguous().float() / 255
    if preprocess is not None and preprocess.crop == "pad":
        pixels = _fit(pixels[None], preprocess)[0]
    return pixels


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    size, short, long = preprocess.size, min(height, width), max(height, width)
    if preprocess.resize == "none":
        return height, width
    if (
        preprocess.resize == "shortest"
    ):  # the long side is cut down to an integer, as torchvision's Resize does
        return (size, size * width // height) if height <= width else (size * height // width, size)
    scale = size / long  # the short side is rounded half to even, as open_clip's ResizeMaxSize does
    rounded = max(round(short * scale), 1)
    return (size, rounded) if height >= width else (rounded, size)


def _resize(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    target = _resized(pixels.shape[2], pixels.shape[3], preprocess)
    if target == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(
        pixels, target, mode=preprocess.interpolation, align_corners=False, antialias=preprocess.antialias
    )


def _offset(side: int, preprocess: Preprocess) -> int:
    margin = side - preprocess.size  # Python rounds half to even
    return margin // 2 if preprocess.crop_offset == "floor" else round(margin / 2)


def _fit(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    size = preprocess.size
    height, width = pixels.shape[2:]
    if preprocess.crop == "center" and min(height, width) >= size:
        top, left = _offset(height, preprocess), _offset(width, preprocess)
        pixels = pixels[:, :, top : top + size, left : left + size]
    elif preprocess.crop == "pad" and max(height, width) <= size:
        left, top = (size - width) // 2, (size - height) // 2
        pixels = F.pad(pixels, (left, size - width - left, top, size - height - top))
    if pixels.shape[2:] != (size, size):
        raise ValueError(
            f"images of {height} x {width} pixels do not become {size} x {size} with crop={preprocess.crop!r};"
            " resize them first"
        )
    return pixels
