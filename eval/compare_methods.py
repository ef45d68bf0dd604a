r"""Train several methods from one model with several seeds, and evaluate them on the same prompts (the
methods table).

A method is NAME=DRIVER FLAGS, as typed on the command line. Each is started by `accelerate launch` in
RUNS/NAME-SEED with --model, --seed and --output-dir added. When the comparison is started again, unfinished
runs continue and finished runs are not repeated. All methods then generate the same held-out prompts from
the same noise as the base model. As in ImageReward (arXiv 2304.05977), Table 4 and Fig. 6, it reports wins,
ties and win rate of each method against the base, and between all methods. The flags of a method set its
training budget: give each the same number of images, and check the column `images`, which counts the images
that updates were computed on. NAME=OTHER@UPDATES is not trained but is the checkpoint of another method
after this many updates, for example RAFT after its first iteration.

    python eval/compare_methods.py --methods "refl=finetune/refl.py --config refl.yaml" "weird=finetune/weird_lora.py --config weird.yaml" \
        --negatives "weird=Weird image. " --model SD_FOLDER --prompts held_out.txt --rewards imagereward hpsv2.1

Win rate is wins / (wins + losses), as in the paper. Intervals are 95 % bootstrap intervals over prompts
with all seeds pooled; a single prompt has none. In the shapes world, `shapes` is the gold score that no
method was trained on. Writes images/ (all generated images, reused when run again: eval/generated.py),
table.csv, measures.csv (diversity, where a scorer has a CLIP, and statistics of the pixels), scores.csv, wins.png, grid.png and
report.html, and comparison.json, which says what they are of:
a report of other settings is not overwritten without being told to.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from eval.flags import BASE
from eval.trainings import check_commands, check_seeds, command_record, split_named, train_all
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here, workers_here
from preftune.cli.scorer_flags import Files, Measured
from preftune.families import Pretrained
from preftune.sampling_config import Resolved, Sampling
from rewards.terms import parse_files, parse_names

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
REPORT, RECORD = (
    ("report.html", "table.csv", "measures.csv", "scores.csv", "wins.png", "grid.png"),
    "comparison.json",
)
"""Files of a report, and the one that says what it is of."""
CHECKPOINT = re.compile(r"([\w-]+)@(\d+)")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train methods from one model and judge them on the same prompts and seeds."""

    methods: tuple[str, ...]
    """NAME=DRIVER FLAGS, where DRIVER is a file such as finetune/refl.py or `preftune refl`; --model, --seed and --output-dir
    are added. Or NAME=OTHER@UPDATES: the checkpoint of another method after this many updates.
    """
    model: Annotated[Pretrained, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Pretrained(model="assets/tiny/pipeline")
    )
    prompts: Path = Path("assets/tiny/held_out.txt")
    """Held-out prompt file."""
    count: int = 256
    """Maximum number of prompts, from the start of the file."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, one run per method and seed; prompt i is always generated with seed i."""
    concurrency: int = 1
    """Trainings at a time, each with its share of the CPU's cores; a small model on two cores is trained twice as fast by 2. Give
    1 where one training fills the GPU.
    """
    rewards: Measured = ("imagereward-tiny", "shapes")
    reward_files: Files = ()
    negatives: tuple[str, ...] = ()
    """NAME=TEXT: negative prompt of a method, as "weird=Weird image. "; base=TEXT gives the base one."""
    grid_rows: int = 6
    """Prompts in the grid."""
    sample: Sampling = field(default_factory=Sampling)
    workers: int | None = None
    """Processes that decode images for the scorers; 0 = the main process; None = one for each core."""
    output_dir: Path = Path("runs/compare")
    """Folder of the report, with runs in runs/ and generated images in images/; both are reused."""
    overwrite_output_dir: bool = False
    """Replace images generated with other weights, prompts, seeds or settings, and a report of others; runs are never
    replaced.
    """

    def __post_init__(self) -> None:
        names = self.names()
        if not names or len({*names, BASE}) != len(names) + 1:
            raise ValueError(
                f"--methods needs methods with different names other than {BASE}, got {', '.join(names)}"
            )
        check_seeds(self.seeds)
        for name, value, least in (
            ("count", self.count, 1), ("grid-rows", self.grid_rows, 1), ("concurrency", self.concurrency, 1), ("workers", self.workers, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if unknown := dict(map(split_named, self.negatives)).keys() - {*names, BASE}:
            raise ValueError(
                f"--negatives names {min(unknown)}, which is none of {', '.join([BASE, *names])}"
            )
        scale = self.sample.guidance_scale
        if self.negatives and scale is not None and scale <= 1:
            raise ValueError(
                f"--negatives do nothing at --sample.guidance-scale {scale:g}; choose another, such as 3"
            )
        for name, (other, _) in self.checkpoints().items():
            if other not in self.commands():
                raise ValueError(
                    f"method {name} is a checkpoint of {other}, which is no method that is trained; there are"
                    f" {', '.join(self.commands()) or 'none'}"
                )
        self.files()

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, parse_names(self.rewards))

    def commands(self) -> dict[str, list[str]]:
        """Return name -> driver and flags of the methods that are trained."""
        return {
            name: shlex.split(text)
            for name, text in map(split_named, self.methods)
            if not CHECKPOINT.fullmatch(text)
        }

    def checkpoints(self) -> dict[str, tuple[str, int]]:
        """Return name -> other method and number of updates of the methods that are checkpoints of others."""
        found = {name: CHECKPOINT.fullmatch(text) for name, text in map(split_named, self.methods)}
        return {name: (match[1], int(match[2])) for name, match in found.items() if match}

    def names(self) -> list[str]:
        """Return the names of all methods, in their order."""
        return [name for name, _ in map(split_named, self.methods)]


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eval.benchmark_report import csv_of, measure_table
from eval.benchmark_table import Measure, measures
from eval.generated import Request, generate, missing_columns, score_generated, settings_of
from eval.models import Column, check_scorers, parse_column
from eval.report_folder import check_report, write_record
from eval.win_rates import MethodResult, heat_maps, method_table, scores_csv, to_csv, to_text
from preftune import families
from preftune.cli.printable import show
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.grid import captioned_grid
from preftune.images import save_image
from preftune.pages import base64_of, render
from preftune.prompts import read_prompts
from preftune.records import read_jsonl
from preftune.statistics.bootstrap import interval
from preftune.statistics.image_features import clip_tower, describe
from preftune.statistics.image_statistics import STATISTICS
from rewards import Scorer
from rewards.shared_towers import load_all


def check_inputs(config: Config) -> tuple[list[str], Resolved]:
    """Return the prompts, and how to sample; ValueError for what is wrong before anything is trained."""
    check_commands(config.commands(), taken=["--model"])
    prompts = read_prompts(config.prompts)[: config.count]
    sampling = config.sample.resolved(families.check(config.model.source()))
    check_scorers(parse_names(config.rewards), config.files(), prompts, sampling.resolution, config.prompts)
    check_writable(config.output_dir)
    tidy(config.output_dir / "runs")
    return prompts, sampling


def record_of(config: Config, prompts: Sequence[str], sampling: Resolved) -> dict[str, Any]:
    """Return what a report depends on, beside the contents of data and models."""
    commands = config.commands()
    methods = {name: text for name, text in map(split_named, config.methods) if name not in commands}
    return {
        "methods": methods | {name: command_record(command) for name, command in commands.items()},
        "model": config.model.flags(),
        "prompts": list(prompts),
        "seeds": list(config.seeds),
        "rewards": list(parse_names(config.rewards)),
        "reward files": {name: str(path) for name, path in config.files().items()},
        "negatives": dict(map(split_named, config.negatives)),
        "grid rows": config.grid_rows,
        "sampling settings": settings_of(sampling),
    }


def checkpoint(folder: Path, name: str, updates: int) -> Path:
    """Return a run's checkpoint after so many updates; ValueError where it was not kept."""
    path = folder / f"step_{updates:06d}"
    if not path.is_dir():
        kept = ", ".join(sorted(other.name for other in folder.glob("step_*"))) or "none"
        raise ValueError(
            f"method {name}: there is no {path}; kept are {kept}. Have the driver write it (--checkpointing-steps) and keep it (--checkpoints-total-limit 0)"
        )
    return path


def images_trained_on(folder: Path, updates: int | None = None) -> int:
    """Return how many images the (first) updates of a run have trained on, ReFL's alternate pre-training updates included.

    Not counted: images that RAFT samples to choose from, and a second loss in the same update.
    """
    header, *settings = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(": ", 1) for line in settings if ": " in line)
    processes = int(header.rpartition("processes ")[2])
    rows = read_jsonl(folder / "metrics.jsonl")
    done = sum(
        ("loss" in row) + ("pretrain_loss" in row) for row in rows if updates is None or row["step"] < updates
    )
    return done * int(values["train_batch_size"]) * int(values["gradient_accumulation_steps"]) * processes


