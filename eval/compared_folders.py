"""Folders of images of the same prompts and seeds, put side by side; needs no torch.

A folder is what `preftune benchmark-images` writes, or one of any other tool: images and a metadata.jsonl with `file_name`, `text`
and, where there are any, `seed` and `group`. Other tables of captions, and captions in files beside the images, are read as well.
Of a protocol with groups, a folder may also be as HPS v2's own program has it: GROUP/00000.jpg, 00001.jpg, ... in the order of
the prompts.

Letters: N images, P prompts, S images of each prompt.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.cli.notes import counted
from preftune.image_folders import Columns, find_captions
from preftune.images import SUFFIXES, opened
from preftune.records import read_captioned
from preftune.resolution import Resolution
from rewards.input_files import read_text

METADATA, RECORD = "metadata.jsonl", "generated.json"


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """An image, and what it is of."""

    path: Path
    text: str
    seed: int | None = None
    group: str = ""

    @property
    def key(self) -> str:
        """Return what says that two prompts are one: the text without spaces that a tool may have dropped."""
        return key_of(self.text)


def key_of(text: str) -> str:
    """Return a text with single spaces between its words."""
    return " ".join(text.split())


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The images of a model."""

    title: str
    folder: Path
    rows: list[ImageRow]
    """N, in the order of its table."""
    made: dict[str, Any]
    """What generated.json says of weights and sampling; empty for a folder of another tool."""

    @property
    def has_seeds(self) -> bool:
        """Return whether all images have a seed."""
        return all(row.seed is not None for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The images of several models by prompt and seed."""

    texts: list[str]
    """P."""
    groups: list[str]
    """P; "" where there are none."""
    seeds: list[list[int | None]]
    """P of S."""
    files: dict[str, list[list[Path]]]
    """Title -> P of S images, of the same prompt and seed in the same place."""
    paired_by_seed: bool
    """Whether images were paired by prompt and seed; else by prompt and order."""

    @property
    def images_per_prompt(self) -> int:
        """Return S."""
        return len(self.seeds[0])


def read_folder(title: str, folder: Path, lists: Mapping[str, Sequence[str]] | None) -> ModelFolder:
    """Return the images of a folder; ValueError for one that is not complete or that has no captions.

    `lists` are group -> prompts of a protocol, where they are known, for a folder GROUP/00000.jpg.
    """
    if not folder.is_dir():
        raise ValueError(f"--folders {folder} {'is no folder' if folder.exists() else 'does not exist'}")
    made = _made(folder / RECORD)
    if made and not (folder / METADATA).exists():
        there = sum(path.suffix == ".png" for path in folder.iterdir())
        wanted = len(made.get("seeds", ()))
        raise ValueError(
            f"{folder} is not complete: it has {there} of {wanted} images; start its `preftune benchmark-images` again"
        )
    if (
        find_captions(folder) is None
        and lists is not None
        and all((folder / name).is_dir() for name in lists)
    ):
        rows = list(_rows_by_number(folder, lists))
        return ModelFolder(title=title, folder=folder, rows=rows, made=made)
    samples, skipped = read_captioned(folder, Columns())
    if skipped:
        raise ValueError(
            f"{counted(len(skipped), 'row')} of {folder} cannot be used, the first: {skipped[0].reason}; complete the folder, or"
            " remove these rows from all folders"
        )
    rows = [
        ImageRow(
            path=sample.path,
            text=sample.text,
            seed=_seed(sample.extra.get("seed"), sample.place),
            group=str(sample.extra.get("group") or ""),
        )
        for sample in samples
    ]
    return ModelFolder(title=title, folder=folder, rows=rows, made=made)


def _made(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _seed(value: object, place: str) -> int | None:
    """Return a seed of a table, whose cells may be text; None where there is none."""
    if value is None or value == "" or value != value:
        return None
    try:
        return int(str(value))
    except ValueError as error:
        raise ValueError(f"{place}: seed is {value!r}; it must be a whole number, or be left out") from error


def _rows_by_number(folder: Path, lists: Mapping[str, Sequence[str]]) -> Iterator[ImageRow]:
    """Yield the images of HPS v2's own layout; ValueError for one that is missing, which that program would pass over."""
    for group, prompts in lists.items():
        images = {path.stem: path for path in (folder / group).iterdir() if path.suffix.lower() in SUFFIXES}
        for number, text in enumerate(prompts):
            name = f"{number:05d}"
            if name not in images:
                raise ValueError(
                    f"{folder / group} has no image {name} (.jpg or .png) of prompt {number + 1} of {len(prompts)}; generate it"
                )
            yield ImageRow(path=images[name], text=text, group=group)


def with_groups(model: ModelFolder, lists: Mapping[str, Sequence[str]], name: str) -> ModelFolder:
    """Return a folder in the order of a protocol's prompts, each image with its group; ValueError for a prompt that is not the protocol's."""
    places: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for place, (group, text) in enumerate((group, text) for group, texts in lists.items() for text in texts):
        places[key_of(text), group].append((place, group))
        places[key_of(text), ""].append((place, group))
    keys = [(row.key, row.group if (row.key, row.group) in places else "") for row in model.rows]
    total, seen, placed = Counter(keys), Counter[tuple[str, str]](), []
    for row, key in zip(model.rows, keys, strict=True):
        if key not in places:
            raise ValueError(
                f"{row.path} is of a prompt that is not one of {name}: {row.text[:80]!r}; leave --protocol out, or give the"
                " protocol's own images"
            )
        # a text that the list has several times is several prompts, each with its share of the images
        place, group = places[key][min(seen[key] * len(places[key]) // total[key], len(places[key]) - 1)]
        seen[key] += 1
        placed.append((place, replace(row, group=group if len(lists) > 1 else "")))
    rows = [row for _, row in sorted(placed, key=lambda pair: pair[0])]
    return replace(model, rows=rows)


def side_by_side(models: Sequence[ModelFolder]) -> SideBySide:
    """Return the images of all models by prompt and seed, in the order of the first. ValueError, which says where, for folders of
    other prompts, numbers of images, seeds or image sizes.
    """
    first = models[0]
    units = _units(first)
    by_seed = all(model.has_seeds for model in models)
    files = {model.title: _matched(units, model, first, by_seed=by_seed) for model in models}
    _check_sizes(files, first)
    return SideBySide(
        texts=[unit[0].text for unit in units],
        groups=[unit[0].group for unit in units],
        seeds=[[row.seed for row in unit] for unit in units],
        files=files,
        paired_by_seed=by_seed,
    )


def _units(model: ModelFolder) -> list[list[ImageRow]]:
    """Return P prompts of S rows each, in the order of their first rows; a prompt that is in the list several times is several
    prompts.
    """
    by_prompt: dict[tuple[str, str], list[tuple[int, ImageRow]]] = defaultdict(list)
    for number, row in enumerate(model.rows):
        by_prompt[row.group, row.key].append((number, row))
    counts = Counter(len(rows) for rows in by_prompt.values())
    each = counts.most_common(1)[0][0]
    for (_, text), rows in by_prompt.items():
        if len(rows) % each:
            raise ValueError(
                f"{model.folder} has {counted(len(rows), 'image')} of {text[:80]!r}, and {each} of most prompts; give each prompt as"
                " many"
            )
    units = [rows[at : at + each] for rows in by_prompt.values() for at in range(0, len(rows), each)]
    return [[row for _, row in unit] for unit in sorted(units, key=lambda unit: unit[0][0])]


def _matched(
    units: Sequence[Sequence[ImageRow]], model: ModelFolder, first: ModelFolder, *, by_seed: bool
) -> list[list[Path]]:
    """Return P of S images of a model, each of the prompt and seed of the first model's."""
    mine: dict[str, list[ImageRow]] = defaultdict(list)
    for row in model.rows:
        mine[row.key].append(row)
    wanted = Counter(row.key for unit in units for row in unit)
    where = f"{model.folder} and {first.folder}"
    for text in [*wanted, *mine]:
        if len(mine[text]) != wanted[text]:
            raise ValueError(
                f"{where} differ in their prompts: {text[:80]!r} has {counted(len(mine[text]), 'image')} in the first and"
                f" {wanted[text]} in the second; compare folders of one prompt list"
            )
    if not by_seed:
        queues = {text: iter(rows) for text, rows in mine.items()}
        return [[next(queues[row.key]).path for row in unit] for unit in units]
    seeded: dict[tuple[str, int | None], list[ImageRow]] = defaultdict(list)
    for row in model.rows:
        seeded[row.key, row.seed].append(row)
    found = []
    for unit in units:
        paths = []
        for row in unit:
            same = seeded[row.key, row.seed]
            if not same:
                others = sorted({str(other.seed) for other in mine[row.key]})
                raise ValueError(
                    f"{where} differ in their seeds: {row.text[:80]!r} has seed {', '.join(others[:4])} in the first and"
                    f" {row.seed} in the second; generate both with one --seed, or leave the seeds out of one metadata.jsonl to"
                    " pair by order"
                )
            paths.append(same.pop(0).path)
        found.append(paths)
    return found


def _check_sizes(files: Mapping[str, Sequence[Sequence[Path]]], first: ModelFolder) -> None:
    """Raise ValueError for images of one prompt and seed that differ in size; headers are read, no pixels."""
    reference, *others = files.values()
    for number, unit in enumerate(reference):
        for index, path in enumerate(unit):
            size = size_of(path)
            for other in others:
                there = size_of(other[number][index])
                if there != size:
                    raise ValueError(
                        f"{other[number][index]} is {there.width} x {there.height} pixels, and {path} of the same prompt"
                        f" {size.width} x {size.height}; compare images of one size: generate both at one --sample.resolution, or"
                        f" resize those of one folder"
                    )


def size_of(path: Path) -> Resolution:
    """Return the size of an image file; reads its header alone."""
    with opened(path) as image:
        return Resolution(width=image.width, height=image.height)
