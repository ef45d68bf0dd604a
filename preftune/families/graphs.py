"""A module's forward as CUDA graphs, one for each shape of its inputs: a replay costs the host one launch instead of hundreds."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from preftune.cli.notes import say

Forward = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name -> output."""
_WARM_UP = 3  # calls before a capture: libraries choose their kernels, compiled code compiles
_LIMIT = 16  # shapes with a graph; further ones are called


class Graphs:
    """CUDA graphs of a function of tensors on a CUDA device.

    A graph reads its weights at their addresses, and does what the function did: `keep_for` looks at the addresses, `forget` it
    where the function is another one. What is written in place comes into effect with the next call.
    """

    def __init__(self) -> None:
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        self._weights: list[int] = []
        self._pool: Any = None
        self._failed = False

    def forget(self) -> None:
        """Drop all graphs, and their pool: torch captures into none whose graphs are gone, if a tensor of it is still there."""
        self._graphs, self._pool = {}, None

    def keep_for(self, addresses: list[int]) -> None:
        """Keep the graphs as long as the weights are at these addresses."""
        if addresses != self._weights:
            self.forget()
            self._weights = addresses

    @torch.inference_mode(False)  # in which tensors that stay could not be written later
    @torch.no_grad()
    def call(self, forward: Forward, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return forward(inputs), without gradient: replayed where these shapes were called before.

        The output is the caller's own. Where a capture fails, which one line says, forward is called from then on.
        """
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if key not in self._graphs:
            if self._failed or len(self._graphs) >= _LIMIT:
                return forward(inputs)
            with torch.cuda.device(next(iter(inputs.values())).device):
                stream = torch.cuda.current_stream()
                try:
                    self._graphs[key] = self._captured(forward, inputs)
                except RuntimeError as error:
                    self._failed = True
                    torch.cuda.set_stream(stream)  # a capture that breaks off leaves its own in place
                    reason = str(error).splitlines()[0][:200]
                    say(f"passes without gradient go on without CUDA graphs: {reason}")
                    return forward(inputs)
        graph, static, output = self._graphs[key]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return output.clone()

    def _captured(
        self, forward: Forward, inputs: Mapping[str, Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
        """Return a graph, its inputs and its output, whose tensors stay where they are."""
        static = {name: value.clone() for name, value in inputs.items()}
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                forward(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:  # of all graphs: an output is copied before the next replay can write over it
            self._pool = torch.cuda.graph_pool_handle()
        # others' threads, such as those that pin memory or watch over processes, go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = forward(static)
        return graph, static, output


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of a device that all captures and the calls before them are on: what libraries keep for each stream, as cuBLAS its
    workspace of 32 MB, is there once, and lies in no graph's pool.
    """
    return torch.cuda.Stream(device)
