"""Compare models side by side: each row is a prompt with a seed, each column a model, with scores below
every image.

All images of a row start from the same noise, so only the weights differ. Columns are TITLE=WHAT, where
WHAT is empty (the model itself), a LoRA (a folder, or a file of kohya's, diffusers' or peft's layout), a run's folder, a UNet
folder or another pipeline; LORA@0.5 applies a LoRA with scale 0.5, LORA@anneal2
by annealed importance guidance with power 2 (preftune.sampling.mixed). Written into --output-dir:

    images/TITLE/   the images of a column, their prompts and seeds; reused when run again (eval/generated.py)
    index.html      all images as thumbnails linked to their files, scores (several scorers also give the sum by their
                    weights; --rewards without a value scores nothing), means per column, and win rate against the first
                    column
    thumbnails/     the small images of the page
    grid.png        the first --grid-rows rows
    grid.json       what they show; a page and a grid of something else are not overwritten without being told to

    python eval/grid.py --columns base= tuned=runs/refl-tiny half=runs/refl-tiny@0.5 --guidance-scale 3 --num-inference-steps 25
    python eval/grid.py --model SD_FOLDER --columns base= tuned=runs/refl --prompts refl_data.json --rewards imagereward=1

Hardware: the embedded model runs on a CPU; Stable Diffusion needs a GPU in practice, and uses one if
available. Memory does not grow with the number of images. Left out: confidence intervals, since a grid has
too few images for conclusions.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from eval.columns_config import ColumnsConfig
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here, workers_here
from preftune.cli.scorer_flags import Files, Weighted
from preftune.sampling_config import Resolved
from rewards.terms import parse_files, parse_weights

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
IMAGES, THUMBNAILS = "images", "thumbnails"
REPORT, RECORD = ("grid.png", "index.html"), "grid.json"
"""What is written beside the images, and the file that says what it is of."""
THUMBNAIL_SIZE = 320
"""Pixels of the longer side of an image on the page; smaller images are shown themselves."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate the same prompts and seeds with several models, score the images, and write a page and a grid."""

    models: Annotated[ColumnsConfig, tyro.conf.arg(name="")] = field(default_factory=ColumnsConfig)
    prompts: Path = Path("assets/tiny/held_out.txt")
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    count: int = 8
    """Maximum number of prompts, from the start of the file."""
    num_images_per_prompt: int = 1
    """Images per prompt, one row each."""
    seed: int = 0
    """Image k of prompt i has the seed seed + i * num_images_per_prompt + k."""
    rewards: Weighted = ("imagereward-tiny=1.0", "shapes=1.0")
    reward_files: Files = ()
    negative_columns: tuple[str, ...] = ()
    """Titles of the columns that use --negative; none = all."""
    workers: int | None = None
    """Processes that decode images for the scorers; 0 = the main process; None = one for each core."""
    grid_rows: int = 32
    """Maximum number of rows in grid.png; index.html has all."""
    output_dir: Path = Path("grid")
    """Folder of the images, the page and grid.png."""
    overwrite_output_dir: bool = False
    """Replace images generated with other weights, prompts, seeds or settings, and a page and grid.png of others."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("count", self.count, 1), ("num-images-per-prompt", self.num_images_per_prompt, 1), ("seed", self.seed, 0),
            ("workers", self.workers, 0), ("grid-rows", self.grid_rows, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        scale, negative = self.models.sample.guidance_scale, self.models.negative
        if negative and scale is not None and scale <= 1:
            raise ValueError(
                f"--negative does nothing at --sample.guidance-scale {scale:g}; choose another, such as 3"
            )
        if unknown := set(self.negative_columns) - set(self.models.titles() if negative else ()):
            raise ValueError(
                f"--negative-columns names {min(unknown)}; it takes titles of --columns, and needs --negative"
            )
        self.weights()

    def weights(self) -> dict[str, float]:
        """Return scorer name -> weight."""
        return parse_weights(self.rewards) if self.rewards else {}

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, self.weights())


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eval.generated import Request, generate, missing_columns, score_generated
from eval.models import Column, check_column, check_scorers, parse_column
from eval.report_folder import check_report, write_record
from preftune import families
from preftune.cli.printable import show
from preftune.files import check_writable, replacing, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.grid import captioned_grid
from preftune.images import opened, save_image, thumbnail
from preftune.pages import render
from preftune.prompts import read_prompts
from rewards.shared_towers import load_all


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What was generated and scored: C columns of N images, S scorers, M measures (the scorers; if several, their sum)."""

    columns: Sequence[Column]
    prompts: Sequence[str]
    """N."""
    seeds: Sequence[int]
    """N."""
    files: Sequence[Sequence[Path]]
    """C of N image files."""
    scorers: Sequence[str]
    """S."""
    measures: Sequence[str]
    """M."""
    scores: NDArray[np.float64]
    """(C, N, M)."""

    def means(self) -> NDArray[np.float64]:
        """Return the mean of each measure, (C, M)."""
        return self.scores.mean(1)

    def wins(self) -> NDArray[np.float64]:
        """Return the share of images that beat those of the first column, ties counted half, (C, M)."""
        return ((np.sign(self.scores - self.scores[:1]) + 1) / 2).mean(1)

    def best(self) -> NDArray[np.bool_]:
        """Return which scores are the best of their row, (C, N, M); none where all are equal."""
        best = self.scores == self.scores.max(0)
        return best & (best.sum(0) < len(self.columns))

    def lines(self, values: NDArray[np.float64]) -> list[str]:
        """Return a line for each scorer, of M values."""
        return [f"{name} {value:.3f}" for name, value in zip(self.scorers, values, strict=False)]


