r"""Train scorers with several objectives and compare them on the same held-out rankings: ablations of
reward models.

A method is NAME=DRIVER FLAGS, as in compare_methods.py: finetune/reward_model.py with an objective, a start
and data. Each is trained once per seed. All scorers then score the same held-out images, unchanged and
mirrored and cropped (Stable Preference, Table 1). Its Tables 2 and 3 are such comparisons, from the plain
loss of the first method to the complete method.

    python eval/compare_reward_models.py --methods "plain=finetune/reward_model.py --config a.yaml" \
        "stable=finetune/reward_model.py --config a.yaml --stable.views 3 --stable.weighting two-stage" --data data/held_out

Prints and plots ImageReward's accuracy (pooled pairs, a predicted tie is wrong) against the annotators and,
in the shapes world, against the noiseless judge, which is the more precise measure. If sets have several
annotators, also HPD v2's inversion score against their mean rank. The accuracy of a single annotator is
shown for comparison. `over the first` is the difference from the first method. Intervals are 95 % bootstrap
intervals over prompts (two or more), with all seeds pooled.

Held-out images are read, and judged in the shapes world, before training starts. Damaged images are
rejected and counted, and their rankings keep the other images. Writes table.csv with all three published
accuracies against every reference of agreement.py, seeds.csv, rejected.jsonl and accuracy.png, and
comparison.json, which says what they are of: those of other settings are not overwritten without being told to.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.agreement import (
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGES,
    FLIPPED,
    GOLD,
    INVERSION,
    JUDGE,
    MEAN,
    ONE,
    PUBLISHED,
    Floats,
    RankedSet,
    of_scorer,
    references,
)
from eval.flags import check_crops, check_folders
from eval.trainings import check_commands, check_seeds, command_record, split_named, train
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here

REPORT, RECORD = ("table.csv", "seeds.csv", "accuracy.png"), "comparison.json"
"""Files of a report, and the one that says what it is of."""
SHOWN = {ANNOTATORS: ACCURACY, MEAN: INVERSION, JUDGE: ACCURACY}
"""The references that are printed and plotted, and by which metric: the first two are those of Stable Preference's
Tables 1 to 3.
"""
OVER = {name: f"{name} over the first" for name in PUBLISHED}
SIGNED = {*OVER.values(), *CHANGES.values()}
"""Metrics that are differences."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train scorers by several objectives and measure them on the same held-out rankings."""

    methods: tuple[str, ...]
    """NAME=DRIVER FLAGS with DRIVER finetune/reward_model.py or `preftune reward-model`; --seed and --output-dir are added. The others
    are compared with the first.
    """
    data: tuple[Path, ...]
    """Folders of held-out rankings, evaluated separately."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, one run per method and seed."""
    crops: tuple[float, ...] = (0.97, 0.95, 0.93, 0.9)
    """Centre crops of the mirrored image, as shares in (0, 1] of each side; none = no robustness."""
    count: int | None = None
    """Maximum number of prompts of each folder; None = all."""
    batch_size: int = 32
    """Images per forward pass, each with all its views."""
    output_dir: Path = Path("runs/compare_scorers")
    """Folder of the tables, with runs in runs/."""
    overwrite_output_dir: bool = False
    """Replace tables of other methods, data, seeds or settings; runs are never replaced."""

    def __post_init__(self) -> None:
        names = [name for name, _ in map(split_named, self.methods)]
        if not names or len(set(names)) != len(names) or ONE in names:
            raise ValueError(f"--methods needs methods with different names, got {', '.join(names)}")
        check_folders(self.data)
        if len({folder.name for folder in self.data}) != len(self.data):
            raise ValueError(
                f"--data needs folders with different names, got {', '.join(map(str, self.data))}"
            )
        for name, value in (("count", self.count), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        check_crops(self.crops)
        check_seeds(self.seeds)

    def record(self) -> dict[str, Any]:
        """Return what a report depends on, beside the contents of data and models."""
        return {
            "methods": {name: command_record(command) for name, command in self.commands().items()},
            "data": [str(folder.resolve()) for folder in self.data],
            "seeds": list(self.seeds),
            "crops": list(self.crops),
            "count": self.count,
        }

    def commands(self) -> dict[str, list[str]]:
        """Return name -> driver and flags."""
        return {name: shlex.split(text) for name, text in map(split_named, self.methods)}


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import matplotlib.pyplot as plt
import numpy as np
import torch

import rewards
from eval.agreement_table import Measurement, Sums, by_annotator, measurements, reached, robustness
from eval.rankings import (
    RankedImages,
    read_ranked_images,
    rejected_rows,
    sound_sets,
    summary,
    without_rejected,
)
from eval.report_folder import check_report, write_record
from eval.view_scores import score_views, view_names
from eval.win_rates import csv_text
from preftune.cli.printable import show
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.images import save_figure
from preftune.records import write_jsonl
from preftune.statistics.bootstrap import interval
from rewards.shapes import in_world


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A folder of held-out rankings, all of its images read once."""

    ranked: RankedImages
    rejected: dict[int, str]
    """Place of an image that was set aside -> why."""
    gold: Floats | None
    """(N,): the judge's scores, in the shapes world."""


def sums_of(
    name: str,
    columns: Floats,
    judged: Sequence[RankedSet],
    reference_ranks: Mapping[str, Sequence[Floats]],
    views: Sequence[str],
    prompts: int,
) -> Sums:
    """Return what one scorer reaches, its scores being (V, N), against each reference, and on changed views."""
    compared = {
        reference: of_scorer(columns[0], judged, ranks) for reference, ranks in reference_ranks.items()
    }
    found = reached(name, AS_IS, compared, PUBLISHED, prompts)
    return found | robustness(name, columns, views, judged, reference_ranks, prompts)


def one_annotator(
    judged: Sequence[RankedSet], reference_ranks: Mapping[str, Sequence[Floats]], prompts: int
) -> Sums:
    """Return what one annotator reaches against each reference that excludes this annotator."""
    fair = {reference: ranks for reference, ranks in reference_ranks.items() if reference != MEAN}
    return by_annotator(judged, fair, PUBLISHED, prompts)


def pooled(runs: Sequence[Sums]) -> Sums:
    """Return the sums of a method over its seeds."""
    return {key: np.sum([run[key] for run in runs], axis=0) for key in runs[0]}


def with_differences(sums: Sums, first: str) -> Sums:
    """Return the sums, and behind each accuracy its difference from that of the first method."""
    found: Sums = {}
    for (name, reference, view, metric), pair in sums.items():
        found[name, reference, view, metric] = pair
        if view == AS_IS and name not in (first, ONE):
            gain = pair[0] - sums[first, reference, view, metric][0]
            found[name, reference, view, OVER[metric]] = np.stack([gain, pair[1]])
    return found


def is_shown(row: Measurement) -> bool:
    """Return whether a line is printed: the metric of its reference, its differences, and flipped choices."""
    metric = SHOWN.get(row.reference, "")
    return row.metric == FLIPPED or row.metric in (metric, OVER.get(metric), CHANGES.get(metric))


def to_text(tables: Mapping[str, Sequence[Measurement]]) -> str:
    """Return the tables as printed, in per cent: accuracies, their differences, and how robust they are."""
    text = [
        f"{'data':16s} {'method':20s} {'reference':16s} {'view':17s} {'measure':38s} {'per cent':>8s}  interval"
    ]
    for data, rows in tables.items():
        for row in filter(is_shown, rows):
            sign = "+" if row.metric in SIGNED else ""
            bounds = interval(100 * row.low, 100 * row.high, f"{sign}z.1f")
            line = f"{data:16s} {row.rater:20s} {row.reference:16s} {row.view:17s} {row.metric:38s} {100 * row.value:{sign}z8.1f}  {bounds}"
            text.append(line.rstrip())
    return "\n".join(text)


def plot_accuracies(tables: Mapping[str, Sequence[Measurement]], path: Path) -> None:
    """Draw accuracies with their intervals, a panel for each folder and reference, and the flipped choices of the first."""
    panels: dict[tuple[str, str], list[Measurement]] = {}
    for data, rows in tables.items():
        for row in rows:
            if row.view == AS_IS and row.metric == SHOWN.get(row.reference):
                panels.setdefault((data, row.reference), []).append(row)
    names = list(dict.fromkeys(row.rater for rows in tables.values() for row in rows))
    flipped = [row for row in next(iter(tables.values())) if row.metric == FLIPPED]
    number = max(len(panels) + bool(flipped), 1)  # rankings of ties alone have no pair to plot
    figure, axes = plt.subplots(
        1,
        number,
        figsize=(2 + 3.2 * number, max(1.4 + 0.4 * len(names), 3)),
        squeeze=False,
        layout="constrained",
    )
    for axis, ((data, reference), rows) in zip(axes[0], panels.items(), strict=False):
        for row in rows:
            ends = [100 * (row.value - row.low), 100 * (row.high - row.value)]
            place = names.index(row.rater)
            axis.errorbar(
                100 * row.value, place, xerr=np.reshape(ends, (2, 1)), color=f"C{place}", fmt="o", capsize=3
            )
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"{data}\nagainst: {reference}", fontsize=9)
        axis.set_xlabel(f"{SHOWN[reference]}, per cent")
        axis.grid(axis="x", alpha=0.3)
    for name in dict.fromkeys(row.rater for row in flipped):
        of = [row for row in flipped if row.rater == name]
        axes[0, -1].plot(
            [row.view.split()[-1] for row in of],
            [100 * row.value for row in of],
            color=f"C{names.index(name)}",
            marker=".",
            label=name,
        )
    if flipped:
        axes[0, -1].set_title("choices that flip when images are\nmirrored and cropped, per cent", fontsize=9)
        axes[0, -1].legend(fontsize=7)
    save_figure(figure, path)


