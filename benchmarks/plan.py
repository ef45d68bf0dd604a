"""Will it fit, and how long will it take, before a GPU is rented: peak memory, work and time of a method, without a GPU.

    python benchmarks/plan.py                                                  # ReFL of Stable Diffusion 1.x, LoRA, batch 2
    python benchmarks/plan.py --model sdxl --method pretrain --train full --use-8bit-adam --checkpointing on
    python benchmarks/plan.py --train lora full --train-batch-size 2 8 --output plan.json
    python benchmarks/plan.py --measured refl_step.json --output plan.json     # beside what benchmarks/refl_step.py measured
    python benchmarks/plan.py --model sd1 sdxl --table plan.md                 # what fits 8, 12, 16, 24, 40 and 80 GB

The driver's own functions run on fake tensors (torch's FakeTensorMode), which have shapes and dtypes but no content, under
CUDA's rules of autocast: no weights, no memory, ten seconds to a minute a setting on one core. Counted: peak memory of live
tensors, operations, kernels, bytes. Modelled: images/s of named GPUs. `roofline` is the limit, where each kernel reaches the
card's peak or bandwidth; `modelled` assumes shares of these and the host's time to start kernels (benchmarks/prediction.py).

Options have the names of the drivers' flags; several values of the first ones are all combined. The peak is the largest of three:
models while they load, an update, and a batch of validation images. A GPU is said to suffice where the peak, 5 % for holes
between tensors, and 1 GiB for CUDA and its libraries are no more than it has.
"""

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.cards import CARDS
from benchmarks.paths import check_file
from benchmarks.setting import Method, Model, Precision, RewardPrecision, Setting, Switch, Train
from preftune.cli import exit_on_user_error, parse
from preftune.lora.config import LoRA
from preftune.sampling_config import Sampling


@dataclass(frozen=True, kw_only=True)
class Config:
    """Plan memory and time of a method."""

    model: tuple[Model, ...] = ("sd1",)
    """Stable Diffusion 1.x or XL."""
    method: tuple[Method, ...] = ("refl",)
    """Programs, by their names."""
    train: tuple[Train, ...] = ("lora",)
    """Trained weights: a LoRA, or all weights of the denoiser."""
    train_batch_size: tuple[int, ...] = (2,)
    """Images per forward and backward pass."""
    mixed_precision: tuple[Precision, ...] = ("bf16",)
    """Precision of the forward pass."""
    resolution: str | None = None
    """Pixels: 512, or WIDTHxHEIGHT as 768x512; None = 512 for sd1, 1024 for sdxl."""
    lora: LoRA = field(default_factory=LoRA)
    checkpointing: Switch | None = None
    """Gradient checkpointing of the denoiser, and for refl, draft, drtune and flowbp of the decoder; None = on for these, else off."""
    reward_precision: RewardPrecision = "fp32"
    """Precision of the scorer, ImageReward, which all but pretrain, reward_weighted, weird_lora and dpo have in memory."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits."""
    ema_decay: float = 0.0
    """Above 0, an average of the trained weights is kept."""
    sample: Annotated[Sampling, tyro.conf.arg(name="sample")] = field(default_factory=Sampling)
    late: float = 34.5
    """ReFL: steps without gradient before the one with it; the default is the mean of the published window, 30..39 of 40."""
    measured: Path | None = None
    """JSON of benchmarks/refl_step.py: plan the settings that it measured of our loop, and show both side by side."""
    table: Path | None = None
    """Write the page of what fits instead: the models with all methods, for 8 to 80 GB. Takes a quarter of an hour on one core."""
    output: Path | None = None
    """JSON file with everything planned."""

    def __post_init__(self) -> None:
        check_file(self.output)
        check_file(self.table, "--table")
        if self.measured is None:
            self.settings()
        else:
            read_measured(self.measured)

    def settings(self) -> list[Setting]:
        """Return what is planned; ValueError for a value that is out of range."""
        axes = ("model", "method", "train", "train_batch_size", "mixed_precision")
        same = ("resolution", "checkpointing", "reward_precision", "use_8bit_adam", "ema_decay", "late")  # fmt: skip
        for name in axes:
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is empty; give one value, or leave it out")
        if "full" in self.train and self.lora != LoRA():
            raise ValueError(
                "--lora settings do nothing with --train full; leave them out, or choose --train lora"
            )
        return [
            Setting(
                **dict(zip(axes, values, strict=True)),
                **{name: getattr(self, name) for name in same},
                rank=self.lora.rank,
                sample_batch_size=self.sample.batch_size,
            )
            for values in itertools.product(*(getattr(self, name) for name in axes))
        ]


def read_measured(path: Path) -> list[tuple[Setting, dict[str, Any]]]:
    """Return settings and rows of our loop in a file of refl_step.py at real size; ValueError where it has none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return _settings_of(rows)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--measured {path} is no result of benchmarks/refl_step.py --models sd1 --output FILE: {_reason(error)}; make it anew"
        ) from error


def _reason(error: Exception) -> str:
    """Why a file is no result, in words."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is not JSON"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, KeyError):
        return f"'{error.args[0]}' is missing"
    return "it has no rows" if isinstance(error, LookupError | TypeError) else str(error)


