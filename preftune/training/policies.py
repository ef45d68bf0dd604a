"""Other weights of the model that is trained: an earlier policy, a slow average of it, and the model before tuning.

What they say is asked for without gradient before the pass with gradient begins: weights are swapped in place, which the graph of
such a pass does not survive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from preftune.families.base import Cond
from preftune.training.before_tuning import BeforeTuning
from preftune.training.weight_copy import WeightCopy
from preftune.training.workspace import Workspace


class Policy(WeightCopy):
    """Other weights of the trained parameters, asked what the network says with them."""

    def __init__(self, w: Workspace, kept: Sequence[Tensor] | None = None) -> None:
        """Begin as the weights are, or with those of `state` of an earlier copy."""
        super().__init__(p for p in w.family.denoiser.parameters() if p.requires_grad)
        self._family = w.family
        if kept is not None:
            self.load(kept)

    @torch.no_grad()
    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return what the network says with these weights, (B, C, h, w), of noisy latents x at timesteps t (B,), without guidance."""
        with self.swapped_in():
            return self._family.predict(x, t, cond).output


class Base:
    """The model before tuning, asked as a `Policy`."""

    def __init__(self, w: Workspace) -> None:
        self._family, self._before = w.family, BeforeTuning(w)

    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return what its network says, as `Policy.output`."""
        with self._before():
            return self._family.predict(x, t, cond).output


def distance(output: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference () of two outputs of the network, (B, C, h, w): up to a factor for each noise level the KL
    divergence of their denoising steps.
    """
    return (output - other).square().mean()
