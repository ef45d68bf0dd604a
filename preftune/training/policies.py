"""Other weights of the model that is trained: an earlier policy, a slow average of it, and the model before tuning.

What they say is asked for without gradient before the pass with gradient begins: weights are swapped in place, which the graph of
such a pass does not survive.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from preftune.families.base import Cond
from preftune.training.before_tuning import BeforeTuning
from preftune.training.workspace import Workspace


class Policy:
    """A copy of the trained weights, in their precision; of a LoRA a few megabytes, of all weights as much as those."""

    def __init__(self, w: Workspace, kept: Sequence[Tensor] | None = None) -> None:
        """Begin as the weights are, or with those of `state` of an earlier copy."""
        self._w = w
        self._trained: list[Tensor] = [p for p in w.family.denoiser.parameters() if p.requires_grad]
        self.weights = [p.detach().clone() for p in self._trained]
        for mine, other in zip(self.weights, kept or self.weights, strict=True):
            mine.copy_(other)

    def state(self) -> list[Tensor]:
        """Return what a checkpoint keeps."""
        return [weight.cpu() for weight in self.weights]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Become decay times this copy plus (1 - decay) times the trained weights."""
        torch._foreach_lerp_(self.weights, self._trained, 1 - decay)  # exact for 0

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the model has these weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return what the network says with these weights, (B, C, h, w), of noisy latents x at timesteps t (B,), without guidance."""
        with self.swapped_in():
            return self._w.family.predict(x, t, cond).output

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, trained in zip(self.weights, self._trained, strict=True):
            own = trained.clone()
            trained.copy_(mine)
            mine.copy_(own)


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
