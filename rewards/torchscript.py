"""The tensors of a TorchScript archive, as OpenAI publishes CLIP, without running what else is in it.

Such an archive is a zip: data.pkl is a tree of modules, data/0, data/1, ... are the bytes of tensors, and code/
is a program. torch.load(weights_only=True) refuses it and torch.jit.load compiles the program. Here the tree is
unpickled with three harmless names: a module is a dictionary, a tensor is a view of bytes, and all else is an error.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def is_archive(path: Path) -> bool:
    """Return True for a zip that has a program in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """Return the tensors by their dotted names, as a state dict has them.

    UnpicklingError when the tree holds anything but modules and tensors; BadZipFile or KeyError when bytes are missing.
    """
    with zipfile.ZipFile(path) as archive:
        (tree,) = (name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl")
        with archive.open(tree) as file:
            root = _Unpickler(file, archive, str(PurePosixPath(tree).parent)).load()
    if not isinstance(root, _Module):
        raise pickle.UnpicklingError(f"the root is a {type(root).__name__}, not a module")
    return dict(_tensors(root, ""))


class _Module:
    """A module of whatever class, reduced to its attributes."""

    attributes: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module holds {type(state).__name__}, not a dictionary")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is neither a module nor a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype)


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
