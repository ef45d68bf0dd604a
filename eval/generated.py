"""Folders of generated images, reused as long as everything that determines the images is unchanged.

    images/TITLE/0000.png ...     image i of prompt i with seed i
    images/TITLE/metadata.jsonl   file_name, text, seed: `datasets.load_dataset("imagefolder")` reads the folder
    images/TITLE/generated.json   SHA-256 of the weights and of the prompts, seeds, sampling settings

A folder appears only when it is complete. A folder of that name with other images is refused, or with
`overwrite` replaced. Characters of a title that are not allowed in file names become _ in the folder name.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.agreement import Floats
from eval.models import Column
from eval.report_folder import difference
from eval.view_scores import PromptedImage, score_views
from preftune import families
from preftune.cli import exit_on_user_error
from preftune.families import Source
from preftune.families.base import Family
from preftune.families.digest import digest_of_part
from preftune.families.locate import locate_vae
from preftune.files import replacing, tidy, write_text
from preftune.images import to_pil
from preftune.records import write_jsonl
from preftune.sampling import sample
from preftune.sampling_config import Resolved
from rewards import Scorer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "generated.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """N images of each of C columns: the same prompts, seeds and settings for all."""

    folder: Path
    """Its folders are those of the columns."""
    columns: Sequence[Column]
    prompts: Sequence[str]
    seeds: Sequence[int]
    sampling: Resolved
    negatives: Mapping[str, str]
    """Title -> negative prompt; others have none."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    vae: Path | None = None
    """Folder of an autoencoder to use instead of each pipeline's."""

    def files(self, title: str) -> list[Path]:
        """Return the N images of a column."""
        return [self.folder_of(title) / f"{index:04d}.png" for index in range(len(self.prompts))]

    def folder_of(self, title: str) -> Path:
        """Return the folder of a column."""
        names: dict[str, str] = {}
        for column in self.columns:
            plain = re.sub(r"[^A-Za-z0-9._-]+", "_", column.title)[:60].lstrip(".") or "_"
            number = sum(name.partition("~")[0].lower() == plain.lower() for name in names.values())
            names[column.title] = f"{plain}~{number + 1}" if number else plain
        return self.folder / names[title]

    def record(self, column: Column) -> dict[str, Any]:
        """Return all that decides the images of a column; the batch size does not."""
        return {
            "weights": column.digest(),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "seeds": list(self.seeds),
            "negative": self.negatives.get(column.title, ""),
            "precision": self.precision,
            "vae": digest_of_part(locate_vae(str(self.vae))) if self.vae is not None else "",
            **settings_of(self.sampling),
        }


def settings_of(sampling: Resolved) -> dict[str, Any]:
    """Return the sampling settings that decide images; the batch size does not."""
    settings = asdict(sampling) | {"resolution": str(sampling.resolution)}
    del settings["batch_size"]
    return settings


def missing_columns(request: Request, *, overwrite: bool) -> list[Column]:
    """Return the columns whose images are not there. ValueError for a folder of other images, unless it may be
    overwritten.
    """
    missing = []
    for column in request.columns:
        folder = request.folder_of(column.title)
        if not folder.exists():
            missing.append(column)
            continue
        differs = difference(folder / RECORD, request.record(column))
        if differs and not overwrite:
            raise ValueError(
                f"{folder} holds other images ({differs}); add --overwrite-output-dir, or choose another --output-dir"
            )
        if differs or not all(path.is_file() for path in request.files(column.title)):
            missing.append(column)
    return missing


def generate(request: Request, columns: Sequence[Column], device: torch.device) -> None:
    """Generate and write the images of these columns; a pipeline is loaded once for all columns that share it.

    Exits with code 2 for weights that do not fit, before the first image of their pipeline.
    """
    tidy(request.folder, request.folder.parent)
    for pipeline in dict.fromkeys(column.pipeline for column in columns):
        group = [column for column in columns if column.pipeline == pipeline]
        _generate_group(request, group, pipeline, device)


def _generate_group(
    request: Request, group: Sequence[Column], pipeline: Source, device: torch.device
) -> None:
    """Generate the columns of one pipeline: with a LoRA on or off; a UNet replaces that of the pipeline, which is then
    loaded again.
    """
    dtype = DTYPES[request.precision]
    with exit_on_user_error():
        family: Family | None = families.load(pipeline, device, dtype, request.vae)
        assert family is not None
        for column in group:  # a LoRA that does not fit is found before the first image
            if column.tuned is not None and column.has_lora:
                family.load_tuned(column.tuned)
    for column in group:
        if family is None:
            family = families.load(pipeline, device, dtype, request.vae)
        if column.tuned is None:
            with family.reference():
                _write_folder(request, column, family)
            continue
        with exit_on_user_error():
            family.load_tuned(column.tuned, column.weight)
        _write_folder(request, column, family.to(device, dtype))
        if not column.has_lora:
            family = None


def _write_folder(request: Request, column: Column, family: Family) -> None:
    """Write the images of a column as they are generated, then what they are; no more than a batch is in memory."""
    negative = request.negatives.get(column.title, "")
    batches = sample(
        family, request.prompts, request.seeds, request.sampling, negative=negative, progress=column.title
    )
    names = [path.name for path in request.files(column.title)]
    with replacing(request.folder_of(column.title)) as folder:
        folder.mkdir()
        for name, pixels in zip(names, itertools.chain.from_iterable(batches), strict=True):
            to_pil(pixels).save(folder / name)
        rows = zip(names, request.prompts, request.seeds, strict=True)
        write_jsonl(
            folder / "metadata.jsonl",
            ({"file_name": name, "text": prompt, "seed": seed} for name, prompt, seed in rows),
        )
        write_text(folder / RECORD, json.dumps(request.record(column), indent=1) + "\n")


def score_generated(
    request: Request, scorers: Sequence[Scorer], device: torch.device, *, workers: int
) -> dict[str, Floats]:
    """Return title -> scores (N, S) of the images in their folders. ValueError for a file that cannot be read any more."""
    found = {}
    for column in request.columns:
        files = request.files(column.title)
        images = [
            PromptedImage(path=path, prompt=prompt)
            for path, prompt in zip(files, request.prompts, strict=True)
        ]
        scores, rejected = score_views(
            images,
            scorers,
            (),
            device,
            batch_size=request.sampling.batch_size,
            workers=workers,
            progress=f"scoring {column.title}",
        )
        if rejected:
            why = rejected[min(rejected)]
            raise ValueError(f"{len(rejected)} images cannot be scored; the first: {why}")
        found[column.title] = np.stack([scores[scorer.card.name][0] for scorer in scorers], axis=1)
    return found
