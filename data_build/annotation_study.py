"""Making a study out of folders of images: reads captions, rankings and scores, and copies the images under names that tell nothing.

A folder has a table of captions, as `preftune/records.py` reads them, or a rankings.jsonl, whose sources become raters. An image
that is broken or too large is set aside and said; where the same image is in several folders, it counts for the first.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preftune.annotation.items import (
    IMAGES,
    Item,
    Picture,
    Settings,
    item_of,
    questions,
    write_study,
)
from preftune.annotation.votes import Votes, votes_of_ranks
from preftune.cli.notes import counted, say
from preftune.image_folders import Columns
from preftune.images import MAX_BYTES, MAX_PIXELS, ImageError, decode, save_image, thumbnail
from preftune.records import read_captioned, read_rankings, read_usable_rankings
from rewards.atomic_folder import link
from rewards.input_files import read_bytes

_SHOWN = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""Formats that browsers show and of which training reads the same pixels; others are written anew."""


@dataclass(kw_only=True)
class _Source:
    """An image of a folder, before it is copied."""

    path: Path
    seed: int | None = None
    scores: dict[str, float] = field(default_factory=dict)


def named_folders(terms: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder of --data, each NAME=FOLDER, or FOLDER, whose name it is; ValueError for what is neither."""
    found: dict[str, Path] = {}
    for term in terms:
        name, equals, folder = term.partition("=")
        if not equals or Path(term).is_dir():
            name, folder = Path(term).resolve().name, term
        if name in found:
            raise ValueError(f"--data has two folders with the name {name}; write NAME=FOLDER for one")
        if not Path(folder).is_dir():
            raise ValueError(f"--data {term}: there is no folder {folder}")
        found[name] = Path(folder)
    return found


def write(folder: Path, settings: Settings) -> list[Item]:
    """Write a study of the folders of its settings into an empty folder, and return its items; ValueError where there are none."""
    (folder / IMAGES).mkdir()
    prompts: dict[str, list[Picture]] = {}
    aside = Counter[str]()
    known = set[str]()
    for name, place in named_folders(settings.data).items():
        sources, scored = _sources(place, settings.raters)
        known |= scored
        images = [(prompt, source) for prompt, found in sources.items() for source in found.values()]
        for prompt, source in tqdm(images, desc=name, unit="image", delay=3, mininterval=1):
            try:
                picture = _copied(source, name, folder)
            except ValueError as error:
                aside[f"{error}"] += 1
                continue
            prompts.setdefault(prompt, []).append(picture)
    if aside:
        say(f"{counted(aside.total(), 'image')} set aside; the first: {next(iter(aside))}")
    if unknown := [name for name in settings.raters if name not in known]:
        raise ValueError(
            f"--raters {unknown[0]} is no column of scores in --data; there are {', '.join(sorted(known)) or 'none'}"
        )
    items = [*questions(prompts, settings.tasks)]
    if not items:
        raise ValueError(
            f"nothing to ask: {counted(len(prompts), 'prompt')}, none with two different images for --tasks"
            f" {' '.join(settings.tasks)}"
        )
    write_study(folder, settings, items)
    return items


def read_raters(folders: Sequence[Path], items: Sequence[Item]) -> dict[str, Votes]:
    """Return source -> votes of the rankings of folders that rank images of a study, such as those of annotate_mllm.py.

    An image is one of the study by its bytes, or by its name where that is the study's own. ValueError for a folder that ranks
    no two of them.
    """
    known = {image.id for item in items for image in item.images}
    found: dict[str, Votes] = {}
    for folder in folders:
        identities: dict[Path, str] = {}
        before = sum(map(len, found.values()))
        for ranking in read_rankings(folder):
            for path in ranking.paths:
                if path not in identities:
                    identities[path] = (
                        path.stem
                        if path.stem in known
                        else identity_of(read_bytes(path, MAX_BYTES, "the image "))
                    )
            places = [at for at, path in enumerate(ranking.paths) if identities[path] in known]
            pictures = [Picture(file=identities[ranking.paths[at]], group="") for at in places]
            item = item_of("ranking", ranking.prompt, pictures)
            votes = found.setdefault(ranking.source or folder.name, {})
            votes |= votes_of_ranks(item, [ranking.ranks[at] for at in places])
        if sum(map(len, found.values())) == before:
            raise ValueError(f"--raters-from {folder}: none of its rankings is of two images of this study")
    return found


def identity_of(content: bytes) -> str:
    """Return what the pages call an image of these bytes."""
    return hashlib.sha256(content).hexdigest()[:24]


def _sources(folder: Path, raters: Sequence[str]) -> tuple[dict[str, dict[Path, _Source]], set[str]]:
    """Prompt -> path -> image of a folder, and the names of the scores that there are."""
    found: dict[str, dict[Path, _Source]] = {}
    known = set[str]()
    if (folder / "rankings.jsonl").exists():
        rankings, skipped = read_usable_rankings(folder)
        for ranking in rankings:
            known.add(ranking.source)
            for path, rank in zip(ranking.paths, ranking.ranks, strict=True):
                source = found.setdefault(ranking.prompt, {}).setdefault(path, _Source(path=path))
                if ranking.source in raters:
                    source.scores[ranking.source] = -float(rank)
    else:
        samples, skipped = read_captioned(folder, Columns())
        for sample in samples:
            scores = {name: float(value) for name, value in sample.extra.items() if _is_number(value)}
            known |= scores.keys()
            seed = sample.extra.get("seed")
            found.setdefault(sample.text, {})[sample.path] = _Source(
                path=sample.path,
                seed=seed if type(seed) is int else None,
                scores={name: scores[name] for name in raters if name in scores},
            )
    if skipped:
        say(f"{folder}: {counted(len(skipped), 'row')} left out; the first: {skipped[0].reason}")
    return found, known


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _copied(source: _Source, group: str, folder: Path) -> Picture:
    """An image under the digest of its bytes; ValueError for one that cannot be shown."""
    content = read_bytes(source.path, MAX_BYTES, "the image ")
    try:
        suffix = _SHOWN.get(decode(content).format or "", "")
    except ImageError as error:
        raise ValueError(f"cannot read the image {source.path}: {error}") from error
    file = f"{IMAGES}/{identity_of(content)}{suffix or '.png'}"
    if not (folder / file).exists():
        if suffix:
            link(source.path.resolve(), folder / file)
        else:
            save_image(thumbnail(source.path, MAX_PIXELS, MAX_PIXELS), folder / file)
    return Picture(file=file, group=group, seed=source.seed, scores=source.scores)
