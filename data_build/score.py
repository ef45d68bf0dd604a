"""Score the images of a data set with several scorers in one pass: columns, statistics, the best and the worst.

The data is recognised: an imagefolder (metadata.jsonl with file_name and text), a folder of images without captions, a
parquet table or a folder of them, a zip file of DiffusionDB or a folder of them. Worker processes read and decode each
image once and prepare it once for all scorers that want it alike; scorers with the same image tower share it, too.
What cannot be scored is set aside with the reason and counted. Killed and started again with the same flags, a job goes
on where it was and ends in the same files. What is written where: see score_folder.py.

    python data_build/score.py --data data/shapes --rewards imagereward-tiny shapes --output-dir scored/shapes
    python data_build/score.py --data images/part-000001.zip --rewards hpsv2.1 clipscore aesthetic --output-dir scored/part-1

Hardware: the embedded scorer needs a CPU; published ones want a GPU, and use one where there is one.
Left out: several GPUs; a scorer that is asked for later, which is another job with another --output-dir.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data_build import score_folder, scoring
from data_build.decode import Entry
from data_build.readers import DataSet, entries, find_data_set, survey
from data_build.scoring import DTYPES, Batch, PrepareEntry, digests
from preftune.cli import exit_on_user_error, parse
from rewards import CARDS, Scorer, find_card
from rewards.mix import parse_files
from rewards.shared_towers import load_all


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score the images of a data set; gives a table, statistics, and an image of the best and the worst."""

    data: Path
    """Imagefolder, folder of images, parquet table, DiffusionDB zip, or a folder of tables or zips."""
    rewards: tuple[str, ...]
    """Scorers, a column each; `python -m rewards` lists them."""
    output_dir: Path
    """Folder to create, or one that this job began."""
    reward_files: tuple[str, ...] = ()
    """Weights of scorers on disk, as imagereward=PATH; others come from this repository or the hub's cache."""
    prompt: str = ""
    """The prompt of all images of a folder without captions."""
    image_column: str = "image"
    """Column of parquet tables: encoded images, or structs of bytes and path."""
    text_column: str = "text"
    """Column of parquet tables: the prompts."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the scorers' towers; scores are float32."""
    batch_size: int = 32
    """Images in one pass."""
    workers: int = 2
    """Processes that read and decode; 0 = this one does it."""
    chunk: int = 1000
    """Images between two savings."""
    best: int = 4
    """Images of each end that best_worst.png shows for each scorer; 0 = no best_worst.png."""
    add_to_metadata: bool = False
    """Write the scores into the imagefolder's metadata.jsonl, too."""

    def __post_init__(self) -> None:
        if not self.rewards or len(set(self.rewards)) != len(self.rewards):
            raise ValueError(f"--rewards must name scorers, each once; one of {', '.join(CARDS)}")
        for name, value, least in (
            ("batch-size", self.batch_size, 1), ("chunk", self.chunk, 1), ("workers", self.workers, 0), ("best", self.best, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("--precision fp16 needs a GPU; use fp32 or bf16")


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
    files = parse_files(config.reward_files, config.rewards)
    weights = digests(config.rewards, files)
    data = find_data_set(
        config.data,
        prompted=any(find_card(name).prompted for name in config.rewards),
        prompt=config.prompt,
        image_column=config.image_column,
        text_column=config.text_column,
    )
    if config.data.is_dir() and config.output_dir.resolve().is_relative_to(config.data.resolve()):
        raise ValueError(f"--output-dir {config.output_dir} lies in the data set; choose a folder beside it")
    if config.add_to_metadata and data.kind != "imagefolder":
        raise ValueError(f"--add-to-metadata needs a metadata.jsonl, and {config.data} has none")
    digest, total = survey(data)
    if not total:
        raise ValueError(f"{config.data} holds no images")
    names = ("precision", "prompt", "image_column", "text_column", "chunk")
    settings = {name: getattr(config, name) for name in names}
    score_folder.begin_job(
        config.output_dir, {"rewards": list(config.rewards), "data": digest, **settings, "weights": weights}
    )
    return data, total, files


def score_rest(
    config: Config, data: DataSet, total: int, scorers: Sequence[Scorer], device: torch.device
) -> None:
    """Score what is left to do and write it chunk by chunk."""
    done, place = score_folder.progress(config.output_dir)
    listed = batches(data, place, config.batch_size, config.chunk)
    counts = scoring.write_score_chunks(
        config.output_dir, PrepareEntry(data=data), listed, scorers, device, workers=config.workers
    )
    with tqdm(total=total, initial=min(done * config.chunk, total), desc="scoring", unit="image") as bar:
        for count in counts:
            bar.update(count)


@torch.no_grad()
def main(config: Config) -> None:
    """Score, conclude and report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with exit_on_user_error():
        data, total, files = check_inputs(config)
    if not score_folder.is_complete(config.output_dir):
        with exit_on_user_error():
            dtype = DTYPES[config.precision]
            scorers = load_all(config.rewards, files=files, device=device, dtype=dtype)
        score_rest(config, data, total, scorers, device)
        score_folder.write_results(config.output_dir, data, config.rewards, config.best)
    score_folder.remove_chunks(config.output_dir)
    if config.add_to_metadata:
        score_folder.add_to_metadata(config.output_dir, data, config.rewards)
    print(f"{score_folder.summary_text(config.output_dir)}\n{config.output_dir}")  # noqa: T201


if __name__ == "__main__":
    main(parse(Config))
