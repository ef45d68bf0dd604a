"""Run all parts of benchmarks/gpu.sh, each in a process of its own with a time limit, and write one table.

    python benchmarks/gpu.py                                    # needs a CUDA device
    python benchmarks/gpu.py --dry                              # on a CPU: the same code on the embedded models
    python benchmarks/gpu.py --parts updates forwards --output-dir gpu-results

A part that needs CUDA is skipped by name in a dry run. The table, table.md, is written anew after each part.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import parse

PartName = Literal["limits", "updates", "forwards", "tests", "parity", "scoring"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the parts and write a table."""

    parts: tuple[PartName, ...] = ("limits", "updates", "forwards", "tests", "parity", "scoring")
    """Parts to run, in this order."""
    output_dir: Path = Path("gpu-results")
    """Folder for a JSON file and a log of each part, and table.md."""
    workdir: Path = Path("gpu-work")
    """Folder for weights of published size, 8 GB; kept between calls."""
    dry: bool = False
    """Run on the CPU with the embedded models: shows that the code works, and measures nothing."""
    limit_scale: float = 1.0
    """Factor on the time limits, which are those of an H100."""


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part: its time limit in seconds, its command behind the interpreter, and what the dry run adds or None where it needs CUDA."""

    limit: int
    command: str
    dry: str | None


PARTS: dict[PartName, Part] = {
    "limits": Part(limit=25, command="benchmarks/gpu_parts.py --part limits --output {out}", dry="--dry"),
    "updates": Part(
        limit=140,
        command="benchmarks/gpu_parts.py --part updates --output {out} --workdir {work}",
        dry="--dry",
    ),
    "forwards": Part(
        limit=100,
        command="benchmarks/gpu_parts.py --part forwards --output {out}",
        dry="--dry --train-batch-size 2",
    ),
    "tests": Part(limit=75, command="-m pytest -m gpu -n 0 -q -p no:cacheprovider tests", dry=None),
    "parity": Part(
        limit=40, command="benchmarks/gpu_parts.py --part parity --output {out} --workdir {work}", dry="--dry"
    ),
    "scoring": Part(
        limit=100,
        command="benchmarks/score.py --scorers hpsv2.1 --precision bf16 --batch-size 128 --images 512 --workers 16 --reload-images 0 --workdir {work} --output {out}",
        dry="--scorers imagereward-tiny --precision fp32 --batch-size 32 --images 32 --workers 2",
    ),
}


def run(name: PartName, config: Config) -> str:
    """Run a part with its output shown and kept; return how it ended."""
    part = PARTS[name]
    out, log = config.output_dir / f"{name}.json", config.output_dir / f"{name}.log"
    words = part.command.format(out=out, work=config.workdir).split()
    if config.dry:
        if part.dry is None:
            return "skipped: needs a CUDA device"
        words += part.dry.split()
    limit = part.limit * config.limit_scale
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None, "a pipe"
        timer = _kill_after(process, limit)
        for text in process.stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            file.write(text)
        code = process.wait()
        timer.cancel()
    taken = time.perf_counter() - began
    if taken >= limit:
        return f"cut at its limit of {limit:.0f} s"
    return f"{'done' if code == 0 else f'failed with exit code {code}'} in {taken:.0f} s of {limit:.0f}"


def _kill_after(process: subprocess.Popen[str], limit: float) -> Any:
    import threading

    timer = threading.Timer(limit, process.kill)
    timer.start()
    return timer


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


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(config: Config) -> int:
    """Run the parts; 1 where one failed or was cut."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    ends: dict[PartName, str] = {}
    began = time.perf_counter()
    for name in config.parts:
        print(f"== {name}, at {time.perf_counter() - began:.0f} s", flush=True)
        ends[name] = run(name, config)
        print(f"== {name}: {ends[name]}", flush=True)
        (config.output_dir / "table.md").write_text(table(config, ends), encoding="utf-8")
    print(f"== all parts in {time.perf_counter() - began:.0f} s; {config.output_dir / 'table.md'}")
    return int(any(not end.startswith(("done", "skipped")) for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main(CONFIG))
