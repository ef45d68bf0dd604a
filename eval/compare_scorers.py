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
from dataclasses import dataclass, fields
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
    Floats,
    Judged,
    by_prompt,
    of_annotator,
    of_scorer,
    pooled_accuracy,
    references,
    robustness,
)
from eval.columns import write_text
from eval.ranked import read, without
from eval.trainings import check_commands, check_seeds, split, train
from eval.view_scores import Picture, score
from eval.win_rates import csv_text, ratios, save_figure
from preftune.cli import exit_on_user_error, parse
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
        if not all(0 < crop <= 1 for crop in self.crops) or len(set(self.crops)) != len(self.crops):
            raise ValueError(f"--crops must be different shares in (0, 1], got {self.crops}")
        check_seeds(self.seeds)

    def commands(self) -> dict[str, list[str]]:
        """Return name -> driver and flags."""
        return {name: shlex.split(text) for name, text in map(split, self.methods)}

    def views(self) -> list[str]:
        """Return the names of the views, V of them."""
        return [AS_IS, *(f"flip + crop {crop:g}" for crop in self.crops)]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: a method's value by one measure, with its 95 % interval."""

    data: str
    method: str
    reference: str
    view: str
    metric: str
    value: float
    low: float
    high: float


Sums = dict[tuple[str, str, str], Floats]
"""(reference, view, metric) -> hits and totals of each prompt, (2, P)."""


def sums_of(
    columns: Floats, gold: Floats | None, judged: Sequence[Judged], views: Sequence[str], prompts: int
) -> Sums:
    """Return what one scorer reaches, its scores being (views, N), against annotators and judge, and on changed views."""
    said = references(judged, gold)
    found = {
        (reference, AS_IS, ACCURACY): by_prompt(
            pooled_accuracy, of_scorer(columns[0], judged, said[reference]), prompts
        )
        for reference in (ANNOTATORS, JUDGE)
        if reference in said
    }
    for view, column in zip(views[1:], columns[1:], strict=True):
        changed = robustness("", view, columns[0], column, judged, prompts)
        found |= {(reference, view, metric): sums for (_, reference, _, metric), sums in changed.items()}
    return found


def lines_of(data: str, runs: Mapping[str, Sequence[Sums]], one: Sums) -> list[Line]:
    """Return the table of a folder: each method's seeds pooled, and its difference from the first; `one`: a single annotator's."""
    pooled = {
        name: {key: np.sum([run[key] for run in each], axis=0) for key in each[0]}
        for name, each in runs.items()
    }
    first = next(iter(pooled.values()))
    rows: list[tuple[str, tuple[str, str, str], Floats]] = [(ONE, key, sums) for key, sums in one.items()]
    for name, sums in pooled.items():
        rows += [(name, key, pair) for key, pair in sums.items()]
        if sums is not first:
            rows += [
                (
                    name,
                    (reference, view, OVER),
                    np.stack([pair[0] - first[reference, view, metric][0], pair[1]]),
                )
                for (reference, view, metric), pair in sums.items()
                if (view, metric) == (AS_IS, ACCURACY)
            ]
    hits, totals = np.stack([pair for _, _, pair in rows], axis=1)
    return [
        Line(
            data=data,
            method=name,
            reference=reference,
            view=view,
            metric=metric,
            value=value,
            low=low,
            high=high,
        )
        for (name, (reference, view, metric), _), (value, low, high) in zip(
            rows, ratios(hits, totals).tolist(), strict=True
        )
    ]


def to_text(lines: Sequence[Line]) -> str:
    """Return the tables as printed, in per cent: accuracies, their differences, and how robust they are."""
    text = [
        f"{'data':16s} {'method':20s} {'reference':11s} {'view':17s} {'measure':22s} {'per cent':>8s}  interval"
    ]
    for line in lines:
        value, low, high = (100 * number for number in (line.value, line.low, line.high))
        sign = "+" if line.metric in (OVER, CHANGE) else ""
        text.append(
            f"{line.data:16s} {line.method:20s} {line.reference:11s} {line.view:17s} {line.metric:22s} {value:{sign}8.1f}"
            f"  [{low:{sign}.1f}, {high:{sign}.1f}]"
        )
    return "\n".join(text)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw accuracies with their intervals, a panel for each folder and reference, and flipped choices by view."""
    shown = [line for line in lines if (line.view, line.metric) == (AS_IS, ACCURACY)]
    panels = list(dict.fromkeys((line.data, line.reference) for line in shown))
    names = list(dict.fromkeys(line.method for line in shown))
    flipped = [line for line in lines if line.metric == FLIPPED and line.data == panels[0][0]]
    width, height = 2 + 3.2 * (len(panels) + bool(flipped)), 1.4 + 0.4 * len(names)
    figure, axes = plt.subplots(
        1, len(panels) + bool(flipped), figsize=(width, max(height, 3)), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=False):
        for line in shown:
            if (line.data, line.reference) == panel:
                middle, ends = (
                    100 * line.value,
                    [100 * (line.value - line.low), 100 * (line.high - line.value)],
                )
                axis.errorbar(
                    middle, names.index(line.method), xerr=np.reshape(ends, (2, 1)), fmt="o", capsize=3
                )
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [])
        axis.invert_yaxis()
        axis.set_title(f"{panel[0]}\nagainst: {panel[1]}", fontsize=9)
        axis.set_xlabel("pairs in the right order, per cent")
        axis.grid(axis="x", alpha=0.3)
    for name in dict.fromkeys(line.method for line in flipped):
        of = [line for line in flipped if line.method == name]
        axes[0, -1].plot(
            [line.view.split()[-1] for line in of], [100 * line.value for line in of], marker=".", label=name
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
    views, lines, by_seed = config.views(), list[Line](), list[tuple[object, ...]]()
    for data, (pictures, judged, prompts) in held_out.items():
        found: dict[str, list[Sums]] = {}
        gold = None
        if in_world(prompts):
            scored, rejected = score(
                pictures, [rewards.load(GOLD)], [], device, batch=config.batch, workers=0
            )
            gold, judged = scored[GOLD][0], without(judged, rejected)
        for name, folders in runs.items():
            for seed, folder in zip(config.seeds, folders, strict=True):
                scorer = rewards.load(str(folder / "scorer"), device=device)
                scored, rejected = score(
                    pictures, [scorer], config.crops, device, batch=config.batch, workers=0
                )
                judged = without(judged, rejected)
                sums = sums_of(scored[scorer.card.name], gold, judged, views, len(prompts))
                found.setdefault(name, []).append(sums)
                by_seed += [
                    (data, name, seed, *key, pair[0].sum() / max(pair[1].sum(), 1))
                    for key, pair in sums.items()
                ]
        said = references(judged, gold)
        one = {
            (reference, AS_IS, ACCURACY): by_prompt(
                pooled_accuracy, of_annotator(judged, reference, said[reference]), len(prompts)
            )
            for reference in (ANNOTATORS, JUDGE)
            if reference in said
        }
        lines += lines_of(data, found, {key: pair for key, pair in one.items() if pair[1].any()})
    names = [field.name for field in fields(Line)]
    write_text(
        config.output / "table.csv",
        csv_text(names, ([getattr(line, name) for name in names] for line in lines)),
    )
    heads = ["data", "method", "seed", "reference", "view", "metric", "value"]
    write_text(config.output / "seeds.csv", csv_text(heads, by_seed))
    draw(lines, config.output / "accuracy.png")
    print(f"{to_text(lines)}\n{config.output / 'accuracy.png'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
