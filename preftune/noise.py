"""The noise process x_t = alpha x_0 + sigma eps as pure functions of tensors.

Variance-preserving (VP) models: alpha = sqrt(alphas_cumprod) and sigma = sqrt(1 - alphas_cumprod), where alphas_cumprod
is the cumulative product of Ho et al. 2020 (arXiv 2006.11239, eq. 4). Flow models: alpha = 1 - sigma (Liu et al. 2022,
arXiv 2209.03003, section 2.1, with noise at sigma 1). The prediction types of a network:

    epsilon        eps
    v_prediction   v = alpha eps - sigma x_0     (Salimans and Ho 2022, arXiv 2202.00512, appendix D)
    sample         x_0
    flow           v = eps - x_0

All latents are (B, C, h, w); alpha and sigma are (B,) or (), and are cast to the dtype of the latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from preftune.solver_names import PredictionType


class Prediction(NamedTuple):
    """A network's prediction for noisy latents, each (B, C, h, w): x = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor
    output: Tensor
    """The network's own output, guided where guidance is on."""


def like(level: Tensor, x: Tensor) -> Tensor:
    """Return alpha or sigma, () or (B,), in the dtype and on the device of x, shaped to multiply it."""
    return level.to(x).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t."""
    return like(alpha, x0) * x0 + like(sigma, x0) * eps


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionType) -> Tensor:
    """Return the training target of this prediction type at x_t."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "flow":
        return eps - x0
    return like(alpha, x0) * eps - like(sigma, x0) * x0


def predict_from(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionType) -> Prediction:
    """Return the x_0 and eps that correspond to an output at x: not clipped, differentiable in output and x.

    At alpha = 0 (zero terminal SNR; Lin et al. 2023, arXiv 2305.08891) x is pure noise. The other types
    still determine x_0; epsilon does not, and raises RuntimeError (an assertion on the device, so that no
    GPU waits for it).
    """
    a, s = like(alpha, x), like(sigma, x)
    if kind == "epsilon":
        torch._assert_async((a != 0).all(), "epsilon says nothing about x_0 at alpha 0 (zero terminal SNR)")
        return Prediction((x - s * output) / a, output, output)
    if kind == "sample":
        return Prediction(output, (x - a * output) / s, output)
    if kind == "flow":
        return Prediction(x - s * output, x + a * output, output)
    return Prediction(a * x - s * output, a * output + s * x, output)
