"""Images that a scorer's gradient leads to, of which the scorer is then trained again.

A method that follows a scorer's gradient, such as ReFL, soon makes images unlike those of the scorer's own training, such as malformed
outlines and bleeding colours, which it may rate too high. InstructGPT (Ouyang et al. 2022, arXiv 2203.02155,
section 3.1) therefore collects comparisons of outputs of the current policy and trains a new reward model. Here the gradient is followed
without a policy: by Adam on the final latents of a generated image. Half of the images are reached by the gradient of the score of
the image as it is, half by that of the image shifted at random before each step, as ReFL's --jitter does.

Shapes: B rankings, n images of each, C h w latents, H W pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from preftune.augment import shifted
from preftune.families.base import Family

BATCH = 32
"""Rankings that are climbed at once. Memory is that of a backward pass through the decoder and the scorer for so many images."""

SHIFT = 4
"""Pixels along each axis by which an image is shifted at most."""

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""Pixels (B, 3, H, W), about in [0, 1], and B prompts -> rewards (B,), with gradients to the pixels."""


def stops(images: int, steps: int) -> list[int]:
    """Return the numbers of steps, evenly spaced up to `steps`, after which so many images are taken; they differ if steps >= images."""
    return [steps * number // images for number in range(1, images + 1)]


def climb(
    family: Family,
    reward: Reward,
    latents: Tensor,
    prompts: Sequence[str],
    after: Sequence[int],
    rate: float,
    shift: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Return the latents (B, C, h, w) after each of these numbers of steps, rising, from `latents` up the gradient of reward(shift(pixels)).

    A step is one of Adam with the learning rate `rate`, in units of latents, so that it moves a latent by about `rate`. Images do not
    influence each other: Adam works by element, and the loss is minus the sum of the rewards. The decoder's pixels are not clamped.
    """
    x = latents.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    found = []
    for step in range(1, after[-1] + 1):
        (x.grad,) = torch.autograd.grad(-reward(shift(family.decode(x)), prompts).sum(), x)
        optimizer.step()
        if step in after:
            found.append(x.detach().clone())
    return found


def climbed(
    family: Family,
    reward: Reward,
    latents: Tensor,
    prompts: Sequence[str],
    generators: Sequence[Generator],
    *,
    images: int,
    steps: int,
    rate: float,
) -> Tensor:
    """Return pixels (B, n, 3, H, W) in [0, 1], float32 on the CPU, of rankings of n = `images` that begin with the image of `latents` (B, C, h, w).

    Behind it are (n - 1) // 2 images up the gradient, then n // 2 up that of images shifted by up to SHIFT pixels along each axis, by each
    ranking's generator; both after `stops` of `steps` steps. FloatingPointError, from `reward`, for a score that is not finite.
    """
    found = [latents]
    if plain := (images - 1) // 2:
        found += climb(family, reward, latents, prompts, stops(plain, steps), rate, lambda pixels: pixels)
    found += climb(
        family,
        reward,
        latents,
        prompts,
        stops(images // 2, steps),
        rate,
        lambda pixels: shifted(pixels, generators, SHIFT),
    )
    with torch.no_grad():
        return torch.stack([family.decode(x).float().clamp(0, 1).cpu() for x in found], dim=1)
