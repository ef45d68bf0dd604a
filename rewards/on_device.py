"""Values between the CPU and a device without waiting for the device.

A copy from pageable memory, `torch.tensor(values, device="cuda")`, `x.new_tensor(values)`, `x[list]` and `.item()` all make the program
wait until the GPU has done everything that was asked of it before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on the device; a GPU gets it from pinned memory, and the program goes on meanwhile.

    What is on the device already is returned as it is. The caller must not change `values` in place afterwards.
    """
    device = torch.device(device)
    if values.device.type == "cpu" and device.type == "cuda" and values.numel():
        values = values.pin_memory()
    return values.to(device, non_blocking=values.device.type == "cpu")


def filled(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values (n,) on the device, which writes them itself: for a handful."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])


def one(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a number, or a tensor of one element, as (1,) float32 on the device."""
    if isinstance(value, Tensor):
        return upload(value.detach().float().reshape(1), device)
    return filled([value], device)


class Reading:
    """Values on their way to the CPU: begin to read, ask the device for more work, and look at them then.

    Only what was asked of the device before is waited for.
    """

    def __init__(self, values: Tensor) -> None:
        """Begin to copy a tensor of any shape."""
        # Into pinned memory: Tensor.to sees to that where it need not block. Other devices have no event here: they are waited for.
        self._values = values.detach().to("cpu", non_blocking=values.is_cuda)
        self._done = torch.cuda.Event() if values.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(values.device))

    def values(self) -> Tensor:
        """Return the values on the CPU, which waits for them."""
        if self._done is not None:
            self._done.synchronize()
        return self._values