def trained_columns(config: Config, runs: Mapping[tuple[str, int], Path]) -> list[Column]:
    """Return the base, and a column for each method and seed; ValueError for a checkpoint that was not kept."""
    tuned = dict(runs)
    for name, (other, updates) in config.checkpoints().items():
        tuned |= {(name, seed): checkpoint(runs[other, seed], name, updates) for seed in config.seeds}
    base = Column(title=BASE, source="", pipeline=config.model.source())
    return [
        base,
        *(
            parse_column(f"{name}-{seed}={tuned[name, seed]}", config.model.source())
            for name in config.names()
            for seed in config.seeds
        ),
    ]


def images_by_method(config: Config, runs: Mapping[tuple[str, int], Path]) -> dict[str, int]:
    """Return how many images each method was trained on with the first seed."""
    first = config.seeds[0]
    counts = {BASE: 0} | {name: images_trained_on(runs[name, first]) for name in config.commands()}
    for name, (other, updates) in config.checkpoints().items():
        counts[name] = images_trained_on(runs[other, first], updates)
    return counts


@one_writer
def main(config: Config) -> int:
    """Train, generate, judge, report."""
    device = device_here()
    with exit_on_user_error():
        prompts, sampling = check_inputs(config)
        record = record_of(config, prompts, sampling)
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        commands = {name: [*command, *config.model.flags()] for name, command in config.commands().items()}
        runs = train_all(commands, config.seeds, config.output_dir, config.concurrency)
        negatives = dict(map(split_named, config.negatives))
        request = Request(
            folder=config.output_dir / "images",
            columns=trained_columns(config, runs),
            prompts=prompts,
            seeds=range(len(prompts)),
            sampling=sampling,
            negatives={f"{name}-{seed}": text for name, text in negatives.items() for seed in config.seeds}
            | {BASE: negatives.get(BASE, "")},
        )
        missing = missing_columns(request, overwrite=config.overwrite_output_dir)
        scored_by = parse_names(config.rewards)
        scorers = load_all(scored_by, files=config.files(), device=device, dtype=torch.float32)
    generate(request, missing, device)
    with exit_on_user_error():
        scored = score_generated(request, scorers, device, workers=workers_here(config.workers))
        others = measured(config, request, scorers, device)
    scores = {BASE: np.stack([scored[BASE]] * len(config.seeds))}
    scores |= {name: np.stack([scored[f"{name}-{seed}"] for seed in config.seeds]) for name in config.names()}
    rows = method_table(scores, scored_by, images_by_method(config, runs))
    write_record(config.output_dir, RECORD, record)
    write_report(config, rows, others, scores, scored_by, request)
    return 0


