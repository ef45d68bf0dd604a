"""A study on disk: its items, its own copies of their images, and its settings.

    study.json     settings, one object
    items.jsonl    one item a line: id, kind, prompt, images (file, group, seed, scores)
    images/        each image once, under the SHA-256 of its bytes: a page that shows one tells nothing about where it is from

An item is asked once of each annotator. `group` is the folder that an image is from, such as a model; annotators never see it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from preftune.annotation.tasks import KINDS, MOST_IMAGES, Kind
from preftune.records import parse_object, read_lines, write_jsonl, write_lines
from rewards.input_files import read_text

IMAGES, ITEMS, SETTINGS = "images", "items.jsonl", "study.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a study is made with."""

    tasks: tuple[Kind, ...]
    data: tuple[str, ...]
    """NAME=FOLDER, as typed."""
    seed: int
    repeats: float
    """Share of items that an annotator gets a second time."""
    annotators_per_item: int | None
    choice_ties: bool
    raters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of a study."""

    file: str
    """images/DIGEST.SUFFIX"""
    group: str
    seed: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Rater -> score, higher is better."""

    @property
    def id(self) -> str:
        """Return what the pages call it."""
        return Path(self.file).stem


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question."""

    id: str
    kind: Kind
    prompt: str
    images: tuple[Picture, ...] = ()

    @property
    def image_ids(self) -> list[str]:
        """Return the ids of its images."""
        return [image.id for image in self.images]


def questions(
    prompts: Mapping[str, Sequence[Picture]], tasks: Sequence[Kind], most: int = MOST_IMAGES
) -> Iterator[Item]:
    """Yield the items of prompts and their images, those of one prompt together.

    Prompts and images are asked about one by one, rankings have up to `most` images, and choices are between images of two
    groups, the k-th with the k-th (by seed, where all have one); of a single group, all pairs. The same image twice is one.
    """
    for prompt, images in prompts.items():
        unique = list({image.id: image for image in images}.values())
        for kind in (kind for kind in KINDS if kind in tasks):
            if kind == "prompt":
                yield item_of(kind, prompt, ())
            elif kind == "rating":
                yield from (item_of(kind, prompt, [image]) for image in unique)
            elif kind == "ranking":
                yield from (item_of(kind, prompt, part) for part in parts(unique, most))
            else:
                pairs = {
                    item.id: item for one in paired(images) if one[0].id != one[1].id for item in [item_of(kind, prompt, one)]
                }  # fmt: skip
                yield from pairs.values()


def parts(images: Sequence[Picture], most: int) -> Iterator[list[Picture]]:
    """Yield the images in parts of nearly equal size, between 2 and `most`; none for a single image."""
    number = -(-len(images) // most)
    for at in range(number):
        part = list(images[at::number])
        if len(part) > 1:
            yield part


def paired(images: Sequence[Picture]) -> Iterator[tuple[Picture, Picture]]:
    """Yield the pairs of a two-alternative choice, see `questions`."""
    groups: dict[str, list[Picture]] = {}
    for image in images:
        groups.setdefault(image.group, []).append(image)
    if len(groups) == 1:
        yield from combinations({image.id: image for image in images}.values(), 2)
        return
    for found in groups.values():
        if all(image.seed is not None for image in found):
            found.sort(key=lambda image: image.seed or 0)
    for one, other in combinations(groups.values(), 2):
        yield from zip(one, other, strict=False)


def item_of(kind: Kind, prompt: str, images: Sequence[Picture]) -> Item:
    """Return an item, whose id is a digest of what it asks."""
    words = json.dumps([kind, prompt, [image.id for image in images]])
    identity = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:20]
    return Item(id=identity, kind=kind, prompt=prompt, images=tuple(images))


def write_study(folder: Path, settings: Settings, items: Sequence[Item]) -> None:
    """Write the settings and items; the images are there."""
    write_jsonl(folder / ITEMS, (asdict(item) for item in items))
    write_lines(folder / SETTINGS, json.dumps(asdict(settings), indent=1, ensure_ascii=False).splitlines())


def is_study(folder: Path) -> bool:
    """Return whether a folder holds a study."""
    return (folder / SETTINGS).is_file()


def read_study(folder: Path) -> tuple[Settings, list[Item]]:
    """Return the settings and items of a study; ValueError for one that is damaged."""
    path = folder / SETTINGS
    row = parse_object(read_text(path), str(path))
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    try:
        settings = Settings(**values)
    except TypeError as error:
        raise ValueError(f"{path} is no study of this version: {error}") from error
    return settings, [_item(parse_object(line, place), place) for place, line in read_lines(folder / ITEMS)]


def _item(row: dict[str, Any], place: str) -> Item:
    try:
        images = tuple(Picture(**image) for image in row["images"])
        item = Item(id=row["id"], kind=cast(Kind, row["kind"]), prompt=row["prompt"], images=images)
        if item.kind in KINDS and item == item_of(item.kind, item.prompt, images):
            return item
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place} is no item of a study") from error
    raise ValueError(f"{place} is damaged: its id is not that of what it asks")
