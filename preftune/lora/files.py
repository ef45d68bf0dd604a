"""Files of low-rank updates, in all layouts that people have, read to one form.

Read are LoRA and LoCon (convolutions, also with lora_mid) of Stable Diffusion and SDXL, with or without text encoders:

- kohya's: lora_unet_..., lora_te_..., lora_te1_... and lora_te2_..., an alpha for each layer; from sd-scripts, LyCORIS and others
- diffusers': unet.X.lora_A.weight, .lora.down.weight or .lora_linear_layer.down.weight, scale in the file's metadata
- diffusers' of 2023: X.attn1.processor.to_q_lora.down.weight, also without unet. and as a torch file (HPS, arXiv 2303.14420)
- peft's: a folder with adapter_config.json and adapter_model.safetensors, or one such folder for each part

Every layer's own scale, alpha / rank (with rslora alpha / sqrt(rank), arXiv 2312.03732), is multiplied into B, so no later reader can mistake
it. What cannot be taken whole (DoRA, LoHa, LoKr, layers that the model lacks) is refused: half an update is another update.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from preftune.lora import scales as lora_scales
from preftune.lora.names import PREFIXES, Layers, file_name, flat
from preftune.lora.scales import Scales
from rewards.digests import sha256_of
from rewards.input_files import check_pointer

FILE = "pytorch_lora_weights.safetensors"
"""Name of the weights in a LoRA folder."""
OLD_FILE = "pytorch_lora_weights.bin"
"""Their name until 2023, when `unet.save_attn_procs` wrote them."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Names of peft's two files."""

TORCH = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of torch files."""

Update = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""part -> layer -> (A (rank, in, ...), B (out, rank, ...)), float32: the layer's weight becomes W + B A."""

