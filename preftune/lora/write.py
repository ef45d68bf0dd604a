"""Writing of low-rank updates in the layouts of diffusers, kohya and peft.

The scale of every layer is in its B (preftune/lora/files.py), so a program that reads the tensors alone has it right: on disk
alpha equals rank, or there is no alpha. Where layers have several ranks, diffusers' and peft's layouts are
filled up with zeros to one rank, since readers without metadata take the first layer's rank for all.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torch.nn import functional

from preftune.files import replacing, write_text
from preftune.lora.files import ADAPTER, ADAPTER_CONFIG, FILE, Update
from preftune.lora.names import Layers, file_name

KOHYA_FILE = "lora_kohya.safetensors"
"""Name of kohya's file in a run."""


def write_diffusers(folder: Path, update: Update, dtype: torch.dtype = torch.float32) -> None:
    """Write folder/pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` loads."""
    # In peft's names: diffusers' renaming knows attention alone, and of a file in two styles it loads but one.
    state = {
        f"{part}.{file_name(part, layer)}.lora_{half}.weight": tensor
        for part, pairs in padded(update).items()
        for layer, pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    with replacing(folder / FILE) as temporary:
        save_file(_cast(state, dtype), temporary, {"format": "pt"})


def write_kohya(path: Path, update: Update, layers: Layers, dtype: torch.dtype = torch.float32) -> None:
    """Write one .safetensors file with the names of preftune/lora/names.py for a model with these layers."""
    names, state, ranks = layers.kohya_names(), dict[str, Tensor](), set[int]()
    for part, pairs in update.items():
        for layer, (a, b) in pairs.items():
            name = names[part, layer]
            state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = a, b
            state[f"{name}.alpha"] = torch.tensor(float(len(a)))
            ranks.add(len(a))
    version = "sdxl_base_v1-0" if layers.is_xl else "sd_v2" if _is_second(layers) else "sd_v1"
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
    }
    with replacing(path) as temporary:
        _save_in_one_order(_cast(state, dtype), temporary, metadata)


def write_peft(folder: Path, update: Update, dtype: torch.dtype = torch.float32) -> None:
    """Write folder/unet and so on, each of which `PeftModel.from_pretrained` puts on that part of a pipeline."""
    for part, pairs in padded(update).items():
        rank = len(next(iter(pairs.values()))[0])
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(pairs),
            "bias": "none",
        }
        state = {
            f"base_model.model.{layer}.lora_{half}.weight": tensor
            for layer, pair in pairs.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        with replacing(folder / part / ADAPTER) as temporary:
            save_file(_cast(state, dtype), temporary, {"format": "pt"})
        write_text(folder / part / ADAPTER_CONFIG, json.dumps(config, indent=1) + "\n")


def _save_in_one_order(state: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its metadata sorted: safetensors writes several keys in an order that changes from call to call."""
    content = memoryview(save(state, dict(metadata)))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(bytes(content[8 : 8 + length]))
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(text)), text, content[8 + length :]):
            file.write(piece)


def _is_second(layers: Layers) -> bool:
    """Whether it is Stable Diffusion 2.x, whose text encoder is 1024 wide."""
    return any(
        shape[0] == 1024 for name, shape in layers.shapes["text_encoder"].items() if name.endswith("out_proj")
    )


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as a file needs them; ValueError for a number that the precision cannot hold."""
    cast = {name: value.detach().to("cpu", dtype).contiguous().clone() for name, value in state.items()}
    for name, value in cast.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} does not fit into {dtype}; write the update in fp32")
    return cast


def padded(update: Update) -> Update:
    """Return the same function with one rank for all layers of a part: rows of A and columns of B that are zero."""
    found: Update = {}
    for part, pairs in update.items():
        rank = max(len(a) for a, _ in pairs.values())
        found[part] = {
            layer: (_rows(a, rank), _rows(b.transpose(0, 1), rank).transpose(0, 1))
            for layer, (a, b) in pairs.items()
        }
    return found


def _rows(tensor: Tensor, number: int) -> Tensor:
    """The tensor with rows of zeros below."""
    return functional.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, number - len(tensor)])


def summed(one: Update, other: Update) -> Update:
    """Return the sum of two updates: the ranks of a layer that both have are added."""
    found: Update = {}
    for part in (*one, *(name for name in other if name not in one)):
        first, second = one.get(part, {}), other.get(part, {})
        found[part] = {**first, **second}
        for layer in first.keys() & second.keys():
            (a, b), (c, d) = first[layer], second[layer]
            found[part][layer] = torch.cat([a, c.to(a)]), torch.cat([b, d.to(b)], dim=1)
    return found
