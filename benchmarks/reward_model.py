r"""Time and memory of an update of a reward model at published size: Stable Preference on CLIP ViT-L/14, or
ViT-H/14 with a GPU.

    python benchmarks/reward_model.py --workdir /tmp/scorers
    python benchmarks/reward_model.py --workdir /tmp/scorers --scorers hpsv2 --train-batch-size 8 \
        --gradient-accumulation-steps 8 --precision bf16                                 # a CUDA device: the paper's 64 pairs

Each row runs `finetune/reward_model.py` in a fresh process with the settings of
stable_preference_clip_l.yaml: pairs, weak views, the last 18 layers of the image tower and 8 of the text
tower, two stages. A pair is a ranking of two images, each of which passes the image tower with all its
views: `images/s` counts all these passes. `s/update` is the median over the updates after the first, if
there are several. `ratio` is relative to the first row, so that `--views 0 3` gives the cost of the views.

Weights are random, of the published size, written once to --workdir, so nothing is downloaded; losses are
meaningless. Hardware: ViT-L in float32 on a CPU needs 7 GiB of memory and 6 GB of disk; ViT-H needs a GPU.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.paths import check_file
from preftune.cli import exit_on_user_error, parse
from rewards import CARDS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure updates of a full-size reward model."""

    workdir: Path
    """Folder for random weights; existing files are reused."""
    scorers: tuple[str, ...] = ("clipscore",)
    """CLIP scorers to start from: clipscore and hpsv1 are ViT-L/14; hpsv2, hpsv2.1 and pickscore ViT-H/14."""
    views: tuple[int, ...] = (3,)
    """Weak views of each image; 0 = the plain pair loss."""
    checkpointing: tuple[Literal["on", "off"], ...] = ("on",)
    """Gradient checkpointing of the towers."""
    precision: tuple[Literal["no", "bf16", "fp16"], ...] = ("no",)
    """Precision of the towers."""
    last_layers: tuple[int, int] = (18, 8)
    """Trained layers of the image tower and of the text tower."""
    train_batch_size: int = 4
    """Pairs per forward pass."""
    gradient_accumulation_steps: int = 1
    """Passes in one update."""
    max_train_steps: int = 2
    """Updates of each row."""
    threads: int = 0
    """CPU threads; 0 = torch's own choice."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name, least in (
            ("train_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("max_train_steps", 1),
            ("threads", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        if min(self.views, default=-1) < 0:
            raise ValueError(f"--views must be 0 or more, got {self.views}")
        usable = [card.name for card in CARDS.values() if card.module == "rewards.clip"]
        for name in self.scorers:
            if name not in usable:
                raise ValueError(f"--scorers {name} cannot be measured here; one of {', '.join(usable)}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch

from benchmarks.hardware import fresh, name_of_machine, peak_mib, write_json
from benchmarks.models import fresh_scorer
from benchmarks.score import write_images
from finetune import reward_model
from preftune.records import read_jsonl, write_jsonl


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table."""

    scorer: str
    weights: Path
    views: int
    checkpointing: Literal["on", "off"]
    precision: Literal["no", "bf16", "fp16"]
    last_layers: tuple[int, int]
    train_batch_size: int
    gradient_accumulation_steps: int
    max_train_steps: int
    threads: int
    device: str


def write_pairs(folder: Path, number: int) -> Path:
    """Write rankings of two images each, with different prompts as far as there are so many."""
    write_images(folder, 2 * number)
    rows = read_jsonl(folder / "metadata.jsonl")
    pairs = [
        {
            "prompt": first["text"],
            "generations": [first["file_name"], second["file_name"]],
            "ranking": [1, 2],
        }
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ]
    write_jsonl(folder / "rankings.jsonl", pairs)
    return folder


