"""Captioned images to train on: rows and images that cannot be used are set aside before the first update."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from preftune import files
from preftune.cli.notes import counted, say
from preftune.image_check import SMALL, Checked, check_images
from preftune.image_folders import Columns, describe_passed_over, find_captions, list_images, suffixes
from preftune.prompts import say_long
from preftune.records import (
    CaptionedImage,
    Ranking,
    Skipped,
    check_captioned,
    read_captioned,
    read_usable_rankings,
    write_jsonl,
)

SKIPPED = "skipped.jsonl"
"""File of a run that lists what was set aside: place and reason."""
SHOWN = 3
"""Number of reasons that are said at once."""


def check(folder: Path, columns: Columns, *, captioned: bool = True) -> None:
    """Raise ValueError as `read` where no row can be used; opens no image, so call it before a model is downloaded."""
    if captioned or find_captions(folder) is not None or not list_images(folder)[0]:
        check_captioned(folder, columns)
    else:
        columns.check_unused(folder)


def read(
    folder: Path, columns: Columns, *, captioned: bool = True
) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Return the usable samples of a data set in its order, and what was set aside; the latter is said on stderr.

    The same data give the same samples in every process and after a resume. Without `captioned` a folder of images without
    captions will do; their texts are empty. Raises ValueError where nothing can be used.
    """
    found = find_captions(folder, columns.image_column) if folder.is_dir() else None
    images, others = list_images(folder) if found is None and not captioned and folder.is_dir() else ((), ())
    if images:
        columns.check_unused(folder)
        samples = [CaptionedImage(path=folder / name, text="", extra={}, place=name) for name in images]
        skipped, passed_over = list[Skipped](), suffixes(others)
    else:
        samples, skipped = read_captioned(folder, columns)
        passed_over = found.passed_over if found is not None else suffixes(())
    if words := describe_passed_over(passed_over):
        say(f"{folder}: {words}")
    checked = check_images([sample.path for sample in samples])
    skipped += [Skipped(place=samples[at].place, reason=reason) for at, reason in checked.unreadable.items()]
    number, samples = (
        len(samples),
        [sample for at, sample in enumerate(samples) if at not in checked.unreadable],
    )
    if not samples:
        raise ValueError(
            f"{folder}: none of {counted(number, 'image')} can be read; the first: {skipped[-number].reason}"
        )
    _say(folder, samples, skipped, checked)
    return samples, skipped


def read_rankings(folder: Path) -> tuple[list[Ranking], list[Skipped]]:
    """Return the usable rankings of a folder in its order, and what was set aside, as `read`: rankings of an image that
    cannot be decoded, too.
    """
    rankings, skipped = read_usable_rankings(folder)
    paths = list(dict.fromkeys(path for ranking in rankings for path in ranking.paths))
    unreadable = {paths[at]: reason for at, reason in check_images(paths).unreadable.items()}
    usable = []
    for ranking in rankings:
        reason = next((unreadable[path] for path in ranking.paths if path in unreadable), None)
        if reason is None:
            usable.append(ranking)
        else:
            skipped.append(Skipped(place=f"{folder}: ranking of {ranking.prompt!r}", reason=reason))
    if not usable:
        raise ValueError(
            f"{folder}: none of {counted(len(rankings), 'ranking')} can be used; the first: {skipped[-len(rankings)].reason}"
        )
    _say_skipped(folder, counted(len(usable), "ranking"), skipped)
    return usable, skipped


def _say_skipped(folder: Path, used: str, skipped: Sequence[Skipped]) -> None:
    if skipped:
        more = f"; all are listed in {SKIPPED} of the run" if len(skipped) > SHOWN else ""
        reasons = "; ".join(row.reason for row in itertools.islice(skipped, SHOWN))
        say(f"{folder}: {used} used, {len(skipped):,} set aside: {reasons}{more}")


def _say(
    folder: Path, samples: Sequence[CaptionedImage], skipped: Sequence[Skipped], checked: Checked
) -> None:
    _say_skipped(folder, counted(len(samples), "image"), skipped)
    for number, words in (
        (checked.turned, "turned as the EXIF data say"),
        (checked.animated, "animated or of several pages; the first one is used"),
        (checked.tiny, f"less than {SMALL} pixels high or wide, and will be enlarged"),
    ):
        if number:
            say(f"{folder}: {counted(number, 'image is', 'images are')} {words}")
    say_long(folder, (sample.text for sample in samples), "caption")


def as_setting(skipped: Sequence[Skipped] | None) -> dict[str, object]:
    """Return what a resumed run compares of the samples that are used, beside the digest of the data: how many are not."""
    return {} if skipped is None else {"samples set aside": len(skipped)}


def write_report(folder: Path, skipped: Sequence[Skipped]) -> None:
    """Write what was set aside to the folder of a run; of a run that sets nothing aside an earlier list goes."""
    if skipped:
        write_jsonl(folder / SKIPPED, (asdict(row) for row in skipped))
    else:
        files.remove(folder / SKIPPED)
