"""Model families: one module each, selected by the `_class_name` in a pipeline folder's model_index.json."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from preftune.families.base import Cond, Defaults, Family
from preftune.families.configs import read_json
from preftune.lora_names import Layers

if TYPE_CHECKING:
    from preftune.families.sd import SD
    from preftune.families.sdxl import SDXL

    _HAVE_THE_WHOLE_PROTOCOL: list[type[Family]] = [SD, SDXL]

__all__ = ["FAMILIES", "Cond", "Defaults", "Family", "check", "load", "lora_layers"]

# The image-to-image and inpainting pipelines have the same parts but stay out: diffusers would load such a folder, and what is
# tuned and saved from it, as a pipeline that wants an image; and the SDXL refiner is saved as an image-to-image pipeline.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
}
"""`_class_name` of a folder's model_index.json -> module of this package."""


def check(folder: Path, vae: Path | None = None) -> Defaults:
    """Return the defaults of a pipeline folder, in milliseconds; reads JSON files alone.

    `vae` is the folder of an autoencoder to use instead of the pipeline's. ValueError, in one sentence,
    unless the folder is a complete pipeline of a known family.
    """
    module, index = _module(folder)
    defaults: Defaults = module.check(folder, index, vae)
    return defaults


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: Path | None = None,
) -> Family:
    """Return a diffusers pipeline folder as its family, frozen; ValueError as `check`, before any weight is read."""
    module, index = _module(folder)
    module.check(folder, index, vae)
    family: Family = module.load(folder, device, dtype, vae)
    return family


def lora_layers(folder: Path) -> Layers:
    """Return the layers of a pipeline folder that a LoRA can update, in less than a second; reads JSON files alone.

    ValueError as `check`.
    """
    module, index = _module(folder)
    module.check(folder, index, None)
    layers: Layers = module.lora_layers(folder)
    return layers


def _module(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The module of a folder's family, and its model_index.json."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline folder: it has no model_index.json; save one with pipe.save_pretrained(folder)"
        )
    index = read_json(path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        raise ValueError(f"{folder} is a {class_name}; known are {', '.join(FAMILIES)}")
    return importlib.import_module(f"preftune.families.{FAMILIES[class_name]}"), index
