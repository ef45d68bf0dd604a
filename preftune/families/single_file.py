"""A whole model in one .safetensors or .ckpt file, in the key names of the original Stable Diffusion code.

Its kind is told by the names and shapes of the weights, without network. The configurations are those that were published
with the checkpoints, in published/; diffusers converts the weights.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.utils import logging

from preftune.families.configs import read_json
from rewards.input_files import check_pointer, read_text

_MAX_YAML = 1 << 18
"""Bytes of a .yaml beside a checkpoint."""
PUBLISHED = Path(__file__).with_name("published")
"""Folders of configurations: sd1, sd2, sd2-base, sdxl."""
_UNET = "model.diffusion_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_KINDS = {"v1": "sd1", "v2": "sd2", "xl_base": "sdxl"}
_REFUSED = {
    "inpainting": "an inpainting model",
    "inpainting_v2": "an inpainting model",
    "xl_inpaint": "an inpainting model",
    "xl_refiner": "an SDXL refiner",
    "playground-v2-5": "Playground v2.5, whose noise (EDM) is not variance-preserving",
    "upscale": "an upscaler",
    "instruct-pix2pix": "InstructPix2Pix",
}
_PARTS = {
    "the UNet": (_UNET,),
    "the autoencoder": ("first_stage_model.",),
    "the text encoder": ("cond_stage_model.", "conditioner."),
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a single file holds."""

    folder: Path
    """The configurations of its kind."""
    noise: tuple[tuple[str, Any], ...]
    """What the file says about the noise schedule, in the names of scheduler_config.json."""


@dataclass(frozen=True)
class _Shape:
    """In the place of a tensor: diffusers asks for the shape alone."""

    shape: tuple[int, ...]


def detect(file: Path) -> Kind:
    """Return the kind of a single file; ValueError for another kind of file or model. Reads names and shapes alone."""
    shapes, metadata = read_shapes(file)
    if any("lora_" in name or ".lora" in name for name in shapes):
        raise ValueError(
            f"{file} is a LoRA, not a model: name the model that it was trained on as --model; preftune grid shows it with"
            f" --columns tuned={file}"
        )
    missing = [part for part, prefixes in _PARTS.items() if not any(n.startswith(prefixes) for n in shapes)]
    if _FIRST not in shapes or missing:
        have = f"it lacks {', '.join(missing)}" if len(missing) < len(_PARTS) else f"it has {_some(shapes)}"
        raise ValueError(
            f"{file} is no whole checkpoint of Stable Diffusion 1.x, 2.x or XL: {have}; name a checkpoint or a pipeline folder"
        )
    kind = _kind(file, shapes)
    noise = _noise(file, kind, shapes, metadata)
    if kind == "sd2" and noise["prediction_type"] == "epsilon":
        kind = "sd2-base"
    folder = PUBLISHED / kind
    unet = read_json(folder / "unet" / "config.json")
    found = (*shapes[_FIRST].shape[:2], _text_width(shapes))
    expected = (unet["block_out_channels"][0], unet["in_channels"], unet["cross_attention_dim"])
    if found != expected:
        raise ValueError(
            f"{file} has a UNet with a width of {found[0]}, {found[1]} input channels and text of width {found[2]}; expected"
            f" {expected[0]}, {expected[1]} and {expected[2]}, as in {kind}"
        )
    return Kind(folder=folder, noise=tuple(sorted(noise.items())))


def is_checkpoint(file: Path) -> bool:
    """Return whether a file has the UNet of a whole model, and not a LoRA or something else; ValueError for a damaged file."""
    return file.suffix in (".safetensors", ".ckpt") and _FIRST in read_shapes(file)[0]


def read_shapes(file: Path) -> tuple[dict[str, _Shape], dict[str, str]]:
    """Return the shapes of a file's weights by name, and its metadata; ValueError for a file that cannot be read."""
    check_pointer(file)
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, "pt") as opened:
                names = list(opened.keys())
                shapes = {name: _Shape(tuple(opened.get_slice(name).get_shape())) for name in names}
                return shapes, dict(opened.metadata() or {})
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is no readable safetensors file ({error}); download it again"
            ) from error
    if file.suffix not in (".ckpt", ".pt", ".bin", ".pth"):
        raise ValueError(f"{file} is no model; expected a .safetensors or .ckpt file, or a pipeline folder")
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        raise ValueError(
            f"{file} holds more than tensors{f' ({found[1]})' if found else ''}, and reading that could execute code in it; use a"
            " .safetensors file of the model"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is no readable checkpoint ({reason}); download it again") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, no weights by name; name a checkpoint")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: _Shape(tuple(value.shape)) for name, value in tensors.items()}, {}


