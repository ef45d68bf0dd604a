"""The known families, and the check of a pipeline's configurations."""

import importlib
from pathlib import Path
from types import ModuleType

from preftune.families.base import Defaults
from preftune.families.source import Source

# The image-to-image and inpainting pipelines have the same parts but stay out: diffusers would load such a folder, and what is
# tuned and saved from it, as a pipeline that wants an image; and the SDXL refiner is saved as an image-to-image pipeline.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
}
"""`_class_name` of a folder's model_index.json -> module of this package."""


def check(source: Source, vae: Path | None = None) -> Defaults:
    """Return the defaults of a model of a known family, from its configurations alone; ValueError in one sentence."""
    defaults: Defaults = module_of(source).check(source, vae)
    return defaults


def module_of(source: Source) -> ModuleType:
    """Return the module of a model's family; ValueError for a pipeline that is not known."""
    class_name = source.index().get("_class_name")
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        raise ValueError(f"{source} is a {class_name}; known are {', '.join(FAMILIES)}")
    return importlib.import_module(f"preftune.families.{FAMILIES[class_name]}")
