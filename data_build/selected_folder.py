"""The data set that `diffusiondb.py` writes: an imagefolder of selected images, and a report.

    metadata.jsonl   file_name, text, kind, score, confidence, group_size, source (the part), member (its name in the part)
    000/000000.png   the images, with the same bytes as in the part, in the order of the data
    rejected.jsonl   file, member, reason and detail of rejected images
    summary.json     counts and mean scores
    job.json         data, weights and settings
    __report__/      index.html, best_worst.png, scores.png; `datasets` skips folders with such names

The scores are read from the chunks of score_folder.py, one per part. The folder is always rebuilt from
them, so a killed process needs no special treatment.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from data_build import score_folder
from data_build.decode import ImageEntry, decode
from data_build.filters import identity, number
from data_build.readers import DataSet, read_bytes
from data_build.selection import KINDS, Chosen, Selection, select
from preftune.files import remove
from preftune.grid import captioned_grid
from preftune.images import save_image, to_pil
from preftune.pages import base64_of, render
from preftune.records import read_jsonl, write_jsonl, write_lines
from rewards.pixels import from_pil

FOLDER = "data"
"""Its name while it is made."""
REPORT = "__report__"
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
CELL = 192
"""Pixels of an image's side in the report."""
INKS = {"preferred": "#1a7f37", "non_preferred": "#c0392b"}


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """All scored images, N, in the order of the data."""

    prompts: NDArray[np.uint64]
    """Equal where prompts are."""
    made: NDArray[np.uint64]
    """Equal where all is that makes an image; 0 = not known."""
    scores: NDArray[np.float64]
    places: NDArray[np.uint32]
    """(N, 2): chunk, and row in it."""
    filtered: Counter[str]
    """Images that were not wanted, by filter."""
    rejected: Counter[str]
    """What was set aside, by reason."""

    def without_duplicates(self) -> "ScoredImages":
        """Return the table with the first of several images that were made alike."""
        keep = self.made == 0
        keep[np.unique(self.made, return_index=True)[1]] = True
        return ScoredImages(
            prompts=self.prompts[keep], made=self.made[keep], scores=self.scores[keep], places=self.places[keep],
            filtered=self.filtered + Counter(duplicate=int((~keep).sum())), rejected=self.rejected,
        )  # fmt: skip


def read_table(folder: Path) -> ScoredImages:
    """Return what the chunks of a folder say."""
    prompts, made, scores, places = array("Q"), array("Q"), array("f"), array("I")
    filtered, rejected = Counter[str](), Counter[str]()
    for chunk, rows in enumerate(score_folder.chunk_rows(folder)):
        for index, row in enumerate(rows):
            if "scores" in row:
                prompts.append(number(row["text"]))
                made.append(identity(row["text"], row["made"]))
                scores.append(row["scores"][0])
                places.extend((chunk, index))
            else:
                filtered.update([row["filter"]] if "filter" in row else [])
                rejected.update([row["reason"]] if "reason" in row else [])
    return ScoredImages(
        prompts=np.array(prompts, np.uint64), made=np.array(made, np.uint64), scores=np.array(scores, np.float64),
        places=np.array(places, np.uint32).reshape(-1, 2), filtered=filtered, rejected=rejected,
    )  # fmt: skip


def write_data_set(
    building: Path,
    data: DataSet,
    rule: Selection,
    scale: float,
    *,
    keep_duplicates: bool,
    name: str,
    shown: int,
    record: Mapping[str, Any],
) -> None:
    """Select from the chunks in `building`, and write the data set into its folder FOLDER."""
    folder = building / FOLDER
    remove(folder)
    (folder / REPORT).mkdir(parents=True)
    table = read_table(building)
    table = table if keep_duplicates else table.without_duplicates()
    chosen = sorted(select(table.prompts, table.scores, rule, scale), key=lambda one: one.index)
    write_jsonl(folder / "metadata.jsonl", copied(building, folder, data, table, chosen))
    rejected = (row for rows in score_folder.chunk_rows(building) for row in rows if "reason" in row)
    write_jsonl(folder / "rejected.jsonl", rejected)
    summary = summarise(table, chosen, rule, scale, name)
    write_lines(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).splitlines())
    histogram(table, chosen, name).savefig(
        folder / REPORT / "scores.png", dpi=110, metadata={"Software": None}
    )
    draw_report(folder, summary, shown)
    write_jsonl(folder / "job.json", [record])


