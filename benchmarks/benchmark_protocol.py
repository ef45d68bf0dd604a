"""A whole benchmark protocol at its real size: time, memory, and the same table after kills at random moments.

    python benchmarks/benchmark_protocol.py --workdir /tmp/protocol --kills 10 --output benchmark_protocol.json

HPS v2's protocol (4 styles x 800 prompts, parts of 80) with two models, the embedded one and the same with a LoRA of random weights,
and the embedded scorer: prompts are captions of the shapes world, so scores mean nothing. Once it runs undisturbed; then in another
folder, where it is killed at random moments and started again. Images, table.csv, groups.csv and scores.csv must be the same bytes.
A tenth of the prompts is run as well: memory must not grow with their number. At the end it is computed what ViT-H/14 would take on a
GPU.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import PROMPTS, ROOT, TINY, check_file
from preftune.cli import exit_on_user_error, parse

STYLES = ("anime", "concept-art", "paintings", "photo")
COMPARED = ("table.csv", "groups.csv", "scores.csv", "measures.csv")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run HPS v2's protocol with the embedded models."""

    workdir: Path
    """Folder of prompts, images and reports; it must be empty or absent."""
    per_style: int = 800
    """Prompts of each style."""
    kills: int = 10
    """Kills at random moments."""
    num_inference_steps: int = 8
    """Denoising steps of each image."""
    seed: int = 0
    """Of the moments."""
    images_per_second: float = 1000.0
    """What ViT-H is assumed to score on the GPU, besides its own arithmetic: what the decoding processes deliver."""
    output: Path | None = None
    """JSON file."""

    def __post_init__(self) -> None:
        if self.per_style < 10 or self.kills < 0:
            raise ValueError(
                f"--per-style must be at least 10 and --kills at least 0, got {self.per_style} and {self.kills}"
            )
        if self.workdir.exists() and any(self.workdir.iterdir()):
            raise ValueError(f"--workdir {self.workdir} holds something; choose an empty folder")
        check_file(self.output)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch

from benchmarks.hardware import name_of_machine, write_json
from preftune import families
from preftune.lora.config import LoRA
from rewards import CARDS
from rewards.card import Clip


