r"""Compare folders of images, one a model, by a published protocol or by any scorers, with intervals over prompts.

A folder is what `preftune benchmark-images` writes, or images of any other tool with a metadata.jsonl of `file_name`, `text` and,
where there are any, `seed` and `group`. Folders whose prompts, seeds or image sizes differ are refused, and the sentence says where.

    preftune benchmark-images --columns base= tuned=runs/refl-tiny --count 64 --output-dir images
    preftune benchmark --folders images/base images/tuned --output-dir runs/benchmark

    preftune benchmark --protocol hpsv2.1 --folders base=images/base tuned=images/tuned dalle=my_images --prompts HPDv2/benchmark

Each model is compared with --base on the same prompts: the mean change with a 95 % bootstrap interval over prompts, the win rate with
ties half, and the p-value of the exact sign test, adjusted for all claims of the table (Holm). Beside the scores the table has
diversity (with a CLIP among the scorers, or by --diversity-by), saturation, contrast and high-frequency energy, which show damage that
scorers reward. Written into --output-dir:

    report.html    the page: conclusions, tables, plot, examples; one file
    table.csv      models x scorers       groups.csv   the protocol's groups       measures.csv   diversity and pixels
    results.json   all of it with what it is of        results.png   the changes with their intervals
    scores.csv     every score            scores/      the same, chunk by chunk: a program that was killed goes on there

Hardware: memory does not grow with the number of images. The embedded scorers do hundreds of images/s on two CPU cores; a ViT-H needs a GPU in
practice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compared_folders import ModelFolder, SideBySide, read_folder, side_by_side, size_of, with_groups
from eval.flags import named_folders
from eval.protocol import Protocol, load_protocol, read_lists
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import Precision, batch_size_here, check_precision, device_here, workers_here
from preftune.cli.scorer_flags import Files, Measured
from rewards.terms import parse_files, parse_names

REPORT = (
    "report.html",
    "table.csv",
    "groups.csv",
    "measures.csv",
    "results.json",
    "results.png",
    "scores.csv",
)
RECORD = "benchmark.json"
"""The file that says what a report is of."""
SCORES = "scores"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score folders of images of the same prompts, and compare each with the base."""

    folders: tuple[str, ...]
    """TITLE=FOLDER, or FOLDER, whose name is the title: the images of each model."""
    base: str | None = None
    """Title of the model that the others are compared with; None = the first."""
    protocol: str | None = None
    """hpsv2, hpsv2.1, drawbench, imagereward, pickscore, lpo, parti or geneval_prompts, or a YAML file; None = no protocol."""
    prompts: Path | None = None
    """File or folder of the protocol's prompts, where they do not come with it; the images are checked against them."""
    rewards: Measured = ()
    reward_files: Files = ()
    precision: Precision = "fp32"
    """Precision of the scorers."""
    batch_size: int | None = None
    """Images per forward pass of a scorer; None = 128 on a GPU, 32 elsewhere."""
    workers: int | None = None
    """Processes that decode images for the scorers; 0 = the main process; None = one for each core."""
    diversity_by: str | None = None
    """Folder or hub id of a DINOv2 whose features measure diversity, such as facebook/dinov2-base; None = the image tower of the first
    CLIP among the scorers.
    """
    examples: int = 6
    """Prompts whose images the page shows: those of the largest gains, the middle and the largest losses."""
    output_dir: Path = Path("runs/benchmark")
    """Folder of the report."""
    overwrite_output_dir: bool = False
    """Replace a report of other images, scorers or settings."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("examples", self.examples, 1), ("batch-size", self.batch_size, 1), ("workers", self.workers, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        titles = list(self.named())
        if self.base is not None and self.base not in titles:
            raise ValueError(f"--base is {self.base}; it must be one of {', '.join(titles)}")
        if self.prompts is not None and self.protocol is None:
            raise ValueError(
                f"--prompts {self.prompts} is for a --protocol; the prompts of folders are in their metadata.jsonl"
            )
        self.files()
        check_precision(self.precision)

    def named(self) -> dict[str, Path]:
        """Return title -> folder of each model."""
        return named_folders(self.folders)

    def base_title(self) -> str:
        """Return the title of the base."""
        return self.base or next(iter(self.named()))

    def followed(self) -> Protocol | None:
        """Return the protocol, None without one; ValueError for one that is not there."""
        return None if self.protocol is None else load_protocol(self.protocol)

    def scorers(self) -> tuple[str, ...]:
        """Return the names of the scorers: those typed, else the protocol's, else those of the shapes world."""
        protocol = self.followed()
        return parse_names(self.rewards or (protocol.rewards if protocol else ("imagereward-tiny", "shapes")))

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, self.scorers())

    def factors(self) -> list[float]:
        """Return by what the scores of each scorer are multiplied, as in the protocol's tables."""
        protocol = self.followed()
        return [protocol.factor if protocol and name in protocol.rewards else 1.0 for name in self.scorers()]


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np

from eval.benchmark_report import Results, write_report
from eval.folder_scores import FolderScores, digest_of, score_folder
from eval.generated import DTYPES
from eval.models import check_scorers
from eval.report_folder import check_report, write_record
from eval.view_scores import PromptedImage
from preftune.cli.printable import show
from preftune.files import check_writable, tidy
from preftune.files.one_writer import one_writer
from preftune.scorer_digests import digests
from preftune.statistics.image_features import load_dino
from rewards.shared_towers import load_all


