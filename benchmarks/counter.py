"""Counts what a computation on fake tensors would take on a GPU: live bytes, kernels, casts, bytes moved, operations.

Fake tensors (torch's FakeTensorMode) have shapes and dtypes but no content. They are on the CPU here, since the backward pass of
fake CUDA tensors needs a device; `cuda_autocast` therefore gives autocast on the CPU the rules that it has on CUDA.
"""

import weakref
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

GIB = 2**30
BLOCK = 512
"""The CUDA allocator gives memory in multiples of so many bytes."""

_ops = torch.ops.aten
FLOPS = {  # attention on a CPU is not in torch's table
    **flop_registry,
    _ops._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    _ops._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(
            gradient.shape, q.shape, k.shape, v.shape
        )
    ),
}
_PARTS = "CompositeImplicitAutograd"
"""Key of operations that consist of others."""
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}  # fmt: skip
"""Operations that are no views by their schema, but start no kernel either."""

VALUES: dict[torch.dtype, bool | float] = {torch.bool: False, torch.float32: 0.5, torch.float64: 0.5}
"""What the host reads where it asks for the value of a fake tensor of these dtypes; of others 1."""

FLOAT32 = (  # ATen/autocast_mode.h, CUDA's lists, as far as networks here may call them
    "layer_norm", "native_layer_norm", "group_norm", "exp", "log", "rsqrt", "reciprocal", "logsumexp", "softplus",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softmax.int", "log_softmax.int", "cumsum",
    "sum", "sum.dim_IntList", "linalg_vector_norm", "cosine_similarity", "mse_loss", "l1_loss", "upsample_nearest2d",
    "upsample_nearest2d.vec", "upsample_bilinear2d", "upsample_bilinear2d.vec", "upsample_bicubic2d", "upsample_bicubic2d.vec",
    "_upsample_bicubic2d_aa", "_upsample_bicubic2d_aa.vec",
)  # fmt: skip
"""Operations that autocast on CUDA computes in float32; on the CPU it leaves them in the dtype of their inputs."""


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, autocast on the CPU computes in float32 what autocast on CUDA does: norms, softmax, powers, sums."""
    rules = torch.library.Library("aten", "IMPL", "AutocastCPU")
    for name in FLOAT32:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
            continue  # a rule for the CPU, too
        packet, _, overload = name.partition(".")
        rules.impl(name, _in_float32(getattr(getattr(_ops, packet), overload or "default")))
    try:
        yield
    finally:
        rules._destroy()


def _in_float32(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return op(*args, **kwargs)

    return kernel


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation that is no view: a kernel of its own where nothing is fused."""

    name: str
    dtype: torch.dtype
    """Of its output."""
    flop: int
    read: int
    """Bytes of its inputs."""
    written: int
    """Bytes of its outputs."""
    cast: bool
    """Whether it only changes the dtype."""


class Counter(TorchDispatchMode):
    """The kernels of a computation, and the bytes of all tensors that were seen and are alive, `now` and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self._alive = WeakIdKeyDictionary()
        self.kernels: list[Kernel] = []
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is gone."""
        storage = tensor.untyped_storage()
        if storage in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._alive[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def restart(self) -> None:
        """Forget the kernels and the peak until now, not what is alive."""
        self.kernels, self.peak = [], self.now

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ops._local_scalar_dense.default:  # a fake tensor has no value
            return VALUES.get(args[0].dtype, 1)
        if func is _ops.equal.default:
            return False
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _PARTS):
            with self:  # in inference mode, operations that consist of others come whole
                return func._op_dk(getattr(torch._C.DispatchKey, _PARTS), *args, **kwargs)
        found = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self.add(tensor)
        self._note(func, args, kwargs, found, outputs)
        return found

    def _note(self, func: Any, args: Any, kwargs: Any, found: Any, outputs: Sequence[Tensor]) -> None:
        returns = func._schema.returns
        written = [
            one.alias_info for one in func._schema.arguments if one.alias_info and one.alias_info.is_write
        ]
        view = all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        name = func._schema.name.removeprefix("aten::")
        if name in _NO_KERNEL or (view and not written):
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not outputs and not written:
            return
        outputs = outputs or inputs  # foreach functions in place return nothing
        rule = FLOPS.get(func._overloadpacket)
        self.kernels.append(
            Kernel(
                name=name,
                dtype=outputs[0].dtype,
                flop=int(rule(*args, **kwargs, out_val=found)) if rule else 0,
                read=_bytes(inputs),
                written=_bytes(outputs),
                cast=name in ("_to_copy", "copy_") and inputs[-1].dtype != outputs[0].dtype,
            )
        )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in {id(one): one for one in tensors}.values())


def totals(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Return {kernels, casts, gb, gflop}: their number, those that only change a dtype, 10^9 bytes read and written, 10^9 operations."""
    return {
        "kernels": len(kernels),
        "casts": sum(kernel.cast for kernel in kernels),
        "gb": sum(kernel.read + kernel.written for kernel in kernels) / 1e9,
        "gflop": sum(kernel.flop for kernel in kernels) / 1e9,
    }


def largest(kernels: Sequence[Kernel], number: int) -> list[tuple[str, int, float, float]]:
    """Return (name and dtype, number of kernels, GB, GFLOP) of the kinds of kernels that move most bytes."""
    count, moved, flop = Tally[str](), Tally[str](), Tally[str]()
    for kernel in kernels:
        kind = f"{kernel.name} {str(kernel.dtype).removeprefix('torch.')}"
        count[kind] += 1
        moved[kind] += kernel.read + kernel.written
        flop[kind] += kernel.flop
    return [(kind, count[kind], size / 1e9, flop[kind] / 1e9) for kind, size in moved.most_common(number)]


@dataclass(kw_only=True)
class LeanSteps:
    """Calls of a denoiser without gradient, which are all alike."""

    number: int = 0
    kernels: list[Kernel] = field(default_factory=list)
    """Of one call."""


@contextmanager
def lean_steps(family: Any, counter: Counter) -> Iterator[LeanSteps]:
    """Inside, count the calls of `family.predict` in `family.lean()` apart from all else.

    Only the first is computed: tensors without content of the same shapes are as good as what the others would return.
    """
    predict, lean, found = family.predict, family.lean, LeanSteps()
    inside, kind, like = False, Any, list[tuple[torch.Size, torch.dtype]]()

    @contextmanager
    def entered() -> Iterator[None]:
        nonlocal inside
        with lean():
            inside = True
            try:
                yield
            finally:
                inside = False

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal kind
        if not inside:
            return predict(x, *args, **kwargs)
        found.number += 1
        if found.number > 1:
            assert x.shape == like[0][0], "steps of one size"
            return kind(*(torch.empty(shape, dtype=dtype) for shape, dtype in like))
        start = len(counter.kernels)
        result = predict(x, *args, **kwargs)
        found.kernels = counter.kernels[start:]
        del counter.kernels[start:]
        kind = type(result)
        like.extend((one.shape, one.dtype) for one in result)
        return result

    family.predict, family.lean = call, entered
    try:
        yield found
    finally:
        del family.predict, family.lean
