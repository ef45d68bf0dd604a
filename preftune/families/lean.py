"""A lean copy of a denoiser for passes without gradient: the run's half precision, no autocast, the LoRA merged into the weights.

Autocast casts float32 weights in each call and lifts every norm to float32, and a LoRA adds two small products to a layer; only
the pass with gradient needs them. Kernels of norms compute their statistics in float32 whatever the input is.

    with family.lean():            # reads the trained weights as they are now
        family.predict(...)        # without gradient

The copy shares with the model every tensor that training leaves alone. It has tensors of its own for layers with a LoRA, and for
weights in another precision, those of --train full. They are written anew, in place, at the beginning of each block: whatever has
changed the weights since (an optimizer, a checkpoint, an average that was swapped in), no answer is stale.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from preftune.families.graphs import Graphs
from preftune.lora import tuning as loras
from preftune.regional import compile_blocks


class Lean:
    """The lean copy of one denoiser, built when it is first used, and again where layers were put in or out."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._dtype = _precision(module)
        self._lost: dict[
            nn.Module, tuple[Tensor, int]
        ] = {}  # base layer -> `_rounded_off`, its weight's version
        self._copy: nn.Module | None = None
        self._state: list[object] = []  # of the module when the copy was made
        self._key: tuple[torch.dtype, torch.device] | None = None
        self._merged: list[tuple[Any, Tensor]] = []  # layer with a LoRA, the weight of its copy
        self._cast: list[tuple[Tensor, nn.Module, str]] = []  # own tensor, module and name of its source
        self._depth = 0
        self._compiled, self._replayed = False, True
        self._graphs = Graphs()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Context without gradient in which `call` takes the copy, with the weights as they are now."""
        with torch.no_grad():
            self._depth += 1
            try:
                if self._depth == 1:
                    self.refresh()
                yield
            finally:
                self._depth -= 1

    def changed(self) -> None:
        """Say that the model answers differently from now on; a block that is open takes it up."""
        if self._depth:
            self.refresh()

    def compile(self, *, graphs: bool, blocks: bool) -> None:
        """From now on replay the copy's passes as CUDA graphs or not, and compile its blocks or not; nothing on a CPU."""
        self._replayed, self._compiled = graphs, blocks and torch.cuda.is_available()
        self._forget()

    def call(
        self,
        denoiser: nn.Module,
        x: Tensor,
        t: Tensor,
        embeds: Tensor,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the network's output for latents x (N, C, h, w): of the denoiser, or inside the block of its copy.

        `added` are the conditions that diffusers calls added_cond_kwargs.
        """
        if not self._depth or _unwrapped(denoiser) is not self._module:
            more = {} if added is None else {"added_cond_kwargs": added}
            output: Tensor = denoiser(x.to(embeds.dtype), t, embeds, **more).sample
            return output
        inputs = {"x": x.to(self._dtype), "t": t, "embeds": embeds.to(self._dtype), **(added or {})}
        with torch.autocast(x.device.type, enabled=False):
            if self._replayed and x.is_cuda:
                return self._graphs.call(self._forward, inputs)
            with torch.inference_mode():
                output = self._forward(inputs)
        return output.clone()  # which autograd may keep, unlike what inference mode makes

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The copy's output."""
        assert self._copy is not None, "made when the block began"
        added = {name: value for name, value in inputs.items() if name not in ("x", "t", "embeds")}
        output: Tensor = self._copy(
            inputs["x"], inputs["t"], inputs["embeds"], added_cond_kwargs=added or None, return_dict=False
        )[0]
        return output

    @torch.no_grad()
    def casting_to(self, dtype: torch.dtype | None) -> None:
        """Before the module is cast: keep what rounding takes from weights under a LoRA, which are merged from their full value."""
        self._lost = {base: kept for base, kept in self._lost.items() if kept[1] == base.weight._version}
        if dtype is None:
            return
        self._dtype = dtype
        if dtype == torch.float32:
            self._lost = {}  # rounded weights are what the model has from then on
            return
        for layer in loras.layers(self._module):
            base = layer.get_base_layer()
            if _is_plain(base):
                self._lost[base] = (_rounded_off(self._value(base), base.weight.to(dtype)), -1)

    def was_cast(self) -> None:
        """After the module was cast: what was kept belongs to its weights as they are."""
        for base, (lost, _) in self._lost.items():
            weight: Any = base.weight
            self._lost[base] = (lost.to(weight.device), weight._version)

    @torch.inference_mode(False)  # in which tensors that stay could not be written later
    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copy's own tensors from the module's weights; make the copy where there is none of this structure."""
        state, key = _structure(self._module), (self._dtype, next(self._module.parameters()).device)
        if self._copy is None or key != self._key or not _same(self._state, state):
            self._forget()
            self._copy = self._copied(self._module).eval()
            self._key, self._state = key, state
            if self._compiled:
                compile_blocks(self._copy)
        with torch.autocast(key[1].type, enabled=False):
            for layer, own in self._merged:
                value = self._value(layer.get_base_layer())
                for update in loras.deltas(layer):
                    value = value + update.float()
                own.copy_(value)
        if self._cast:
            sources: list[Tensor] = [getattr(module, name) for _, module, name in self._cast]
            torch._foreach_copy_([own for own, _, _ in self._cast], sources)
        if self._replayed and key[1].type == "cuda":
            self._graphs.keep_for([tensor.data_ptr() for tensor in self._copy.parameters()])

    def _forget(self) -> None:
        """Drop the copy and its graphs."""
        self._graphs.forget()
        self._copy, self._state, self._merged, self._cast = None, [], [], []

    def _copied(self, module: nn.Module) -> nn.Module:
        """Return a module of the same class that shares submodules' settings and weights, but for those of `_merged` and `_cast`."""
        if loras.is_layer(module) and _is_plain(module.get_base_layer()):
            base = module.get_base_layer()
            copy = _twin(base)
            own = nn.Parameter(torch.empty_like(base.weight, dtype=self._dtype), requires_grad=False)
            copy._parameters = {**base._parameters, "weight": own}
            if self._dtype != torch.float32 and base not in self._lost:
                self._lost[base] = (_rounded_off(base.weight.float(), base.weight), base.weight._version)
            self._merged.append((module, own))
            self._cast_others(base, copy)
            return copy
        copy = _twin(module)
        if isinstance(module, Attention) and not self._compiled:
            # its own reads the processor's signature each time; a copy that held itself would outlive the last use of its weights
            copy.forward = partial(module.processor, weakref.proxy(copy))
        self._cast_others(module, copy)
        copy._modules = {
            name: child if child is None else self._copied(child) for name, child in module._modules.items()
        }
        return copy

    def _cast_others(self, module: nn.Module, copy: nn.Module) -> None:
        """Give the copy its own tensors in place of weights in another precision."""
        for name, weight in list(copy._parameters.items()):
            if weight is not None and weight.is_floating_point() and weight.dtype != self._dtype:
                own = nn.Parameter(torch.empty_like(weight, dtype=self._dtype), requires_grad=False)
                copy._parameters = {**copy._parameters, name: own}
                self._cast.append((own, module, name))

    def _value(self, base: nn.Module) -> Tensor:
        """Return the weight of a layer in float32, with what rounding took from it."""
        weight: Tensor = base.weight  # type: ignore[assignment]
        value = weight.float()
        lost, version = self._lost.get(base, (None, 0))
        if lost is None or version != weight._version:  # others' weights since
            return value
        return value + lost.to(value)


def _precision(module: nn.Module) -> torch.dtype:
    """The precision of the module's weights."""
    return next(module.parameters()).dtype


def _twin(module: nn.Module) -> nn.Module:
    """Return a module of the same class that shares weights and settings, but neither what is put in place of its forward,
    as accelerate's with the autocast, nor compiled code, both of which belong to the other.
    """
    twin = module.__new__(type(module))
    twin.__dict__ = {
        name: value
        for name, value in module.__dict__.items()
        if name not in ("forward", "_compiled_call_impl")
    }
    return twin


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that processes share the gradients of."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return module


def _is_plain(layer: nn.Module) -> bool:
    """Whether an update can be added to the layer's weight: not where it is quantized."""
    weight: Any = layer.weight
    own = type(layer) in (nn.Linear, nn.Conv2d) and not is_traceable_wrapper_subclass(weight)
    return own and bool(weight.dtype.is_floating_point)


def _structure(module: nn.Module) -> list[object]:
    """What a copy was made of: modules, weights and their precision; of a LoRA that is not merged also whether it is off."""
    found: list[object] = []
    for part in module.modules():
        found.append(part)
        for weight in part._parameters.values():
            found += (weight, None if weight is None else weight.dtype)
        if isinstance(part, Attention):
            found.append(part.processor)
        if loras.is_layer(part) and not _is_plain(part.get_base_layer()):
            found.append(part.disable_adapters)
    return found


def _same(one: list[object], other: list[object]) -> bool:
    """Whether both hold the very same things."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _rounded_off(value: Tensor, half: Tensor) -> Tensor:
    """Return value - half, in the precision of half: what rounding took from float32 weights.

    Made smaller where it would not round back to half, so that a LoRA of zero changes nothing.

    Weights from a file in half precision lost nothing, or a few steps of it alone. An update smaller than these steps would vanish,
    or move too many weights at once. So a random part of a step is added to them before, always the same: the share of weights that
    an update moves is then in proportion to it, which is right on average over the layer.
    """
    for kind in (half.dtype, torch.float16):
        if torch.equal(value.to(kind).float(), value):
            value = value + _spacing(value, kind) * _random(value)
            break
    lost = (value - half.float()).to(half.dtype)
    for smaller in (0.98 * lost, 0 * lost):
        lost = torch.where((half.float() + lost.float()).to(half.dtype) == half, lost, smaller)
    return lost


def _spacing(value: Tensor, kind: torch.dtype) -> Tensor:
    """The distance from each value to the next number of a precision, 0 at 0."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.full_like(value, torch.finfo(kind).eps / 2), exponent) * (value != 0)


def _random(value: Tensor) -> Tensor:
    """Numbers in [-0.5, 0.5), the same for each shape."""
    return (torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) - 0.5).to(value)
