"""Speed of scoring image files, compared with the scorer's forward pass and with loading the scorer for
each image.

    python benchmarks/score.py                                            # the embedded scorer
    python benchmarks/score.py --scorers hpsv2.1 pickscore --workdir /tmp/scorers
    python benchmarks/score.py --scorers imagereward blipscore --workdir /tmp/scorers --images 16

Four speeds per scorer, measured in one process: `files` is data_build/score.py from the first file to the
last written chunk, end to end. `decode` is only what its worker processes do: read, decode, prepare, tokenise. `raw` is the
forward pass alone on the same images, preprocessed and on the device. Files and raw encode every prompt again, and all
alternate. `files:raw` is the ratio by the clock, `by CPU` that of the main process' CPU time, which other work on the
machine and the workers' own work do not disturb: what receiving and writing cost beside the forward pass. `reload` loads checkpoint and vocabulary for each image, as
`hpsv2.score` does, for `--reload-images` images. Published scorers get random weights of their published
size, written once to --workdir, so nothing is downloaded and scores are meaningless. On a CUDA device,
`MFU` is the floating-point operations of the raw pass relative to the dense bf16 peak of the data sheet, `of mm` relative
to what a product of two large matrices in the same precision reaches on the same card.

--trace writes one more turn of `files` as a trace of main process, workers and GPU, and prints what went on at once.

Hardware: two CPU cores for the embedded scorer, seconds; ViT-H needs 9 GB of memory, 4 GB of disk, and
preferably a GPU.
"""

import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import PROMPTS, TINY, check_file
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import Precision, batch_size_here, precision_here, workers_here

SIDE = 512
"""Pixels of an image file's side."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how fast files are scored."""

    scorers: tuple[str, ...] = ("imagereward-tiny",)
    """Names of `python -m rewards`; published ones need --workdir."""
    precision: tuple[Precision, ...] = ()
    """Precision of the towers; none = data_build/score.py's own on this machine."""
    batch_size: tuple[int, ...] = ()
    """Images per forward pass; none = data_build/score.py's own on this machine."""
    images: int = 64
    """Image files, 512 x 512 PNG."""
    reload_images: int = 8
    """Images of the loop that loads the checkpoint for each; 0 leaves it out."""
    repeats: int = 3
    """Repetitions of files and raw; the medians are reported."""
    workers: int | None = None
    """Processes that read and decode; None = one for each core."""
    threads: int = 0
    """CPU threads of the forward pass; 0 = torch's own choice."""
    workdir: Path | None = None
    """Folder for weights of published size; existing files are reused."""
    peak_tflops: float | None = None
    """Dense bf16 peak of a card that is not in the table."""
    trace: Path | None = None
    """Folder for a trace of each row, to open in ui.perfetto.dev."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name, least in (
            ("images", 1),
            ("reload_images", 0),
            ("repeats", 1),
            ("workers", 0),
            ("threads", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        if min(self.batch_size, default=1) < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import rewards
from benchmarks.hardware import (
    Spent,
    fresh,
    matmul_tflops,
    name_of_machine,
    peak_mib,
    peak_tflops,
    seconds,
    spent,
    write_json,
)  # fmt: skip
from benchmarks.models import fresh_scorer
from benchmarks.scoring_trace import NotingPrepare, traced
from data_build import score as program
from data_build.scoring import Batch, PrepareEntry, write_score_chunks
from preftune.images import opened
from preftune.order import items_at
from preftune.prepared_images import prepared_slices
from preftune.prompts import read_prompts
from preftune.records import write_jsonl
from rewards.pixels import from_pil
from rewards.readers import readers_of


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table."""

    scorer: str
    weights: Path | None
    precision: Precision
    batch_size: int
    images: int
    reload_images: int
    repeats: int
    workers: int
    threads: int
    device: str
    trace: Path | None


def write_images(folder: Path, number: int) -> Path:
    """Write an imagefolder of the embedded images, enlarged, with a prompt each."""
    files = sorted((TINY / "images").rglob("*.png"))
    prompts = items_at(read_prompts(PROMPTS), range(number), seed=0)
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(prompts):
        name = f"{index:06d}.png"
        with opened(files[index % len(files)]) as image:
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name)
        rows.append({"file_name": name, "text": prompt})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


