"""Model families: one module each, selected by the `_class_name` in a pipeline folder's model_index.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from preftune.families import guard, known, weights
from preftune.families.base import Cond, Defaults, Family
from preftune.families.known import FAMILIES
from preftune.families.locate import Pretrained, as_source, locate, locate_vae, names_a_model, vae_folder
from preftune.families.source import Source
from preftune.lora.names import Layers

if TYPE_CHECKING:
    import torch

    from preftune.families.sd import SD
    from preftune.families.sdxl import SDXL

    _HAVE_THE_WHOLE_PROTOCOL: list[type[Family]] = [SD, SDXL]

__all__ = [
    "FAMILIES",
    "Cond",
    "Defaults",
    "Family",
    "Pretrained",
    "Source",
    "check",
    "load",
    "locate",
    "lora_layers",
    "names_a_model",
    "vae_folder",
]


def check(model: Source | Path | str, vae: Path | None = None) -> Defaults:
    """Return the defaults of a model, in milliseconds where it is on this machine; reads JSON files and names of weights alone.

    `vae` is the folder or hub id of an autoencoder to use instead of the pipeline's. ValueError, in one sentence,
    unless the model is a complete pipeline of a known family. A path or hub id is located as `locate` does.
    """
    source = as_source(model)
    vae = None if vae is None else locate_vae(str(vae))
    guard.check_files(source.folder)
    defaults = known.check(source, vae)
    source.check_weights(without=() if vae is None else ("vae",))
    if vae is not None:
        weights.find(vae, "diffusers", source.variant)
    return defaults


def load(
    model: Source | Path | str,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    vae: Path | None = None,
) -> Family:
    """Return a model as its family, frozen, in dtype (None is float32); ValueError as `check`, before any weight is read."""
    import torch

    source = as_source(model)
    check(source, vae)
    vae = None if vae is None else locate_vae(str(vae))
    with guard.loading(source):
        family: Family = known.module_of(source).load(
            source, device, torch.float32 if dtype is None else dtype, vae
        )
    return family


def lora_layers(model: Source | Path | str) -> Layers:
    """Return the layers of a model that a LoRA can update, in less than a second; reads its configurations alone.

    ValueError for a model that `check` refuses by its configurations.
    """
    source = as_source(model)
    known.check(source)
    layers: Layers = known.module_of(source).lora_layers(source.folder)
    return layers
