"""A device that exists in tests alone: it computes on the CPU, and counts what would make a program wait for a GPU.

`Transfers` is a mode in which tensors may be on DEVICE ("meta", which needs no hardware and for which autograd needs no thread of its
own). Such a tensor holds a real one of the CPU, so that results are those of the CPU but for rounding: attention has no kernel of its
own here. Counted, each with the place in
our code that asked for it: `uploads`, copies from the CPU to the device; `waits`, copies that block, and whatever needs a value on
the CPU: `.item()`, `bool(tensor)`, `.cpu()`, `nonzero`, an index of the CPU. Load models before, without the mode: the libraries
build them on the meta device themselves. Autocast does nothing on DEVICE.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
_ROOT = Path(__file__).parents[1]
_AUTOCAST_INIT, _IS_AUTOCAST_ENABLED = torch.autocast.__init__, torch.is_autocast_enabled
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
}
"""Operations whose result, or its size, the CPU must know."""
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_MIXED = {_aten._to_copy.default, _aten.copy_.default, *_INDEXING}
"""Operations that take tensors of both places."""


class OnDevice(Tensor):
    """A tensor of DEVICE that holds its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Transfers")


class _Python(TorchFunctionMode):
    """What Python asks of a tensor before any operation is dispatched: making one of numbers, and reading one."""

    def __init__(self, note: Callable[[str, object], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and _is_device(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], OnDevice):
            self._note("waits", func)
            return func(args[0].held)
        return func(*args, **kwargs)


class Transfers(TorchDispatchMode):
    """The mode, and what it counted."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[str] = []
        self.waits: list[str] = []
        self._python = _Python(self._note)

    def __enter__(self) -> Self:
        self._python.__enter__()
        setattr(torch.autocast, "__init__", _autocast_init)  # noqa: B010
        setattr(torch, "is_autocast_enabled", _is_autocast_enabled)  # noqa: B010
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        setattr(torch.autocast, "__init__", _AUTOCAST_INIT)  # noqa: B010
        setattr(torch, "is_autocast_enabled", _IS_AUTOCAST_ENABLED)  # noqa: B010
        self._python.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        _map(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
        inside = any(isinstance(tensor, OnDevice) for tensor in tensors)
        to_device = inside if kwargs.get("device") is None else _is_device(kwargs["device"])
        self._count(func, args, kwargs, inside, to_device)
        if inside and func not in _MIXED and any(t.ndim and not isinstance(t, OnDevice) for t in tensors):
            raise RuntimeError(f"{func}: tensors on the device and on the CPU")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*_map(_held, args), **_map(_held, kwargs))
        if not to_device:
            return out
        wrapped = _map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _count(self, func: Any, args: Any, kwargs: Any, inside: bool, to_device: bool) -> None:
        """Note a copy, or a read."""
        goes_on = bool(kwargs.get("non_blocking"))
        if func is _aten.copy_.default:
            inside, to_device = isinstance(args[1], OnDevice), isinstance(args[0], OnDevice)
            goes_on = args[2] if len(args) > 2 else goes_on
        if func in (_aten._to_copy.default, _aten.copy_.default) and inside != to_device:
            if to_device:
                self._note("uploads", func)
            if not to_device or not goes_on:
                self._note("waits", func)
        elif func in _INDEXING and inside:
            indices = [index for index in args[1] if index is not None]
            if not all(isinstance(index, OnDevice) for index in indices):
                self._note("uploads", func)
                self._note("waits", func)
            if any(index.dtype == torch.bool for index in indices):
                self._note("waits", func)  # how many are true
        elif inside and func in _READS:
            self._note("waits", func)

    def _note(self, kind: str, func: object) -> None:
        frames = [
            f"{Path(frame.filename).relative_to(_ROOT)}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(_ROOT)) and Path(frame.filename).parent != Path(__file__).parent
        ]
        getattr(self, kind).append(f"{func}: {' < '.join(reversed(frames[-3:]))}")


def _autocast_init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    """Autocast, which has no operations of DEVICE to change, knows no such device."""
    _AUTOCAST_INIT(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


def _is_autocast_enabled(*device_type: str) -> bool:
    return device_type != (DEVICE.type,) and _IS_AUTOCAST_ENABLED(*device_type)


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """The value with every leaf of its lists, tuples and dicts changed; torch's own is slower."""
    if type(value) in (list, tuple):
        return type(value)([_map(change, part) for part in value])
    if type(value) is dict:
        return {name: _map(change, part) for name, part in value.items()}
    return change(value)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnDevice) else leaf
