"""The files of a benchmark: tables as CSV and JSON, a plot, and one HTML page without external requests.

Letters: P prompts, S images of each, R scorers, K statistics, D features.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from eval.benchmark_table import (
    Floats,
    GroupRow,
    Measure,
    Row,
    conclusions,
    group_rows,
    in_p,
    measures,
    plain,
    table_rows,
    to_text,
)
from eval.compared_folders import ModelFolder, SideBySide
from eval.win_rates import csv_text
from preftune.cli.printable import show
from preftune.files import write_text
from preftune.images import save_figure, thumbnail
from preftune.pages import base64_of, render
from preftune.statistics.bootstrap import interval

TEMPLATE = Path(__file__).with_name("benchmark.html.jinja")
THUMBNAIL_SIZE = 192
"""Pixels of the longer side of an image on the page."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured of all models."""

    base: str
    models: Sequence[ModelFolder]
    images: SideBySide
    scorers: Sequence[str]
    factors: Sequence[float]
    """R: by what the scores of each scorer are multiplied in tables."""
    part_size: int | None
    notes: Sequence[str]
    scores: Mapping[str, Floats]
    """Title -> (P, S, R)."""
    statistics: Mapping[str, Floats]
    """Title -> (P, S, K)."""
    features: Mapping[str, Floats | None]
    """Title -> (P, S, D)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt whose images the page shows."""

    why: str
    text: str
    cells: list[tuple[str, str, str]]
    """Title, image as base64 of a JPEG, and scores in words, of each model."""


