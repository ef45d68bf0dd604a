"""Parsing of the models to compare: a pipeline, a LoRA or a UNet on it, or a run."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import rewards
from eval.flags import split_term
from preftune import families
from preftune.cli.precision import device_here
from preftune.families import Source
from preftune.families.configs import read_json
from preftune.families.digest import digest as digest_of_pipeline
from preftune.families.digest import digest_of_part
from preftune.lora import files as loras
from preftune.resolution import Resolution
from rewards import embedded, own
from rewards.own_scorer import try_out
from rewards.shapes import check_judgeable

_ANNEAL = "anneal"
TUNED = ("lora", "unet")
"""Folders of a run that hold what was tuned."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A model to sample with: a pipeline, with what was tuned on it or without."""

    title: str
    source: str
    """As the user wrote it."""
    pipeline: Source
    tuned: Path | None = None
    """A LoRA's file or folder or the folder of a UNet, as `Family.load_tuned` takes it."""
    weight: float = 1.0
    """Of the LoRA."""
    annealing: float | None = None
    """Power of annealed importance guidance (preftune.sampling.mixed); None = off."""

    @property
    def has_lora(self) -> bool:
        """Return whether what was tuned is a LoRA, which can be taken off again."""
        return self.tuned is not None and bool(loras.find(self.tuned))

    def digest(self) -> str:
        """Return what tells the model's weights from others: SHA-256 of the pipeline and of what was tuned, and the weight."""
        found = digest_of_pipeline(self.pipeline)
        if self.tuned is None:
            return found
        tuned = loras.digest(self.tuned) if self.has_lora else digest_of_part(self.tuned)
        how = f"{self.weight:g}" if self.annealing is None else f"annealed {self.annealing:g}"
        return f"{found} + {how} x {tuned}"


def parse_column(term: str, model: Source) -> Column:
    """Return the column that TITLE=WHAT describes; the files in WHAT tell its kind. ValueError when it has none."""
    title, source = split_term(term)
    if not source:
        return Column(title=title, source=source, pipeline=model)
    if families.names_a_model(source):
        pipeline = families.locate(source)
        families.check(pipeline)
        return Column(title=title, source=source, pipeline=pipeline)
    folder, strength = _split_weight(title, source)
    where = f"column {title!r}: {folder}"
    if (folder / "model_index.json").is_file():
        pipeline = families.locate(str(folder))
        families.check(pipeline)
        column = Column(title=title, source=source, pipeline=pipeline)
    else:
        column = Column(title=title, source=source, pipeline=model, tuned=_tuned(folder, model, where))
    if strength is None:
        return column
    annealed = strength.startswith(_ANNEAL)
    try:
        number = float(strength.removeprefix(_ANNEAL))
    except ValueError:
        number = math.nan
    if not column.has_lora or not math.isfinite(number) or (annealed and number <= 0):
        raise ValueError(
            f"column {term!r}: @ goes before the weight of a LoRA, as in runs/refl@0.5, or before anneal and the power of annealed"
            " importance guidance, as in runs/refl@anneal2"
        )
    return replace(column, annealing=number) if annealed else replace(column, weight=number)


def check_column(term: str) -> None:
    """Raise ValueError for a column TITLE=WHAT whose folder or file is missing; downloads nothing."""
    title, source = split_term(term)
    if source and not families.names_a_model(source):
        _split_weight(title, source)


def _split_weight(title: str, source: str) -> tuple[Path, str | None]:
    """Return the folder or file of a column, and what follows its @, None without one; ValueError where it is missing."""
    name, at, strength = source.rpartition("@")
    weighted = bool(at) and not embedded.find(source).exists()  # a folder may have an @ in its name
    folder = embedded.find(name if weighted else source)
    if not folder.exists():
        raise ValueError(
            f"column {title!r}: {folder} does not exist; name a run, LoRA or UNet folder, a LoRA file or a model, one of the hub"
            " that is not in its cache as https://huggingface.co/OWNER/NAME"
        )
    return folder, strength if weighted else None


def _tuned(folder: Path, model: Source, where: str) -> Path:
    """Return a LoRA or the folder of a UNet: this one, or the one in this run. ValueError where there is none that fits."""
    inside = [
        part
        for part in TUNED
        if (folder / part).is_dir() and not (folder / part / loras.ADAPTER_CONFIG).exists()
    ]
    if len(inside) == 2:
        raise ValueError(f"{where} holds both lora/ and unet/; name one of them")
    part = folder / inside[0] if inside else folder
    if not loras.find(part) and not (part / "config.json").is_file():
        raise ValueError(
            f"{where} is no pipeline (model_index.json), no LoRA (a .safetensors file), no UNet (config.json)"
            " and no run with lora/ or unet/ in it"
        )
    if loras.find(part):
        try:
            loras.read(part, families.lora_layers(model))
        except ValueError as error:
            raise ValueError(f"{where.removesuffix(str(folder))}{error}") from error
    else:
        check_unet(part, model, where)
    return part


def check_unet(folder: Path, model: Source, where: str) -> None:
    """Raise ValueError unless the folder holds a UNet that takes the model's latents and text; reads no weights."""
    found, base = read_json(folder / "config.json"), read_json(model.folder / "unet" / "config.json")
    for key in ("_class_name", "in_channels", "out_channels", "cross_attention_dim"):
        if found.get(key) != base.get(key):
            raise ValueError(
                f"{where} has {key} {found.get(key)}, but the UNet of {model} has {base.get(key)}"
            )
    if not any(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise ValueError(f"{where} has no diffusion_pytorch_model.safetensors")


def check_scorers(
    names: Collection[str],
    files: Mapping[str, Path],
    prompts: Sequence[str],
    resolution: Resolution,
    source: Path,
) -> None:
    """Raise ValueError for scorers whose weights are missing, for a judge that cannot read such images of `source`, and for a
    reward of the user's own that fails for random images.
    """
    rewards.check_all(names, files, download=False)
    device = device_here()
    mine = [rewards.load(name, device=device) for name in names if own.is_own(name)]
    try_out(mine, prompts, (resolution.width, resolution.height), gradient=False)
    if "shapes" in names:
        check_judgeable(prompts, (resolution.width, resolution.height), f"the images of {source}")