def _text_width(shapes: Mapping[str, _Shape]) -> int | None:
    """Return the width of the text that the UNet reads."""
    keys = (
        s.shape[-1]
        for name, s in shapes.items()
        if name.startswith(_UNET) and name.endswith("attn2.to_k.weight")
    )
    return next(keys, None)


def _some(shapes: Mapping[str, _Shape]) -> str:
    return f"{len(shapes)} weights, such as {min(shapes)}" if shapes else "no weights"


def _kind(file: Path, shapes: Mapping[str, _Shape]) -> str:
    """Return the folder of configurations; ValueError for a model of another kind."""
    found = infer_diffusers_model_type(shapes)
    if found not in _KINDS:
        raise ValueError(
            f"{file} is {_REFUSED.get(found, f'a model of the kind {found}')}; known are Stable Diffusion 1.x, 2.x and XL"
        )
    return _KINDS[found]


def _noise(
    file: Path, kind: str, shapes: Mapping[str, _Shape], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the file, or the .yaml beside it, says about the noise schedule.

    The weights of Stable Diffusion 2.x do not tell whether they predict noise (the 512 px models) or v (the 768 px ones).
    """
    noise: dict[str, Any] = {}
    if "v_pred" in shapes or "v" in _said(metadata):
        noise["prediction_type"] = "v_prediction"
    elif "epsilon" in _said(metadata):
        noise["prediction_type"] = "epsilon"
    beside = file.with_suffix(".yaml")
    if "prediction_type" not in noise and beside.is_file():
        noise["prediction_type"] = _from_yaml(beside)
    if "ztsnr" in shapes:
        noise |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if kind == "sd2" and "prediction_type" not in noise:
        raise ValueError(
            f"{file} is Stable Diffusion 2.x, whose weights do not say whether they predict noise or v; put the model's .yaml"
            f' beside it as {beside.name} (parameterization: "v" or "eps"), or name a pipeline folder'
        )
    return noise


def _said(metadata: Mapping[str, str]) -> set[str]:
    """Return "v" or "epsilon" where the metadata of a file says so (modelspec, as trainers write it)."""
    said = {metadata.get("modelspec.prediction_type", "")}
    return {"v" if word.startswith("v") else "epsilon" for word in said if word}


def _from_yaml(file: Path) -> str:
    """Return the prediction type of a .yaml of the original code, which lies beside a checkpoint."""
    try:
        text = read_text(file, _MAX_YAML)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{file} has aliases (*name), which no configuration of a checkpoint has")
        content = yaml.safe_load(text)
        params = content["model"]["params"]
        found = params.get("parameterization", "eps")
        denoiser = json.dumps(params.get("denoiser_config", {}))  # of SDXL's code
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no configuration of a checkpoint: {error}") from error
    return "v_prediction" if found == "v" or "VScaling" in denoiser else "epsilon"


def load(
    pipeline: Any, file: Path, folder: Path, dtype: torch.dtype, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parts of a single file, converted by the pipeline class; those in `given` are taken as they are.

    ValueError where the weights do not fit the configurations of the file's kind.
    """
    with _one_sentence(file):
        parts: dict[str, Any] = pipeline.from_single_file(
            str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, **given
        ).components
    for name, part in parts.items():
        missing = [key for key, weight in getattr(part, "named_parameters", dict)() if weight.is_meta]
        if missing:
            raise ValueError(f"{file} lacks {len(missing)} weights of the {name}, such as {missing[0]}")
    return parts


def load_vae(file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Return the autoencoder of a single file in a precision of its own; ValueError as `load`."""
    with _one_sentence(file):
        return AutoencoderKL.from_single_file(
            str(file), config=str(folder), subfolder="vae", torch_dtype=dtype, local_files_only=True
        )


@contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """Say in one sentence what diffusers finds wrong with the weights, and nothing else."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of modules to be kept in float32, and lists none
    logging.disable_progress_bar()
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not fit the model that its weights look like: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
