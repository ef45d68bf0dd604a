r"""Show which of n images of a prompt each scorer picks, and how often people or a judge prefer its pick to a random image.

Of n images of each prompt every scorer picks the one it scores highest (Stable Preference, Fig. 6: 1 of 100; ImageReward, arXiv
2304.05977, Fig. 1 and 5: 1 of 9, 25 and 64). --data is a folder of rankings by people (`preftune preferences` writes those of
published data), or of several images of each prompt with a metadata.jsonl (`preftune benchmark-images`). Who judges: the people who
ranked, or another scorer, --judge; without either there are only the picks. The win rate is that of a pick against the other images
of its prompt, ties half: 50 % is random choice. Over n it is estimated without bias from all the images.

    preftune benchmark-images --columns base= --count 32 --num-images-per-prompt 16 --output-dir images
    python eval/selection.py --data images/base --rewards imagereward-tiny --judge shapes
    python eval/selection.py --data data/hpdv2-test --rewards imagereward hpsv2.1 pickscore clipscore

A scorer that was trained on these rankings, or like the judge, overstates. Writes table.csv, picks.csv, results.json,
picks.png (what was picked), selection.png (win rates) and report.html, one file without external requests. Scores are kept in scores/
as they are made: the same command goes on where one was stopped. Intervals are 95 % bootstrap intervals over prompts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import Precision, batch_size_here, check_precision, device_here, workers_here
from preftune.cli.scorer_flags import Files, Measured
from rewards.terms import parse_files, parse_names

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
REPORT = ("report.html", "table.csv", "picks.csv", "results.json", "picks.png", "selection.png")
RECORD = "selection.json"
"""The file that says what a report is of."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what each scorer picks from n images of a prompt, and how good its picks are."""

    data: Path
    """Folder of rankings (rankings.jsonl), or of several images of each prompt (metadata.jsonl)."""
    rewards: Measured = ("imagereward-tiny",)
    reward_files: Files = ()
    judge: str | None = None
    """Scorer that judges the picks; None = the people who ranked the images, without rankings nobody."""
    count: int | None = None
    """Maximum number of prompts, from the start; None = all."""
    num_images_per_prompt: int | None = None
    """n, images to choose from, those of the lowest seeds; None = all. Rankings are taken as they are."""
    precision: Precision = "fp32"
    """Precision of the scorers."""
    batch_size: int | None = None
    """Images per forward pass of a scorer; None = 128 on a GPU, 32 elsewhere."""
    workers: int | None = None
    """Processes that decode images; 0 = the main process; None = one for each core."""
    grid_rows: int = 8
    """Prompts in picks.png."""
    seed: int = 0
    """Of the random images in picks.png."""
    output_dir: Path = Path("runs/selection")
    """Folder of the report."""
    overwrite_output_dir: bool = False
    """Replace a report of other images, scorers or settings."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("count", self.count, 1), ("num-images-per-prompt", self.num_images_per_prompt, 2), ("workers", self.workers, 0),
            ("batch-size", self.batch_size, 1), ("grid-rows", self.grid_rows, 1), ("seed", self.seed, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not self.rewards:
            raise ValueError("--rewards is empty; name a scorer, as in --rewards imagereward")
        if self.judge is not None and self.judge in parse_names(self.rewards):
            raise ValueError(
                f"--judge {self.judge} is one of --rewards and would judge its own picks; leave it out there"
            )
        if self.is_ranked() and self.num_images_per_prompt is not None:
            raise ValueError(
                f"--num-images-per-prompt is for a folder of images, and {self.data} holds rankings; leave it out"
            )
        check_precision(self.precision)
        self.files()

    def is_ranked(self) -> bool:
        """Return whether the data are rankings."""
        return (self.data / "rankings.jsonl").exists()

    def names(self) -> tuple[str, ...]:
        """Return the names of all scorers, the judge's last."""
        return parse_names((*self.rewards, *([] if self.judge is None else [self.judge])))

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, self.names())


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from eval.compared_folders import read_folder, size_of
from eval.folder_scores import digest_of, score_folder
from eval.generated import DTYPES
from eval.models import check_scorers
from eval.rankings import read_ranked_images
from eval.report_folder import check_report, write_record
from eval.top_picks import (
    Picks,
    Pool,
    grid,
    picks_csv,
    plot,
    pools_of_folder,
    pools_of_rankings,
    quality,
    sentence,
    table,
    to_csv,
    to_json,
    to_text,
)
from eval.view_scores import PromptedImage
from preftune.cli.printable import show
from preftune.files import check_writable, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.images import save_image
from preftune.pages import base64_of, render
from preftune.scorer_digests import digests
from preftune.statistics.bootstrap import interval
from rewards.shared_towers import load_all