def _settings_of(rows: list[dict[str, Any]]) -> list[tuple[Setting, dict[str, Any]]]:
    mine = [
        row for row in rows if row["loop"] == "ours" and row["model"] == "sd1" and row["compile"] == "off"
    ]
    mine = [row for row in mine if "peak_mib" in row]
    if not mine:
        raise ValueError("no row of our loop at the size of sd1")
    return [
        (
            Setting(
                model="sd1",
                train=row["train"],
                train_batch_size=row["train_batch_size"],
                mixed_precision=row["precision"],
                reward_precision="fp32" if row["precision"] == "no" else row["precision"],
                checkpointing=row["checkpointing"],
                ema_decay=0.9999
                if row["train"] == "full"
                else 0.0,  # as the released script, and so refl_step.py
                late=row["late"],
            ),
            row,
        )
        for row in mine
    ]


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from benchmarks.hardware import write_json
from benchmarks.plan_table import page
from benchmarks.prediction import ASSUMPTIONS, predict

PEAKS = {"loading": "loading the models", "update": "update", "images": "validation images"}


def title(setting: Setting) -> str:
    """Return what is planned, in words."""
    weights = "all weights" if setting.train == "full" else f"LoRA of rank {setting.rank}"
    precision = {"no": "float32"}.get(setting.mixed_precision, setting.mixed_precision)
    return (
        f"{setting.method} of {setting.model} at {setting.size()} px, {weights}, batch {setting.train_batch_size},"
        f" {precision}, checkpointing {'on' if setting.checkpointed() else 'off'}"
    )


def show(row: dict[str, Any], setting: Setting) -> None:
    """Print a plan."""
    peaks = ", ".join(f"{PEAKS[name]} {value:.1f}" for name, value in row["peaks_gib"].items())
    print(f"\n{title(setting)} (counted, not measured)")
    print(f"  peak {row['peak_gib']:.1f} GiB ({peaks}); a GPU needs {row['needed_gib']:.1f}")
    for name, what in (("update", "an image of an update"), ("images", "a validation image")):
        work = row[name]
        print(
            f"  {what}: {work['tflop_per_image']:.3g} TFLOP, {work['gb_per_image']:.3g} GB; {work['kernels']:.0f} kernels,"
            f" {work['casts']:.0f} of them casts, for the batch"
        )
    print("  images/s      update: limit  modelled   validation: limit  modelled")
    for card, found in row["cards"].items():
        rates = [found[phase][kind] for phase in ("update", "images") for kind in ("roofline", "modelled")]
        cells = "{:15.2f} {:9.2f} {:19.2f} {:9.2f}".format(*rates)
        print(f"  {card:10s} {cells}" if found["fits"] else f"  {card:10s}       does not fit")


def compare(row: dict[str, Any], measured: dict[str, Any], hardware: str) -> dict[str, Any]:
    """Return the plan beside the measurement: peaks of an update, images/s of the card that it ran on, where it is known."""
    found = {
        "peak_gib": row["peaks_gib"]["update"],
        "measured_peak_gib": measured["peak_mib"] / 1024,
        "measured_images_per_s": measured["images_per_s"],
    }
    found["peak_error"] = found["peak_gib"] / found["measured_peak_gib"] - 1
    name = next((name for name in CARDS if name.removesuffix("GB") in hardware), None)
    if name is not None:
        rates = row["cards"][name]["update"]
        found |= {f"{kind}_images_per_s": rate for kind, rate in rates.items()}
        found["time_error"] = found["measured_images_per_s"] / rates["modelled"] - 1
    return found


def main(config: Config) -> int:
    """Plan, print, write JSON."""
    with exit_on_user_error():
        hardware, beside = "", list[dict[str, Any]]()
        settings = config.settings()
        if config.measured is not None:
            pairs = read_measured(config.measured)
            settings, beside = [setting for setting, _ in pairs], [row for _, row in pairs]
            hardware = json.loads(config.measured.read_text(encoding="utf-8")).get("hardware", "")
        for path in (config.output, config.table):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
    if config.table is not None:
        lines = list[str]()
        for text in page(config.model):
            print(text, flush=True)
            lines.append(f"{text}\n")
        config.table.write_text("".join(lines), encoding="utf-8")
        return 0
    rows = []
    for place, setting in enumerate(settings):
        row = predict(setting)
        show(row, setting)
        if beside:
            row["beside"] = compare(row, beside[place], hardware)
            print(
                "  " + ", ".join(f"{name} {value:.3g}" for name, value in row["beside"].items()), flush=True
            )
        rows.append(row)
        if config.output is not None:
            write_json(config.output, {"assumptions": ASSUMPTIONS, "hardware": hardware, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
