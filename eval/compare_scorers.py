"""Train scorers by several objectives, and hold all of them against the same held-out rankings: ablations of reward models.

A method is NAME=DRIVER FLAGS, as in compare.py: finetune/reward_model.py with an objective, a start and data. Each is trained
with each seed, once. All then score the same held-out pictures, as they are and mirrored and cropped (paper 000, Table 1). Its
Tables 2 and 3 are such comparisons, from the first method's plain loss to all that it adds.

    python eval/compare_scorers.py --methods "plain=finetune/reward_model.py --config a.yaml" \\
        "stable=finetune/reward_model.py --config a.yaml --stable.views 3 --stable.weighting two-stage" --data data/held_out

Accuracy is ImageReward's (pooled pairs, a predicted tie is wrong), against the annotators and, in the shapes world, against the
noiseless judge, which is the measure that matters; what one annotator reaches stands beside it. `over` is the difference from
the first method. Intervals are 95 % bootstrap intervals over prompts, seeds pooled. Writes table.csv, seeds.csv and accuracy.png.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import rewards
from eval.agreement import (
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGE,
    FLIPPED,
    GOLD,
    JUDGE,
    ONE,
    Compared,
    Floats,
    Judged,
    Row,
    Sums,
    by_prompt,
    of_annotator,
    of_scorer,
    pooled_accuracy,
    references,
    robustness,
    rows_of,
)
from eval.columns import write_text
from eval.ranked import read, without
from eval.trainings import check_commands, check_seeds, split, train
from eval.view_scores import Picture, check_crops, score, view_names
from eval.win_rates import csv_text
from preftune.cli import exit_on_user_error, parse
from preftune.images import save_figure
from rewards.shapes import in_world

OVER = "over the first"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train scorers by several objectives and measure them on the same held-out rankings."""

    methods: tuple[str, ...]
    """NAME=DRIVER FLAGS each, DRIVER finetune/reward_model.py; --seed and --output are added. The first is what others are held against."""
    data: tuple[Path, ...]
    """Folders of held-out rankings, each measured by itself."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A training run of each method for each."""
    crops: tuple[float, ...] = (0.97, 0.95, 0.93, 0.9)
    """Side lengths of centre crops, as shares in (0, 1], of mirrored pictures; none = robustness is not measured."""
    count: int | None = None
    """At most so many prompts of each folder; None = all."""
    batch: int = 32
    """Pictures in one pass, each with all its views."""
    output: Path = Path("runs/compare_scorers")
    """Folder of the tables; runs lie in its runs/."""

    def __post_init__(self) -> None:
        names = [name for name, _ in map(split, self.methods)]
        if not names or len(set(names)) != len(names) or ONE in names:
            raise ValueError(f"--methods needs methods with different names, got {', '.join(names)}")
        if not self.data or len({folder.name for folder in self.data}) != len(self.data):
            raise ValueError("--data needs folders of rankings with different names")
        check_crops(self.crops)
        check_seeds(self.seeds)

    def commands(self) -> dict[str, list[str]]:
        """Return name -> driver and flags."""
        return {name: shlex.split(text) for name, text in map(split, self.methods)}


def sums_of(
    name: str,
    columns: Floats,
    gold: Floats | None,
    judged: Sequence[Judged],
    views: Sequence[str],
    prompts: int,
) -> Sums:
    """Return what one scorer reaches, its scores being (views, N), against annotators and judge, and on changed views."""
    compared = {
        reference: of_scorer(columns[0], judged, ranks)
        for reference, ranks in held_against(judged, gold).items()
    }
    found = accuracies(name, compared, prompts)
    for view, column in zip(views[1:], columns[1:], strict=True):
        found |= robustness(name, view, columns[0], column, judged, prompts)
    return found


def held_against(judged: Sequence[Judged], gold: Floats | None) -> dict[str, list[Floats]]:
    """Return the references: every annotator, and the judge where there are its scores (N,)."""
    said = references(judged, gold)
    return {name: said[name] for name in (ANNOTATORS, JUDGE) if name in said}


def accuracies(name: str, compared: Mapping[str, Sequence[Compared]], prompts: int) -> Sums:
    """Return a rater's accuracy against each reference."""
    return {
        (name, reference, AS_IS, ACCURACY): by_prompt(pooled_accuracy, pairs, prompts)
        for reference, pairs in compared.items()
    }


def pooled(runs: Sequence[Sums]) -> Sums:
    """Return the sums of a method over its seeds."""
    return {key: np.sum([run[key] for run in runs], axis=0) for key in runs[0]}