def check_inputs(config: Config) -> dict[str, HeldOut]:
    """Return the held-out rankings of each folder, and say what of them is measured.

    ValueError for what is wrong before anything is trained.
    """
    check_commands(config.commands())
    check_report(config.output_dir, REPORT, RECORD, config.record(), overwrite=config.overwrite_output_dir)
    ranked = {folder.name: read_ranked_images([folder], config.count) for folder in config.data}
    check_writable(config.output_dir)
    held_out = {data: read_held_out(one, config.batch_size) for data, one in ranked.items()}
    tidy(config.output_dir, config.output_dir / "runs")
    write_rejected(held_out, config.output_dir)
    for data, held in held_out.items():
        show(f"{data}: {summary_of(held)}")
    return held_out


def read_held_out(ranked: RankedImages, batch: int) -> HeldOut:
    """Read all images, judge them in the shapes world, and set aside what cannot be read; ValueError where no set is left."""
    judges = [rewards.load(GOLD)] if in_world(ranked.prompts) else []
    scored, rejected = score_views(
        ranked.images, judges, (), torch.device("cpu"), batch_size=batch, workers=0
    )
    sound_sets(ranked, rejected)
    return HeldOut(ranked=ranked, rejected=rejected, gold=scored[GOLD][0] if judges else None)


