"""What frozen encoders say of images and captions, kept on disk under a digest of all that it depends on.

An entry `ab/abcd....safetensors` is written under a temporary name and renamed, so that several processes may read and write one
folder. An entry that is damaged is worked out again; one that cannot be written costs speed alone.
"""

import contextlib
import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from preftune.cli.notes import say
from preftune.files import replacing

FORMAT = 1
"""Part of every key: a change of how images are cropped, or of what an entry holds, raises it."""
MEMORY = 256 << 20
"""Bytes of entries that a process keeps in memory, the latest ones."""
_CHECK = "crc32"


def key(*parts: object) -> str:
    """Return the name of an entry that depends on these parts."""
    return hashlib.sha256(json.dumps([FORMAT, *map(str, parts)]).encode()).hexdigest()


def place(folder: Path, name: str) -> Path:
    """Return the file of an entry."""
    return folder / name[:2] / f"{name}.safetensors"


def digest_of(modules: Iterable[nn.Module], tokenizers: Iterable[Any] = ()) -> str:
    """Return a digest of what modules answer with: their classes, configurations, weights and precision.

    In a second for 500 MB. `tokenizers` are those of transformers.
    """
    found = hashlib.sha256()
    for module in modules:
        config: Any = getattr(module, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        public = {name: value for name, value in config.items() if not name.startswith("_")}
        found.update(f"{type(module).__name__} {json.dumps(public, sort_keys=True, default=str)}\n".encode())
        for name, tensor in module.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(_bytes(tensor))
    for tokenizer in tokenizers:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
        found.update(json.dumps([rules, tokenizer.model_max_length], sort_keys=True).encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """What the tensor holds, as a buffer."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), found))
    return found


def parse(content: bytes) -> dict[str, Tensor] | None:
    """Return the tensors of an entry, or None where it is damaged."""
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError):
        return None
    check = tensors.pop(_CHECK, None)
    return tensors if check is not None and int(check) == _checksum(tensors) else None


class Store:
    """The entries in a folder, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._writes = True

    def get(self, name: str, content: bytes | None = None) -> dict[str, Tensor] | None:
        """Return the tensors of an entry, on the CPU; None where there is none. `content` are its bytes, where they were read."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if content is None:
            try:
                content = place(self.folder, name).read_bytes()
            except OSError:
                return None
        tensors = parse(content)
        if tensors is not None:
            self._keep(name, tensors)
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry; a folder that cannot be written, or is full, is said once and then left alone."""
        mine = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        self._keep(name, mine)
        if not self._writes:
            return
        content = safetensors.torch.save({**mine, _CHECK: torch.tensor(_checksum(mine))})
        try:
            with replacing(place(self.folder, name)) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            self._writes = False
            say(
                f"warning: {self.folder} cannot be written ({error.strerror or error}): nothing more is cached",
                kind="",
            )

    def _keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        if name in self._kept:
            self._bytes -= _size(self._kept.pop(name))
        self._kept[name] = tensors
        self._bytes += _size(tensors)
        while self._bytes > MEMORY:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def read(folder: Path, name: str) -> bytes | None:
    """Return the bytes of an entry, or None; needs no torch at work, so that worker processes may."""
    with contextlib.suppress(OSError):
        return place(folder, name).read_bytes()
    return None
