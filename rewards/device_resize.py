"""Bicubic resizing on a device as the authors' code does on the CPU: PIL's, bit for bit, and torch's, to 1e-6.

A bicubic resize is two products with sparse matrices, along the width and along the height. Products that a GPU does in
microseconds take a processor core milliseconds, as long as decoding a JPEG.

PIL (Resample.c) rounds the weights to integers of 22 bits and each pass to 8 bits. Weights are split here into two halves of 11
bits, so that all products and sums are whole numbers below 2 ** 24, which float32 holds exactly, and TF32 the factors. Torch's
weights are those of its own kernel on the CPU, to which they are told apart by resizing an identity matrix; the two passes
differ in the order of their sums alone.

PIL 13 makes the pass along the height first for images that are more than twice as tall as wide, which is not done here: see `is_exact`.

Letters: B images of H x W pixels, which become h x w.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PRECISION_BITS = 32 - 8 - 2
"""Of PIL's weights."""
HALF_BITS = PRECISION_BITS // 2
MAX_SCALE = 7.0
"""Largest ratio of input to output side: sums of more products than this needs would not be exact."""
MAX_ASPECT = 1.8
"""Largest ratio of the sides of an image, up to which PIL makes the pass along the width first."""
TOLERANCE = 1e-6
"""Largest difference from torch's resize on the CPU, of values in [0, 1]."""


def is_exact(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Return whether `resize_as_pil` gives PIL's pixels for a resize between these (height, width), aspect ratio kept."""
    (height, width), scale = before, max(old / new for old, new in zip(before, after, strict=True))
    return scale <= MAX_SCALE and max(height, width) <= MAX_ASPECT * min(height, width)


def resize_as_pil(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return images (B, 3, H, W) uint8 as (B, 3, h, w) uint8: PIL's bicubic resize of RGB images, where `is_exact`."""
    with _tf32(True):  # the factors fit into it
        if width != pixels.shape[3]:
            pixels = _pil_pass(pixels, width)
        if height != pixels.shape[2]:
            pixels = _pil_pass(pixels.transpose(2, 3), height).transpose(2, 3)
    return pixels


def resize_as_torch(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return images (B, 3, H, W) float32 as (B, 3, h, w): what torch's antialiased bicubic resize makes on the CPU, to 1e-6."""
    with _tf32(False):
        if width != pixels.shape[3]:
            pixels = pixels @ _torch_weights(pixels.shape[3], width, pixels.device)
        if height != pixels.shape[2]:
            pixels = _torch_weights(pixels.shape[2], height, pixels.device).T @ pixels
    return pixels


@functools.cache
def equals_the_authors(device: torch.device) -> bool:
    """Return whether both resizes on this device equal those of the PIL and the torch that are installed, on trial images."""
    for height, width in ((150, 150), (180, 100), (100, 180)):
        values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, after = torch.from_numpy(values).permute(2, 0, 1)[None], (height * 2 // 5, width * 2 // 5)
        theirs = np.asarray(Image.fromarray(values).resize(after[::-1], Image.Resampling.BICUBIC))
        ours = resize_as_pil(image.to(device), *after)[0].permute(1, 2, 0).cpu().numpy()
        unit = image.float() / 255
        exact = F.interpolate(unit, after, mode="bicubic", align_corners=False, antialias=True)
        distance = (resize_as_torch(unit.to(device), *after).cpu() - exact).abs().max()
        if not (ours == theirs).all() or distance > TOLERANCE:
            return False
    return True


def _pil_pass(pixels: Tensor, out: int) -> Tensor:
    """Resize the last axis of uint8 pixels to `out`."""
    halves = pixels.float() @ _pil_weights(pixels.shape[-1], out, pixels.device)  # (..., 2 out)
    high, low = halves.to(torch.int32).split(out, dim=-1)
    sums = (high << HALF_BITS) + low + (1 << (PRECISION_BITS - 1))
    return (sums >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _pil_weights(size: int, out: int, device: torch.device) -> Tensor:
    """Return the weights (size, 2 out) of a pass: the upper halves, then the lower ones, whole numbers in float32."""
    scale = size / out
    assert scale <= MAX_SCALE, f"{size} pixels become {out}, {scale:.2f} times fewer"
    support = 2.0 * max(scale, 1.0)
    weights = np.zeros((size, out), dtype=np.int64)
    for place in range(out):
        center = (place + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size)
        taps = [_bicubic((x - center + 0.5) / max(scale, 1.0)) for x in range(first, last)]
        total = sum(taps)
        parts = [tap / total * (1 << PRECISION_BITS) for tap in taps]
        weights[first:last, place] = [int(part - 0.5) if part < 0 else int(part + 0.5) for part in parts]
    halves = np.concatenate([weights >> HALF_BITS, weights & ((1 << HALF_BITS) - 1)], axis=1)
    return torch.from_numpy(halves).float().to(device)


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5, as PIL's."""
    x = abs(x)
    if x < 1:
        return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@functools.lru_cache(maxsize=64)
def _torch_weights(size: int, out: int, device: torch.device) -> Tensor:
    """Return the weights (size, out) of torch's kernel on the CPU."""
    identity = torch.eye(size)[None, None]
    weights = F.interpolate(identity, (size, out), mode="bicubic", align_corners=False, antialias=True)
    return weights[0, 0].to(device)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
