"""Time and memory of one ReFL update: our loop under several settings, and the released loops in turns with
it.

    python benchmarks/refl_step.py                                        # the tiny model on the CPU; also SD 1.x with CUDA
    python benchmarks/refl_step.py --models sd1 --cross --output sd1.json # all combinations instead of one change at a time
    python benchmarks/refl_step.py --models thin --train-batch-size 1     # Stable Diffusion's depth on the CPU

The first values of --train, --compile, --graphs, --checkpointing and --precision are the base setting; by default
every other value is measured alone. A row is a median over updates (trajectory, late step, decoder, scorer,
backward, clip, AdamW) at one late step. The released loops (benchmarks/published.py: all weights, LoRA, LoRA
with half-precision frozen weights) take turns with ours, update by update, so that variations of the
machine's speed affect all; `x full`, `x lora` and `x half` are their time over ours, of CPU time where the
CPU is shared. Full training keeps an EMA in both. MFU is the floating-point operations of an update, without
recomputation, relative to the card's nominal dense bf16 peak, and to what a large matrix product reaches.

Hardware: two CPU cores, a few minutes; for SD 1.x at 512 px a CUDA device (80 GB for the loops together at
batch 8) and 4 GB of disk. Left out of all loops: logs, checkpoints, several processes.
"""

import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.paths import check_file
from preftune.cli import exit_on_user_error, parse

