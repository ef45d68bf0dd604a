r"""Show how the scores of several models are distributed, how far the scorers agree, and what a tuning is worth in best of n.

The folders hold images of the same prompts: those of `preftune benchmark-images`, or of any tool with a metadata.jsonl of
`file_name`, `text` and `seed`. The first is the base. Scores are standardised by it: less its mean, divided by its standard deviation
over prompts, so that all scorers share an axis (ImageReward, arXiv 2304.05977, Fig. 3, divides by each model's range, and hides
what differs between them). Scorers are correlated over the images of a prompt, and from three models on over models (Stable
Preference, Fig. 5).

"Worth best of 3.4": one image of the tuned model scores as much as the best of 3.4 images of the base, by this scorer. The base's
curve is the unbiased estimate from all its images of a prompt, several, 16 say; a tuning beyond the pool is said to be. Beside it is the KL
divergence of best of n from the base, log n - (n - 1) / n nats: a tuning whose own divergence is larger pays more for its score than
choosing would. A scorer that was optimised overstates: read it of those that were not.

    preftune benchmark-images --columns base= --count 32 --num-images-per-prompt 16 --output-dir images
    python eval/distribution.py --folders images/base --rewards imagereward-tiny shapes
    python eval/distribution.py --folders base=images/base refl=images/tuned --rewards imagereward hpsv2.1 pickscore

Writes table.csv, distributions.png, best_of_n.png, correlations.png, results.json and report.html, one file without external
requests. Scores are kept in scores/ as they are made: the same command goes on where one was stopped. Intervals are 95 % bootstrap
intervals over prompts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.flags import named_folders
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import Precision, batch_size_here, check_precision, device_here, workers_here
from preftune.cli.scorer_flags import Files, Measured
from rewards.terms import parse_files, parse_names

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
PLOTS = ("distributions.png", "best_of_n.png", "correlations.png")
REPORT, RECORD = ("report.html", "table.csv", "results.json", *PLOTS), "distribution.json"
"""Files of a report, and the one that says what it is of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show the distributions of scores of folders of images, the first of which is the base."""

    folders: tuple[str, ...]
    """TITLE=FOLDER, or FOLDER, whose name is the title: images of the same prompts, the base's first."""
    rewards: Measured = ("imagereward-tiny", "shapes")
    reward_files: Files = ()
    precision: Precision = "fp32"
    """Precision of the scorers."""
    batch_size: int | None = None
    """Images per forward pass of a scorer; None = 128 on a GPU, 32 elsewhere."""
    workers: int | None = None
    """Processes that decode images; 0 = the main process; None = one for each core."""
    output_dir: Path = Path("runs/distribution")
    """Folder of the report."""
    overwrite_output_dir: bool = False
    """Replace a report of other images or scorers."""

    def __post_init__(self) -> None:
        for name, value, least in (("batch-size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not self.rewards:
            raise ValueError("--rewards is empty; name a scorer, as in --rewards imagereward")
        named_folders(self.folders)
        check_precision(self.precision)
        self.files()

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, parse_names(self.rewards))


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import json

from eval.compared_folders import read_folder, size_of
from eval.folder_scores import digest_of, score_folder
from eval.generated import DTYPES
from eval.models import check_scorers
from eval.report_folder import check_report, write_record
from eval.score_distribution import (
    Floats,
    ModelRow,
    box_plots,
    curves,
    heat_maps,
    n_interval,
    scorer_correlations,
    sentence,
    table,
    to_csv,
    to_text,
    units,
)
from eval.view_scores import PromptedImage
from preftune.cli.notes import say
from preftune.cli.printable import show
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.json_values import json_value
from preftune.pages import base64_of, render
from preftune.scorer_digests import digests
from preftune.statistics import best_of_n
from preftune.statistics.bootstrap import interval
from rewards.shared_towers import load_all


def images_of(config: Config) -> dict[str, list[list[PromptedImage]]]:
    """Return title -> P prompts of S images, S of each folder its own. ValueError for folders of other prompts than the base's."""
    folders = [read_folder(title, path, None) for title, path in named_folders(config.folders).items()]
    found = {}
    for folder in folders:
        found[folder.title], left_out = units(folder, folders[0])
        if left_out:
            each = len(found[folder.title][0])
            say(f"{folder.folder}: {left_out} images left out, so that each prompt has {each}")
    for folder in folders:
        size = size_of(folder.rows[0].path)
        texts = [row.text for row in folder.rows]
        check_scorers(parse_names(config.rewards), config.files(), texts, size, folder.folder)
    return found


def score(
    config: Config, images: dict[str, list[list[PromptedImage]]], weights: dict[str, Any]
) -> dict[str, Floats]:
    """Return title -> scores (P, S, R)."""
    device = device_here()
    scorers = load_all(
        parse_names(config.rewards), files=config.files(), device=device, dtype=DTYPES[config.precision]
    )
    found = {}
    for number, (title, prompts) in enumerate(images.items()):
        flat = [image for some in prompts for image in some]
        measured = score_folder(
            flat,
            scorers,
            config.output_dir / "scores" / f"{number:02d}",
            device,
            weights=weights,
            batch_size=batch_size_here(config.batch_size),
            workers=workers_here(config.workers),
            title=title,
        )
        found[title] = measured.scores.reshape(len(prompts), -1, len(scorers))
    return found


def write_report(config: Config, scores: dict[str, Floats]) -> None:
    """Write the files of the report and print its table."""
    folder, names = config.output_dir, parse_names(config.rewards)
    rows = table(scores, names)
    correlations = scorer_correlations(scores)
    box_plots(scores, names, folder / "distributions.png")
    curves(scores, names, rows, folder / "best_of_n.png")
    heat_maps(correlations, names, folder / "correlations.png")
    write_text(folder / "table.csv", to_csv(rows))
    write_text(folder / "results.json", json.dumps(results(rows, names, correlations), indent=1) + "\n")
    pool = next(iter(scores.values())).shape[1]
    page = render(
        TEMPLATE,
        rows=rows,
        scores=scores,
        names=names,
        base=next(iter(scores)),
        pool=pool,
        interval=interval,
        in_words=best_of_n.in_words,
        n_interval=n_interval,
        sentences=[sentence(row, rows[0].model, pool) for row in rows if row.model != rows[0].model],
        inlined={name: base64_of(folder / name) for name in PLOTS},
    )
    write_text(folder / "report.html", page)
    show(f"{to_text(rows, pool)}\n{folder / 'report.html'}")


def results(rows: list[ModelRow], names: tuple[str, ...], correlations: dict[str, Floats]) -> dict[str, Any]:
    """Return what was found, as JSON has it: what there is no number for is null, a tuning beyond the pool is "inf"."""
    return {
        "scorers": list(names),
        "rows": [row.to_json() for row in rows],
        "correlations": {title: json_value(found.tolist()) for title, found in correlations.items()},
    }


@one_writer
def main(config: Config) -> int:
    """Score, compute, report."""
    with exit_on_user_error():
        images = images_of(config)
        check_writable(config.output_dir)
        weights = {**digests(parse_names(config.rewards), config.files()), "precision": config.precision}
        record = {
            "images": {
                title: digest_of([image for some in prompts for image in some])
                for title, prompts in images.items()
            },
            "weights": weights,
        }
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        tidy(config.output_dir)
        scores = score(config, images, weights)
    write_record(config.output_dir, RECORD, record)
    write_report(config, scores)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