_FIRST = r"\.lora_down|\.lora_A(?:\.default)?|[._]lora\.down|\.lora_linear_layer\.down"
_SECOND = r"\.lora_up|\.lora_B(?:\.default)?|[._]lora\.up|\.lora_linear_layer\.up"
_ROLES = {
    "A": re.compile(rf"(.+?)(?:{_FIRST})\.weight"),
    "B": re.compile(rf"(.+?)(?:{_SECOND})\.weight"),
    "mid": re.compile(r"(.+?)\.lora_mid\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
_KINDS = {
    "DoRA": r"dora_scale|magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoRA with biases": r"\.bias$",
    "set of whole weights": r"\.(diff|diff_b|w_norm|b_norm)$",
    "textual inversion": r"^bundle_emb\.|string_to_param",
}
"""Kinds of updates that are none of A and B alone, by a name that tells them."""
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
_FOUND = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}


@dataclass
class _Layer:
    """What a file has for one layer."""

    name: str
    """As in the file."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def find(path: Path) -> list[Path]:
    """Return the files of the update that a path names: a file itself, or what is in a folder; none where there is no update.

    In a run it is lora/. A folder of peft's has adapter_model.safetensors, or folders unet/ and text_encoder/ with one each. ValueError
    for a folder with several .safetensors of other names.
    """
    if path.is_file():
        return [path]
    if (path / "lora").is_dir():
        return find(path / "lora")
    for name in (FILE, OLD_FILE, ADAPTER):
        if (path / name).is_file():
            return [path / name]
    parts = [path / part / ADAPTER for part in PREFIXES if (path / part / ADAPTER_CONFIG).is_file()]
    if parts or (path / "config.json").exists() or (path / "model_index.json").exists():
        return parts
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(others) > 1:
        names = ", ".join(other.name for other in others[:3])
        raise ValueError(f"{path} holds {len(others)} files that may be a LoRA ({names}); name one of them")
    return others


def find_some(path: Path) -> list[Path]:
    """Return the files as `find`; ValueError also where there is no update."""
    files = find(path)
    if not files:
        raise ValueError(
            f"no LoRA in {path}: neither {FILE} nor {ADAPTER} nor one other .safetensors file is there"
        )
    return files


def digest(path: Path) -> str:
    """Return a SHA-256 of the update that a path names: of its weights, and of peft's configurations beside them."""
    total = hashlib.sha256()
    for file in find(path):
        for part in (file, file.with_name(ADAPTER_CONFIG)):
            if part == file or (part.is_file() and file.name == ADAPTER):
                total.update(bytes.fromhex(sha256_of(part)))
    return total.hexdigest()


def read(path: Path, layers: Layers) -> Update:
    """Return the update that a path names, of a model with these layers, on the CPU.

    Raises ValueError, in one sentence, when there is none, when it is damaged or of another kind, and when it has layers that the
    model lacks.
    """
    update: Update = {}
    for file in find_some(path):
        part = file.parent.name if file.name == ADAPTER and file.parent.name in PREFIXES else None
        for name, pairs in _read_file(file, layers, part).items():
            update.setdefault(name, {}).update(pairs)
    return update


def _read_file(path: Path, layers: Layers, part: str | None) -> Update:
    """The update in one file; `part` is what all its names belong to, None where they say it themselves."""
    state, configs = _load(path)
    _check_names(path, state)
    table = layers.by_flat_name()
    found: dict[tuple[str, str], _Layer] = {}
    unknown = []
    for name, tensor in state.items():
        stem, role = _stem(name)
        place = _place(stem, part, table, layers)
        if place is None:
            unknown.append(name)
        else:
            tensors = found.setdefault(place, _Layer(stem)).tensors
            if role in tensors:
                raise ValueError(
                    f"{path} has two updates of {'.'.join(place)}, the second under {name}; remove one"
                )
            tensors[role] = tensor
    if unknown or not found:
        raise ValueError(_unknown(path, unknown, len(state), layers))
    update: Update = {}
    for (owner, layer), held in found.items():
        config = configs.get(owner, configs.get(""))
        pair = _pair(path, held, layers.shapes[owner][layer], file_name(owner, layer), config)
        update.setdefault(owner, {})[layer] = pair
    return update


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Scales]]:
    """The tensors of a file, and its scales by part; "" is peft's file, which does not name its part."""
    check_pointer(path)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    else:
        metadata, state = {}, _load_torch(path)
    _check_plain(path, state)
    configs = lora_scales.of_metadata(path, metadata.get("lora_adapter_metadata", "{}"))
    beside = path.with_name(ADAPTER_CONFIG)
    if path.stem == "adapter_model" and beside.is_file():
        configs[""] = lora_scales.of_peft(beside)
    elif any(name.startswith("base_model.model.") for name in state) and not configs:
        raise ValueError(
            f"{path} is peft's, whose scale is in {ADAPTER_CONFIG}; put that file beside it, as {ADAPTER}"
        )
    return state, configs


def _load_torch(path: Path) -> dict[str, Tensor]:
    """The weights of a torch file, which runs nothing; ValueError where it is none."""
    if path.suffix not in TORCH:
        raise ValueError(
            f"{path} is not a LoRA file; expected one that ends in .safetensors, {', '.join(TORCH)}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in torch's reader
        first = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"{path} is damaged, or holds more than weights: {first}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} does not hold weights by name")
    return {name: value.detach() for name, value in state.items()}


def _check_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not arrays of numbers, such as sparse ones, and views that would take more memory than their file."""
    for name, tensor in state.items():
        is_array = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
        if not is_array or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
            raise ValueError(
                f"{path} is damaged, or of an unknown kind: {name} is no plain array of numbers ({kind})"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} is damaged: {name} has more numbers than the file holds")


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse by its name a kind of update that is not A and B alone."""
    for name in names:
        if any(pattern.fullmatch(name) for pattern in _ROLES.values()):
            continue
        for kind, pattern in _KINDS.items():
            if re.search(pattern, name):
                raise ValueError(lora_scales.refusal(path, f"a {kind} ({name})"))


