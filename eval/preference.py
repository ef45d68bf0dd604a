"""How well scorers predict preferences: accuracies, selection, robustness and correlation on ranked pictures.

Reads folders of pictures with rankings.jsonl. Several annotators may rank the same pictures (`source` tells them apart); a
scorer is then held against every single ranking, and against the annotators' mean places. Beside it stands "one annotator":
what a single person reaches against another, and against the mean of the others. In the shapes world the scorer `shapes` is
the noiseless judge, and one more reference. All folders are pooled; for each by itself, run it on each.

    python eval/preference.py --data data/held_out --rewards imagereward-tiny=1 shapes=1 --output runs/preference
    python eval/preference.py --data data/imagereward_test --rewards imagereward=1 hpsv2.1=1 --reward-files imagereward=x.pt

The metrics and their sources are in agreement.py, the views of robustness (paper 000, Table 1) in view_scores.py. Intervals are
95 % bootstrap intervals over prompts. A picture that cannot be read is set aside and counted, and its rankings keep the
others. Writes table.csv, scores.csv, rejected.jsonl, five plots and report.html.

Left out: correlation over generative models (paper 000, Fig. 5), since rankings do not say which model drew a picture; it is
over pictures here. Hardware: the embedded scorer needs a CPU; published ones want a GPU, and use one where there is one.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jinja2
import numpy as np
import torch

import rewards
from eval import preference_plots as plots
from eval.agreement import GOLD, Floats, Judged, Row, choices, table
from eval.columns import inlined, write_text
from eval.ranked import read, without
from eval.view_scores import Picture, check_crops, score, view_names
from eval.win_rates import csv_text
from preftune.cli import exit_on_user_error, parse
from preftune.records import write_jsonl
from rewards.mix import parse_files, parse_weights
from rewards.shapes import in_world
from rewards.together import load_all

TEMPLATE = Path(__file__).with_suffix(".html.jinja")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how scorers agree with rankings of pictures; gives a table, plots and an HTML page."""

    data: tuple[Path, ...]
    """Folders with rankings.jsonl and the pictures that it names; several are pooled."""
    rewards: tuple[str, ...] = ("imagereward-tiny=1.0", "shapes=1.0")
    """Scorers to measure; the weights only say which there are."""
    reward_files: tuple[str, ...] = ()
    """Weights of scorers on disk, as imagereward=PATH; others come from this repository or the hub's cache."""
    count: int | None = None
    """At most so many prompts of each folder, the first ones; None = all."""
    crops: tuple[float, ...] = (0.97, 0.95, 0.93, 0.9)
    """Side lengths of centre crops, as shares in (0, 1], that robustness is measured with; none = no robustness."""
    batch: int = 16
    """Pictures in one pass, each with all its views."""
    workers: int = 2
    """Processes that read and decode; 0 = this one does it."""
    output: Path = Path("runs/preference")
    """Folder of the report."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data needs at least one folder with rankings.jsonl")
        for name, value, least in (
            ("count", self.count, 1), ("batch", self.batch, 1), ("workers", self.workers, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        check_crops(self.crops)
        parse_files(self.reward_files, parse_weights(self.rewards))


def check_inputs(config: Config) -> tuple[list[Picture], list[Judged], list[str]]:
    """Return what `read` gives, and make the output folder; ValueError before any weight loads."""
    weights = parse_weights(config.rewards)
    files = parse_files(config.reward_files, weights)
    for name in weights:
        rewards.check(name, files.get(name))
    pictures, judged, prompts = read(config.data, config.count)
    if GOLD in weights and not in_world(prompts):
        foreign = next(prompt for prompt in prompts if not in_world([prompt]))
        raise ValueError(
            f"the scorer {GOLD} judges captions of the shapes world only, not {foreign!r}; leave it out of --rewards"
        )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {config.output} cannot be made: {error.strerror}") from error
    return pictures, judged, prompts


def scores_csv(pictures: Sequence[Picture], scores: Mapping[str, Floats], views: Sequence[str]) -> str:
    """Return every score as CSV, a line for each picture and view; empty where there is none."""
    lines = (
        [picture.path, picture.prompt, view, *("" if np.isnan(value) else value for value in values)]
        for number, picture in enumerate(pictures)
        for view, values in zip(
            views,
            zip(*(columns[:, number].tolist() for columns in scores.values()), strict=True),
            strict=True,
        )
    )
    return csv_text(["picture", "prompt", "view", *scores], lines)


def summary(judged: Sequence[Judged], rejected: int) -> str:
    """Return a sentence on what was measured."""
    pictures = len({row for one in judged for row in one.rows.tolist()})
    rankings = sum(len(one.ranks) for one in judged)
    pairs = sum(int((choices(one.ranks) != 0).sum()) for one in judged)
    prompts = len({one.prompt for one in judged})
    return (
        f"{pictures} pictures of {prompts} prompts, {rankings} rankings with {pairs} untied pairs;"
        f" {rejected} pictures set aside"
    )


def report(
    config: Config,
    judged: Sequence[Judged],
    scores: Mapping[str, Floats],
    prompts: int,
    aside: Sequence[Mapping[str, str]],
) -> None:
    """Write the table, the plots and the page, and print the accuracies."""
    rows = table(judged, scores, view_names(config.crops), prompts)
    names = [field.name for field in fields(Row)]
    write_text(config.output / "table.csv", csv_text(names, (list(asdict(row).values()) for row in rows)))
    drawn = plots.draw_all(rows, judged, scores, config.output)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    said = summary(judged, len(aside))
    page = template.render(
        config=config,
        summary=said,
        aside=aside,
        tables=plots.tables(rows),
        inlined={path.stem: inlined(path) for path in drawn},
    )
    write_text(config.output / "report.html", page)
    print(f"{plots.to_text(rows)}\n{said}\n{config.output / 'report.html'}")  # noqa: T201


def main(config: Config) -> int:
    """Score every picture, compare, report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with exit_on_user_error():
        pictures, judged, prompts = check_inputs(config)
        weights = parse_weights(config.rewards)
        files = parse_files(config.reward_files, weights)
        scorers = load_all(list(weights), files=files, device=device, dtype=torch.float32)
    scores, rejected = score(
        pictures, scorers, config.crops, device, batch=config.batch, workers=config.workers
    )
    write_text(config.output / "scores.csv", scores_csv(pictures, scores, view_names(config.crops)))
    aside = [{"picture": str(pictures[row].path), "reason": why} for row, why in sorted(rejected.items())]
    write_jsonl(config.output / "rejected.jsonl", aside)
    sound = without(judged, rejected)
    with exit_on_user_error():
        if not sound:
            raise ValueError(
                f"no ranking has two pictures left: {len(aside)} of {len(pictures)} were set aside, the first because"
                f" {aside[0]['reason']}"
            )
    report(config, sound, scores, len(prompts), aside)
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
