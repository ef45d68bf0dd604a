"""Measure how well scorers predict preferences: accuracy, selection, robustness and correlation on ranked
images.

Reads folders of images with rankings.jsonl. Several annotators may rank the same images; `source`
identifies them. A second ranking by the same source is skipped and counted; each ranking without a source
counts as another annotator's. A scorer is compared with every single ranking, with the annotators' mean
rank (as HPD v2 publishes it), and with the mean rank of all but one annotator, for each of them. For
comparison, "one annotator" is the accuracy of a single person against another person, and against the mean
of the others; sets with one annotator have no such row. In the shapes world the scorer `shapes` is the
noiseless judge, which is one more reference. All folders are pooled; to evaluate them separately, run the
program on each.

    python eval/preference_accuracy.py --data data/held_out --rewards imagereward-tiny shapes --output-dir runs/preference
    python eval/preference_accuracy.py --data data/imagereward_test --rewards imagereward hpsv2.1 --reward-files imagereward=x.pt

agreement.py defines the metrics and cites their sources, view_scores.py defines the views for robustness
(Stable Preference, Table 1). Intervals are 95 % bootstrap intervals over prompts (two or more). An
unreadable image is rejected and counted, and its rankings keep the other images. Writes table.csv,
scores.csv, rejected.jsonl, five plots, report.html, and report.json, which says what they are of: a report
of something else is not overwritten without being told to.

Left out: correlation over generative models (Stable Preference, Fig. 5), because rankings do not name the
model of an image; the correlation here is over images. Hardware: the embedded scorer runs on a CPU;
published ones need a GPU in practice, and use one if available.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from eval.flags import check_crops, check_folders
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here, workers_here
from preftune.cli.scorer_flags import Files, Measured
from rewards.terms import parse_files, parse_names

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
REPORT, RECORD = ("report.html", "table.csv", "scores.csv"), "report.json"
"""Files of a report, and the one that says what it is of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how scorers agree with rankings of images; gives a table, plots and an HTML page."""

    data: tuple[Path, ...]
    """Folders with rankings.jsonl and the images that it names; several are pooled."""
    rewards: Measured = ("imagereward-tiny", "shapes")
    reward_files: Files = ()
    count: int | None = None
    """Maximum number of prompts of each folder; None = all."""
    crops: tuple[float, ...] = (0.97, 0.95, 0.93, 0.9)
    """Centre crops for robustness, as shares in (0, 1] of each side; none = no robustness."""
    batch_size: int = 16
    """Images per forward pass, each with all its views."""
    workers: int | None = None
    """Reading and decoding processes; 0 = the main process; None = one for each core."""
    output_dir: Path = Path("runs/preference")
    """Folder of the report."""
    overwrite_output_dir: bool = False
    """Replace a report of other data, scorers or settings."""

    def __post_init__(self) -> None:
        check_folders(self.data)
        for name, value, least in (
            ("count", self.count, 1), ("batch-size", self.batch_size, 1), ("workers", self.workers, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        check_crops(self.crops)
        self.files()

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, parse_names(self.rewards))


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch

import rewards
from eval import preference_plots as plots
from eval.agreement import GOLD, Floats, RankedSet
from eval.agreement_table import Measurement, agreement_table
from eval.rankings import RankedImages, read_ranked_images, rejected_rows, sound_sets, summary
from eval.report_folder import check_report, write_record
from eval.view_scores import PromptedImage, score_views, view_names
from eval.win_rates import csv_text
from preftune.cli.printable import show
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.images import opened
from preftune.pages import base64_of, render
from preftune.records import write_jsonl
from rewards.shapes import SIZE, check_judgeable
from rewards.shared_towers import load_all


def check_inputs(config: Config) -> RankedImages:
    """Return the rankings; ValueError before any weight loads."""
    names = parse_names(config.rewards)
    rewards.check_all(names, config.files(), download=False)
    ranked = read_ranked_images(config.data, config.count)
    if GOLD in names:
        check_judgeable(ranked.prompts, size_for_judge(ranked), "the images of --data")
    check_report(config.output_dir, REPORT, RECORD, record_of(config), overwrite=config.overwrite_output_dir)
    check_writable(config.output_dir)
    return ranked


def size_for_judge(ranked: RankedImages) -> tuple[int, int]:
    """Return the size of the images, judged by the first ten: that which the judge reads if any has it."""
    sizes = []
    for image in ranked.images[:10]:
        with contextlib.suppress(ValueError), opened(image.path) as file:
            sizes.append(file.size)
    return sizes[0] if sizes and (SIZE, SIZE) not in sizes else (SIZE, SIZE)


def record_of(config: Config) -> dict[str, Any]:
    """Return what a report depends on, beside the contents of files."""
    return {
        "data": [str(folder.resolve()) for folder in config.data],
        "rewards": list(parse_names(config.rewards)),
        "reward files": {name: str(path) for name, path in config.files().items()},
        "count": config.count,
        "crops": list(config.crops),
    }


def scores_csv(images: Sequence[PromptedImage], scores: Mapping[str, Floats], views: Sequence[str]) -> str:
    """Return every score as CSV, a line for each image and view; empty where there is none."""
    lines = (
        [image.path, image.prompt, view, *values]
        for number, image in enumerate(images)
        for view, values in zip(
            views,
            zip(*(columns[:, number].tolist() for columns in scores.values()), strict=True),
            strict=True,
        )
    )
    return csv_text(["image", "prompt", "view", *scores], lines)


def write_report(
    config: Config,
    judged: Sequence[RankedSet],
    scores: Mapping[str, Floats],
    ranked: RankedImages,
    aside: Sequence[Mapping[str, str]],
) -> None:
    """Write the table, the plots and the page, and print the accuracies."""
    rows = agreement_table(judged, scores, view_names(config.crops), len(ranked.prompts))
    names = [field.name for field in fields(Measurement)]
    write_text(config.output_dir / "table.csv", csv_text(names, (list(asdict(row).values()) for row in rows)))
    figures = plots.plot_all(rows, judged, scores, config.output_dir)
    measured = summary(judged, len(aside), ranked.repeated)
    page = render(
        TEMPLATE,
        config=config,
        summary=measured,
        aside=aside,
        tables=plots.tables(rows),
        inlined={path.stem: base64_of(path) for path in figures},
    )
    write_text(config.output_dir / "report.html", page)
    show(f"{plots.to_text(rows)}\n{measured}\n{config.output_dir / 'report.html'}")


@one_writer
def main(config: Config) -> int:
    """Score every image, compare, report."""
    device = device_here()
    with exit_on_user_error():
        ranked = check_inputs(config)
        names = parse_names(config.rewards)
        scorers = load_all(names, files=config.files(), device=device, dtype=torch.float32)
    tidy(config.output_dir)
    scores, rejected = score_views(
        ranked.images,
        scorers,
        config.crops,
        device,
        batch_size=config.batch_size,
        workers=workers_here(config.workers),
    )
    write_record(config.output_dir, RECORD, record_of(config))
    write_text(config.output_dir / "scores.csv", scores_csv(ranked.images, scores, view_names(config.crops)))
    aside = rejected_rows(ranked.images, rejected)
    write_jsonl(config.output_dir / "rejected.jsonl", aside)
    with exit_on_user_error():
        judged = sound_sets(ranked, rejected)
    write_report(config, judged, scores, ranked, aside)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