def _stem(name: str) -> tuple[str, str]:
    """A layer as the file names it, and which of its tensors this is; "" where the name has no known ending."""
    for role, pattern in _ROLES.items():
        match = pattern.fullmatch(name)
        if match:
            return match[1], role
    return name, ""


def _place(
    stem: str, part: str | None, table: Mapping[tuple[str, str], str], layers: Layers
) -> tuple[str, str] | None:
    """The part and the layer that a file means, None where the model has no such layer."""
    name = stem.removeprefix("base_model.model.")
    for prefix in (*_FOUND, *(f"{owner}." for owner in PREFIXES)):
        if part is None and name.startswith(prefix):
            part, name = _FOUND.get(prefix, prefix.rstrip(".")), name.removeprefix(prefix)
            break
    name = flat(name.replace(".processor.", "."))
    name = re.sub(r"(attn[12]_to_out)$", r"\1_0", name)
    name = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name.removeprefix("text_model_"))
    owners = [owner for owner in ([part] if part else layers.shapes) if (owner, name) in table]
    return (owners[0], table[owners[0], name]) if len(owners) == 1 else None


def _unknown(path: Path, unknown: Sequence[str], count: int, layers: Layers) -> str:
    """The sentence for a file with names that are no layer of the model."""
    if not unknown:
        return f"{path} holds no weights"
    if not any(pattern.fullmatch(name) for pattern in _ROLES.values() for name in unknown):
        return f"{path} is not a LoRA, or of an unknown kind: it holds {unknown[0]}"
    more = f" and {len(unknown) - 1} more of its {count} weights" if len(unknown) > 1 else ""
    return (
        f"{path} does not fit this model: {unknown[0]}{more} would update layers that its {' and '.join(layers.shapes)} lack;"
        " give the --model that it was made for"
    )


def _pair(
    path: Path, held: _Layer, shape: tuple[int, ...], name: str, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """A and B of a layer whose weight has this shape, the scale in B."""
    if not {"A", "B"} <= held.tensors.keys():
        raise ValueError(f"{path} is incomplete: {held.name} has only {' and '.join(sorted(held.tensors))}")
    tensors, kernel = held.tensors, math.prod(shape[2:])
    a, b, mid = tensors["A"], tensors["B"], tensors.get("mid")
    rank = len(a) if a.ndim else 0
    fits = rank > 0 and a.ndim in (2, 4) and b.ndim in (2, 4)
    fits = fits and b.shape[:2] == (shape[0], rank) and b.numel() == shape[0] * rank
    if mid is None:
        fits = fits and a.numel() == rank * shape[1] * kernel and (a.ndim == 2 or a.shape[1] == shape[1])
    else:  # 1 x 1 down, then a kernel between the ranks
        fits = fits and a.shape[1] == shape[1] and a.numel() == rank * shape[1]
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (rank, rank) and mid.numel() == rank**2 * kernel
    if not fits:
        sizes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items())
        raise ValueError(
            f"{path} does not fit this model: {held.name} has {sizes}, but the weight there is {shape}; give the --model"
            " that it was made for"
        )
    scale = 1.0
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1 or (scales and scales.alpha is not None):
            raise ValueError(f"{path} has several alphas for {held.name}, so its scale is not known")
        scale = float(tensors["alpha"]) / rank
    elif scales is not None:
        scale = scales.of(name, rank)
    a, b = a.float(), b.float()
    if mid is not None:
        a = torch.einsum("nmhw,mi->nihw", mid.float(), a.flatten(1))
    # shapes are checked before: a file cannot make these copies large
    scaled = (b * scale).reshape(shape[0], rank, *[1] * (len(shape) - 2))
    if not all(bool(tensor.isfinite().all()) for tensor in (a, scaled)):
        raise ValueError(
            f"{path} is damaged: {held.name} has numbers that are not finite, or a scale, {scale:g}, that makes such"
        )
    return a.reshape(rank, *shape[1:]).contiguous(), scaled
