"""Low-rank adaptation of a UNet (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x, with W
frozen.

Files are in the format of diffusers: after `pipe.load_lora_weights(folder)` a Stable Diffusion or SDXL
pipeline generates the same image as the UNet that was saved. The format of 2023 can also be read, for
example the file released with HPS (arXiv 2303.14420): pytorch_lora_weights.bin with the names of attention
processors, which diffusers no longer loads. Only this file and preftune/families import diffusers'
adapters; only this file imports peft.
"""

import contextlib
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from preftune.files import replacing

FILE = "pytorch_lora_weights.safetensors"
"""Name of the weights in a LoRA folder."""
OLD_FILE = "pytorch_lora_weights.bin"
"""Their name until 2023, when `unet.save_attn_procs` wrote them."""

_ADAPTER = "default"
# For a UNet, SDXL's loader has the same code; it differs in the text encoders alone, which have no update here.
_FILES = StableDiffusionLoraLoaderMixin


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank update of some layers. Where all weights are trained there is no LoRA: None."""

    rank: int = 4
    """Rank of the update."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None = alpha equals rank, a scale of 1."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers with a LoRA, by the last part of their name; the default is all attention projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(
                f"lora.rank is {self.rank}; it must be 1 or more; --train full trains all weights"
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0, or None for alpha = rank")
        if not self.target_modules or not all(self.target_modules):
            raise ValueError(
                f"lora.target_modules is {self.target_modules}; name at least one layer, such as to_q"
            )


def inject(unet: UNet2DConditionModel, lora: LoRA, seed: int) -> list[nn.Parameter]:
    """Freeze the UNet, add the update to its target layers, and return the update's weights, float32 and trainable.

    A is normal with standard deviation 1 / rank, from the seed alone; B is zero, so the UNet's output is unchanged at first.
    Raises ValueError for a target module that no layer is named after.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in lora.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted(
                {name.rpartition(".")[2] for name in names if not name[-1].isdigit()} | {"to_out.0"}
            )
            raise ValueError(
                f"lora.target_modules: no layer is called {target}; there are {', '.join(known)}"
            )
    unet.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=_alpha(lora),
        target_modules=list(lora.target_modules),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(config, adapter_name=_ADAPTER)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    return weights


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the update to folder/pytorch_lora_weights.safetensors, with its scale in the metadata; float32."""
    config = unet.peft_config[_ADAPTER]
    # Only what fixes the function: a longer list would fail to load where another version of peft lacks a field.
    metadata = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    # In peft's names: diffusers' renaming knows attention alone, and of a file in two styles it loads but one.
    layers = get_peft_model_state_dict(unet, adapter_name=_ADAPTER)
    with replacing(folder / FILE) as temporary:  # diffusers takes a folder, and the file's name in it
        _FILES.save_lora_weights(
            temporary.parent,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=metadata,
            weight_name=temporary.name,
        )


def find(folder: Path) -> Path | None:
    """Return the file of the update in a folder, or None."""
    return next((folder / name for name in (FILE, OLD_FILE) if (folder / name).is_file()), None)


def load(unet: UNet2DConditionModel, folder: Path, weight: float = 1.0) -> None:
    """Put a saved update on the UNet, frozen, in place of any that it has; weight scales its effect.

    Raises ValueError when the folder holds no update, or one with layers that this UNet lacks.
    """
    path = find(folder)
    if path is None:
        raise ValueError(f"no LoRA in {folder}: {FILE} is not there")
    source: Path | dict[str, Tensor] = folder if path.name == FILE else _read_old(path)
    try:
        state, alphas, metadata = _FILES.lora_state_dict(
            source, weight_name=FILE, use_safetensors=True, unet_config=unet.config, return_lora_metadata=True
        )
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    state = {_new_name(name): value for name, value in state.items()}
    layers = {name: value for name, value in state.items() if name.startswith("unet.")}
    if not layers or len(layers) < len(state):
        raise ValueError(
            f"{path} is not an update of a UNet alone: it holds {next(iter(state.keys() - layers.keys()), 'nothing')}"
        )
    if is_on(unet):
        unet.unload_lora()
    try:
        _FILES.load_lora_into_unet(
            layers, network_alphas=alphas, unet=unet, adapter_name=_ADAPTER, metadata=metadata
        )
    except (RuntimeError, TypeError, ValueError) as error:
        first = " ".join(str(error).split("\n")[:2])  # torch lists every weight that does not fit
        raise ValueError(f"{path} does not fit this UNet: {first}") from error
    if len(get_peft_model_state_dict(unet, adapter_name=_ADAPTER)) != len(layers):
        raise ValueError(f"{path} does not fit this UNet: it has updates of layers that are not there")
    unet.set_adapters([_ADAPTER], [weight])
    unet.requires_grad_(False)


def is_on(unet: nn.Module) -> bool:
    """Whether the UNet has layers with an update."""
    return any(isinstance(module, BaseTunerLayer) for module in unet.modules())


@contextlib.contextmanager
def disabled(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside the block the UNet is the one before the update: the reference model, without a second copy in memory."""
    assert is_on(unet), "the UNet has no update that could be switched off"
    flags = [(weight, weight.requires_grad) for weight in unet.parameters()]
    unet.disable_lora()
    try:
        yield
    finally:
        unet.enable_lora()
        for (
            weight,
            flag,
        ) in flags:  # peft freezes the update while it is off, and always makes it trainable afterwards
            weight.requires_grad_(flag)


def merge(unet: UNet2DConditionModel) -> None:
    """Add the update to the weights themselves and remove it: the UNet has its old layers and names again."""
    assert is_on(unet), "the UNet has no update to merge"
    unet.fuse_lora()
    unet.unload_lora()


def _read_old(path: Path) -> dict[str, Tensor]:
    """The weights of a torch file, which runs nothing; ValueError where it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"{path} is damaged, or holds more than weights: {first}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold weights by name")
    return state


def _new_name(name: str) -> str:
    """The present name of a weight: x.attn1.processor.to_out_lora.down.weight is unet.x.attn1.to_out.0.lora_A.weight."""
    old = re.fullmatch(r"(?:unet\.)?(.+\.attn[12])\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight", name)
    if not old:
        return name
    layer, projection, half = old.groups()
    return f"unet.{layer}.to_{projection}{'.0' * (projection == 'out')}.lora_{'A' if half == 'down' else 'B'}.weight"


def _alpha(lora: LoRA) -> float:
    """The scale's numerator."""
    return lora.rank if lora.alpha is None else lora.alpha
