"""The pre-training loss of a diffusion model, by image, so that drivers may weight images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from preftune.families.base import Family
from preftune.images import load_pixels
from preftune.noise import add_noise, target


def denoising_error(
    family: Family, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, generators: Sequence[Generator]
) -> Tensor:
    """Return the squared error (B,) of the network's output at a random timestep: paper 002 eq. 3, mean over elements.

    predict(x_t (B, C, h, w), t (B,)) is the network with its prompts; x0 are latents. Each image's timestep, uniform in
    [0, 1000), and noise come from its own generator. A v-prediction network is compared with v.
    """
    num_timesteps = int(str(family.scheduler_config["num_train_timesteps"]))
    t = torch.cat([torch.randint(num_timesteps, (1,), generator=generator) for generator in generators]).to(
        x0.device
    )
    eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
    abar = family.abar(t)
    output = predict(add_noise(x0, eps, abar), t)
    return (output - target(x0, eps, abar, family.prediction)).square().flatten(1).mean(1)


def captioned_error(
    family: Family,
    paths: Sequence[Path],
    captions: Sequence[str],
    generators: Sequence[Generator],
    *,
    size: int,
    caption_dropout: float,
    dropped: Sequence[str] | None = None,
) -> Tensor:
    """Return `denoising_error` (B,) of image files, scaled and cropped to size x size pixels, with their captions.

    A share caption_dropout of the captions is left empty, so that guidance has an unconditional model to point away from
    (Ho and Salimans 2022); `dropped` says what stands in their place, None = nothing. All draws of an image come from its own
    generator.
    """
    kept = [float(torch.rand((), generator=generator)) >= caption_dropout for generator in generators]
    texts = zip(captions, dropped or [""] * len(captions), kept, strict=True)
    cond = family.encode([caption if keep else other for caption, other, keep in texts])
    with torch.no_grad():
        pixels = torch.stack([load_pixels(path, size) for path in paths])
        x0 = family.encode_pixels(pixels, generators)
    return denoising_error(family, lambda x, t: family.denoise(x, t, cond), x0, generators)
