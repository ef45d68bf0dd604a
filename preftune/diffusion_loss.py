"""The pre-training loss of a diffusion model, one value per image, so that programs can weight images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from preftune.ahead import initial_noise
from preftune.cli import exit_on_user_error
from preftune.families.base import Family
from preftune.images import load_with_framing
from preftune.noise import add_noise, target
from preftune.resolution import Resolution
from rewards.on_device import upload


def diffusion_loss(
    family: Family, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, generators: Sequence[Generator]
) -> Tensor:
    """Return the squared error (B,) of the network's output at a random timestep, the mean over elements.

    For epsilon it is Ho et al. 2020 (arXiv 2006.11239, eq. 14), ImageReward's pre-training loss (arXiv
    2304.05977, eq. 3); other prediction types are compared with their own target. predict(x_t (B, C, h, w),
    t (B,)) returns the network's output; x0 are latents. Each image's timestep, from the family's
    distribution, and its noise come from its own generator, in this order.
    """
    t = upload(family.training_timesteps(generators), x0.device)
    eps = initial_noise(x0.shape[1:], generators, x0.device).to(x0)
    alpha, sigma = family.schedule(t)
    output = predict(add_noise(x0, eps, alpha, sigma), t)
    return (output - target(x0, eps, alpha, sigma, family.prediction_type)).square().flatten(1).mean(1)


def captioned_loss(
    family: Family,
    paths: Sequence[Path],
    captions: Sequence[str],
    generators: Sequence[Generator],
    *,
    resolution: Resolution,
    caption_dropout: float,
    dropped: Sequence[str] | None = None,
) -> Tensor:
    """Return `diffusion_loss` (B,) of image files, scaled and cropped to the resolution, with their captions.

    A share caption_dropout of the captions is left empty, as classifier-free guidance needs (Ho and Salimans
    2022, arXiv 2207.12598); `dropped` are their replacements, None = empty captions. All random numbers
    of an image come from its own generator: first its dropout, then its latents, then `diffusion_loss`.
    """
    kept = [float(torch.rand((), generator=generator)) >= caption_dropout for generator in generators]
    texts = zip(captions, dropped or [""] * len(captions), kept, strict=True)
    with exit_on_user_error():  # an image that was sound when the run began
        loaded = [load_with_framing(path, resolution) for path in paths]
    cond = family.encode(
        [caption if keep else other for caption, other, keep in texts],
        framings=[framing for _, framing in loaded],
    )
    with torch.no_grad():
        x0 = family.encode_pixels(torch.stack([pixels for pixels, _ in loaded]), generators)
    return diffusion_loss(family, lambda x, t: family.predict(x, t, cond).output, x0, generators)