class Bench:
    """A scorer, and images both as files and ready for it."""

    def __init__(self, trial: Trial, scratch: Path) -> None:
        self.trial, self.scratch = trial, scratch
        self.device, self.dtype = torch.device(trial.device), program.DTYPES[trial.precision]
        self.data = write_images(scratch / "data", trial.images)
        self.source = program.find_data_set(
            self.data, prompted=True, prompt="", image_column="image", text_column="text"
        )
        self.paths = sorted(self.data.glob("*.png"))
        self.prompts = items_at(read_prompts(PROMPTS), range(trial.images), seed=0)
        self.scorer = self.load()
        self.rule = self.scorer.card.preprocess
        self.ready = torch.stack([self.pixels(path) for path in self.paths]).to(self.device)

    def pixels(self, path: Path) -> torch.Tensor:
        """Return an image prepared for the scorer, (3, size, size)."""
        with opened(path) as image:
            return from_pil(image, self.rule)

    def load(self) -> Any:
        """Return the scorer, loaded anew."""
        trial = self.trial
        return rewards.load(trial.scorer, weights=trial.weights, device=self.device, dtype=self.dtype)

    def forget(self) -> None:
        """Empty the cache of texts, as moving a scorer does."""
        self.scorer.to(self.device)

    def raw(self, _: int) -> None:
        """Score the images that are ready."""
        for start in range(0, self.trial.images, self.trial.batch_size):
            part = slice(start, start + self.trial.batch_size)
            self.scorer(self.ready[part], self.prompts[part])

    def files(self, turn: int) -> None:
        """Score the files as data_build/score.py does, the written chunks included."""
        trial = self.trial
        config = program.Config(
            data=self.data,
            rewards=(trial.scorer,),
            reward_files=() if trial.weights is None else (f"{trial.scorer}={trial.weights}",),
            output_dir=self.scratch / f"scored{turn}",
            batch_size=trial.batch_size,
            workers=trial.workers,
        )
        program.score_rest(config, self.source, trial.images, [self.scorer], self.device)

    def batches(self) -> Iterator[Batch]:
        """All batches, as data_build/score.py lists them."""
        return program.batches(self.source, (0, 0), self.trial.batch_size, chunk=1000)

    def decode(self, _: int) -> None:
        """Prepare the files as worker processes do, for no scorer."""
        entries = (batch.entries for batch in self.batches())
        prepare, readers = PrepareEntry(data=self.source), readers_of([self.scorer])
        for one in prepared_slices(
            prepare, entries, [self.rule], workers=self.trial.workers, device=self.device, readers=readers
        ):
            del one

    def traced(self, path: Path) -> dict[str, float]:
        """Score the files once more, and write a trace of that."""
        notes = self.scratch / "notes"
        prepare = NotingPrepare(data=self.source, notes=notes)

        def score() -> None:
            workers = self.trial.workers
            for _ in write_score_chunks(
                self.scratch / "traced", prepare, self.batches(), [self.scorer], self.device, workers=workers
            ):
                pass

        return traced(score, notes, path, cuda=self.trial.device == "cuda")

    def reload(self, index: int) -> None:
        """Load the scorer and score one file."""
        pixels = self.pixels(self.paths[index])[None].to(self.device)
        self.load()(pixels, self.prompts[index : index + 1])


