"""Models to compare: a pipeline, a LoRA on it, a run, or another UNet in it, and what pages of images need."""

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewards
from preftune import families
from preftune import lora as loras
from preftune.cli import exit_on_user_error
from preftune.families.sd import SD
from preftune.images import to_pil
from preftune.sampling import Sampling, sample
from rewards.mix import Mix
from rewards.shapes import SIZE, in_world


@dataclass(frozen=True, kw_only=True)
class Column:
    """A model to sample with: a pipeline, with a LoRA on it or another UNet in it, but not both."""

    title: str
    source: str  # as the user wrote it
    pipeline: Path
    unet: Path | None = None
    lora: Path | None = None
    weight: float = 1.0  # of the LoRA


def split_term(term: str) -> tuple[str, str]:
    """Return TITLE and WHAT of a column."""
    title, equals, source = term.partition("=")
    if not equals or not title.strip():
        raise ValueError(f"column {term!r} is not TITLE=WHAT, as in base= or tuned=runs/refl")
    return title, source


def parse_column(term: str, model: Path) -> Column:
    """Return the column that TITLE=WHAT describes; the files in WHAT tell its kind. ValueError when it has none."""
    title, source = split_term(term)
    if not source:
        return Column(title=title, source=source, pipeline=model)
    name, at, strength = source.rpartition("@")
    weighted = bool(at) and not Path(source).exists()  # a folder may have an @ in its name
    folder = Path(name if weighted else source)
    where = f"column {title!r}: {folder}"
    if not folder.is_dir():
        raise ValueError(f"{where} {'is a file, not a folder' if folder.exists() else 'does not exist'}")
    pipeline, unet, lora, weight = model, None, None, 1.0
    inside = [part for part in ("lora", "unet") if (folder / part).is_dir()]
    if (folder / "model_index.json").is_file():
        families.check(folder)
        pipeline = folder
    elif len(inside) == 2:
        raise ValueError(f"{where} holds both lora/ and unet/; name one of them")
    else:
        part = folder / inside[0] if inside else folder
        if loras.find(part):
            lora = part
        elif (part / "config.json").is_file():
            check_unet(part, model, where)
            unet = part
        else:
            raise ValueError(
                f"{where} is no pipeline (model_index.json), no LoRA ({loras.FILE}), no UNet (config.json)"
                " and no run with lora/ or unet/ in it"
            )
    if weighted:
        try:
            weight = float(strength)
        except ValueError:
            weight = math.nan
        if lora is None or not math.isfinite(weight):
            raise ValueError(f"column {term!r}: @ goes before the weight of a LoRA, as in runs/refl@0.5")
    return Column(title=title, source=source, pipeline=pipeline, unet=unet, lora=lora, weight=weight)


def check_unet(folder: Path, model: Path, where: str) -> None:
    """Raise ValueError unless the folder holds a UNet that takes the model's latents and text; reads no weights."""
    mine, base = read_json(folder / "config.json"), read_json(model / "unet" / "config.json")
    for key in ("_class_name", "in_channels", "out_channels", "cross_attention_dim"):
        if mine.get(key) != base.get(key):
            raise ValueError(
                f"{where} has {key} {mine.get(key)}, but the UNet of {model} has {base.get(key)}"
            )
    if not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise ValueError(f"{where} has no diffusion_pytorch_model.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not a {type(content).__name__}")
    return content


def inlined(path: Path) -> str:
    """Return a file in the letters in which a page holds it."""
    return base64.b64encode(path.read_bytes()).decode("ascii")


def own_side(model: Path) -> int:
    """Return the side in pixels that a pipeline was trained at: its UNet's times the factor of its autoencoder."""
    latents = read_json(model / "unet" / "config.json").get("sample_size")
    levels = read_json(model / "vae" / "config.json").get("block_out_channels")
    if not isinstance(latents, int) or not isinstance(levels, list):
        raise ValueError(f"{model} does not say which size it was trained at; give --resolution")
    return latents * 2 ** (len(levels) - 1)


def check_scorers(
    names: Iterable[str], files: Mapping[str, Path], prompts: Sequence[str], sampling: Sampling, source: Path
) -> None:
    """Raise ValueError for scorers whose weights are missing, or for a judge that cannot read such images of `source`."""
    for name in names:
        rewards.check(name, files.get(name))
        if name == "shapes" and not (in_world(prompts) and sampling.size == (SIZE, SIZE)):
            raise ValueError(
                f"the scorer shapes judges {SIZE} x {SIZE} images of captions of the shapes world only, not"
                f" {sampling.size[1]} x {sampling.size[0]} images of {source}; leave it out of --rewards"
            )


def wear(family: SD, column: Column, *, tuned: bool) -> AbstractContextManager[None]:
    """Give the family the column's weights, and return the context to sample in; `tuned`: a LoRA is on its UNet."""
    family.denoiser = family.unet
    if column.lora is not None:
        loras.load(family.unet, column.lora, column.weight)
        family.to(family.device, family.vae.dtype)
    elif column.unet is not None:
        # By the class of the pipeline's own UNet, so that only the families name classes of diffusers.
        family.denoiser = type(family.unet).from_pretrained(
            column.unet, torch_dtype=family.vae.dtype, use_safetensors=True, local_files_only=True
        )
        family.denoiser.to(family.device).requires_grad_(False).eval()
    elif tuned:
        return loras.disabled(family.unet)
    return nullcontext()


def generate(
    columns: Sequence[Column],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    device: torch.device,
    dtype: torch.dtype,
    negatives: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return title -> images (N, 3, H, W) of N prompts and seeds; `negatives` maps titles to what guidance points away from.

    Exits with code 2 for weights that do not fit, before the first image of their pipeline.
    """
    generated: dict[str, Tensor] = {}
    for pipeline in dict.fromkeys(column.pipeline.resolve() for column in columns):
        group = [column for column in columns if column.pipeline.resolve() == pipeline]
        tuned = [column.lora for column in group if column.lora]
        with exit_on_user_error():
            family = families.load(pipeline, device, dtype)
            for folder in tuned:
                loras.load(family.unet, folder)
        for column in group:
            with exit_on_user_error():
                worn = wear(family, column, tuned=bool(tuned))
            with worn:
                generated[column.title] = sample(
                    family,
                    prompts,
                    seeds,
                    sampling,
                    negative=negatives.get(column.title, ""),
                    progress=column.title,
                )
    return generated


@torch.no_grad()
def score(pixels: Tensor, prompts: Sequence[str], mix: Mix, batch: int, device: torch.device) -> Tensor:
    """Return (N, M): the scorers' columns, and their weighted sum if there are several."""
    parts = []
    for start in range(0, len(prompts), batch):
        mixed = mix(pixels[start : start + batch].to(device), prompts[start : start + batch])
        columns = [mixed.scores] if len(mix.names) == 1 else [mixed.scores, mixed.rewards[:, None]]
        parts.append(torch.cat(columns, 1).cpu())
    return torch.cat(parts)


def base64_png(pixels: Tensor) -> str:
    """Return a PNG of (3, H, W) as base64 text."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