def summary_of(held: HeldOut) -> str:
    """Return a sentence on what is measured."""
    return summary(
        without_rejected(held.ranked.judged, held.rejected), len(held.rejected), held.ranked.repeated
    )


def write_rejected(held_out: Mapping[str, HeldOut], output: Path) -> None:
    """Write which images were set aside, and why."""
    rows = (
        {"data": data, **row}
        for data, held in held_out.items()
        for row in rejected_rows(held.ranked.images, held.rejected)
    )
    write_jsonl(output / "rejected.jsonl", rows)


def train_all(config: Config) -> dict[tuple[str, int], Path]:
    """Return (method, seed) -> the folder of its scorer; ValueError for a driver that fails or leaves none.

    All methods are trained with the first seed before any is with the second, so that a wrong command is found early.
    """
    scorers = {}
    for seed in config.seeds:
        for name, command in config.commands().items():
            folder = train(name, command, seed, config.output_dir) / "scorer"
            try:
                rewards.check(str(folder))
            except ValueError as error:
                raise ValueError(f"method {name}, seed {seed} left no scorer to measure: {error}") from error
            scorers[name, seed] = folder
    return scorers


def score_all(
    held: HeldOut, scorers: Mapping[tuple[str, int], Path], config: Config
) -> tuple[dict[tuple[str, int], Floats], HeldOut]:
    """Return (method, seed) -> scores (V, N), and the rankings without images that any of the scorers cannot read.

    FloatingPointError names scorer and image for a score that is no finite number.
    """
    device = device_here()
    columns, rejected = {}, held.rejected
    for run, folder in scorers.items():
        scorer = rewards.load(str(folder), device=device)  # one at a time: they may be large
        scored, aside = score_views(
            held.ranked.images, [scorer], config.crops, device, batch_size=config.batch_size, workers=0
        )
        columns[run] = scored[scorer.card.name]
        rejected = aside | rejected
    return columns, replace(held, rejected=rejected)