def measured(
    config: Config, request: Request, scorers: Sequence[Scorer], device: torch.device
) -> list[Measure]:
    """Return diversity across prompts and statistics of the images of each method, means over its trainings."""
    statistics, features = {}, {}
    tower = clip_tower(scorers)
    for name in (BASE, *config.names()):
        titles = [BASE] if name == BASE else [f"{name}-{seed}" for seed in config.seeds]
        seen = [
            describe(
                request.files(title), tower, device,
                batch_size=request.sampling.batch_size, workers=workers_here(config.workers),
            )
            for title in titles
        ]  # fmt: skip
        columns = [np.stack([one.statistics[kind] for kind in STATISTICS], axis=1) for one in seen]
        statistics[name] = np.stack(columns, axis=1)
        rows = [one.features for one in seen if one.features is not None]
        features[name] = np.stack(rows, axis=1) if rows else None
    return measures(statistics, features, BASE, within=False)


def write_report(
    config: Config,
    rows: Sequence[MethodResult],
    others: Sequence[Measure],
    scores: Mapping[str, NDArray[np.float64]],
    scorers: Sequence[str],
    request: Request,
) -> None:
    """Write the files of the comparison and print its table."""
    folder, prompts = config.output_dir, request.prompts
    heat_maps(scores, scorers, folder / "wins.png")
    save_image(grid_of(config, scores, scorers, request), folder / "grid.png")
    write_text(folder / "table.csv", to_csv(rows))
    write_text(folder / "measures.csv", csv_of(others))
    write_text(folder / "scores.csv", scores_csv(scores, scorers, config.seeds, prompts))
    page = render(
        TEMPLATE,
        rows=rows,
        measures=measure_table(others),
        config=config,
        sampling=request.sampling,
        prompts=prompts,
        base=BASE,
        interval=interval,
        inlined={name: base64_of(folder / name) for name in ("wins.png", "grid.png")},
    )
    write_text(folder / "report.html", page)
    show(f"{to_text(rows)}\n{folder / 'report.html'}")


def grid_of(
    config: Config, scores: Mapping[str, NDArray[np.float64]], scorers: Sequence[str], request: Request
) -> Image.Image:
    """Return a grid of the first prompts: a column for each method, by its first training seed."""
    titles = {name: name if name == BASE else f"{name}-{config.seeds[0]}" for name in scores}
    numbers = range(min(config.grid_rows, len(request.prompts)))
    captions = [
        ["\n".join(f"{name} {value:.2f}" for name, value in zip(scorers, found[0, i], strict=True)) for found in scores.values()]
        for i in numbers
    ]  # fmt: skip
    return captioned_grid(
        [[request.files(title)[i] for title in titles.values()] for i in numbers],
        row_captions=[request.prompts[i] for i in numbers],
        column_titles=list(titles),
        cell_captions=captions,
    )


if __name__ == "__main__":
    sys.exit(main(CONFIG))
