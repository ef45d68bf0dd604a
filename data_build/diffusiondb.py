"""Convert DiffusionDB to a data set of preferred and non-preferred images, the input of
finetune/weird_lora.py (HPS, arXiv 2303.14420).

Reads the zip files as published (2M: PNG, Large: WebP, each with its JSON), scores every image that passes
the filters, groups images by prompt over all parts, and selects the best and the worst image of a prompt if
they stand out (selection.py). Nothing is unzipped to the disk. Memory grows by at most 100 bytes per scored
image (and nine bytes per image in the NSFW metadata). Broken files are skipped with the reason. If the
program is killed and started again with the same flags, it continues at the same part and gives identical
output. selected_folder.py describes the output.

    python data_build/diffusiondb.py --data images/ --rewards hpsv1 --output-dir data/filtered
    python data_build/diffusiondb.py --data large-1/ large-2/ --rewards hpsv2.1 --output-dir data/filtered_large --metadata metadata-large.parquet --max-image-nsfw 0.9

With --ray the processes of a Ray cluster score the parts; the resulting data set is the same (cluster.py):

    python data_build/diffusiondb.py --data /shared/images/ --rewards hpsv2.1 --output-dir data/filtered --ray auto --ray-workers 8

The 2M set has nearly always one image per prompt; groups of four are in Large. The released code scores
with another activation than the one HPS v1 was trained with;
rewards/ follows the README of that code instead. Captions
are stored without the "Weird image. " prefix and without ordinary images: finetune/weird_lora.py adds both
(--regularisation). Hardware: as score.py. Left out: several GPUs without Ray; prompts with too few images
are scored although they cannot be selected.
"""

import functools
import glob
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_build.filters import Filters, Nsfw
from data_build.selection import Selection
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import (
    Precision,
    batch_size_here,
    check_precision,
    device_here,
    precision_here,
    workers_here,
)
from preftune.cli.scorer_flags import Files
from rewards import CARDS, Scorer, check_all, find_card
from rewards.terms import parse_files, parse_names

COSINES = ("hpsv1", "hpsv2", "hpsv2.1", "clipscore", "blipscore")
"""Scorers that give plain cosines, of which the published rule takes 100 times as many."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Select preferred and non-preferred images of DiffusionDB; gives an imagefolder whose rows have a kind."""

    data: tuple[str, ...]
    """Folders of part-NNNNNN.zip, such files, or quoted patterns such as 'images/part-0000*.zip'."""
    rewards: str
    """The scorer: a name that `preftune scorers` lists, or the folder of a trained one."""
    output_dir: Path
    """Folder to create; unfinished work is in OUTPUT.building."""
    reward_files: Files = ()
    selection: Annotated[Selection, tyro.conf.arg(name="")] = field(default_factory=Selection)
    filters: Annotated[Filters, tyro.conf.arg(name="")] = field(default_factory=Filters)
    precision: Precision | None = None
    """Precision of the scorer's towers; scores are float32. None = bf16 on a CUDA GPU, fp16 on one before Ampere, fp32 elsewhere."""
    allow_tf32: bool = False
    """With --precision fp32 on a GPU since Ampere: TF32, which is faster and has 10 bits of mantissa in place of 23."""
    batch_size: int | None = None
    """Images per forward pass; None = 128 on a CUDA GPU, 32 elsewhere."""
    workers: int | None = None
    """Reading and decoding processes per scoring process; 0 = the scoring process reads; None = one for each core, with --ray
    divided by --ray-workers.
    """
    ray: str | None = None
    """Ray cluster that scores the parts: its address, auto = the cluster of this machine, local = a new one
    on this machine; None = no Ray. Parts, weights and preftune must be on all machines of the cluster,
    under the same paths.
    """
    ray_workers: int = 2
    """With --ray: number of scoring processes, each with one GPU if the cluster has GPUs."""
    shown: int = 12
    """Number of prompts whose images are shown in the report."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data needs a folder of part-NNNNNN.zip, or such files")
        parse_names((self.rewards,))
        for name, value, least in (
            ("batch-size", self.batch_size, 1), ("workers", self.workers, 0), ("ray-workers", self.ray_workers, 1),
            ("shown", self.shown, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        check_precision(self.precision)

    @property
    def scorer(self) -> str:
        """Return the scorer's name."""
        return parse_names((self.rewards,))[0]

    @property
    def scale(self) -> float:
        """What scores are multiplied by in the softmax."""
        clip = find_card(self.scorer).clip if self.scorer not in CARDS else None  # one that was trained
        published = 100.0 if self.scorer in COSINES or (clip and not clip.scaled) else 1.0
        return published if self.selection.scale is None else self.selection.scale


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from tqdm import tqdm

