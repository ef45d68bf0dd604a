r"""What the options for speed and memory do to the result: ReFL in the shapes world with each of them, by gold and by CPU time.

    python benchmarks/options.py --workdir FOLDER                       # a short run of each, about a minute of CPU time
    python benchmarks/options.py --workdir FOLDER --max-train-steps 85 --train-batch-size 32 \
        --num-validation-prompts 256 --sample-steps 25 --seeds 3                             # the demo's own length

Gold is the judge's score of held-out captions, which no run optimises; `change` is the difference to the run without options on the
same captions and seeds, with its 95 % interval over all of them. Each run is that of `finetune/refl.py` with its
embedded configuration; runs in --workdir that are complete are not made again. For --reward-vae an AutoencoderTiny
is first fitted to the embedded decoder. Hardware: two CPU cores. At this size the denoiser's arithmetic is small, so
that CPU time says how much work an option saves or adds here, not what it saves on a GPU.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import check_file
from preftune.cli import exit_on_user_error, parse

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, str] = {
    "default": "",
    "few steps: dpm++, 3": "--rollout-solver dpm++ --rollout-steps 3",
    "few steps: ddim, 3": "--rollout-solver ddim --rollout-steps 3",
    "AutoencoderTiny": "--reward-vae {taesd}",
    "fused AdamW": "--fused-adam",
    "8-bit AdamW": "--use-8bit-adam",
    "offload": "--offload",
    "base in 4 bits": "--quantization 4bit",
    "base in 8 bits": "--quantization 8bit",
    "base in fp8": "--quantization fp8",
}
"""Name -> flags of finetune/refl.py."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what each option does to gold in the shapes world."""

    workdir: Path
    """Folder for the runs."""
    options: tuple[str, ...] = tuple(OPTIONS)
    """Names of the options; `default` is always measured."""
    seeds: int = 1
    """Runs of each, with seeds 0, 1, ..."""
    max_train_steps: int = 30
    """Updates of a run; the demo has 85."""
    train_batch_size: int = 8
    """Images of an update; the demo has 32."""
    num_validation_prompts: int = 64
    """Held-out captions; the demo has 256."""
    sample_steps: int = 10
    """Denoising steps of the validation images; the demo has 25."""
    fit_steps: int = 400
    """Steps in which the AutoencoderTiny is fitted."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        unknown = [name for name in self.options if name not in OPTIONS]
        if unknown:
            raise ValueError(f"--options {unknown[0]} is unknown; one of {', '.join(OPTIONS)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One option: means over all captions and seeds."""

    option: str
    flags: str
    before: float
    """Gold before training; a quantized base is another model."""
    after: float
    change: tuple[float, float, float]
    """Of gold after training, against the default: the mean and its 95 % interval."""
    proxy: float
    cpu_s: float
    """A run with its validation."""


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
import torch
from diffusers import AutoencoderTiny

from finetune import refl
from preftune import families
from preftune.images import load_pixels
from preftune.statistics import bootstrap


def fit_decoder(folder: Path, steps: int) -> None:
    """Write an AutoencoderTiny whose decoder gives what the embedded model's gives, for latents of its images."""
    torch.manual_seed(0)
    family = families.load(ROOT / "assets" / "tiny" / "pipeline")
    paths = sorted((ROOT / "assets" / "tiny" / "images").glob("*/*.png"))[: min(512, 16 * steps)]
    with torch.no_grad():
        pixels = torch.stack([load_pixels(path, 64) for path in paths])
        latents = torch.cat([family.encode_pixels(part) for part in pixels.split(64)])
        latents = latents + 0.3 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(
            latents
        )  # as predictions are
        wanted = torch.cat([family.decode(part) for part in latents.split(64)])
    widths, blocks = (16, 16, 16, 16), (1, 1, 1, 1)
    student = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    optimizer = torch.optim.AdamW(student.decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (16,))
        error = (student.decode(latents[chosen]).sample / 2 + 0.5 - wanted[chosen]).abs().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    print(
        f"AutoencoderTiny: mean absolute error {float(error.detach()):.4f} of a pixel in [0, 1]",
        file=sys.stderr,
    )
    student.save_pretrained(folder)


def train(folder: Path, flags: str, seed: int, config: Config) -> None:
    """Run finetune/refl.py in this process, and write its CPU time to FOLDER.json; nothing where that is there."""
    if folder.with_suffix(".json").is_file():
        return
    words = f"--config {refl.TINY} --output-dir {folder} --seed {seed} --sample.num-inference-steps {config.sample_steps}".split()
    for name in ("max_train_steps", "train_batch_size", "num_validation_prompts"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    start = time.process_time()
    if refl.main(parse(refl.Config, [*words, *flags.split()])):
        raise ValueError(f"the run in {folder} was stopped; start again to go on")
    folder.with_suffix(".json").write_text(json.dumps({"cpu_s": time.process_time() - start}))


def scores(folder: Path, step: int) -> dict[str, Any]:
    """Return the scores of the validation images after so many updates."""
    text = (folder / "samples" / f"step_{step:06d}" / "scores.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def row_of(option: str, config: Config) -> Row:
    """Return the figures of an option whose runs are complete."""
    steps = config.max_train_steps
    runs = [place(config, option, seed) for seed in range(config.seeds)]
    gold = np.concatenate([scores(run, steps)["gold"] for run in runs])
    plain = np.concatenate(
        [scores(place(config, "default", seed), steps)["gold"] for seed in range(config.seeds)]
    )
    return Row(
        option=option,
        flags=OPTIONS[option],
        before=float(np.mean([scores(run, 0)["gold"] for run in runs])),
        after=float(gold.mean()),
        change=bootstrap.mean(gold - plain),
        proxy=float(np.mean([scores(run, steps)["proxy"] for run in runs])),
        cpu_s=min(json.loads(run.with_suffix(".json").read_text())["cpu_s"] for run in runs),
    )


def place(config: Config, option: str, seed: int) -> Path:
    """Return the folder of a run."""
    name = "".join(letter if letter.isalnum() else "_" for letter in option)
    sizes = f"{config.max_train_steps}x{config.train_batch_size}_{config.num_validation_prompts}"
    return config.workdir / f"{name}-{sizes}-{seed}"


def table(rows: list[Row]) -> str:
    """Return the table, for LOG.md."""
    lines = [
        "| option | flags | gold before | gold after | change to default [95 %] | proxy | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, low, high = row.change
        change = "" if row.option == "default" else f"{mean:+.3f} {bootstrap.interval(low, high, '+.3f')}"
        flags = f"`{row.flags}`" if row.flags else ""
        lines.append(
            f"| {row.option} | {flags} | {row.before:.3f} | {row.after:.3f} | {change} | {row.proxy:.2f} | {row.cpu_s:.0f} |"
        )
    return "\n".join(lines)


def main(config: Config) -> int:
    """Make the runs that are missing, and print the table."""
    options = ["default", *(name for name in config.options if name != "default")]
    config.workdir.mkdir(parents=True, exist_ok=True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    taesd = config.workdir.resolve() / "taesd"
    with exit_on_user_error():
        for seed in range(config.seeds):
            for option in options:
                if "{taesd}" in OPTIONS[option] and not (taesd / "config.json").is_file():
                    fit_decoder(taesd, config.fit_steps)
                train(place(config, option, seed), OPTIONS[option].format(taesd=taesd), seed, config)
                print(f"{option}, seed {seed}", file=sys.stderr, flush=True)
    rows = [row_of(option, config) for option in options]
    print(table(rows))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