def copied(
    building: Path, folder: Path, data: DataSet, table: ScoredImages, chosen: list[Chosen]
) -> Iterator[dict[str, Any]]:
    """Copy the chosen images, byte for byte, and yield their rows."""
    taken = {(int(table.places[one.index, 0]), int(table.places[one.index, 1])): one for one in chosen}
    chunks = {chunk for chunk, _ in taken}
    count = 0
    for chunk, rows in enumerate(score_folder.chunk_rows(building)):
        for index, row in enumerate(rows if chunk in chunks else ()):
            if (one := taken.get((chunk, index))) is None:
                continue
            suffix = PurePosixPath(row["member"]).suffix.lower()
            file_name = f"{count // 1000:03d}/{count:06d}{suffix}"
            (folder / file_name).parent.mkdir(exist_ok=True)
            image = ImageEntry(file=row["file"], member=row["member"], text=row["text"])
            (folder / file_name).write_bytes(read_bytes(data, image))
            count += 1
            yield {
                "file_name": file_name,
                "text": row["text"],
                "kind": one.kind,
                "score": row["scores"][0],
                "confidence": one.confidence,
                "group_size": one.group_size,
                "source": row["file"],
                "member": row["member"],
            }


def summarise(
    table: ScoredImages, chosen: list[Chosen], rule: Selection, scale: float, name: str
) -> dict[str, Any]:
    """Return counts and mean scores."""
    sizes = np.unique(table.prompts, return_counts=True)[1]
    selected: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        scores = table.scores[[one.index for one in chosen if one.kind == kind]]
        selected[kind] = {"count": len(scores), "mean_score": float(scores.mean()) if len(scores) else None}
    numbers = {"softmax": ("alpha",), "top-k": ("k",), "threshold": ("high", "low")}[rule.rule]
    return {
        "scorer": name,
        "scored": len(table.scores),
        "filtered": dict(sorted(table.filtered.items())),
        "rejected": dict(sorted(table.rejected.items())),
        "mean_score": float(table.scores.mean()) if len(table.scores) else None,
        "prompts": len(sizes),
        "groups": int((sizes >= rule.min_group).sum()),
        "in_groups": int(sizes[sizes >= rule.min_group].sum()),
        "rule": {"name": rule.rule, "min_group": rule.min_group, "scale": scale}
        | {key: getattr(rule, key) for key in numbers},
        "selected": selected,
    }


