"""ReFL at real size on a CPU: two LoRA updates of Stable Diffusion 1.x at 512 px with a full-size
ImageReward.

Both models have the published configurations and random weights, so nothing is downloaded: memory and time
are realistic, images and scores are noise. The driver is started as a user would, with `accelerate launch
finetune/refl.py`, in separate processes whose memory is monitored.

    python benchmarks/full_size.py --workdir /tmp/full_size --prompts refl_data.json
    python benchmarks/full_size.py --workdir /tmp/full_size --fast                    # 4 denoising steps instead of 40

Needs Linux and 4 GB of disk in --workdir, and no GPU (accelerate uses one if available). Left out: any
measure of quality.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.paths import PROMPTS, ROOT
from preftune.cli import exit_on_user_error, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run two full-size ReFL updates and report their peak memory and time."""

    workdir: Path
    """Folder for 4 GB of models and for the run; existing files are reused."""
    prompts: Path = PROMPTS
    """Prompt file, such as the published refl_data.json."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the model; the scorer uses float32, the default of the driver."""
    max_train_steps: int = 2
    """ReFL updates."""
    threads: int = 0
    """CPU threads of the driver; 0 = all."""
    fast: bool = False
    """4 denoising steps instead of 40, for a quick check."""

    def __post_init__(self) -> None:
        if self.max_train_steps < 1:
            raise ValueError(f"--max-train-steps must be at least 1, got {self.max_train_steps}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import psutil
import torch

from benchmarks.models import build_sd1
from preftune.records import read_jsonl


def command(config: Config) -> list[str]:
    """Return the driver's command line: published T and window, memory savers on, next to nothing sampled."""
    parts, steps = config.workdir, ("4", "3", "3") if config.fast else ("40", "30", "39")
    flags = {
        "--model": parts / "pipeline",
        "--prompts": config.prompts,
        "--validation-prompts": config.prompts,
        "--num-validation-prompts": 1,
        "--rewards": "imagereward=1.0",
        "--reward-files": f"imagereward={parts / 'scorer'}",
        "--pretraining": "off",
        "--num-inference-steps": steps[0],
        "--resolution": 512,
        "--sample.num-inference-steps": 1,
        "--train-batch-size": 1,
        "--gradient-accumulation-steps": 1,
        "--max-train-steps": config.max_train_steps,
        "--mixed-precision": config.mixed_precision,
        "--threads": config.threads,
        "--output-dir": parts / "run",
    }
    options = [str(word) for pair in flags.items() for word in pair]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"),
        *("--mixed_precision", config.mixed_precision, str(ROOT / "finetune" / "refl.py")),
        *(
            *options,
            "--window",
            *steps[1:],
            "--gradient-checkpointing",
            "--vae-checkpointing",
            "--overwrite-output-dir",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen of a command and its descendants; GiB are 2^30 bytes."""

    code: int
    seconds: float
    tree_gib: float
    """Largest sum of resident memory over the processes, looked at five times a second."""
    process_gib: float
    """Largest resident memory of any one process, as the kernel kept it."""


def watch(argv: Sequence[str]) -> Watched:
    """Run a command to its end and return its exit code, time and peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen(argv)
    parent = psutil.Process(process.pid)
    tree = largest = 0
    while process.poll() is None:
        try:
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        total = 0
        for one in family:
            resident, peak = _resident(one.pid)
            total, largest = total + resident, max(largest, peak)
        tree = max(tree, total)
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    return Watched(
        code=process.returncode, seconds=seconds, tree_gib=tree / 2**30, process_gib=largest / 2**30
    )


def _resident(pid: int) -> tuple[int, int]:
    """Return a process' resident memory and its peak, bytes; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    resident, peak = (int(fields[name][0]) * 1024 if name in fields else 0 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def main(config: Config) -> int:
    """Build the models, run the driver, report."""
    with exit_on_user_error():
        if not config.prompts.is_file():
            raise ValueError(f"{config.prompts} is not a file")
        if not Path("/proc/self/status").is_file():
            raise ValueError("memory is read from /proc, which this system does not have; use Linux")
        config.workdir.mkdir(parents=True, exist_ok=True)
    print(f"models: 4 GB in {config.workdir}", flush=True)
    # In a separate process, to release its memory.
    builder = multiprocessing.get_context("spawn").Process(target=build_sd1, args=(config.workdir,))
    builder.start()
    builder.join()
    if builder.exitcode:
        return 1
    argv = command(config)
    print(" ".join(argv), flush=True)
    seen = watch(argv)
    if seen.code:
        return seen.code
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, precision {config.mixed_precision}")
    print(
        f"peak memory {seen.process_gib:.2f} GiB (driver), {seen.tree_gib:.2f} GiB (with the launcher), {seen.seconds:.0f} s in all"
    )
    for row in read_jsonl(config.workdir / "run" / "metrics.jsonl"):
        if "images_per_s" in row:
            print(
                f"update {row['step']}: {1 / float(str(row['images_per_s'])):.1f} s, late step {row['late_step']:.0f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
