"""Folders of generated images, reused as long as everything that determines the images is unchanged.

    images/TITLE/0000.png ...     image i of prompt i with seed i
    images/TITLE/metadata.jsonl   file_name, text, seed: `datasets.load_dataset("imagefolder")` reads the folder
    images/TITLE/generated.json   SHA-256 of the weights and of the prompts, seeds, sampling settings

generated.json is written first and metadata.jsonl last, so a folder with metadata.jsonl is complete. In between images appear
one by one, each in one piece; a program that was stopped goes on with the first batch that lacks one. Batches are the same
then, so the bytes are. A folder of that name with other images is refused, or with `overwrite` replaced. Characters of a title
that are not allowed in file names become _ in the folder name.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.agreement import Floats
from eval.compared_folders import METADATA, RECORD
from eval.models import Column
from eval.report_folder import begin_folder, difference
from eval.view_scores import PromptedImage, score_views
from preftune import families
from preftune.cli import exit_on_user_error
from preftune.families import Source
from preftune.families.base import Family
from preftune.families.digest import digest_of_part
from preftune.families.locate import locate_vae
from preftune.files import tidy
from preftune.images import save_image
from preftune.processes import ALONE, Processes
from preftune.records import write_jsonl
from preftune.sampling import sample
from preftune.sampling_config import Resolved
from rewards import Scorer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    groups: Sequence[str] = ()
    """Group of each image, such as a style; none where there are none."""

    def files(self, title: str) -> list[Path]:
        """Return the N images of a column."""
        folder = self.folder_of(title)
        return [folder / f"{index:04d}.png" for index in range(len(self.prompts))]

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
            "prompts": _digest_of(self.prompts),
            "seeds": list(self.seeds),
            "negative": self.negatives.get(column.title, ""),
            "precision": self.precision,
            "vae": digest_of_part(locate_vae(str(self.vae))) if self.vae is not None else "",
            **settings_of(self.sampling),
            **({"groups": _digest_of(self.groups)} if self.groups else {}),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metadata.jsonl, the same for all columns."""
        for index, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            row = {"file_name": f"{index:04d}.png", "text": prompt, "seed": seed}
            yield row | ({"group": self.groups[index]} if self.groups else {})


def _digest_of(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


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
        files = [*request.files(column.title), folder / METADATA]
        if differs or not all(map(_is_written, files)):
            missing.append(column)
    return missing


def _is_written(path: Path) -> bool:
    """Return whether a file is there, and not as a power cut leaves one."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def generate(
    request: Request,
    columns: Sequence[Column],
    device: torch.device,
    processes: Processes = ALONE,
) -> None:
    """Generate and write the images of these columns; a pipeline is loaded once for all columns that share it.

    Each of several processes generates every so many-th batch. Exits with code 2 for weights that do not fit, before the first
    image of their pipeline.
    """
    if processes.is_main:
        tidy(request.folder, request.folder.parent)
    for pipeline in dict.fromkeys(column.pipeline for column in columns):
        group = [column for column in columns if column.pipeline == pipeline]
        _generate_group(request, group, pipeline, device, processes)
    processes.wait()
    for column in columns if processes.is_main else ():
        write_jsonl(request.folder_of(column.title) / METADATA, request.rows())


def _generate_group(
    request: Request, group: Sequence[Column], pipeline: Source, device: torch.device, processes: Processes
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
    for column in group if processes.is_main else ():
        tidy(request.folder_of(column.title))
        begin_folder(request.folder_of(column.title), RECORD, request.record(column))
    processes.wait()
    for column in group:
        if family is None:
            family = families.load(pipeline, device, dtype, request.vae)
        if column.tuned is None:
            with family.reference():
                _write_images(request, column, family, processes)
            continue
        with exit_on_user_error():
            family.load_tuned(column.tuned, column.weight)
        _write_images(request, column, family.to(device, dtype), processes)
        if not column.has_lora:
            family = None


def _write_images(request: Request, column: Column, family: Family, processes: Processes) -> None:
    """Write the images of a column that are not there as they are generated; no more than a batch is in memory.

    A batch that lacks one is generated as a whole, so that its images do not depend on which were there.
    """
    files, size = request.files(column.title), request.sampling.batch_size
    batches = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
    mine = batches[processes.rank :: processes.count]
    numbers = [i for batch in mine if not all(_is_written(files[i]) for i in batch) for i in batch]
    generated = sample(
        family,
        [request.prompts[i] for i in numbers],
        [request.seeds[i] for i in numbers],
        request.sampling,
        negative=request.negatives.get(column.title, ""),
        annealing=column.annealing,
        progress=column.title if processes.is_main else None,
    )
    for i, pixels in zip(numbers, itertools.chain.from_iterable(generated), strict=True):
        if not _is_written(files[i]):
            save_image(pixels, files[i])


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
