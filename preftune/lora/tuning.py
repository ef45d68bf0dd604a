"""Low-rank adaptation of a model (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x, with W frozen.

Trained is the update of the UNet. A loaded file may also update text encoders (preftune/lora/files.py has the
layouts). Only this file imports peft.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from preftune.lora.config import LoRA
from preftune.lora.files import FILE, OLD_FILE, Update, find, read
from preftune.lora.names import layers_of
from preftune.lora.write import summed, write_diffusers

__all__ = [
    "FILE", "OLD_FILE", "LoRA", "deltas", "disabled", "find", "inject", "is_layer", "is_on", "layers", "leave_casts_to_autocast",
    "load", "merge", "merge_file", "save", "unload",
]  # fmt: skip

_ADAPTER = "default"


def inject(unet: nn.Module, lora: LoRA, seed: int) -> list[nn.Parameter]:
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
                f"--lora.target-modules: no layer is called {target}; there are {', '.join(known)}"
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
        inject_adapter_in_model(config, unet, _ADAPTER)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    return weights


def save(unet: nn.Module, folder: Path, start: Update | None = None) -> None:
    """Write the UNet's update to folder/pytorch_lora_weights.safetensors, float32, the scale in B.

    `start`: an update that was merged into the model before; the file holds the sum, so it is right for the model without it.
    """
    pairs = {}
    for name, layer in _layers(unet):
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        pairs[name] = a.detach().float().cpu(), b.detach().float().cpu() * layer.scaling[_ADAPTER]
    write_diffusers(folder, summed(start or {}, {"unet": pairs}))


def load(model: nn.Module | Mapping[str, nn.Module], path: Path, weight: float = 1.0) -> None:
    """Put a saved update on the model, frozen, in place of any that it has; weight scales its effect.

    model: a UNet, or modules by part (unet, text_encoder, text_encoder_2). path: a file, or a folder with one.
    Raises ValueError, before anything changes, for a file that cannot be taken whole.
    """
    parts = model if isinstance(model, Mapping) else {"unet": model}
    update = read(path, layers_of(parts))
    unload(*parts.values())
    _put(parts, update, weight)


def _put(parts: Mapping[str, nn.Module], update: Update, weight: float) -> None:
    """Put an update on modules without one, frozen."""
    for part, pairs in update.items():
        ranks = {layer: len(a) for layer, (a, _) in pairs.items()}
        rank = max(ranks.values())
        others = {f"^{layer}": number for layer, number in ranks.items() if number != rank}
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(pairs), rank_pattern=others, alpha_pattern=others
        )
        with torch.random.fork_rng(
            devices=[]
        ):  # its random weights are replaced; the caller's random numbers stay
            inject_adapter_in_model(config, parts[part], _ADAPTER)
        found = dict(_layers(parts[part]))
        assert found.keys() == pairs.keys(), f"updates on {found.keys() ^ pairs.keys()}"
        for layer, (a, b) in pairs.items():
            for half, value in ((found[layer].lora_A, a), (found[layer].lora_B, b)):
                half[_ADAPTER].weight.data = value.to(half[_ADAPTER].weight.device)
            found[layer].set_scale(_ADAPTER, weight)
        parts[part].requires_grad_(False)


def merge_file(parts: Mapping[str, nn.Module], path: Path) -> Update:
    """Add a saved update to the weights of a model without one, and return it. ValueError as `load`."""
    assert not is_on(*parts.values()), "the model has an update already"
    update = read(path, layers_of(parts))
    _put(parts, update, 1.0)
    for part in update:
        merge(parts[part])
    return update


def is_on(*modules: nn.Module) -> bool:
    """Whether one of the modules has layers with an update."""
    return any(True for module in modules for _ in _layers(module))


@contextlib.contextmanager
def disabled(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the modules are those before the update: the reference model, without a second copy in memory."""
    layers = [layer for module in modules for _, layer in _layers(module)]
    assert layers, "the model has no update that could be switched off"
    # peft freezes the update while it is off, and always makes it trainable afterwards
    flags = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for weight, flag in flags:
            weight.requires_grad_(flag)


def merge(module: nn.Module) -> None:
    """Add the update to the weights themselves and remove it: the module has its old layers and names again."""
    layers = _layers(module)
    assert layers, "the module has no update to merge"
    for _, layer in layers:
        layer.merge()
    unload(module)


def unload(*modules: nn.Module) -> None:
    """Remove the update of modules that have one: they are those before it."""
    for module in modules:
        for name, layer in _layers(module):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(module, "peft_config"):
            del module.peft_config


def layers(module: nn.Module) -> list[LoraLayer]:
    """Return the layers with an update."""
    return [layer for _, layer in _layers(module)]


def is_layer(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether the module is a layer with an update."""
    return isinstance(module, LoraLayer)


def leave_casts_to_autocast(module: nn.Module) -> None:
    """Let peft not cast the input of updates to their float32: autocast casts it back at once. The same numbers, fewer kernels."""
    for layer in layers(module):
        layer.cast_input_dtype_enabled = False


def deltas(layer: LoraLayer) -> list[Tensor]:
    """Return what each update of the layer adds to its weight as it is: nothing where updates are off or merged."""
    if layer.disable_adapters:
        return []
    names = [
        name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters
    ]
    return [layer.get_delta_weight(name) for name in names]


def _layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The layers with an update, by the names that they have without one."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def _alpha(lora: LoRA) -> float:
    """The scale's numerator."""
    return lora.rank if lora.alpha is None else lora.alpha
