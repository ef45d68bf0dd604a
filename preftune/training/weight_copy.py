"""A copy of trained weights that is held beside them: it can follow them, and take their place for a while."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightCopy:
    """A copy of some parameters, in their precision; of a LoRA a few megabytes, of all weights as much as those."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self.weights: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]
        """Where the parameters are; a checkpoint may be given them as they are, which copies nothing before it is written."""

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Become these weights, one for each parameter."""
        for mine, saved in zip(self.weights, weights, strict=True):
            mine.copy_(saved)

    def state(self) -> list[Tensor]:
        """Return the weights on the CPU: what a checkpoint keeps."""
        return [weight.cpu() for weight in self.weights]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Become decay times this copy plus (1 - decay) times the parameters, exactly the parameters for 0."""
        if self.weights:
            torch._foreach_lerp_(self.weights, self._parameters, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the parameters have these weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, parameter in zip(self.weights, self._parameters, strict=True):
            own = parameter.clone()
            parameter.copy_(mine)
            mine.copy_(own)
