"""Frozen modules whose weights stay in the CPU's memory except while they are used."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Offloaded:
    """Weights of frozen modules: in the CPU's memory, where they stay, and a copy on the device between `load` and `unload`.

    The copy is dropped, not written back, so that a use costs one copy of the weights. On CUDA the memory is pinned. A backward
    pass needs the weights that its forward pass had: `unload` after it.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device | str) -> None:
        self.device = torch.device(device)
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._tensors: list[Tensor] = list(tensors.values())  # of a tower that two scorers share, once
        assert not any(tensor.requires_grad for tensor in self._tensors), "trained weights stay on the device"
        self._homes = [self._home(tensor.data) for tensor in self._tensors]
        self.is_loaded = True
        self.unload()

    def _home(self, data: Tensor) -> Tensor:
        home = data.cpu()
        return home.pin_memory() if self.device.type == "cuda" else home

    def load(self) -> None:
        """Copy the weights to the device; nothing where they are there."""
        if not self.is_loaded:
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = home.to(self.device, non_blocking=True, copy=True)
            self.is_loaded = True

    def unload(self) -> None:
        """Drop the copy; nothing where there is none."""
        if self.is_loaded:
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = home
            self.is_loaded = False

    def around(self, pixels: Tensor) -> Tensor:
        """Load the weights; return pixels (B, 3, H, W) whose gradient, once it is computed, unloads them.

        Without a gradient the caller unloads them.
        """
        self.load()
        if not (torch.is_grad_enabled() and pixels.requires_grad):
            return pixels
        own = pixels.view_as(pixels)  # so that the hook is of this use alone
        own.register_hook(lambda gradient: self.unload())
        return own


def offload_between_calls(module: nn.Module, device: torch.device | str) -> None:
    """Keep a frozen module in the CPU's memory but during its forward pass, whose result has no gradient through it."""
    weights = Offloaded([module], device)
    module.register_forward_pre_hook(lambda *_: weights.load())
    module.register_forward_hook(lambda *_: weights.unload(), always_call=True)