ModelName = Literal["tiny", "thin", "sd1"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure time and peak memory of ReFL updates."""

    models: tuple[ModelName, ...] | None = None
    """tiny and thin (SD 1.x with narrow layers) on the CPU, sd1 at 512 px on a CUDA device; None = tiny, and sd1 if CUDA is
    available.
    """
    train: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """LoRA of rank 4, or all weights of the UNet."""
    compile: tuple[Literal["off", "on"], ...] = ("off", "on")
    """--compile of the driver: blocks of the UNet compiled, on CUDA passes without gradient replayed as CUDA graphs."""
    graphs: tuple[Literal["off", "on"], ...] = ("on", "off")
    """CUDA graphs for passes without gradient; on a CPU there are none."""
    checkpointing: tuple[Literal["off", "on"], ...] = ("off", "on")
    """Gradient checkpointing of UNet and decoder."""
    precision: tuple[Literal["no", "bf16", "fp16"], ...] | None = None
    """Precision of model and scorer, the base first; None = no bf16 on the CPU, bf16 fp16 no on CUDA."""
    train_batch_size: tuple[int, ...] | None = None
    """Images in an update; None = 4 on the CPU, 1 2 4 8 on CUDA."""
    published: tuple[Literal["full", "lora", "half-base"], ...] = ("full", "lora", "half-base")
    """Released loops that take turns with ours: of all weights, of a LoRA, of a LoRA on a frozen half-precision base."""
    cross: bool = False
    """All combinations instead of one change at a time."""
    num_inference_steps: int = 40
    """T, as in refl.py."""
    late: int = 35
    """The denoising step with gradient, counted from 0."""
    repeats: int | None = None
    """Timed updates of each setting, after two that warm up; None = 5 on the CPU, 3 on CUDA."""
    threads: int = 0
    """CPU threads; 0 = torch's default."""
    mfu: bool = True
    """Count the operations of an update on CUDA, for MFU; takes two loads of the model and two slow updates."""
    peak_tflops: float | None = None
    """Dense bf16 peak of the CUDA device in TFLOP/s; None = looked up by its name."""
    workdir: Path | None = None
    """Keeps the models that are built, 4 GB for sd1, between calls; None = a temporary folder."""
    output: Path | None = None
    """JSON file with everything measured, written again after each row."""

    def __post_init__(self) -> None:
        check_file(self.output)
        if not 0 <= self.late < self.num_inference_steps:
            raise ValueError(
                f"--late {self.late} must lie in 0..{self.num_inference_steps - 1} (--num-inference-steps - 1)"
            )
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")
        if any(batch < 1 for batch in self.train_batch_size or ()):
            raise ValueError(f"--train-batch-size must be at least 1, got {self.train_batch_size}")
        for name in (
            "models",
            "precision",
            "train",
            "checkpointing",
            "compile",
            "graphs",
            "published",
            "train_batch_size",
        ):
            if self.__dict__[name] == ():
                raise ValueError(f"--{name.replace('_', '-')} needs at least one value")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch

from benchmarks.hardware import fresh, matmul_tflops, name_of_machine, peak_tflops, write_json
from benchmarks.refl_loops import Trial, parts_of
from benchmarks.turns import count_flops, measure_alone, measure_together


def trials(config: Config, parts: dict[str, Any]) -> dict[int, list[Trial]]:
    """Return our settings of one model by batch size, the base first; `parts` are the fields of Trial that the model gives."""
    cuda = parts["device"] == "cuda"
    axes: dict[str, tuple[Any, ...]] = {
        "train": config.train,
        "compile": config.compile,
        "graphs": config.graphs if cuda else ("off",),
        "checkpointing": config.checkpointing,
        "precision": config.precision or (("bf16", "fp16", "no") if cuda else ("no", "bf16")),
    }
    base = {name: values[0] for name, values in axes.items()}
    if config.cross:
        settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        settings = [base] + [base | {name: value} for name, values in axes.items() for value in values[1:]]
    same = {name: config.__dict__[name] for name in ("num_inference_steps", "late", "threads")}
    same |= parts | {"loop": "ours", "repeats": config.repeats or (3 if cuda else 5)}
    batches = config.train_batch_size or ((1, 2, 4, 8) if cuda else (4,))
    return {
        batch: [Trial(train_batch_size=batch, **same, **setting) for setting in settings] for batch in batches
    }


def rivals(trial: Trial, names: Sequence[str]) -> tuple[Trial, ...]:
    """Return the released loops that a setting is compared with; without half precision a half-base LoRA is the other LoRA."""
    loops = {
        "full": trial.published("published", "full"),
        "lora": trial.published("published", "lora"),
        "half-base": trial.published("half-base", "lora"),
    }
    if loops["half-base"].precision == "no":
        del loops["half-base"]
    return tuple(loop for name, loop in loops.items() if name in names)


COLUMNS = {
    "s_per_update": ("s/update", "9.3f"),
    "images_per_s": ("images/s", "8.2f"),
    "cpu_s": ("CPU s", "7.2f"),
    "peak_mib": ("peak MiB", "8.0f"),
    "before_mib": ("before", "6.0f"),
    "over_full": ("x full", "6.2f"),
    "over_lora": ("x lora", "6.2f"),
    "over_half_base": ("x half", "6.2f"),
    "mfu": ("MFU", "6.1%"),
    "mfu_of_matmul": ("of mm", "6.1%"),
}
"""Key of a row -> title and format; what a row has not is left blank."""
HEADER = "model loop      prec train ckpt compile graphs batch " + " ".join(
    title.rjust(int(style.split(".")[0])) for title, style in COLUMNS.values()
)


def line(trial: Trial, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{trial.model:5s} {trial.loop:9s} {trial.precision:4s} {trial.train:5s} {trial.checkpointing:4s} {trial.compile:7s} {trial.graphs:6s} {trial.train_batch_size:5d}"
    if "error" in row:
        return f"{name}  {row['error']}"
    cells = [
        format(row[key], style) if key in row else " " * int(style.split(".")[0])
        for key, (_, style) in COLUMNS.items()
    ]
    return " ".join([name, *cells]).rstrip()


class Table:
    """The rows of all models, printed and written as they come."""

    def __init__(self, machine: str, output: Path | None, peaks: dict[str, float]) -> None:
        self._report: dict[str, Any] = {"hardware": machine, **peaks, "rows": []}
        self._output, self._peaks = output, peaks
        self._flops: dict[str, int | None] = {}

    def add(self, trial: Trial, row: dict[str, Any]) -> None:
        """Print a row, on CUDA with its MFU, and write all rows until now."""
        count = self._flops.get(trial.train)
        if count is not None and "error" not in row:
            rate = count * row["images_per_s"] / 1e12
            row |= {"flops_per_image": count, "mfu": rate / self._peaks["peak_tflops"]}
            row |= {"mfu_of_matmul": rate / self._peaks["matmul_tflops"]}
        print(line(trial, row), flush=True)
        self._report["rows"].append(asdict(trial) | row)
        if self._output is not None:
            write_json(self._output, self._report)

    def count(self, trial: Trial) -> None:
        """Count the operations of an update that trains these weights, once."""
        if trial.train not in self._flops:
            self._flops[trial.train] = count_flops(trial)


def run(config: Config, model: ModelName, workdir: Path, table: Table) -> None:
    """Measure one model: of tiny each setting in a process of its own, whose memory can be told."""
    parts = parts_of(model, workdir)
    for mine in trials(config, parts).values():
        if model == "tiny":
            for trial in dict.fromkeys(rival for one in mine for rival in rivals(one, config.published)):
                table.add(trial, _alone(trial, ()))
            for trial in mine:
                table.add(trial, _alone(trial, rivals(trial, config.published)))
            continue
        for trial in (
            [*mine, *rivals(mine[0], config.published)] if parts["device"] == "cuda" and config.mfu else []
        ):
            table.count(trial)
        for others in dict.fromkeys(rivals(trial, config.published) for trial in mine):
            measure_together(
                [trial for trial in mine if rivals(trial, config.published) == others], others, table.add
            )


def _alone(trial: Trial, others: Sequence[Trial]) -> dict[str, Any]:
    return fresh(measure_alone, trial, others) or {"error": "the process was killed"}


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    cuda = torch.cuda.is_available()
    models: tuple[ModelName, ...] = config.models or (("tiny", "sd1") if cuda else ("tiny",))
    peaks = {}
    with exit_on_user_error():
        if "sd1" in models and not cuda:
            raise ValueError("--models sd1 needs a CUDA device; benchmarks/full_size.py runs it on the CPU")
        if "fp16" in (config.precision or ()) and {*models} != {"sd1"}:
            raise ValueError(
                "--precision fp16 needs a CUDA device, and tiny and thin run on the CPU: --models sd1"
            )
        if "sd1" in models:
            peaks = {"peak_tflops": config.peak_tflops or peak_tflops()}
        for folder in (config.output and config.output.parent, config.workdir):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    machine = name_of_machine("sd1" in models)
    print(f"{machine}; late step {config.late} of {config.num_inference_steps}")
    if peaks:
        peaks["matmul_tflops"] = matmul_tflops(torch.bfloat16)
        print(
            "TFLOP/s in bf16: {peak_tflops:.0f} nominal, {matmul_tflops:.0f} in a matrix product".format(
                **peaks
            )
        )
    print(HEADER, flush=True)
    table = Table(machine, config.output, peaks)
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            run(config, model, config.workdir or Path(scratch), table)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