def with_differences(sums: Sums, first: str) -> Sums:
    """Return the sums, and behind each accuracy its difference from that of the first method."""
    found: Sums = {}
    for (name, reference, view, metric), pair in sums.items():
        found[name, reference, view, metric] = pair
        if (view, metric) == (AS_IS, ACCURACY) and name not in (first, ONE):
            gain = pair[0] - sums[first, reference, view, metric][0]
            found[name, reference, view, OVER] = np.stack([gain, pair[1]])
    return found


def to_text(tables: Mapping[str, Sequence[Row]]) -> str:
    """Return the tables as printed, in per cent: accuracies, their differences, and how robust they are."""
    text = [
        f"{'data':16s} {'method':20s} {'reference':11s} {'view':17s} {'measure':22s} {'per cent':>8s}  interval"
    ]
    for data, rows in tables.items():
        for row in rows:
            value, low, high = (100 * number for number in (row.value, row.low, row.high))
            sign = "+" if row.metric in (OVER, CHANGE) else ""
            text.append(
                f"{data:16s} {row.rater:20s} {row.reference:11s} {row.view:17s} {row.metric:22s} {value:{sign}8.1f}"
                f"  [{low:{sign}.1f}, {high:{sign}.1f}]"
            )
    return "\n".join(text)


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw accuracies with their intervals, a panel for each folder and reference, and the flipped choices of the first."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for data, rows in tables.items():
        for row in rows:
            if (row.view, row.metric) == (AS_IS, ACCURACY):
                panels.setdefault((data, row.reference), []).append(row)
    names = list(dict.fromkeys(row.rater for rows in panels.values() for row in rows))
    flipped = [row for row in next(iter(tables.values())) if row.metric == FLIPPED]
    number = len(panels) + bool(flipped)
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
        axis.set_xlabel("pairs in the right order, per cent")
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
        axes[0, -1].set_title(
            "choices that flip when pictures are\nmirrored and cropped, per cent", fontsize=9
        )
        axes[0, -1].legend(fontsize=7)
    save_figure(figure, path)


def check_inputs(config: Config) -> dict[str, tuple[list[Picture], list[Judged], list[str]]]:
    """Return the held-out rankings of each folder; ValueError for what is wrong before anything is trained."""
    check_commands(config.commands())
    found = {folder.name: read([folder], config.count) for folder in config.data}
    config.output.mkdir(parents=True, exist_ok=True)
    return found


def main(config: Config) -> int:
    """Train, score, compare."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with exit_on_user_error():
        held_out = check_inputs(config)
        runs = {
            name: [train(name, command, seed, config.output) for seed in config.seeds]
            for name, command in config.commands().items()
        }
    views, tables, by_seed = view_names(config.crops), dict[str, list[Row]](), list[tuple[object, ...]]()
    for data, (pictures, judged, prompts) in held_out.items():
        gold = None
        if in_world(prompts):
            scored, rejected = score(
                pictures, [rewards.load(GOLD)], [], device, batch=config.batch, workers=0
            )
            gold, judged = scored[GOLD][0], without(judged, rejected)
        found: dict[str, list[Sums]] = {}
        for name, folders in runs.items():
            for seed, folder in zip(config.seeds, folders, strict=True):
                scorer = rewards.load(
                    str(folder / "scorer"), device=device
                )  # one at a time: they may be large
                scored, rejected = score(
                    pictures, [scorer], config.crops, device, batch=config.batch, workers=0
                )
                judged = without(judged, rejected)
                own = sums_of(name, scored[scorer.card.name], gold, judged, views, len(prompts))
                found.setdefault(name, []).append(own)
                by_seed += [
                    (data, name, seed, *key[1:], pair[0].sum() / max(pair[1].sum(), 1))
                    for key, pair in own.items()
                ]
        said = held_against(judged, gold)
        one = {reference: of_annotator(judged, reference, ranks) for reference, ranks in said.items()}
        sums = accuracies(ONE, one, len(prompts))
        for each in found.values():
            sums |= pooled(each)
        tables[data] = rows_of(with_differences(sums, next(iter(runs))))
    heads = ["data", "method", "reference", "view", "metric", "value", "low", "high"]
    lines = (
        (data, row.rater, row.reference, row.view, row.metric, row.value, row.low, row.high)
        for data, rows in tables.items()
        for row in rows
    )
    write_text(config.output / "table.csv", csv_text(heads, lines))
    heads = ["data", "method", "seed", "reference", "view", "metric", "value"]
    write_text(config.output / "seeds.csv", csv_text(heads, by_seed))
    draw(tables, config.output / "accuracy.png")
    print(f"{to_text(tables)}\n{config.output / 'accuracy.png'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
