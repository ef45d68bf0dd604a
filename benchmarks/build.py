"""Speed of data_build/diffusiondb.py, its bottleneck, and whether its memory grows with the number of parts.

    python benchmarks/build.py                                            # the embedded scorer
    python benchmarks/build.py --workdir /tmp/scorers       # with CUDA: also ViT-H

Four speeds per scorer, measured in one process, in turns; all prompts are encoded again in each turn:

- `build`: data_build/diffusiondb.py from the checks to the written data set, without loading the scorer;
- `scoring`: its part until the last chunk is written;
- `decode`: only the work of the worker processes (list, read, decode, preprocess);
- `forward`: only the scorer, on preprocessed images.

The bottleneck is the slower of the last two. If they share cores, scoring cannot be faster than 1 / (1 /
decode + 1 / forward). `of raw` is scoring relative to forward. HPS v2.1 (ViT-H) is included on a CUDA
device if --workdir has room for random weights of its size (4 GB). Then the peak memory of the builder is
measured for each number of `--parts`, each in a fresh process; the values must agree within 10 %.

Hardware: one CPU core, a few minutes.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.paths import PROMPTS, TINY, check_file
from preftune.cli import exit_on_user_error, parse

FULL_SIZE = "hpsv2.1"
DIFFERENT = 64
"""Number of different images."""
GROWTH = 0.1
"""Largest allowed relative difference of the memory of the runs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how fast a data set is built, and how much memory that takes."""

    images: int = 20
    """Images of a part."""
    side: int = 512
    """Pixels of an image's side."""
    parts: tuple[int, ...] = (10, 100)
    """Numbers of parts of the memory runs; the first is also used for the speed runs."""
    repeats: int = 3
    """Repetitions; the medians are reported."""
    batch_size: int = 32
    """Images per forward pass."""
    workers: int = 2
    """Processes that read and decode."""
    threads: int = 0
    """CPU threads of the forward pass; 0 = torch's own choice."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the towers."""
    workdir: Path | None = None
    """Folder for ViT-H's random weights; existing files are reused."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name, least in (
            ("images", 1), ("side", 1), ("repeats", 1), ("batch_size", 1), ("workers", 0), ("threads", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        if min(self.parts, default=0) < 1:
            raise ValueError(f"--parts must be at least 1, got {self.parts}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from PIL import Image

from benchmarks.hardware import fresh, name_of_machine, peak_mib, seconds, write_json
from benchmarks.models import fresh_scorer
from data_build import diffusiondb as program
from data_build import scoring
from data_build.decode import Entry
from data_build.filters import Filters
from data_build.scoring import Batch
from preftune.images import opened
from preftune.order import items_at
from preftune.prepared_images import SLICE, PreparedSlice, prepared_slices
from preftune.prompts import read_prompts


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured."""

    scorer: str
    weights: Path | None
    parts: int
    images: int
    side: int
    repeats: int
    batch_size: int
    workers: int
    threads: int
    precision: Literal["fp32", "bf16", "fp16"]
    device: str

    def config(self, data: Path, output: Path) -> program.Config:
        """Return the builder's settings."""
        files = () if self.weights is None else (f"{self.scorer}={self.weights}",)
        return program.Config(
            data=(str(data),), rewards=self.scorer, output_dir=output, reward_files=files,
            batch_size=self.batch_size, workers=self.workers, precision=self.precision,
        )  # fmt: skip