def write_inputs(config: Config) -> None:
    """Write the lists of prompts, and a LoRA whose weights are random."""
    captions = PROMPTS.read_text(encoding="utf-8").splitlines()
    lists = config.workdir / "prompts"
    lists.mkdir(parents=True)
    for number, style in enumerate(STYLES):
        texts = [
            captions[(number * config.per_style + index) % len(captions)] for index in range(config.per_style)
        ]
        (lists / f"{style}.json").write_text(json.dumps(texts), encoding="utf-8")
    (config.workdir / "protocol.yaml").write_text(
        f"follows: HPS v2 with captions of the shapes world\nprompt_files: [{', '.join(f'{s}={s}.json' for s in STYLES)}]\n"
        f"source: benchmarks/benchmark_protocol.py\nnum_prompts: {config.per_style}\npart_size: {max(1, config.per_style // 10)}\nfactor: 100\n"
        "rewards: [imagereward-tiny]\n"
        f"sample: {{num_inference_steps: {config.num_inference_steps}, solver: ddim, guidance_scale: 3, resolution: 64}}\n",
        encoding="utf-8",
    )
    family = families.load(TINY / "pipeline")
    trained = family.trainable(LoRA(rank=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    for weight in (weight for weight in trained.parameters() if weight.requires_grad):
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    family.save_tuned(config.workdir / "lora", LoRA(rank=4))


def commands(config: Config, name: str, count: int | None = None) -> list[list[str]]:
    """Return the two commands of a whole protocol, whose files are in workdir/NAME."""
    folder, protocol = config.workdir / name, str(config.workdir / "protocol.yaml")
    lists = ["--protocol", protocol, "--prompts", str(config.workdir / "prompts")]
    columns = ["--columns", "base=", f"other={config.workdir / 'lora'}"]
    fewer = [] if count is None else ["--count", str(count)]
    return [
        ["eval/generate.py", *lists, *fewer, *columns, "--sample.batch-size", "32", "--output-dir", str(folder / "images")],
        ["eval/benchmark.py", *lists, "--workers", "0", "--output-dir", str(folder / "report"), "--folders",
         str(folder / "images" / "base"), str(folder / "images" / "other")],
    ]  # fmt: skip


def run(command: list[str], *, until: float | None = None) -> tuple[float, float, int | None]:
    """Start a program, kill it after `until` seconds where that is given; return seconds, its peak of memory in MiB and exit code."""
    began, peak = time.monotonic(), 0.0
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.set_blocking(process.stderr.fileno(), False)  # type: ignore[union-attr]
        said = b""
        while process.poll() is None:
            said = (said + (process.stderr.read() or b""))[-2000:]  # type: ignore[union-attr]
            peak = max(peak, peak_mib_of(process.pid))
            if until is not None and time.monotonic() - began > until:
                process.kill()
            time.sleep(0.05)
    if process.returncode not in (0, -9):
        raise RuntimeError(said.decode(errors="replace"))
    return time.monotonic() - began, peak, process.returncode


def peak_mib_of(pid: int) -> float:
    """Return the peak of another process' resident memory, MiB; 0 once it has ended."""
    try:
        match = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


def killed(config: Config, seconds: list[float]) -> int:
    """Run the protocol with kills at random moments within `seconds`, the time that each program takes; return the number of starts."""
    rng, starts = random.Random(config.seed), 0
    programs = commands(config, "killed")
    shares = [round(config.kills * seconds[0] / sum(seconds)), 0]
    shares[1] = config.kills - shares[0]
    for command, kills, length in zip(programs, shares, seconds, strict=True):
        for _ in range(kills):
            *_, code = run(command, until=rng.uniform(0, length / max(1, kills) + 5))
            starts += 1
            if code == 0:
                break
        starts += 1
        run(command)
    return starts


def differing(config: Config) -> list[str]:
    """Return the files that differ between the undisturbed and the killed run."""
    one, two = config.workdir / "whole", config.workdir / "killed"
    names = [f"report/{name}" for name in COMPARED]
    names += [path.relative_to(one).as_posix() for path in sorted((one / "images").rglob("*.png"))]
    return [
        name for name in names
        if not (two / name).is_file() or (one / name).read_bytes() != (two / name).read_bytes()
    ]  # fmt: skip


def operations(clip: Clip) -> tuple[float, float]:
    """Return the floating-point operations of an image and of a text: two a weight and token, and attention; layers alone."""
    image_tokens = (224 // clip.patch) ** 2 + 1
    texts = 77
    return tuple(
        layers * (2 * 12 * width**2 * tokens + 4 * width * tokens**2)
        for layers, width, tokens in (
            (clip.vision_layers, clip.vision_width, image_tokens),
            (clip.text_layers, clip.text_width, texts),
        )
    )  # type: ignore[return-value]


def on_a_gpu(config: Config, images: int) -> dict[str, Any]:
    """Return what scoring so many images by ViT-H/14 would take, computed."""
    clip = CARDS["hpsv2"].clip
    assert clip is not None
    each = sum(operations(clip))
    return {
        "operations of an image and its prompt, 1e9": each / 1e9,
        "seconds of arithmetic at 400 teraflops (an H100 in bf16, 40 %)": images * each / 4e14,
        "seconds of arithmetic at 40 teraflops (an H100 in fp32, 60 %)": images * each / 4e13,
        f"seconds of decoding at {config.images_per_second:g} images/s": images / config.images_per_second,
        "weights in fp32, GiB": (CARDS["hpsv2"].about_bytes or 0) / 2**30,
    }


def main(config: Config) -> None:
    """Measure and print."""
    with exit_on_user_error():
        write_inputs(config)
    images = 2 * len(STYLES) * config.per_style
    whole = [run(command) for command in commands(config, "whole")]
    small = [run(command) for command in commands(config, "small", count=max(1, config.per_style // 10))]
    starts = killed(config, [seconds for seconds, *_ in whole])
    report = {
        "machine": name_of_machine(cuda=False),
        "images": images,
        "seconds": {"generate": whole[0][0], "benchmark": whole[1][0]},
        "peak MiB": {"generate": whole[0][1], "benchmark": whole[1][1]},
        "peak MiB with a tenth of the prompts": {"generate": small[0][1], "benchmark": small[1][1]},
        "starts of the killed run": starts,
        "files that differ after it": differing(config),
        "ViT-H/14 on a GPU, computed": on_a_gpu(config, images),
    }
    print(json.dumps(report, indent=1))
    if config.output is not None:
        write_json(config.output, report)


if __name__ == "__main__":
    main(CONFIG)