def write_report(results: Results, folder: Path, *, examples: int, protocol: str | None) -> None:
    """Write all files and print the table."""
    rows = table_rows(results.scores, results.base, results.scorers, results.factors)
    groups = group_rows(
        results.scores, results.images.groups, results.scorers, results.factors, results.part_size
    )
    others = measures(results.statistics, results.features, results.base)
    write_text(folder / "table.csv", csv_of(rows))
    write_text(folder / "groups.csv", csv_of(groups))
    write_text(folder / "measures.csv", csv_of(others))
    write_text(folder / "scores.csv", scores_csv(results))
    everything = summary(results, rows, groups, others, protocol)
    write_text(folder / "results.json", json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    plot(rows, results.base, folder / "results.png")
    page = render(
        TEMPLATE,
        results=results,
        protocol=protocol,
        factors=dict(zip(results.scorers, results.factors, strict=True)),
        rows=rows,
        groups=group_table(groups),
        measures=measure_table(others),
        conclusions=conclusions(rows, results.base),
        several=results.images.images_per_prompt > 1,
        examples=list(choose(results, examples)),
        plot=base64_of(folder / "results.png"),
        made=made_table(results.models),
        interval=interval,
        in_p=in_p,
    )
    write_text(folder / "report.html", page)
    show(f"{to_text(rows, results.base)}\n{folder / 'report.html'}")


def csv_of(rows: Sequence[Any]) -> str:
    """Return dataclasses of one kind as CSV."""
    table = [plain(row) for row in rows]
    return csv_text(
        list(table[0]), [["" if value is None else value for value in row.values()] for row in table]
    )


def scores_csv(results: Results) -> str:
    """Return every score as CSV, not multiplied: a line for each model, prompt and image."""
    images = results.images

    def lines() -> Iterator[list[object]]:
        for title, table in results.scores.items():
            for text, group, seeds, paths, by_image in zip(
                images.texts, images.groups, images.seeds, images.files[title], table.tolist(), strict=True
            ):
                for seed, path, values in zip(seeds, paths, by_image, strict=True):
                    yield [title, group, text, "" if seed is None else seed, path.name, *values]

    return csv_text(["model", "group", "prompt", "seed", "file_name", *results.scorers], lines())


def summary(
    results: Results,
    rows: Sequence[Row],
    groups: Sequence[GroupRow],
    others: Sequence[Measure],
    protocol: str | None,
) -> dict[str, Any]:
    """Return the results and what they are of, as JSON has them."""
    return {
        "protocol": protocol,
        "notes": list(results.notes),
        "base": results.base,
        "prompts": len(results.images.texts),
        "images per prompt": results.images.images_per_prompt,
        "paired by": "prompt and seed" if results.images.paired_by_seed else "prompt and order",
        "models": {
            model.title: {
                "folder": str(model.folder),
                **{key: value for key, value in model.made.items() if key != "seeds"},
            }
            for model in results.models
        },
        "factors": dict(zip(results.scorers, results.factors, strict=True)),
        "conclusions": conclusions(rows, results.base),
        "table": [plain(row) for row in rows],
        "groups": [plain(row) for row in groups],
        "measures": [plain(row) for row in others],
    }


def group_table(groups: Sequence[GroupRow]) -> tuple[list[str], list[list[str]]]:
    """Return the groups as columns: their names, and a line of cells for each model and scorer; none where there is one group."""
    names = list(dict.fromkeys(row.group for row in groups))
    if len(names) < 3 and all(row.std != row.std for row in groups):
        return [], []
    lines: dict[tuple[str, str], list[str]] = {}
    for row in groups:
        cell = f"{row.mean:.3f}" if row.std != row.std else f"{row.mean:.3f} +- {row.std:.3f}"
        lines.setdefault((row.model, row.scorer), []).append(cell)
    return names, [[*key, *cells] for key, cells in lines.items()]


def measure_table(others: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """Return the measures as columns: their names, and a line of cells for each model."""
    names = list(dict.fromkeys(one.measure for one in others))
    lines: dict[str, list[str]] = {}
    for one in others:
        bounds = interval(one.low, one.high, "+.2g") if one.change else ""
        cell = f"{one.value:.3g}" + (
            f" ({one.change:+.2g}{f' {bounds}' if bounds else ''})" if one.change else ""
        )
        lines.setdefault(one.model, []).append(cell)
    return names, [[model, *cells] for model, cells in lines.items()]


def choose(results: Results, count: int) -> Iterator[Example]:
    """Yield prompts to show: of the last model against the base by the first scorer the largest gains, the middle, the largest losses."""
    titles = list(results.scores)
    last, scorer = titles[-1], results.scorers[0]
    scores = {title: table * np.array(results.factors) for title, table in results.scores.items()}
    change = (scores[last] - scores[results.base])[:, :, 0].mean(1)
    order = np.argsort(-change, kind="stable")
    count = min(count, len(order))
    gains, losses = -(-count // 3), count // 3
    middle = count - gains - losses
    start = max(gains, (len(order) - middle) // 2)
    start = min(start, len(order) - losses - middle)
    chosen = [("largest gain", i) for i in order[:gains]]
    chosen += [("middle", i) for i in order[start : start + middle]]
    chosen += [("largest loss", i) for i in order[len(order) - losses :]]
    for kind, place in chosen:
        why = f"{kind}: {last} {change[place]:+.3f} by {scorer}" if len(titles) > 1 else ""
        cells = []
        for title in [results.base, *(title for title in titles if title != results.base)]:
            values = scores[title][place, 0]
            words = ", ".join(
                f"{name} {value:.3f}" for name, value in zip(results.scorers, values, strict=True)
            )
            cells.append((title, _jpeg(results.images.files[title][place][0]), words))
        yield Example(why=why, text=results.images.texts[place], cells=cells)


def made_table(models: Sequence[ModelFolder]) -> list[tuple[str, str, str]]:
    """Return title, folder and, in words, weights and sampling of each model."""
    lines = []
    for model in models:
        made = {
            key: value
            for key, value in model.made.items()
            if value != "" and key not in ("seeds", "prompts", "groups")
        }
        weights = str(made.pop("weights", ""))[:12]
        settings = [f"{key.replace('_', ' ')} {value}" for key, value in made.items()]
        words = ", ".join([f"weights {weights}...", *settings]) if made else "made by another tool"
        lines.append((model.title, str(model.folder), words))
    return lines


def _jpeg(path: Path) -> str:
    """Return a small image as base64 of a JPEG."""
    content = io.BytesIO()
    thumbnail(path, THUMBNAIL_SIZE, THUMBNAIL_SIZE).save(content, format="JPEG", quality=88)
    return base64.b64encode(content.getvalue()).decode("ascii")


def plot(rows: Sequence[Row], base: str, path: Path) -> None:
    """Write the changes with their intervals, in standard deviations of the base over prompts: a block for each scorer."""
    shown = [row for row in rows if row.model != base and row.standardised == row.standardised]
    models = list(dict.fromkeys(row.model for row in shown))
    scorers = list(dict.fromkeys(row.scorer for row in shown))
    height = 0.9 + 0.32 * max(1, len(shown)) + 0.25 * len(scorers)
    figure, axis = plt.subplots(figsize=(7.2, height), layout="constrained")
    places, labels = [], []
    for row in shown:
        at = -(scorers.index(row.scorer) * (len(models) + 0.7) + models.index(row.model))
        colour = {"better": "#1a7f37", "worse": "#c22f2f"}.get(row.verdict, "#777777")
        if row.standardised_low == row.standardised_low:
            axis.plot([row.standardised_low, row.standardised_high], [at, at], color=colour, linewidth=2)
        axis.plot(row.standardised, at, "o", color=colour, markersize=6)
        places.append(at)
        labels.append(f"{row.model}, {row.scorer}" if len(models) > 1 else row.scorer)
    axis.axvline(0, color="#000000", linewidth=0.8)
    axis.set_yticks(places, labels)
    axis.margins(y=0.15)
    axis.set_xlabel(f"change against {base}, in standard deviations of {base} over prompts")
    if not shown:
        alone = all(row.model == base for row in rows)
        why = "is the only model" if alone else "scores all prompts alike, so there is no unit for changes"
        axis.text(0.5, 0.5, f"{base} {why}", ha="center", va="center", transform=axis.transAxes)
        axis.set_xticks([])
    save_figure(figure, path)