from data_build import cluster, score_folder, scoring, selected_folder
from data_build.readers import DataSet, entries, survey
from data_build.scoring import DTYPES, Batch, PrepareEntry
from preftune.cli.printable import show
from preftune.files import remove
from preftune.files.one_writer import one_writer
from preftune.machine.tf32 import set_tf32
from preftune.scorer_digests import digests
from rewards.digests import sha256_of
from rewards.shared_towers import load_all


def find_parts(terms: tuple[str, ...]) -> DataSet:
    """Return the parts that these folders, files and patterns name, sorted; ValueError where there is none."""
    paths: list[Path] = []
    for term in terms:
        path = Path(term)
        found = sorted(path.glob("*.zip")) if path.is_dir() else [path] if path.is_file() else []
        found = found or [Path(name) for name in sorted(glob.glob(term)) if Path(name).is_file()]
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise ValueError(
                f"there is no data at {term}; --data names folders of part-NNNNNN.zip, or such files"
            )
        if wrong := [path for path in found if path.suffix.lower() != ".zip"]:
            raise ValueError(f"{wrong[0]} is no zip file; for other data see preftune score")
        paths += [Path(os.path.abspath(path)) for path in found]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    sources = sorted(path.relative_to(root).as_posix() for path in paths)
    if twice := [first for first, second in itertools.pairwise(sources) if first == second]:
        raise ValueError(f"--data names {root / twice[0]} twice")
    return DataSet(
        root=root, kind="zip", sources=tuple(sources), prompted=True, prompt="", image_column="", text_column=None
    )  # fmt: skip