@one_writer
def main(config: Config) -> int:
    """Train, score, compare."""
    with exit_on_user_error():
        held_out = check_inputs(config)
        scorers = train_all(config)
    views, tables, by_seed = (
        view_names(config.crops),
        dict[str, list[Measurement]](),
        list[tuple[object, ...]](),
    )
    for data in held_out:
        columns, held_out[data] = score_all(held_out[data], scorers, config)
        held = held_out[data]
        with exit_on_user_error():
            judged = sound_sets(held.ranked, held.rejected)
        prompts, ranks = len(held.ranked.prompts), references(judged, held.gold)
        found: dict[str, list[Sums]] = {}
        for (name, seed), scores in columns.items():
            reached_here = sums_of(name, scores, judged, ranks, views, prompts)
            found.setdefault(name, []).append(reached_here)
            by_seed += [
                (data, name, seed, *key[1:], pair[0].sum() / pair[1].sum())
                for key, pair in reached_here.items()
                if pair[1].any()
            ]
        sums = one_annotator(judged, ranks, prompts)
        for each in found.values():
            sums |= pooled(each)
        tables[data] = measurements(with_differences(sums, next(iter(found))))
    write_rejected(held_out, config.output_dir)
    write_record(config.output_dir, RECORD, config.record())
    write_report(tables, by_seed, config.output_dir)
    ends = [
        *(f"{data}: {summary_of(held)}" for data, held in held_out.items()),
        config.output_dir / "accuracy.png",
    ]
    show("\n".join([to_text(tables), *map(str, ends)]))
    return 0


def write_report(
    tables: Mapping[str, Sequence[Measurement]], by_seed: Sequence[tuple[object, ...]], output: Path
) -> None:
    """Write the tables and the plot."""
    heads = ["data", "method", "reference", "view", "metric", "value", "low", "high"]
    lines = (
        (data, row.rater, row.reference, row.view, row.metric, row.value, row.low, row.high)
        for data, rows in tables.items()
        for row in rows
    )
    write_text(output / "table.csv", csv_text(heads, lines))
    heads = ["data", "method", "seed", "reference", "view", "metric", "value"]
    write_text(output / "seeds.csv", csv_text(heads, by_seed))
    plot_accuracies(tables, output / "accuracy.png")


if __name__ == "__main__":
    sys.exit(main(CONFIG))