def read(config: Config) -> tuple[list[PromptedImage], list[Pool]]:
    """Return the images and the pools; ValueError for what is wrong, before any weight loads."""
    if not config.data.is_dir():
        raise ValueError(
            f"--data {config.data} {'is no folder' if config.data.exists() else 'does not exist'}; name a folder with rankings.jsonl"
            " (`preftune preferences`), or with images and metadata.jsonl (`preftune benchmark-images`)"
        )
    if config.is_ranked():
        ranked = read_ranked_images([config.data], config.count)
        images, pools = ranked.images, pools_of_rankings(ranked)
    else:
        folder = read_folder(config.data.name, config.data, None)
        images, pools = pools_of_folder(folder, config.count, config.num_images_per_prompt)
    size = size_of(images[0].path)
    check_scorers(config.names(), config.files(), [image.prompt for image in images], size, config.data)
    return images, pools


def pick(config: Config, images: list[PromptedImage], pools: list[Pool], weights: dict[str, Any]) -> Picks:
    """Return what each scorer picks, and how good that is."""
    device = device_here()
    measured = score_folder(
        images,
        load_all(config.names(), files=config.files(), device=device, dtype=DTYPES[config.precision]),
        config.output_dir / "scores" / "00",
        device,
        weights=weights,
        batch_size=batch_size_here(config.batch_size),
        workers=workers_here(config.workers),
        title=config.data.name,
    )
    scores = dict(zip(config.names(), measured.scores.T, strict=True))
    ranks = [-pool.ranks for pool in pools if pool.ranks is not None]
    judge, found = "", None
    if config.judge is not None:
        judged = scores[config.judge]
        judge, found = config.judge, [quality(judged[None, list(pool.rows)]) for pool in pools]
    elif ranks:
        judge, found = "the annotators", [quality(one) for one in ranks]
    return Picks(pools=pools, images=images, scores=scores, quality=found, judge=judge)


def write_report(config: Config, picks: Picks) -> None:
    """Write the files of the report and print its table."""
    folder = config.output_dir
    rows = table(picks, parse_names(config.rewards))
    save_image(grid(picks, config.grid_rows, config.seed), folder / "picks.png")
    inlined = {"picks.png": base64_of(folder / "picks.png")}
    (folder / "selection.png").unlink(missing_ok=True)
    if picks.quality is not None:
        plot(picks, folder / "selection.png")
        inlined["selection.png"] = base64_of(folder / "selection.png")
    write_text(folder / "table.csv", to_csv(rows))
    write_text(folder / "picks.csv", picks_csv(picks))
    write_text(folder / "results.json", to_json(picks, rows))
    sizes = sorted({len(pool.rows) for pool in picks.pools})
    page = render(
        TEMPLATE,
        rows=rows,
        picks=picks,
        sizes=sizes,
        sentences=[sentence(row, picks.judge) for row in rows],
        interval=interval,
        inlined=inlined,
        shown=min(config.grid_rows, len(picks.pools)),
    )
    write_text(folder / "report.html", page)
    show(
        to_text(rows)
        if rows
        else "nobody judges the picks: name a scorer as --judge, or give rankings by people"
    )
    show(str(folder / "report.html"))


@one_writer
def main(config: Config) -> int:
    """Score, pick, report."""
    with exit_on_user_error():
        images, pools = read(config)
        check_writable(config.output_dir)
        weights = {**digests(config.names(), config.files()), "precision": config.precision}
        record = {
            "images": digest_of(images),
            "weights": weights,
            "judge": config.judge,
            "pools": [pool.rows for pool in pools],
            "grid rows": config.grid_rows,
            "seed": config.seed,
        }
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        tidy(config.output_dir)
        picks = pick(config, images, pools, weights)
    write_record(config.output_dir, RECORD, record)
    write_report(config, picks)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