def check_inputs(config: Config) -> Request:
    """Return what to generate; ValueError before any weight loads."""
    models = config.models
    chosen = read_prompts(config.prompts)[: config.count]
    for term in models.columns:
        check_column(term)
    if models.vae is not None:
        families.vae_folder(str(models.vae))
    sampling = models.sample.resolved(families.check(models.model.source(), models.vae))
    columns = [parse_column(term, models.model.source()) for term in models.columns]
    for column in columns:
        models.sample.resolved(families.check(column.pipeline, models.vae))
    prompts = [prompt for prompt in chosen for _ in range(config.num_images_per_prompt)]
    check_scorers(config.weights(), config.files(), chosen, sampling.resolution, config.prompts)
    check_writable(config.output_dir)
    titles = config.negative_columns or [column.title for column in columns]
    return Request(
        folder=config.output_dir / IMAGES,
        columns=columns,
        prompts=prompts,
        seeds=[config.seed + index for index in range(len(prompts))],
        sampling=sampling,
        negatives=dict.fromkeys(titles, models.negative),
        precision=models.precision,
        vae=models.vae,
    )


def record_of(config: Config, request: Request) -> dict[str, Any]:
    """Return what the page and the grid depend on, beside the scorers' own weights."""
    return {
        "columns": {column.title: request.record(column) for column in request.columns},
        "rewards": config.weights(),
        "reward files": {name: str(path) for name, path in config.files().items()},
        "grid rows": config.grid_rows,
    }


def to_sheet(request: Request, weights: dict[str, float], scores: dict[str, NDArray[np.float64]]) -> Sheet:
    """Return the images with their scores; `scores` is title -> (N, S), empty without scorers."""
    names = tuple(weights)
    table = np.stack([scores[column.title] for column in request.columns]) if names else None
    measures = names
    if table is not None and len(names) > 1:
        measures = (*names, " + ".join(f"{weight:g} x {name}" for name, weight in weights.items()))
        table = np.concatenate([table, table @ np.array([*weights.values()])[:, None]], axis=2)
    return Sheet(
        columns=request.columns,
        prompts=request.prompts,
        seeds=request.seeds,
        files=[request.files(column.title) for column in request.columns],
        scorers=names,
        measures=measures,
        scores=np.empty((len(request.columns), len(request.prompts), 0)) if table is None else table,
    )


def to_png(sheet: Sheet, rows: int) -> Image.Image:
    """Return the first rows of the grid as an image; files are read one by one."""
    numbers = range(min(rows, len(sheet.prompts)))
    return captioned_grid(
        [[files[i] for files in sheet.files] for i in numbers],
        row_captions=[f"seed {sheet.seeds[i]}\n{sheet.prompts[i]}" for i in numbers],
        column_titles=[
            "\n".join([column.title, *sheet.lines(mean)])
            for column, mean in zip(sheet.columns, sheet.means(), strict=True)
        ],
        cell_captions=[["\n".join(sheet.lines(values[i])) for values in sheet.scores] for i in numbers],
        cell_size=256,
    )


def write_thumbnails(sheet: Sheet, folder: Path) -> list[list[Path]]:
    """Return the small images of the page, C of N; those that are missing, or of another image, are written.

    For an image that is no larger than a thumbnail, the image itself.
    """
    shown = []
    tidy(*(folder / THUMBNAILS).glob("*"))
    for files in sheet.files:
        with opened(files[0]) as first:
            if max(first.size) <= THUMBNAIL_SIZE:
                shown.append(list(files))
                continue
        small = [folder / THUMBNAILS / path.parent.name / f"{path.stem}.jpg" for path in files]
        for path, target in zip(files, small, strict=True):
            made = (
                path.stat().st_mtime_ns
            )  # of the image and its thumbnail; the clock may have been set back since
            if not target.is_file() or target.stat().st_mtime_ns != made:
                with replacing(target) as temporary:
                    thumbnail(path, THUMBNAIL_SIZE, THUMBNAIL_SIZE).save(temporary, format="JPEG", quality=90)
                    os.utime(temporary, ns=(made, made))
        shown.append(small)
    return shown


def to_html(sheet: Sheet, config: Config, sampling: Resolved, thumbnails: Sequence[Sequence[Path]]) -> str:
    """Return the page: means and wins, then the grid; it names files below --output-dir, and escapes prompts and titles."""
    files, small = (
        [[path.relative_to(config.output_dir).as_posix() for path in column] for column in paths]
        for paths in (sheet.files, thumbnails)
    )
    return render(TEMPLATE, sheet=sheet, config=config, sampling=sampling, files=files, thumbnails=small)


@one_writer
def main(config: Config) -> int:
    """Generate what is missing, score, and write the page and the grid."""
    device = device_here()
    weights = config.weights()
    with exit_on_user_error():
        request = check_inputs(config)
        missing = missing_columns(request, overwrite=config.overwrite_output_dir)
        record = record_of(config, request)
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        scorers = load_all(list(weights), files=config.files(), device=device, dtype=torch.float32)
    generate(request, missing, device)
    with exit_on_user_error():
        scores = (
            score_generated(request, scorers, device, workers=workers_here(config.workers)) if scorers else {}
        )
    sheet = to_sheet(request, weights, scores)
    png, page = (config.output_dir / name for name in REPORT)
    write_record(config.output_dir, RECORD, record)
    save_image(to_png(sheet, config.grid_rows), png)
    thumbnails = write_thumbnails(sheet, config.output_dir)
    write_text(page, to_html(sheet, config, request.sampling, thumbnails))
    for column, mean in zip(sheet.columns, sheet.means(), strict=True):
        show("  ".join([column.title, *sheet.lines(mean)]))
    show(f"{png} and {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
