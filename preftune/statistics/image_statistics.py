"""Statistics of pixels that show typical damage of reward tuning without any model: loud colours, hard contrast, fine noise.

Pixels are (B, 3, H, W) in [0, 1].
"""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the luma Y' (ITU-R BT.601)."""
HIGH = 0.25
"""Cycles per pixel from which on a frequency counts as high: half of the largest, patterns of four pixels and finer."""


def saturation(pixels: Tensor) -> Tensor:
    """Return the mean saturation of each image, (B,) in [0, 1]: (max - min) / max over the channels of a pixel, 0 for black.

    It is the S of HSV (Smith 1978).
    """
    high, low = pixels.float().amax(1), pixels.float().amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=1e-12), 0.0).mean((1, 2))


def contrast(pixels: Tensor) -> Tensor:
    """Return the RMS contrast of each image, (B,) in [0, 0.5]: the standard deviation of its luma, divided by H W (Peli 1990)."""
    return luma(pixels).std((1, 2), correction=0)


def high_frequency_energy(pixels: Tensor) -> Tensor:
    """Return the part of the luma's variance at high frequencies, (B,) in [0, 0.25]: sum of |F(u, v)|^2 / (H W)^2.

    F is the discrete Fourier transform of the luma; the sum is over frequencies with sqrt(u^2 + v^2) >= 0.25 cycles per pixel.
    Over all but (0, 0) it would be the square of `contrast` (Parseval). Images of other sizes show other
    details at the same frequency: compare images of one size.
    """
    levels = luma(pixels)
    height, width = levels.shape[1:]
    power = torch.fft.fft2(levels).abs().square() / (height * width) ** 2
    u = torch.fft.fftfreq(height, device=levels.device)[:, None]
    v = torch.fft.fftfreq(width, device=levels.device)[None]
    high = u.square() + v.square() >= HIGH**2 - 1e-9
    return (power * high).sum((1, 2))


def luma(pixels: Tensor) -> Tensor:
    """Return .299 R + .587 G + .114 B, (B, H, W) float32."""
    return torch.einsum("bchw,c->bhw", pixels.float(), torch.tensor(LUMA, device=pixels.device))


STATISTICS = {
    "saturation": saturation,
    "contrast": contrast,
    "high-frequency energy": high_frequency_energy,
}
"""Name -> function of pixels."""


def image_statistics(pixels: Tensor) -> dict[str, Tensor]:
    """Return name -> (B,) of all STATISTICS."""
    return {name: statistic(pixels) for name, statistic in STATISTICS.items()}
