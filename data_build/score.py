"""Score the images of a data set with several scorers in one pass: a table, statistics, and the best and
worst images.

The kind of data is detected: captioned images (metadata.jsonl or .csv with file_name and text, or a .txt file
beside each image), a folder of images without captions, a parquet table, a tar archive of webdataset, a zip
file of DiffusionDB, or a folder of such files. Worker
processes read and decode each image once and preprocess it once for all scorers with the same
preprocessing; scorers with the same image tower share it. Images that cannot be scored are rejected with
the reason and counted; where none can be scored the program ends with exit code 2. Images are turned as their
EXIF data say. If a job is killed and started again with the same flags, it continues where it was
and writes the same files. score_folder.py describes the output.

    python data_build/score.py --data data/shapes --rewards imagereward-tiny shapes --output-dir scored/shapes
    python data_build/score.py --data images/part-000001.zip --rewards hpsv2.1 clipscore aesthetic --output-dir scored/part-1

Hardware: the embedded scorer runs on a CPU; published ones need a GPU in practice, and use one if available.
Left out: several GPUs; adding a scorer to finished results, which needs a new job with another --output-dir.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import (
    Precision,
    batch_size_here,
    check_precision,
    device_here,
    precision_here,
    workers_here,
)
from preftune.cli.scorer_flags import Files, Measured
from rewards.terms import parse_files, parse_names


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score the images of a data set; writes a table, statistics, and the best and worst images."""

    data: Path
    """Folder of images, with captions or without, parquet table, tar archive, DiffusionDB zip, or a folder of such files."""
    rewards: Measured
    output_dir: Path
    """Folder to create, or the folder of the same, unfinished job."""
    reward_files: Files = ()
    prompt: str = ""
    """The prompt of all images of a folder without captions."""
    image_column: str | None = None
    """Column with the images of a parquet table, or with their file names in metadata.jsonl and .csv; None = the usual names.
    """
    caption_column: str | None = None
    """Column with the prompts; None = the first of text, prompt and caption."""
    precision: Precision | None = None
    """Precision of the scorers' towers; scores are float32. None = bf16 on a CUDA GPU, fp16 on one before Ampere, fp32 elsewhere."""
    allow_tf32: bool = False
    """With --precision fp32 on a GPU since Ampere: TF32, which is faster and has 10 bits of mantissa in place of 23."""
    batch_size: int | None = None
    """Images per forward pass; None = 128 on a CUDA GPU, 32 elsewhere."""
    workers: int | None = None
    """Reading and decoding processes; 0 = read in the main process; None = one for each core."""
    chunk: int = 1000
    """Number of images between saves."""
    best: int = 4
    """Number of best and of worst images per scorer in best_worst.png; 0 = no best_worst.png."""
    add_to_metadata: bool = False
    """Also write the scores into the imagefolder's metadata.jsonl."""

    def __post_init__(self) -> None:
        self.names()
        for name, value, least in (
            ("batch-size", self.batch_size, 1), ("chunk", self.chunk, 1), ("workers", self.workers, 0), ("best", self.best, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        check_precision(self.precision)

    def names(self) -> tuple[str, ...]:
        """Return the scorers, a column each."""
        return parse_names(self.rewards)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from tqdm import tqdm

from data_build import score_folder, scoring
from data_build.decode import Entry
from data_build.readers import DataSet, entries, find_data_set, survey
from data_build.scoring import DTYPES, Batch, PrepareEntry, check_judge
from preftune.cli.notes import say
from preftune.cli.printable import show
from preftune.files import lock, tidy_beside
from preftune.files.one_writer import one_writer
from preftune.image_folders import describe_passed_over
from preftune.machine.tf32 import set_tf32
from preftune.scorer_digests import digests
from rewards import Scorer, check_all, embedded, find_card
from rewards.shared_towers import load_all


def batches(data: DataSet, place: tuple[int, int], size: int, chunk: int) -> Iterator[Batch]:
    """All entries from a place on, where a chunk begins; what is in a batch depends on the data alone."""
    gathered: list[Entry] = []
    in_chunk = 0
    for source, number, entry in entries(data, *place):
        gathered.append(entry)
        in_chunk += 1
        if len(gathered) == size or in_chunk == chunk:
            yield Batch(entries=gathered, next=(source, number + 1), ends_chunk=in_chunk == chunk)
            gathered, in_chunk = [], in_chunk % chunk
    if gathered:
        yield Batch(entries=gathered, next=(len(data.sources), 0), ends_chunk=False)


def check_inputs(config: Config) -> tuple[DataSet, int, dict[str, Path]]:
    """Return the data, about how many images it has, and weights that are not in their place; begins the output folder.

    ValueError before any weight loads.
    """
    files = parse_files(config.reward_files, config.names())
    check_all(config.names(), files, download=False)
    data = find_data_set(
        config.data,
        prompted=any(find_card(name).prompted for name in config.names()),
        prompt=config.prompt,
        image_column=config.image_column,
        text_column=config.caption_column,
    )
    if config.data.is_dir() and config.output_dir.resolve().is_relative_to(config.data.resolve()):
        raise ValueError(f"--output-dir {config.output_dir} lies in the data set; choose a folder beside it")
    if config.add_to_metadata and not data.sources[0].endswith("metadata.jsonl"):
        raise ValueError(f"--add-to-metadata needs a metadata.jsonl, and {config.data} has none")
    if config.add_to_metadata and embedded.portable(config.data) != config.data:
        raise ValueError(
            f"--add-to-metadata would write into the package, {config.data}; copy that folder and name the copy"
        )
    digest, total = survey(data)
    if not total:
        raise ValueError(f"{config.data} holds no images")
    check_judge(config.names(), data)
    weights = digests(config.names(), files)
    names = ("prompt", "image_column", "caption_column", "chunk")
    settings = {name: getattr(config, name) for name in names} | {
        "precision": precision_here(config.precision)
    }
    score_folder.begin_job(
        config.output_dir, {"rewards": list(config.names()), "data": digest, **settings, "weights": weights}
    )
    return data, total, files


def score_rest(
    config: Config, data: DataSet, total: int, scorers: Sequence[Scorer], device: torch.device
) -> None:
    """Score what is left to do and write it chunk by chunk."""
    done, place = score_folder.progress(config.output_dir)
    listed = batches(data, place, batch_size_here(config.batch_size), config.chunk)
    workers = workers_here(config.workers)
    counts = scoring.write_score_chunks(
        config.output_dir, PrepareEntry(data=data), listed, scorers, device, workers=workers
    )
    with tqdm(total=total, initial=min(done * config.chunk, total), desc="scoring", unit="image") as bar:
        for count in counts:
            bar.update(count)


@one_writer
@torch.no_grad()
def main(config: Config) -> None:
    """Score, conclude and report."""
    device = device_here()
    with exit_on_user_error():
        data, total, files = check_inputs(config)
    if words := describe_passed_over(data.passed_over):
        say(f"{config.data}: {words}")
    if not score_folder.is_complete(config.output_dir):
        set_tf32(config.allow_tf32, convolutions=config.allow_tf32)
        with exit_on_user_error():
            dtype = DTYPES[precision_here(config.precision)]
            scorers = load_all(config.names(), files=files, device=device, dtype=dtype)
        score_rest(config, data, total, scorers, device)
        score_folder.write_results(config.output_dir, data, config.names(), config.best)
    score_folder.remove_chunks(config.output_dir)
    if config.add_to_metadata:
        with exit_on_user_error():
            lock.acquire(data.root)  # other jobs may score the same data set
        tidy_beside(data.root / "metadata.jsonl")
        score_folder.add_to_metadata(config.output_dir, data, config.names())
        lock.release(data.root)
    show(f"{score_folder.summary_text(config.output_dir)}\n{config.output_dir}")
    with exit_on_user_error():
        score_folder.check_any_scored(config.output_dir, config.data)


if __name__ == "__main__":
    main(CONFIG)
