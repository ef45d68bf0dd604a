"""Losses of diffusion models on pairs of images, one of which people prefer, as pure functions of denoising errors.

| function | method |
|---|---|
| `dpo_losses` | Diffusion-DPO (arXiv 2311.12908); with alpha Poly-DPO (ViPO, arXiv 2604.24953) |
| `ipo_losses` | IPO (arXiv 2310.12036) on the implicit margin of Diffusion-DPO |
| `mapo_losses` | MaPO (arXiv 2406.06424), which needs no reference |

An error is the mean over all elements of (output - target)^2, of both images at one timestep with one noise. N pairs; the first image of
a pair is the one that its label prefers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ODDS = 0.5
"""MaPO's factor of an error inside the odds, `snr_value` of the released script."""


def implicit_margins(errors: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return what Diffusion-DPO's sigmoid is taken of (eq. 14), (N,), of errors (2, N) of the model and of the reference.

    It is beta / 2 times by how much more than the reference the model tells the images apart. The paper's T omega(lambda) is in beta, as in
    its released code: 5000 goes with the mean over elements, 5000 / (4 * 64 * 64) with their sum.
    """
    own, other = errors[0] - errors[1], reference[0] - reference[1]
    return -0.5 * beta * (own - other)


def dpo_losses(margins: Tensor, alpha: float = 0.0) -> Tensor:
    """Return -log p + alpha (1 - p), p = sigmoid(margin), (N,).

    Its slope is -(1 - p)(1 + alpha p): Poly-DPO's alpha above 0 weighs pairs more that the model gets right, and so noisy labels less.
    """
    return alpha * torch.sigmoid(-margins) - F.logsigmoid(margins)


def ipo_losses(margins: Tensor) -> Tensor:
    """Return (margin - 1/2)^2, (N,): a margin has a target, where DPO's grows without end.

    It is beta^2 times eq. 17 of the paper with tau = beta, whose values at beta 5000 (1e-8) AdamW's epsilon would drown.
    """
    return (margins - 0.5) ** 2


def mapo_losses(first: Tensor, second: Tensor, weight: float, num_train_timesteps: int) -> Tensor:
    """Return first - weight log sigmoid(T (odds(first) - odds(second))), (N,), of errors (N,): the error of the preferred image,
    and how much likelier it is than the other. odds(m) = c m / (e^(c m) - 1), c = 1/2; T is the number of timesteps.
    """
    return first - weight * F.logsigmoid(num_train_timesteps * (_odds(first) - _odds(second)))


def _odds(errors: Tensor) -> Tensor:
    scaled = (ODDS * errors).clamp(min=1e-12)  # the limit at 0 is 1
    return scaled / torch.expm1(scaled)


def labelled(as_labelled: Tensor, other_way: Tensor, labels: Tensor) -> Tensor:
    """Return the expected loss (N,) where a share `labels` (N,) in [0, 1] of people prefer the first image, of the losses (N,) of
    a pair and of the same pair the other way round.
    """
    return labels * as_labelled + (1 - labels) * other_way


def agreement(margins: Tensor, labels: Tensor) -> Tensor:
    """Return the share (N,) of people who agree with the sign of a margin; of a margin of 0, as at the reference, it is one half."""
    return torch.where(margins == 0, 0.5, torch.where(margins > 0, labels, 1 - labels))
