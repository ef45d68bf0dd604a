"""Preprocessing: a differentiable path for tensors, and the authors' steps for PIL images.

Shapes: B batch, H W pixels of any size, S = preprocess.size. Pixels are float, (B, 3, H, W), in [0, 1].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rewards import device_resize
from rewards.card import Preprocess
from rewards.on_device import Reading, filled

Images = Tensor | Image.Image | Sequence[Image.Image]
"""What a scorer is called with: pixels (B, 3, H, W) in [0, 1], an image, or images of any sizes."""
OUTSIDE = 0.5
"""How far values may lie outside [0, 1]: one bicubic resize makes at most 0.45 of black and white pixels."""

MAX_ORIGINAL = 1 << 20
"""Pixels up to which an image may go to a device as it is, 3 MB; larger ones are resized first."""

_Scorer = TypeVar("_Scorer")


def takes_images(
    score: Callable[[_Scorer, Tensor, Sequence[str]], Tensor],
) -> Callable[[_Scorer, Images, str | Sequence[str]], Tensor]:
    """Let a scorer's call on pixels (B, 3, H, W) and B prompts also take PIL images, and one prompt for all images.

    Images are prepared as the authors do (`from_pil`), each by itself where their sizes differ. ValueError for another number
    of prompts, and for pixels that are no float tensor of RGB images or far outside [0, 1]. The range is not checked for
    pixels that need a gradient: a decoder that is being trained may overshoot, and reading the values would make a GPU wait in
    each update. Else it is, with room for what a bicubic resize overshoots: -1..1 and 0..255 are found, and a
    diffusion model's images, clamped or not, pass.
    """

    @functools.wraps(score)
    def call(self: _Scorer, images: Images, prompts: str | Sequence[str]) -> Tensor:
        if isinstance(images, Tensor):
            check_batch(images)
            found = _range(images)
            scores = score(self, images, one_each(prompts, len(images)))
            check_range(found)  # once a GPU has its work: it goes on while the two numbers are read
            return scores
        batch = _from_images(images, self)
        texts = one_each(prompts, len(batch))
        if len({image.shape for image in batch}) == 1:
            return score(self, torch.stack(batch), texts)
        return torch.cat([score(self, image[None], [text]) for image, text in zip(batch, texts, strict=True)])

    return call


def one_each(prompts: str | Sequence[str], count: int) -> Sequence[str]:
    """Return a prompt for each of so many images: those given, or the one given, repeated; ValueError for another number."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if len(texts) not in (1, count):
        raise ValueError(f"{count} images need as many prompts, got {len(texts)}; one for all is taken, too")
    return texts if len(texts) == count else [*texts] * count


def check_batch(pixels: Tensor) -> None:
    """Raise ValueError unless pixels are a float batch of RGB images."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        remedy = "divide 0..255 by 255" if pixels.dtype == torch.uint8 else "a scorer also takes PIL images"
        raise ValueError(
            f"pixels must be a float tensor (B, 3, H, W) in [0, 1], got {pixels.dtype} {tuple(pixels.shape)}; {remedy}"
        )


def _range(pixels: Tensor) -> Reading | None:
    """Begin to read the least and the greatest value of pixels that need no gradient."""
    if pixels.requires_grad or not pixels.numel():
        return None
    return Reading(torch.stack(torch.aminmax(pixels.detach())))


def check_range(found: Reading | None) -> None:
    """Raise ValueError for values far outside [0, 1]."""
    if found is None:
        return
    low, high = found.values().tolist()
    if low < -OUTSIDE or high > 1 + OUTSIDE:
        remedy = (
            "divide values in 0..255 by 255" if high > 2 else "bring values in -1..1 there by (x + 1) / 2"
        )
        raise ValueError(f"pixels must lie in [0, 1], got {low:g} to {high:g}; {remedy}")


def _from_images(images: Any, scorer: object) -> list[Tensor]:
    """Return each image as pixels (3, H, W) for a scorer, on its device; ValueError for what is no list of PIL images."""
    several = [images] if isinstance(images, Image.Image) else images
    if not isinstance(several, list | tuple) or not several:
        raise ValueError(
            f"a scorer takes pixels (B, 3, H, W) in [0, 1] or a list of PIL images, got {images!r:.60}"
        )
    for image in several:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"a scorer takes a list of PIL images or a tensor (B, 3, H, W), got a list with {type(image).__name__}"
                f" {image!r:.60}; open a file by PIL.Image.open, and stack tensors by torch.stack"
            )
    device = getattr(scorer, "device", "cpu")
    if isinstance(scorer, nn.Module):
        device = next(scorer.parameters()).device
    preprocess = getattr(scorer, "card").preprocess  # noqa: B009
    return [from_pil(image, preprocess).to(device) for image in several]


def prepare(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the normalised input (B, 3, S, S) of a tower, at least float32; gradients flow back to pixels.

    Bicubic overshoot is kept, not clamped: a clamp would zero the gradient exactly where an image is pure
    white or black. ValueError when pixels are not a float batch of RGB images, or end up in another size
    than S x S.
    """
    check_batch(pixels)
    fitted = _fit(_resize(at_least_float32(pixels), preprocess), preprocess)
    mean, std = (
        filled(values, fitted.device, fitted.dtype).view(1, 3, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    return (fitted - mean) / std


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
    return unpack(packed_from_pil(image, preprocess)[None], preprocess)[0]


def packed_from_pil(image: Image.Image, preprocess: Preprocess | None = None) -> Tensor:
    """Return what `unpack` makes `from_pil`'s pixels of, in few bytes: (3, H, W) uint8, or float32 for `files="tensor"`."""
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
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def unpack(packed: Tensor, preprocess: Preprocess | None = None) -> Tensor:
    """Return pixels (B, 3, H, W) float32 of B packed images, on their device; with preprocess (B, 3, S, S)."""
    if packed.is_floating_point():
        return packed
    # Divided by a tensor: a GPU multiplies by the rounded reciprocal of a number.
    pixels = packed.float() / torch.full((), 255.0, device=packed.device)
    return _fit(pixels, preprocess) if preprocess is not None and preprocess.crop == "pad" else pixels


def can_wait(image: Image.Image, preprocess: Preprocess) -> bool:
    """Return whether `from_original` prepares this image as `from_pil` does: one of usual size and shape without transparency."""
    if (
        image.mode not in ("RGB", "L")
        or preprocess.resize == "none"
        or image.width * image.height > MAX_ORIGINAL
    ):
        return False
    before = image.height, image.width
    return device_resize.is_exact(before, _resized(*before, preprocess))


def from_original(originals: Tensor, preprocess: Preprocess) -> Tensor:
    """Return pixels (B, 3, S, S) of B images (B, 3, H, W) uint8 on any device, equal to `from_pil`'s where `can_wait`.

    Bit for bit where the authors resize by PIL, to 1e-6 where they resize a tensor: see rewards.device_resize.
    """
    after = _resized(originals.shape[2], originals.shape[3], preprocess)
    if preprocess.files == "tensor":
        return _fit(device_resize.resize_as_torch(unpack(originals), *after), preprocess)
    resized = device_resize.resize_as_pil(originals, *after)
    return unpack(_fit(resized, preprocess) if preprocess.crop == "center" else resized, preprocess)


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