def write_parts(folder: Path, parts: int, images: int, side: int) -> Path:
    """Write parts of the embedded images, enlarged, four of a prompt."""
    folder.mkdir(parents=True)
    encoded = []
    for path in sorted((TINY / "images").rglob("*.png"))[: min(DIFFERENT, parts * images)]:
        content = io.BytesIO()
        with opened(path) as image:
            image.resize((side, side), Image.Resampling.BICUBIC).save(content, "PNG")
        encoded.append(content.getvalue())
    contents = itertools.cycle(encoded)
    prompts = items_at(read_prompts(PROMPTS), range(-(-parts * images // 4)), seed=0)
    for part in range(parts):
        notes = {}
        with zipfile.ZipFile(folder / f"part-{part + 1:06d}.zip", "w") as archive:
            for number in range(part * images, (part + 1) * images):
                name = f"{number:08d}.png"
                archive.writestr(name, next(contents))
                notes[name] = {"p": prompts[number // 4], "se": number, "c": 7.0, "st": 50, "sa": "k_lms"}
            archive.writestr(f"part-{part + 1:06d}.json", json.dumps(notes))
    return folder


class Bench:
    """A scorer, and images both in parts and ready for it."""

    def __init__(self, trial: Trial, scratch: Path) -> None:
        self.trial, self.scratch, self.device = trial, scratch, torch.device(trial.device)
        self.data = write_parts(scratch / "data", trial.parts, trial.images, trial.side)
        config, job = self.begin("ready")
        self.source = job.data
        self.scorers, self.prepare = program.load_scorer(config, job, self.device)
        self.prompts = [entry.text for batch in self.batches() for entry in batch.entries]
        self.rules = [scorer.card.preprocess for scorer in self.scorers]
        slices = itertools.islice(self.prepared(workers=0), max(1, trial.batch_size // SLICE))
        rule = self.scorers[0].card.preprocess
        assert rule is not None, "scorers that are measured prepare images"
        self.ready = torch.cat([one.to(self.device).inputs(rule) for one in slices])
        self.scoring = list[float]()
        """Seconds of each turn until the last chunk was written."""

    def begin(self, name: str) -> tuple[program.Config, program.Job]:
        """Return settings and the job, whose folder is begun."""
        config = self.trial.config(self.data, self.scratch / name)
        job = program.check_inputs(config)
        assert job is not None, "each turn writes its own data set"
        return config, job

    def batches(self) -> Iterator[Batch]:
        """All batches of all parts, as the builder lists them."""
        for part in range(self.trial.parts):
            yield from program.batches(self.source, part, self.trial.batch_size, Filters(), None)

    def forward(self, _: int) -> None:
        """Score as many images as there are, a batch that is ready again and again, with all prompts."""
        for start in range(0, len(self.prompts), len(self.ready)):
            prompts = self.prompts[start : start + len(self.ready)]
            self.scorers[0](self.ready[: len(prompts)], prompts)

    def decode(self, _: int) -> None:
        """List, read, decode and prepare all images as the builder does, for no scorer."""
        for _done in self.prepared(workers=self.trial.workers):
            pass

    def prepared(self, *, workers: int) -> Iterator[PreparedSlice[Entry]]:
        """All batches as worker processes prepare them."""
        entries = (batch.entries for batch in self.batches())
        return prepared_slices(self.prepare, entries, self.rules, workers=workers, device=self.device)

    def build(self, turn: int) -> None:
        """Make a data set as data_build/diffusiondb.py does, with a scorer that is loaded."""
        config, job = self.begin(f"built{turn}")

        def score(_: int) -> None:
            for _done in scoring.write_score_chunks(
                job.building,
                self.prepare,
                self.batches(),
                self.scorers,
                self.device,
                workers=config.workers,
            ):
                pass

        self.scoring.append(seconds(score, turn, self.trial.device))
        program.write_data_set(config, job)


@torch.no_grad()
def speed(trial: Trial, scratch: Path) -> dict[str, Any]:
    """Return the figures of a scorer, in images a second."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not that of this fresh process
    if trial.threads:
        torch.set_num_threads(trial.threads)
    bench = Bench(trial, scratch)
    bench.forward(0)  # kernels are chosen, memory is taken
    times: dict[str, list[float]] = {"build": [], "decode": [], "forward": []}
    for turn in range(trial.repeats):
        for name, taken in times.items():
            bench.scorers[0].to(bench.device)  # empties the cache of texts
            taken.append(seconds(getattr(bench, name), turn, trial.device))
    times["scoring"] = bench.scoring
    total = trial.parts * trial.images
    row = {f"{name}_per_s": total / statistics.median(taken) for name, taken in times.items()}
    return row | {
        "of_raw": row["scoring_per_s"] / row["forward_per_s"],
        "bottleneck": min("decode", "forward", key=lambda name: row[f"{name}_per_s"]),
    }


def memory(trial: Trial, scratch: Path) -> float:
    """Return the peak memory of this process, MiB resident, after it has built a data set; its workers' is not in it."""
    multiprocessing.set_start_method(None, force=True)
    if trial.threads:
        torch.set_num_threads(trial.threads)
    data = write_parts(scratch / "data", trial.parts, trial.images, trial.side)
    with contextlib.redirect_stdout(io.StringIO()):
        program.main(trial.config(data, scratch / "built"))
    return peak_mib("cpu")


HEADER = "scorer            prec batch parts  build/s  scoring/s  decode/s  forward/s  of raw  bottleneck"


def line(trial: Trial, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{trial.scorer:17s} {trial.precision:4s} {trial.batch_size:5d} {trial.parts:5d}"
    if "error" in row:
        return f"{name}  {row['error']}"
    rates = f"{row['build_per_s']:8.1f} {row['scoring_per_s']:10.1f} {row['decode_per_s']:9.1f} {row['forward_per_s']:10.1f}"
    return f"{name} {rates} {row['of_raw']:7.1%}  {row['bottleneck']}"


def trials(config: Config, cuda: bool) -> list[Trial]:
    """Return the scorers to measure."""
    weights: dict[str, Path | None] = {"imagereward-tiny": None}
    if cuda and config.workdir is not None:
        weights[FULL_SIZE] = fresh_scorer(FULL_SIZE, config.workdir)
    names = ("images", "side", "repeats", "batch_size", "workers", "threads", "precision")
    same = {name: getattr(config, name) for name in names} | {"device": "cuda" if cuda else "cpu"}
    return [Trial(scorer=name, weights=path, parts=config.parts[0], **same) for name, path in weights.items()]


def run(measure: Callable[[Trial, Path], Any], trial: Trial) -> Any:
    """Return what a fresh process measures in a folder of its own; None where it was killed."""
    with tempfile.TemporaryDirectory() as scratch:
        return fresh(measure, trial, Path(scratch))


def main(config: Config) -> int:
    """Measure, print, write JSON; 1 where memory grows with the number of parts."""
    cuda = torch.cuda.is_available()
    if config.threads:
        torch.set_num_threads(config.threads)
    with exit_on_user_error():
        listed = trials(config, cuda)
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
    machine = name_of_machine(cuda)
    print(
        f"{machine}; parts of {config.images} PNG of {config.side} x {config.side}, medians of {config.repeats}"
    )
    if len(listed) == 1:
        print(f"left out: {FULL_SIZE}, which wants a CUDA device and --workdir")
    print(HEADER, flush=True)
    rows = []
    for trial in listed:
        row = run(speed, trial) or {"error": "the process was killed"}
        print(line(trial, row), flush=True)
        rows.append(asdict(trial) | row)
    peaks = {number: run(memory, replace(listed[0], parts=number)) or math.nan for number in config.parts}
    growth = max(peaks.values()) / min(peaks.values()) - 1
    shown = ", ".join(f"{peak:.0f} MiB at {number} parts" for number, peak in peaks.items())
    print(f"peak memory: {shown}; they differ by {growth:.1%}, at most {GROWTH:.0%} is right")
    if config.output is not None:
        report = {"hardware": machine, "rows": rows, "peak_mib": peaks, "growth": growth}
        write_json(config.output, report)
    return 0 if growth <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main(CONFIG))
