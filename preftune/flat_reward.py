"""Rewards in a flattened form: scored where a small step against the reward's own gradient leads.

A reward that is high only at a peak, as where a scorer is fooled by single pixels, loses by the step; one on a plateau does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def downhill(pixels: Tensor, reward: Callable[[Tensor], Tensor], radius: float) -> Tensor:
    """Return pixels (B, 3, H, W) moved by `radius`, the length of each image's step, against the gradient of its reward.

    RSA-FT (CVPR 2026), the part of it in image space: x - rho g / |g| with g the gradient of r at x; the step is a constant, so the
    gradient of what is returned is that of the pixels. Where the gradient is 0 an image stays. `reward` gives rewards (B,).
    """
    with torch.enable_grad():
        here = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(here).sum(), here)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return pixels - radius * gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny)
