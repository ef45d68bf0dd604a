"""Convert published preference data to training data of finetune/reward_model.py: images, and rankings with
ties.

Reads every layout of data_build/published.py, a few rows at a time; zip files and tables are not unpacked.
Each image is decoded once to check it. Missing, empty, truncated and too large images are rejected, and
their rankings keep their other images.

    python data_build/preferences.py --layout hpdv2-test --input HPD/test.json --images HPD/test --output-dir data/hpd
    python data_build/preferences.py --layout pickapic --input pickapic_v2/data/train-*.parquet --output-dir data/pickapic
    python data_build/preferences.py --layout imagerewarddb --input DB/images/train/*.zip --images DB --output-dir data/imagereward

    rankings.jsonl   prompt, generations (file names), ranking (1 = best), source (the annotator) and, unless it is 1, weight
    images/        under their published names, each once: the same bytes, as hard links where possible
    rejected.jsonl   name (of an image, or the place of a ranking), reason, detail
    summary.json     counts

A ranking is rejected if fewer than two images are left, or if the rest is tied only because images were
lost: a choice whose chosen image is missing says nothing. Images of a rejected ranking may remain in the
folder. Hardware: one CPU core reads 840 smooth JPEG images of 512 x 512 pixels per second, or 190 WebP
images. A line of a CSV or JSON-lines file that is no row, such as the last of a file that was cut, costs
itself alone; other files that break off end the program. Left out: several processes, and continuing after a kill; the folder gets its name only when it is
complete.
"""

import functools
import itertools
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_build.published import (
    Aspect,
    Layout,
    PublishedImage,
    PublishedRanking,
    Repeats,
    SetAside,
    read_published,
)
from preftune.cli import exit_on_user_error, parse
from preftune.cli.given_once import check_given_once

IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write rankings and their images from published preference data."""

    layout: Layout
    """Format of the files; data_build/published.py describes each."""
    input: tuple[Path, ...]
    """Files of that layout."""
    output_dir: Path
    """Folder to create; it must not exist yet."""
    images: Path | None = None
    """Root folder of the image names; a.zip in it is read as a folder a. None = that of the first input."""
    aspect: Aspect | None = None
    """Aspect that the ranks of the layout `aspects` use; None = the mean of the four."""

    repeated_ratings: Repeats = "last"
    """Several ratings of an image by a person, in the layout `ratings`: the last counts, their mean, or refuse = none of
    that person's ranking of the prompt.
    """

    def __post_init__(self) -> None:
        check_given_once("--input", self.input, "file", "its rankings would count twice")
        if self.aspect is not None and self.layout != "aspects":
            raise ValueError(f"--aspect is for --layout aspects; {self.layout} has one ranking")
        if self.repeated_ratings != "last" and self.layout != "ratings":
            raise ValueError(f"--repeated-ratings is for --layout ratings; {self.layout} has none")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from tqdm import tqdm

from data_build.decode import ImageEntry, UnusableError, decode, open_zip, or_unusable
from data_build.readers import DataSet, read_bytes
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.images import MAX_BYTES
from preftune.records import check_name, inside, write_jsonl, write_lines


@dataclass(frozen=True, kw_only=True)
class Work:
    """The folder that is being written."""

    folder: Path
    images: Path
    rejected: IO[str]
    reasons: Counter[str]
    """What was set aside."""
    counts: Counter[str]
    """What was kept."""
    unusable: set[str]
    """Names of files that were set aside."""


def check_inputs(config: Config) -> None:
    """Raise ValueError for an output that exists, a missing folder, or a file that does not begin as its layout does."""
    if config.output_dir.exists():
        raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
    if config.images is not None and not config.images.is_dir():
        raise ValueError(f"--images {config.images} is no folder")
    for path in config.input:
        next(read_published(config.layout, path, config.aspect or "mean", config.repeated_ratings), None)


def published_entries(config: Config) -> Iterator[PublishedRanking | SetAside]:
    """All rankings of all files; a file that breaks off ends the program."""
    with exit_on_user_error():
        for path in config.input:
            yield from read_published(config.layout, path, config.aspect or "mean", config.repeated_ratings)


def ranking_rows(config: Config, work: Work) -> Iterator[dict[str, Any]]:
    """The lines of rankings.jsonl; their images are stored on the way."""
    for entry in tqdm(published_entries(config), desc="reading", unit=" ranking", mininterval=1):
        if isinstance(entry, SetAside):
            reject(work, entry.place, entry.reason, entry.detail)
            continue
        kept = [
            (one, rank) for one, rank in zip(entry.images, entry.ranks, strict=True) if keep_image(work, one)
        ]
        ranks = [rank for _, rank in kept]
        if len(kept) < 2:
            detail = f"{len(kept)} of {len(entry.images)} images are left"
            reject(work, entry.place, "too few images", detail)
            continue
        if len(set(ranks)) == 1 < len(set(entry.ranks)):
            reject(work, entry.place, "only ties left", "the images that differed in rank are lost")
            continue
        untied = sum(a != b for a, b in itertools.combinations(ranks, 2))
        work.counts.update(repeated_ratings=entry.repeated)
        work.counts.update(rankings=1, untied_pairs=untied, ties=len(ranks) * (len(ranks) - 1) // 2 - untied)
        row: dict[str, Any] = {
            "prompt": entry.prompt,
            "generations": [f"{IMAGES}/{one.name}" for one, _ in kept],
            "ranking": ranks,
            "source": entry.source,
        }
        yield row if entry.weight == 1 else row | {"weight": entry.weight}


def reject(work: Work, name: str, reason: str, detail: str) -> None:
    """Note what is set aside."""
    work.reasons[reason] += 1
    work.rejected.write(json.dumps({"name": name[:500], "reason": reason, "detail": detail[:500]}) + "\n")


def keep_image(work: Work, image: PublishedImage) -> bool:
    """Store an image; False where it cannot be used, which is noted: once for a file, for bytes in a row each time."""
    if image.name in work.unusable:
        return False
    try:
        store_image(work, image)
    except UnusableError as unusable:
        reject(work, image.name, unusable.reason, str(unusable))
        if image.content is None:
            work.unusable.add(image.name)
        return False
    return True


def store_image(work: Work, image: PublishedImage) -> None:
    """Put an image into its place, unless it is there."""
    target = work.folder / IMAGES / image.name
    with or_unusable("unsafe name"):
        check_name(image.name, "the data")
        there = target.is_file()  # fails for a name that is too long
    if there:
        if image.content is not None and target.read_bytes() != image.content:
            raise UnusableError("bad metadata", "another image has this name")
        return
    content = image.content if image.content is not None else read_image(work.images, image.name)
    decode(content)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if image.content is None and (work.images / image.name).is_file():
            link_or_copy(work.images / image.name, target, content)
        else:
            target.write_bytes(content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UnusableError("unsafe name", "it is both an image and a folder of images") from error
    work.counts["images"] += 1


def link_or_copy(source: Path, target: Path, content: bytes) -> None:
    """Make a hard link, or a copy where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.write_bytes(content)