def command(trial: Trial, data: Path, output: Path) -> list[str]:
    """Return the driver's flags."""
    flags = {
        "--model": trial.scorer,
        "--weights": trial.weights,
        "--data": data,
        "--validation-share": 0.01,  # one prompt
        "--stable.views": trial.views,
        "--stable.weighting": "two-stage",
        "--stable.first-stage-steps": trial.max_train_steps // 2,
        "--train-batch-size": trial.train_batch_size,
        "--gradient-accumulation-steps": trial.gradient_accumulation_steps,
        "--max-train-steps": trial.max_train_steps,
        "--validation-steps": trial.max_train_steps,
        "--checkpointing-steps": trial.max_train_steps,
        "--learning-rate": 2e-6,
        "--adam-weight-decay": 0.2,
        "--mixed-precision": trial.precision,
        "--threads": trial.threads,
        "--output-dir": output,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    saver = ["--gradient-checkpointing"] if trial.checkpointing == "on" else []
    return [*words, "--last-layers", *map(str, trial.last_layers), *saver]


def measure(trial: Trial, scratch: Path) -> dict[str, Any]:
    """Return the figures of a row: the driver's own, and the memory of this process."""
    pairs = trial.train_batch_size * trial.gradient_accumulation_steps
    data = write_pairs(scratch / "data", pairs * trial.max_train_steps + 1)
    config = parse(reward_model.Config, command(trial, data, scratch / "run"))
    if trial.threads:
        torch.set_num_threads(trial.threads)
    before = peak_mib(trial.device)
    with contextlib.redirect_stdout(io.StringIO()):
        code = reward_model.main(config)
    if code:
        return {"error": f"the driver ended with {code}"}
    rows = [row for row in read_jsonl(scratch / "run" / "metrics.jsonl") if "images_per_s" in row]
    times = [pairs / float(row["images_per_s"]) for row in rows]
    update = statistics.median(times[1:] or times)
    return {
        "s_per_update": update,
        "images_per_s": 2 * pairs * (1 + trial.views) / update,
        "peak_mib": peak_mib(trial.device),
        "before_mib": before,
        "times": times,
        "losses": [row["loss"] for row in rows],
    }


HEADER = "scorer     views  checkpointing  prec  pairs  s/update  images/s  peak MiB  before MiB  ratio"


def line(trial: Trial, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = (
        f"{trial.scorer:9s}  {trial.views:5d}  {trial.checkpointing:13s}  {trial.precision:4s}"
        f"  {trial.train_batch_size * trial.gradient_accumulation_steps:5d}"
    )
    if "error" in row:
        return f"{name}  {row['error']}"
    return (
        f"{name}  {row['s_per_update']:8.2f}  {row['images_per_s']:10.2f}  {row['peak_mib']:8.0f}"
        f"  {row['before_mib']:10.0f}  {row['ratio']:5.2f}"
    )


def trials(config: Config, weights: dict[str, Path], device: str) -> list[Trial]:
    """Return the rows of the table."""
    same = {
        name: getattr(config, name)
        for name in (
            "last_layers",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "threads",
        )
    }
    return [
        Trial(
            scorer=scorer,
            weights=path,
            views=views,
            checkpointing=saver,
            precision=precision,
            device=device,
            **same,
        )
        for scorer, path in weights.items()
        for precision in config.precision
        for saver in config.checkpointing
        for views in config.views
    ]


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    cuda = torch.cuda.is_available()
    with exit_on_user_error():
        weights = {name: fresh_scorer(name, config.workdir) for name in config.scorers}
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    machine = name_of_machine(cuda)
    print(
        f"{machine}; {config.max_train_steps} updates of {config.train_batch_size} x {config.gradient_accumulation_steps} pairs"
    )
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for trial in trials(config, weights, "cuda" if cuda else "cpu"):
        with tempfile.TemporaryDirectory(dir=config.workdir) as scratch:
            row = fresh(measure, trial, Path(scratch)) or {"error": "the process was killed"}
        first = next((other["s_per_update"] for other in [*rows, row] if "s_per_update" in other), 0.0)
        if "error" not in row:
            row["ratio"] = row["s_per_update"] / first
        print(line(trial, row), flush=True)
        rows.append(asdict(trial) | row)
    if config.output is not None:
        write_json(config.output, {"hardware": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