def is_of(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a folder is the complete result of a job."""
    path = folder / "job.json"
    return path.is_file() and read_jsonl(path) == [json.loads(json.dumps(record))]


def summary_text(folder: Path) -> str:
    """Return the summary of a data set in words."""
    return "\n".join(
        ": ".join(line)
        for line in summary_lines(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    )


def check_any_scored(folder: Path) -> None:
    """Raise ValueError for a data set of which no image was scored."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if not summary["scored"]:
        raise ValueError(
            f"no image was scored, {sum(summary['rejected'].values())} set aside, {sum(summary['filtered'].values())} filtered;"
            f" {folder / 'rejected.jsonl'} lists the reasons"
        )


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, how many) of a summary; `scored` leaves out what duplicates were filtered afterwards."""

    def total(counts: Mapping[str, int]) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"{sum(counts.values())}{f' ({reasons})' if reasons else ''}"

    def mean(value: float | None) -> str:
        return "" if value is None else f", mean {value:.4g}"

    rule = dict(summary["rule"])
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rule.items() if key != "name")
    return [
        ("set aside", total(summary["rejected"])),
        ("filtered", total(summary["filtered"])),
        (f"scored by {summary['scorer']}", f"{summary['scored']}{mean(summary['mean_score'])}"),
        ("prompts", f"{summary['prompts']}, {summary['groups']} of them with enough images"),
        ("images of these", f"{summary['in_groups']}"),
        *(
            (kind.replace("_", "-"), f"{row['count']}{mean(row['mean_score'])}")
            for kind, row in summary["selected"].items()
        ),
        ("rule", f"{rule['name']} ({settings})"),
    ]


def histogram(table: ScoredImages, chosen: list[Chosen], name: str) -> Figure:
    """Return the distributions of all scores and of those that were selected."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(table.scores if len(table.scores) else np.zeros(1), 50).tolist()
    axes.hist(table.scores, edges, color="#c8c8c8", label=f"all ({len(table.scores)})")
    for kind in KINDS:
        scores = table.scores[[one.index for one in chosen if one.kind == kind]]
        label = f"{kind.replace('_', '-')} ({len(scores)})"
        axes.hist(scores, edges, histtype="step", linewidth=1.8, color=INKS[kind], label=label)
    axes.set_yscale("symlog", linthresh=1)  # the selected are few
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{name} score")
    axes.set_ylabel("images")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_report(folder: Path, summary: Mapping[str, Any], shown: int) -> None:
    """Write best_worst.png and index.html: pairs of a prompt where there are any, evenly picked from all."""
    prompts: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_jsonl(folder / "metadata.jsonl"):
        kept = prompts.setdefault(row["text"], {}).setdefault(row["kind"], row)
        if row["score"] != kept["score"] and (row["score"] > kept["score"]) == (row["kind"] == "preferred"):
            prompts[row["text"]][row["kind"]] = row
    ranked = [text for text, kinds in prompts.items() if len(kinds) == len(KINDS)] or [*prompts]
    places = np.unique(np.linspace(0, len(ranked) - 1, min(shown, len(ranked))).round().astype(int))
    pairs = [(ranked[place], prompts[ranked[place]]) for place in places.tolist()]
    if pairs:
        save_image(best_worst(folder, pairs), folder / REPORT / "best_worst.png")
    page = render(
        TEMPLATE, summary=summary, lines=summary_lines(summary), pairs=pairs, kinds=KINDS,
        image=lambda row: base64_png(folder, row),
        scores=base64_of(folder / REPORT / "scores.png"),
    )  # fmt: skip
    write_lines(folder / REPORT / "index.html", page.splitlines())


def best_worst(folder: Path, pairs: list[tuple[str, dict[str, dict[str, Any]]]]) -> Image.Image:
    """Return a row for each prompt: its preferred image and its non-preferred one."""
    blank = Image.new("RGB", (CELL, CELL), "white")
    return captioned_grid(
        [
            [thumbnail(folder, kinds[kind]) if kind in kinds else blank for kind in KINDS]
            for _, kinds in pairs
        ],
        row_captions=[text for text, _ in pairs],
        column_titles=[kind.replace("_", "-") for kind in KINDS],
        cell_captions=[
            [cell_caption(kinds[kind]) if kind in kinds else "none taken" for kind in KINDS]
            for _, kinds in pairs
        ],
        cell_size=CELL,
    )


def cell_caption(row: Mapping[str, Any]) -> str:
    """Return what stands under an image."""
    return f"{row['score']:.4g}; p = {row['confidence']:.2f} of {row['group_size']}"


def thumbnail(folder: Path, row: Mapping[str, Any]) -> Image.Image:
    """Return a small copy of the image of a row."""
    image = to_pil(from_pil(decode((folder / row["file_name"]).read_bytes())))
    image.thumbnail((CELL, CELL))
    return image


def base64_png(folder: Path, row: Mapping[str, Any]) -> str:
    """Return the small copy as the base64 text of a PNG."""
    path = folder / REPORT / ".thumbnail.png"
    save_image(thumbnail(folder, row), path)
    try:
        return base64_of(path)
    finally:
        path.unlink()
