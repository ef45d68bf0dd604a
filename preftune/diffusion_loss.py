"""The pre-training loss of a diffusion model, one value per image, so that programs can weight images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from preftune.ahead import initial_noise
from preftune.captioned_inputs import CaptionedInputs
from preftune.families.base import Family
from preftune.noise import add_noise, target
from preftune.solver_names import PredictionType
from rewards.on_device import upload


class Noised(NamedTuple):
    """Images at one noise level each, and what a network should say there."""

    x: Tensor
    """(B, C, h, w) noisy latents."""
    t: Tensor
    """(B,) timesteps."""
    alpha: Tensor
    """(B,)."""
    sigma: Tensor
    """(B,)."""
    target: Tensor
    """(B, C, h, w) what the network's own prediction type should give: eps, v, ..."""

    def errors(self, output: Tensor) -> Tensor:
        """Return the squared errors (B,) of the network's output (B, C, h, w), the mean over elements."""
        return (output - self.target).square().flatten(1).mean(1)


def noised(
    family: Family, x0: Tensor, generators: Sequence[Generator], timesteps: Tensor | None = None
) -> Noised:
    """Return latents x0 (B, C, h, w) with noise.

    Each image's timestep, from the family's distribution, and its noise come from its own generator, in this order; timesteps (B,)
    that are given are taken as they are.
    """
    t = upload(family.training_timesteps(generators) if timesteps is None else timesteps, x0.device)
    eps = initial_noise(x0.shape[1:], generators, x0.device).to(x0)
    alpha, sigma = family.schedule(t)
    wanted = target(x0, eps, alpha, sigma, family.prediction_type)
    return Noised(add_noise(x0, eps, alpha, sigma), t, alpha, sigma, wanted)


def diffusion_loss(
    family: Family,
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    generators: Sequence[Generator],
    timesteps: Tensor | None = None,
    snr_gamma: float | None = None,
) -> Tensor:
    """Return the squared error (B,) of the network's output at a random timestep, the mean over elements.

    For epsilon it is Ho et al. 2020 (arXiv 2006.11239, eq. 14), ImageReward's pre-training loss (arXiv
    2304.05977, eq. 3); other prediction types are compared with their own target. predict(x_t (B, C, h, w),
    t (B,)) returns the network's output; x0, generators and timesteps are those of `noised`.
    snr_gamma weights each image's loss by `min_snr`.
    """
    at = noised(family, x0, generators, timesteps)
    losses = at.errors(predict(at.x, at.t))
    if snr_gamma is None:
        return losses
    return losses * min_snr(at.alpha, at.sigma, family.prediction_type, snr_gamma)


def min_snr(alpha: Tensor, sigma: Tensor, prediction_type: PredictionType, gamma: float) -> Tensor:
    """Return the Min-SNR-gamma weight of a loss at each noise level, in the shape of alpha.

    Hang et al. 2023 (arXiv 2303.09556, section 3.4 and appendix): the error of x0 counts min(SNR, gamma) times, SNR =
    (alpha / sigma)^2, which is min(SNR, gamma) / SNR of the error of epsilon and min(SNR, gamma) / (SNR + 1) of that of v.
    With either, the noisiest levels, where little can be learnt, count as they do in the loss of epsilon.
    """
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":
        return gamma / snr.clamp(min=gamma)  # min(SNR, gamma) / SNR, which is 1 where SNR is 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise ValueError(f"Min-SNR weights are of epsilon and v_prediction, not of {prediction_type}")


def captioned_loss(
    inputs: CaptionedInputs,
    paths: Sequence[Path],
    captions: Sequence[str],
    generators: Sequence[Generator],
    *,
    caption_dropout: float,
    dropped: Sequence[str] | None = None,
    stream: int = 0,
) -> Tensor:
    """Return `diffusion_loss` (B,) of image files, scaled and cropped to the resolution, with their captions.

    A share caption_dropout of the captions is left empty, as classifier-free guidance needs (Ho and Salimans
    2022, arXiv 2207.12598); `dropped` are their replacements, None = empty captions. All random numbers
    of an image come from its own generator: first its dropout, then its latents, then `diffusion_loss`. `stream` is that of
    `CaptionedInputs.expect`.
    """
    family = inputs.family
    kept = [float(torch.rand((), generator=generator)) >= caption_dropout for generator in generators]
    texts = zip(captions, dropped or [""] * len(captions), kept, strict=True)
    x0, framings = inputs.latents(paths, generators, stream)
    cond = inputs.cond([caption if keep else other for caption, other, keep in texts], framings)
    return diffusion_loss(family, lambda x, t: family.predict(x, t, cond).output, x0, generators)
