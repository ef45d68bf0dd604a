"""Time of one forward pass of the denoiser: ours without and with gradient, and the released loops', in turns in one
process.

    python benchmarks/forward.py                                  # a UNet of SD 1.x's depth with narrow layers: host time
    python benchmarks/forward.py --model sd1 --train-batch-size 1 2 8   # on a CUDA device

With narrow layers the arithmetic is small, and what remains is the host's work for each kernel, which a GPU waits for at
small batches. `host ms` is the CPU time until the call returns, the least of --repeats calls; `of full` and `of lora` are it
over the released loops'. `device ms` is the median time until the device is idle again.

| row | what is called |
|---|---|
| published full, published lora, half-base lora | the UNet as in benchmarks/published.py, without gradient |
| ours full, ours lora | `family.predict` in a block of `family.lean()`, as the steps without gradient |
| ours ..., gradient | `family.predict`, as the last step: its forward pass alone |
| ours ..., begin | what begins such a block, once an update: the trained weights are merged or cast |

Hardware: one CPU core, a minute; --model sd1 a CUDA device and 4 GB of disk.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.paths import check_file
from preftune.cli import exit_on_user_error, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the denoiser's forward pass."""

    model: Literal["thin", "sd1"] = "thin"
    """Stable Diffusion 1.x with narrow layers at 64 px on the CPU, or as it is at 512 px on a CUDA device."""
    precision: Literal["no", "bf16"] = "bf16"
    """Precision of our run, on the CPU also of the released loops; these take fp16 on CUDA."""
    train_batch_size: tuple[int, ...] = (1,)
    """Images in a call."""
    repeats: int = 20
    """Timed calls of each row."""
    threads: int = 1
    """CPU threads."""
    workdir: Path | None = None
    """Keeps the models that are built between calls; None = a temporary folder."""
    output: Path | None = None
    """JSON file with everything measured."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not self.train_batch_size or min(self.train_batch_size) < 1:
            sizes = " ".join(map(str, self.train_batch_size)) or "none"
            raise ValueError(f"--train-batch-size must be at least 1, got {sizes}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from torch import Tensor

from benchmarks import published, refl_loops
from benchmarks.hardware import name_of_machine, write_json
from benchmarks.refl_loops import Train, Trial, parts_of
from preftune.families import Family

TRAINS: tuple[Train, ...] = ("full", "lora")
SAME: dict[str, Any] = {
    "checkpointing": "off",
    "compile": "off",
    "graphs": "off",
    "num_inference_steps": 40,
    "late": 35,
    "repeats": 1,
    "threads": 0,
}
"""Fields of Trial that a forward pass does not see."""

WARMUP = 3
"""Calls before timing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is timed, and the context that is entered before."""

    name: str
    call: Callable[[int], object]
    context: Callable[[], AbstractContextManager[object]] = torch.no_grad


def rows(trial: Trial) -> list[Row]:
    """Return the rows of a batch; `trial` is ours."""
    found = [released(trial.published("published", train)) for train in TRAINS]
    if trial.precision != "no":
        found.append(released(trial.published("half-base", "lora")))
    return found + [row for train in TRAINS for row in ours(replace(trial, train=train))]


def released(trial: Trial) -> Row:
    """Return the forward pass of a released loop."""
    parts = published.load(replace(trial, checkpointing="off"))
    states = published.encoder(parts.text_encoder, parts.tokenizer)(trial.prompts(0))
    x, t = _inputs(trial, parts)
    return Row(name=f"{trial.loop} {trial.train}", call=lambda _: parts.unet(x, t, states).sample.float())


def ours(trial: Trial) -> list[Row]:
    """Return our forward pass without and with gradient, and what begins a block of passes without gradient."""
    family, _ = refl_loops.load(trial)
    cond = family.encode(trial.prompts(0))
    x, t = _inputs(trial, family)
    levels = t.expand(len(x))

    def begin(_: int) -> None:
        with family.lean():
            pass

    def predict(_: int) -> Tensor:
        return family.predict(x, levels, cond).eps

    name = f"ours {trial.train}"
    return [
        Row(name=name, call=predict, context=family.lean),
        Row(name=f"{name}, gradient", call=predict, context=torch.enable_grad),
        Row(name=f"{name}, begin", call=begin),
    ]


def _inputs(trial: Trial, family: Family) -> tuple[Tensor, Tensor]:
    """Return latents and a noise level."""
    shape = family.latent_shape(trial.refl().model.size(family.defaults))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(trial.train_batch_size, *shape, generator=generator)
    return x.to(trial.device), torch.tensor(501, device=trial.device)


def measure(found: list[Row], device: str, repeats: int) -> list[dict[str, Any]]:
    """Return host_ms (CPU time until the call returns, the least of all) and device_ms (median, until the device is idle) of each row;
    the rows take turns.
    """
    columns: list[list[tuple[float, float]]] = [[] for _ in found]
    for index in range(WARMUP + repeats):
        for row, column in zip(found, columns, strict=True):
            with row.context():
                column.append(timed(row.call, index, device))
    return [
        {
            "row": row.name,
            "host_ms": 1e3 * min(host for host, _ in column[WARMUP:]),
            "device_ms": 1e3 * statistics.median(whole for _, whole in column[WARMUP:]),
        }
        for row, column in zip(found, columns, strict=True)
    ]


def timed(call: Callable[[int], object], index: int, device: str) -> tuple[float, float]:
    """Return the CPU time until the call returns, and the time until the device is idle, seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    began, cpu = time.perf_counter(), time.process_time()
    call(index)
    host = time.process_time() - cpu
    if device == "cuda":
        torch.cuda.synchronize()
    return host, time.perf_counter() - began


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    cuda = config.model == "sd1"
    with exit_on_user_error():
        if cuda and not torch.cuda.is_available():
            raise ValueError("--model sd1 needs a CUDA device; --model thin runs on the CPU")
        for folder in (config.output and config.output.parent, config.workdir):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    machine = name_of_machine(cuda)
    print(f"{machine}; least of {config.repeats} calls")
    print(f"{'batch':5s} {'row':22s}  host ms  of full  of lora  device ms", flush=True)
    report: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        parts = parts_of(config.model, config.workdir or Path(scratch))
        for batch in config.train_batch_size:
            trial = Trial(
                loop="ours", precision=config.precision, train="lora", train_batch_size=batch, **SAME, **parts
            )
            found = measure(rows(trial), trial.device, config.repeats)
            full, lora = (row["host_ms"] for row in found[:2])
            for row in found:
                ratios = f"{row['host_ms'] / full:8.2f} {row['host_ms'] / lora:8.2f}"
                print(
                    f"{batch:5d} {row['row']:22s} {row['host_ms']:8.2f} {ratios} {row['device_ms']:10.2f}",
                    flush=True,
                )
                report.append({"train_batch_size": batch, **row})
    if config.output is not None:
        write_json(config.output, {"hardware": machine, "rows": report})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
