"""The algebra of the noise process: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps. Pure functions of tensors.

abar is the cumulative product of Ho et al. 2020 (arXiv 2006.11239, eq. 4); v = sqrt(abar) eps - sqrt(1 - abar) x_0 is that
of Salimans and Ho 2022 (arXiv 2202.00512, appendix D). All latents are (B, C, h, w); abar is (B,) or ().
"""

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]


def _like(abar: Tensor, x: Tensor) -> Tensor:
    return abar.to(x).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Return x_t."""
    a = _like(abar, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def velocity(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Return v, what a v-prediction network is trained to say."""
    a = _like(abar, x0)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def target(x0: Tensor, eps: Tensor, abar: Tensor, kind: Prediction) -> Tensor:
    """Return what a network of this kind is trained to say at x_t."""
    return {"epsilon": eps, "sample": x0}[kind] if kind != "v_prediction" else velocity(x0, eps, abar)


def x0_from(output: Tensor, x_t: Tensor, abar: Tensor, kind: Prediction) -> Tensor:
    """Return the x_0 that a network's output means, not clipped, differentiable in output and x_t."""
    a = _like(abar, x_t)
    if kind == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()
    if kind == "v_prediction":
        return a.sqrt() * x_t - (1 - a).sqrt() * output
    return output


def eps_from(output: Tensor, x_t: Tensor, abar: Tensor, kind: Prediction) -> Tensor:
    """Return the noise that a network's output means."""
    a = _like(abar, x_t)
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return a.sqrt() * output + (1 - a).sqrt() * x_t
    return (x_t - a.sqrt() * output) / (1 - a).sqrt()
