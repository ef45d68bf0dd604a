"""Run all parts of benchmarks/gpu.sh, each in a process of its own with a time limit, and write one table.

    python benchmarks/gpu.py                                    # needs a CUDA device
    python benchmarks/gpu.py --dry                              # on a CPU: the same code on the embedded models
    python benchmarks/gpu.py --parts updates forwards --output-dir gpu-results

The libraries are imported once, before the processes are forked: on a fresh machine that takes longer than some parts. A part
that needs CUDA is skipped by name in a dry run. The table, table.md, is written anew after each part.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import exit_on_user_error, parse
from preftune.files import check_writable

PartName = Literal["limits", "weights", "updates", "forwards", "parity", "tests", "scoring", "compile"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part: its time limit in seconds, its program with flags, and the flags that a dry run adds or None where it needs CUDA."""

    limit: int
    module: str
    flags: str
    dry: str | None


_OWN = "benchmarks.gpu_parts"
PARTS: dict[PartName, Part] = {
    "limits": Part(limit=15, module=_OWN, flags="--part limits --output {out}", dry="--dry"),
    "weights": Part(
        limit=45, module=_OWN, flags="--part weights --output {out} --workdir {work}", dry="--dry"
    ),
    "forwards": Part(
        limit=45, module=_OWN, flags="--part forwards --output {out}", dry="--dry --train-batch-size 2"
    ),
    "updates": Part(
        limit=150,
        module="benchmarks.refl_step",
        flags="--models sd1 --train-batch-size 2 8 --precision bf16 --checkpointing off --compile off --graphs on --published full --repeats 2 --no-mfu --workdir {work} --output {out}",
        dry="--models tiny --train-batch-size 2 --compile off --num-inference-steps 6 --late 4 --repeats 1",
    ),
    "parity": Part(limit=30, module=_OWN, flags="--part parity --output {out} --workdir {work}", dry="--dry"),
    "tests": Part(
        limit=60,
        module="pytest",
        flags="-m gpu -n 0 -v -p no:cacheprovider tests/test_lean.py tests/test_gpu.py",
        dry=None,
    ),
    "scoring": Part(
        limit=75,
        module="benchmarks.score",
        flags="--scorers hpsv2.1 --precision bf16 --batch-size 128 --images 512 --workers 16 --reload-images 0 --workdir {work} --output {out}",
        dry="--scorers imagereward-tiny --precision fp32 --batch-size 32 --images 32 --workers 2",
    ),
    "compile": Part(limit=60, module=_OWN, flags="--part compile --output {out}", dry=None),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the parts and write a table."""

    parts: tuple[PartName, ...] = tuple(PARTS)
    """Parts to run, in this order."""
    output_dir: Path = Path("gpu-results")
    """Folder for a JSON file of each part, and table.md."""
    workdir: Path = Path("gpu-work")
    """Folder for weights of published size, 8 GB; kept between calls."""
    dry: bool = False
    """Run on the CPU with the embedded models: shows that the code works, and measures nothing."""
    limit_scale: float = 1.0
    """Factor on the time limits, which are those of an H100."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"--parts is empty; name some of {', '.join(PARTS)}, or leave it out for all")
        if not 0 < self.limit_scale < math.inf:
            raise ValueError(f"--limit-scale must be above 0 and finite, got {self.limit_scale:g}")
        check_writable(self.output_dir)
        check_writable(self.workdir, "--workdir")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

# A process that has asked the driver for devices cannot be forked; this asks the management library instead.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def work(name: PartName, config: Config) -> None:
    """Do a part, in a process of its own, which ends with its exit code."""
    part = PARTS[name]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()  # with the processes that it starts itself, so that all can be ended
    words = part.flags.format(out=config.output_dir / f"{name}.json", work=config.workdir).split()
    words += (part.dry or "").split() if config.dry else []
    module = importlib.import_module(part.module)
    if part.module == "pytest":
        sys.exit(int(module.main(words)))
    sys.argv = [f"{part.module.rpartition('.')[2]}.py", *words]
    sys.exit(module.main(parse(module.Config, words)))


def run(name: PartName, config: Config) -> str:
    """Run a part within its limit and return how it ended."""
    part = PARTS[name]
    if config.dry and part.dry is None:
        return "skipped: needs a CUDA device"
    limit, began = part.limit * config.limit_scale, time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=work, args=(name, config))
    process.start()
    try:
        process.join(limit)
        if process.exitcode is None:
            return f"cut at its limit of {limit:.0f} s"
    finally:  # also where a signal ends this program
        assert process.pid is not None, "started"
        with contextlib.suppress(ProcessLookupError):  # what the part started and left running, too
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    end = "done" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"
    return f"{end} in {time.perf_counter() - began:.0f} s of {limit:.0f}"


def table(config: Config, ends: dict[PartName, str]) -> str:
    """Return the rows of all parts so far as Markdown."""
    lines = []
    for name, end in ends.items():
        lines += ["", f"## {name}: {end}", ""]
        path = config.output_dir / f"{name}.json"
        if not path.is_file():
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        lines += [report["hardware"], ""]
        columns = list(dict.fromkeys(key for row in report["rows"] for key in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in report["rows"]]
    return "\n".join(lines).strip() + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ask_for_cuda() -> None:
    """End with exit code 0 where there is a CUDA device, in a process of its own: one that has asked cannot be forked."""
    import torch

    sys.exit(not torch.cuda.is_available())


def check_device(config: Config) -> None:
    """Raise ValueError where there is no CUDA device, but in a dry run."""
    if config.dry:
        return
    process = multiprocessing.get_context("fork").Process(target=_ask_for_cuda)
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(
            "torch finds no CUDA device (preftune doctor says why); --dry runs the same code on the CPU"
        )


def main(config: Config) -> int:
    """Run the parts; 1 where one failed or was cut."""
    with exit_on_user_error():
        check_device(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for name in config.parts:
        if PARTS[name].module != "pytest" and (PARTS[name].dry is not None or not config.dry):
            importlib.import_module(PARTS[name].module)
    print(f"imports: {time.perf_counter() - began:.0f} s", flush=True)
    ends: dict[PartName, str] = {}
    for name in config.parts:
        print(f"== {name}, at {time.perf_counter() - began:.0f} s", flush=True)
        ends[name] = run(name, config)
        print(f"== {name}: {ends[name]}", flush=True)
        (config.output_dir / "table.md").write_text(table(config, ends), encoding="utf-8")
    print(f"== all parts in {time.perf_counter() - began:.0f} s; {config.output_dir / 'table.md'}")
    return int(any(not end.startswith(("done", "skipped")) for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main(CONFIG))