def read_image(images: Path, name: str) -> bytes:
    """The bytes of an image of that name: of a file, or of a member of FOLDER.zip where FOLDER would be."""
    archive, member = f"{PurePosixPath(name).parent}.zip", ""
    with or_unusable("unsafe name"):
        if (images / name).is_file():
            inside(images, name, "the data")
            archive = name
        elif (images / archive).is_file():
            inside(images, archive, "the data")
            member = PurePosixPath(name).name
        else:
            raise UnusableError("missing", f"there is neither {images / name} nor such a member of {archive}")
    if member:
        held = archive_members(images / archive)
        if member not in held:
            raise UnusableError("missing", f"{archive} has no member {member}")
        info = held[member]
        if info is None:
            raise UnusableError("unsafe name", "the name is in the archive more than once")
        if info.file_size > MAX_BYTES:
            raise UnusableError("too large", f"{info.file_size} bytes; at most {MAX_BYTES}")
        member = info.filename
    data = DataSet(
        root=images, kind="zip", sources=(), prompted=False, prompt="", image_column="", text_column=None
    )
    return read_bytes(data, ImageEntry(file=archive, member=member, text=""))


@functools.lru_cache(maxsize=2)
def archive_members(archive: Path) -> dict[str, zipfile.ZipInfo | None]:
    """What a zip file holds, by the last part of its name, for some hold their folder and some do not.

    None for a name that several have: nothing says which of them is meant.
    """
    found: dict[str, zipfile.ZipInfo | None] = {}
    with or_unusable("broken file"), open_zip(archive) as file:
        for member in file.infolist():
            if not member.is_dir():
                name = PurePosixPath(member.filename).name
                found[name] = None if name in found else member
    return found


def write_folder(config: Config, folder: Path) -> dict[str, Any]:
    """Write the folder and return its summary."""
    images = config.images or config.input[0].parent
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
        work = Work(
            folder=folder, images=images, rejected=rejected, reasons=Counter(), counts=Counter(), unusable=set()
        )  # fmt: skip
        write_jsonl(folder / "rankings.jsonl", ranking_rows(config, work))
    names = ("rankings", "images", "untied_pairs", "ties")
    counts = {name: work.counts[name] for name in names}
    if config.layout == "ratings":
        counts["repeated_ratings"] = work.counts["repeated_ratings"]
    summary = {"layout": config.layout, **counts, "rejected": dict(sorted(work.reasons.items()))}
    write_lines(folder / "summary.json", json.dumps(summary, indent=2).splitlines())
    return summary


def first_rejected(folder: Path) -> str:
    """What was set aside first, and why; it tells a file whose values are all of another kind."""
    with (folder / "rejected.jsonl").open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    name, detail = row["name"], row["detail"]
    return " ".join((detail if detail.startswith(name) else f"{name}: {detail}").splitlines())


@one_writer
def main(config: Config) -> None:
    """Check, write under a temporary name, rename."""
    with exit_on_user_error():
        check_inputs(config)
    with replacing(config.output_dir) as partial:
        partial.mkdir()
        summary = write_folder(config, partial)
        with exit_on_user_error():
            if not summary["rankings"]:
                aside = (
                    f"{summary['rejected']}; first {first_rejected(partial)}"
                    if summary["rejected"]
                    else "nothing"
                )
                raise ValueError(f"no ranking is left; set aside: {aside}")
    show(json.dumps(summary))


if __name__ == "__main__":
    main(CONFIG)