@torch.no_grad()
def measure(trial: Trial, scratch: Path) -> dict[str, Any]:
    """Return the figures of a row."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not that of this fresh process
    if trial.threads:
        torch.set_num_threads(trial.threads)
    bench = Bench(trial, scratch)
    bench.raw(0)  # kernels are chosen, memory is taken
    times: dict[str, list[Spent]] = {"files": [], "decode": [], "raw": []}
    for turn in range(trial.repeats):
        for name, taken in times.items():
            bench.forget()
            taken.append(spent(getattr(bench, name), turn, trial.device))
    row: dict[str, Any] = {
        f"{name}_images_per_s": trial.images / statistics.median(one.wall for one in taken)
        for name, taken in times.items()
    }
    row["files_to_raw"] = row["files_images_per_s"] / row["raw_images_per_s"]
    least = {name: min(one.cpu for one in taken) for name, taken in times.items()}
    row["files_to_raw_cpu"] = least["raw"] / least["files"]
    reloads = [
        seconds(bench.reload, index, trial.device) for index in range(min(trial.reload_images, trial.images))
    ]
    if reloads:
        row["reload_images_per_s"] = len(reloads) / sum(reloads)
        row["files_to_reload"] = row["files_images_per_s"] / row["reload_images_per_s"]
    bench.forget()
    if trial.trace is not None:
        name = f"{trial.scorer}-{trial.precision}-{trial.batch_size}.json"
        row["traced_seconds"] = bench.traced(trial.trace / name)
    if trial.device == "cuda":
        row["matmul_tflops"] = matmul_tflops(bench.dtype)
    with FlopCounterMode(display=False) as counter:
        bench.scorer(bench.ready[:1], bench.prompts[:1])
    return row | {"flops_per_image": counter.get_total_flops(), "peak_mib": peak_mib(trial.device)}


HEADER = (
    "scorer            prec batch  files/s decode/s    raw/s  files:raw  by CPU  reload/s  files:reload  peak MiB"
    "    MFU  of mm"
)


def line(trial: Trial, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{trial.scorer:17s} {trial.precision:4s} {trial.batch_size:5d}"
    if "error" in row:
        return f"{name}  {row['error']}"
    formats = {
        "files_images_per_s": "8.2f",
        "decode_images_per_s": "8.2f",
        "raw_images_per_s": "8.2f",
        "files_to_raw": "10.1%",
        "files_to_raw_cpu": "7.1%",
        "reload_images_per_s": "9.3f",
        "files_to_reload": "13.1f",
        "peak_mib": "9.0f",
        "mfu": "6.1%",
        "of_matmul": "6.1%",
    }
    shown = " ".join([name, *(format(row[key], style) for key, style in formats.items() if key in row)])
    parts = row.get("traced_seconds", {}).items()
    return shown + "".join(f"\n    {name}: {value:.3f} s" for name, value in parts)


def weights_of(config: Config, name: str) -> Path | None:
    """Return the weights of a scorer, written if need be; None for an embedded one. ValueError for one that cannot be measured."""
    card = rewards.CARDS.get(name)
    if card is None or card.preprocess is None:
        usable = ", ".join(card.name for card in rewards.CARDS.values() if card.preprocess)
        raise ValueError(f"--scorers {name} cannot be measured here; one of {usable}")
    if card.folder is not None:
        return None
    if config.workdir is None:
        raise ValueError(f"--scorers {name} needs --workdir, a folder for random weights of its size")
    return fresh_scorer(name, config.workdir)


def trials(config: Config, weights: dict[str, Path | None], device: str) -> list[Trial]:
    """Return the rows of the table."""
    names = ("images", "reload_images", "repeats", "threads", "trace")
    same = {name: getattr(config, name) for name in names} | {"workers": workers_here(config.workers)}
    return [
        Trial(scorer=scorer, weights=path, precision=precision, batch_size=batch, device=device, **same)
        for scorer, path in weights.items()
        for precision in config.precision or (precision_here(None),)
        for batch in config.batch_size or (batch_size_here(None),)
    ]


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    cuda = torch.cuda.is_available()
    with exit_on_user_error():
        peak = (config.peak_tflops or peak_tflops()) if cuda else None
        weights = {name: weights_of(config, name) for name in config.scorers}
        for folder in (config.output and config.output.parent, config.trace):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    machine = name_of_machine(cuda)
    print(f"{machine}; {config.images} files of {SIDE} x {SIDE}, medians of {config.repeats}")
    print(HEADER, flush=True)
    rows = []
    for trial in trials(config, weights, "cuda" if cuda else "cpu"):
        with tempfile.TemporaryDirectory() as scratch:
            row = fresh(measure, trial, Path(scratch)) or {"error": "the process was killed"}
        if peak and "error" not in row:
            reached = row["flops_per_image"] * row["raw_images_per_s"] / 1e12
            row |= {"mfu": reached / peak, "of_matmul": reached / row["matmul_tflops"]}
        print(line(trial, row), flush=True)
        rows.append(asdict(trial) | row)
    if config.output is not None:
        write_json(config.output, {"hardware": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