def read_models(config: Config, protocol: Protocol | None) -> tuple[list[ModelFolder], list[str]]:
    """Return the folders, the base's first, and what a reader of the results should know; ValueError for what cannot be compared."""
    lists, notes = None, []
    if protocol is not None and config.protocol is not None:
        notes.append(protocol.summary(config.protocol))
        try:
            lists = read_lists(config.protocol, protocol, config.prompts)
        except ValueError as error:
            if config.prompts is not None:
                raise
            notes.append(f"The images were not checked against the protocol's prompts: {error}.")
    base = config.base_title()
    named = sorted(config.named().items(), key=lambda pair: pair[0] != base)
    models = [read_folder(title, folder, lists) for title, folder in named]
    if protocol is not None and lists is not None:
        models = [with_groups(model, lists, str(config.protocol)) for model in models]
    elif protocol is not None and protocol.groups:
        without = next((row for row in models[0].rows if row.group not in protocol.groups), None)
        if without is not None:
            raise ValueError(
                f"{without.path} has no group of {', '.join(protocol.groups)} in {models[0].folder / 'metadata.jsonl'}; give the"
                f" protocol's lists as --prompts, from {protocol.source}"
            )
    return models, notes


def notes_on(images: SideBySide, models: Sequence[ModelFolder], protocol: Protocol | None) -> list[str]:
    """Return what differs from the protocol, and how images were paired."""
    notes = []
    if protocol is not None:
        wanted, found = protocol.size(), len(images.texts) * images.images_per_prompt
        if (len(images.texts), images.images_per_prompt) != (
            wanted // protocol.num_images_per_prompt,
            protocol.num_images_per_prompt,
        ):
            notes.append(
                f"These are {len(images.texts):,} prompts with {images.images_per_prompt} images each, {found:,} of the protocol's"
                f" {wanted:,} images: do not compare with published tables."
            )
    if len(models) > 1 and not images.paired_by_seed:
        notes.append("Not all folders have seeds: images are paired by prompt and order, not by noise.")
    if any(not model.made for model in models):
        titles = ", ".join(model.title for model in models if not model.made)
        notes.append(f"Weights and sampling settings are not known of {titles}.")
    return notes


def ordered(images: SideBySide, title: str) -> list[PromptedImage]:
    """Return the images of a model, prompt by prompt."""
    return [
        PromptedImage(path=path, prompt=text)
        for text, paths in zip(images.texts, images.files[title], strict=True)
        for path in paths
    ]


def measure(config: Config, images: SideBySide, weights: dict[str, Any]) -> dict[str, FolderScores]:
    """Return title -> what was measured, model after model; what an earlier start has measured is read."""
    device = device_here()
    with exit_on_user_error():
        tower = None if config.diversity_by is None else load_dino(config.diversity_by, device)
        scorers = load_all(
            config.scorers(), files=config.files(), device=device, dtype=DTYPES[config.precision]
        )
    found = {}
    for number, title in enumerate(images.files):
        folder = config.output_dir / SCORES / f"{number:02d}"
        with exit_on_user_error():
            found[title] = score_folder(
                ordered(images, title),
                scorers,
                folder,
                device,
                weights={**weights, "precision": config.precision, "diversity by": config.diversity_by},
                batch_size=batch_size_here(config.batch_size),
                workers=workers_here(config.workers),
                title=title,
                tower=tower,
            )
    return found


def record_of(config: Config, images: SideBySide, weights: dict[str, Any]) -> dict[str, Any]:
    """Return what the report depends on."""
    return {
        "folders": {title: digest_of(ordered(images, title)) for title in images.files},
        "base": config.base_title(),
        "protocol": None if config.protocol is None else repr(config.followed()),
        "rewards": weights,
        "precision": config.precision,
        "diversity by": config.diversity_by,
        "examples": config.examples,
    }


@one_writer
def main(config: Config) -> int:
    """Read, score, compare, report."""
    with exit_on_user_error():
        protocol = config.followed()
        models, notes = read_models(config, protocol)
        images = side_by_side(models)
        notes += notes_on(images, models, protocol)
        size = size_of(images.files[models[0].title][0][0])
        check_scorers(config.scorers(), config.files(), images.texts, size, models[0].folder)
        check_writable(config.output_dir)
        weights = digests(config.scorers(), config.files())
        record = record_of(config, images, weights)
        check_report(config.output_dir, REPORT, RECORD, record, overwrite=config.overwrite_output_dir)
        tidy(config.output_dir)
    for note in notes:
        show(note)
    found = measure(config, images, weights)
    shape = (len(images.texts), images.images_per_prompt, -1)
    results = Results(
        base=models[0].title,
        models=models,
        images=images,
        scorers=config.scorers(),
        factors=config.factors(),
        part_size=protocol.part_size if protocol else None,
        notes=notes,
        scores={title: one.scores.reshape(shape) for title, one in found.items()},
        statistics={title: one.statistics.reshape(shape) for title, one in found.items()},
        features={
            title: None if one.features is None else np.reshape(one.features, shape)
            for title, one in found.items()
        },
    )
    write_record(config.output_dir, RECORD, record)
    write_report(results, config.output_dir, examples=config.examples, protocol=config.protocol)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