def batches(data: DataSet, part: int, size: int, filters: Filters, nsfw: Nsfw | None) -> Iterator[Batch]:
    """All entries of a part, which is a chunk."""
    alone = replace(data, sources=data.sources[part : part + 1])
    listed = [filters.listed(entry, nsfw) for *_, entry in entries(alone)]
    for start in range(0, len(listed), size):
        last = start + size >= len(listed)
        yield Batch(entries=listed[start : start + size], next=(part + 1, 0), ends_chunk=last)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, checked before any weight loads."""

    data: DataSet
    total: int
    """About how many images it has."""
    files: dict[str, Path]
    """Weights that are not in their place."""
    building: Path
    """Where the work is until it is done."""
    nsfw: Nsfw | None
    record: dict[str, Any]
    """For job.json: all that the result depends on."""


def check_inputs(config: Config) -> Job | None:
    """Return the job, whose folder is begun, or None where it is done; ValueError before any weight loads."""
    files = {
        name: path.absolute() for name, path in parse_files(config.reward_files, (config.scorer,)).items()
    }
    check_all([config.scorer], files, download=False)
    data = find_parts(config.data)
    digest, total = survey(data)
    scoring.check_judge([config.scorer], data)
    filters = asdict(config.filters)
    if config.filters.metadata is not None:
        filters["metadata"] = sha256_of(config.filters.metadata)
    weights = digests([config.scorer], files)
    scores = {
        "rewards": config.scorer,
        "data": digest,
        "precision": precision_here(config.precision),
        "weights": weights,
    }
    scores |= json.loads(
        json.dumps({name: value for name, value in filters.items() if name != "keep_duplicates"})
    )
    rule = asdict(config.selection) | {"scale": config.scale}
    record = {
        **scores,
        "keep_duplicates": config.filters.keep_duplicates,
        "selection": rule,
        "shown": config.shown,
    }
    building = config.output_dir.with_name(f"{config.output_dir.name}.building")
    if config.output_dir.exists():
        if not selected_folder.is_of(config.output_dir, record):
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        remove(building)
        return None
    nsfw = Nsfw(config.filters, data.sources) if config.filters.metadata is not None else None
    if config.ray is not None:
        cluster.check_ray_installed()
    score_folder.begin_job(building, scores)  # another rule may be tried on the same scores
    return Job(data=data, total=total, files=files, building=building, nsfw=nsfw, record=record)


def load_scorer(config: Config, job: Job, device: torch.device) -> tuple[list[Scorer], PrepareEntry]:
    """Return the scorer, alone in a list, and what prepares images for it."""
    set_tf32(config.allow_tf32, convolutions=config.allow_tf32)
    dtype = DTYPES[precision_here(config.precision)]
    scorers = load_all([config.scorer], files=job.files, device=device, dtype=dtype)
    return scorers, PrepareEntry(data=job.data, unwanted=config.filters)


def score_here(config: Config, job: Job, parts: range, device: torch.device) -> Iterator[int]:
    """Write a chunk for each part; yields how many entries are done."""
    with exit_on_user_error():
        scorers, prepare = load_scorer(config, job, device)
    listed = (
        batch
        for part in parts
        for batch in batches(job.data, part, batch_size_here(config.batch_size), config.filters, job.nsfw)
    )
    workers = workers_here(config.workers)
    return scoring.write_score_chunks(job.building, prepare, listed, scorers, device, workers=workers)


def part_scorer(config: Config, job: Job) -> Callable[[int], list[score_folder.ScoreRow]]:
    """Return what gives the rows of a part, with a separate scorer: for the processes of a cluster."""
    device = device_here()
    scorers, prepare = load_scorer(config, job, device)

    @torch.no_grad()
    def rows_of(part: int) -> list[score_folder.ScoreRow]:
        listed = batches(job.data, part, batch_size_here(config.batch_size), config.filters, job.nsfw)
        workers = workers_here(config.workers, programs=config.ray_workers)
        found = scoring.score_batches(prepare, listed, scorers, device, workers=workers)
        return [row for _, rows in found for row in rows]

    return rows_of


def score_remaining_parts(config: Config, job: Job, device: torch.device) -> None:
    """Score the parts that are left, and write a chunk for each."""
    _, (first, _) = score_folder.progress(job.building)
    parts = range(first, len(job.data.sources))
    if not parts:
        return
    if config.ray is None:
        counts = score_here(config, job, parts, device)
    else:
        same = replace(config, precision=precision_here(config.precision))  # on all machines
        make = functools.partial(part_scorer, same, job)
        with exit_on_user_error():
            counts = cluster.score_parts(
                job.building, parts, make, address=config.ray, workers=config.ray_workers
            )
    with tqdm(total=job.total, initial=job.total * first // parts.stop, desc="scoring", unit="image") as bar:
        for count in counts:
            bar.update(count)


def write_data_set(config: Config, job: Job) -> None:
    """Select, write the data set under a temporary name, and rename it."""
    selected_folder.write_data_set(
        job.building, job.data, config.selection, config.scale,
        keep_duplicates=config.filters.keep_duplicates, name=config.scorer, shown=config.shown, record=job.record,
    )  # fmt: skip
    (job.building / selected_folder.FOLDER).rename(config.output_dir)
    shutil.rmtree(job.building)


@one_writer
@torch.no_grad()
def main(config: Config) -> None:
    """Score what is left, make the data set of it, and report."""
    with exit_on_user_error():
        job = check_inputs(config)
    if job is not None:
        score_remaining_parts(config, job, device_here())
        write_data_set(config, job)
    show(f"{selected_folder.summary_text(config.output_dir)}\n{config.output_dir}")
    with exit_on_user_error():
        selected_folder.check_any_scored(config.output_dir)


if __name__ == "__main__":
    main(CONFIG)
