"""The file formats of data sets: images, and a file with one JSON object per line.

`metadata.jsonl` ({"file_name", "text", ...}) can be read by `datasets.load_dataset("imagefolder")`; image_folders.py lists what
else is read.
`rankings.jsonl` ({"prompt", "generations", "ranking", "source", "weight"}) holds preferences with the field
names of the ImageReward data.
"""

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from preftune.cli.notes import counted, say
from preftune.files import replacing
from preftune.image_folders import (
    IMAGE_FIELDS,
    Columns,
    ImageFolder,
    caption_file,
    find_captions,
    no_captions,
    table_rows,
)
from preftune.prompts import FIELDS, find_field
from rewards.input_files import has_surrogate, parse_json, read_text, read_text_lines

MAX_CAPTION_FILE = 1 << 20
"""Bytes of a text file beside an image."""
MAX_NAME = 1024
"""Letters of a file name in a data set, its folders included."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """A captioned image."""

    path: Path
    text: str
    extra: dict[str, Any]
    """The other fields of its line, such as scores."""
    place: str = dataclass_field(default="", compare=False)
    """Where it is listed, for messages."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row of a data set that cannot be used, and why in a sentence."""

    place: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Images of one prompt, ordered by an annotator."""

    prompt: str
    paths: tuple[Path, ...]
    """Two images or more, each once."""
    ranks: tuple[int, ...]
    """One for each path; 1 is best, equal ranks are ties."""
    source: str
    """The annotator, for example a number; empty if unknown."""
    weight: float = 1.0
    """Weight of the ranking; PickScore uses 1 / the number of rankings of the prompt."""


def read_imagefolder(folder: Path) -> list[CaptionedImage]:
    """The captioned images of a folder, in the order of its table; rows that cannot be used are left out and said.

    Raises ValueError where no row can be used, with the reason of the first, and for a folder without captions.
    """
    samples, skipped = read_captioned(folder, Columns())
    if skipped:
        say(f"{folder}: {counted(len(skipped), 'row')} left out; the first: {skipped[0].reason}")
    return samples


def read_captioned(folder: Path, columns: Columns) -> tuple[list[CaptionedImage], list[Skipped]]:
    """The captioned images of a folder, in the order of its table, and the rows that cannot be used; no image is opened.

    A row without an image in the folder, or without words in its caption, cannot be used. Raises ValueError as
    `read_imagefolder`, and where --caption-column or --image-column is in no row, or the folder has no table.
    """
    found = _find_with_columns(folder, columns)
    samples, skipped = list[CaptionedImage](), list[Skipped]()
    for row in _samples(found, columns):
        if isinstance(row, CaptionedImage):
            samples.append(row)
        else:
            skipped.append(row)
    if not samples:
        raise ValueError(f"{found.source} holds no samples{_none_usable(skipped)}")
    return samples, skipped


def check_captioned(folder: Path, columns: Columns) -> None:
    """Raise ValueError where `read_captioned` would; reads as far as the first row that can be used."""
    found = _find_with_columns(folder, columns)
    if not any(isinstance(row, CaptionedImage) for row in _samples(found, columns)):
        read_captioned(folder, columns)


def _find_with_columns(folder: Path, columns: Columns) -> ImageFolder:
    """Where the captions of a folder are; ValueError where there are none, or no columns that a flag could name."""
    found = find_captions(folder, columns.image_column)
    if found is None:
        raise no_captions(folder)
    if found.table is None:
        columns.check_unused(folder)
    return found


def _samples(found: ImageFolder, columns: Columns) -> Iterator[CaptionedImage | Skipped]:
    """The captioned images of a folder, and the rows that are none."""
    for place, row in captioned_rows(found, columns):
        try:
            if isinstance(row, ValueError):
                raise row
            image, caption = image_field(row, columns, place), caption_field(row, columns, place)
            path = image_of(found, field(row, image, str, place), place)
            text = caption_of(row, caption, place)
        except ValueError as error:
            yield Skipped(place=place, reason=str(error))
            continue
        extra = {key: value for key, value in row.items() if key not in (image, caption)}
        yield CaptionedImage(path=found.root / path, text=text, extra=extra, place=place)


def captioned_rows(
    folder: ImageFolder, columns: Columns
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(place for messages, row) of each image of a folder; an error in place of a row that cannot be read. Blank lines of
    a metadata.jsonl are passed over.
    """
    if folder.table is None:
        for image in folder.images:
            try:
                yield image, {"file_name": image, "caption": _caption_beside(folder, image)}
            except ValueError as error:
                yield image, error
    elif folder.table.suffix != ".jsonl":
        yield from table_rows(folder.table, columns)
    else:
        for place, line in read_lines(folder.table):
            if line.strip():
                try:
                    yield place, parse_object(line, place)
                except ValueError as error:
                    yield place, error


def _caption_beside(folder: ImageFolder, image: str) -> str | None:
    """The caption in the file beside an image, as kohya reads it: the first line that holds words; None where there is none."""
    name = caption_file(folder, image)
    if name is None:
        return None
    text = read_text(inside(folder.root, name, image), MAX_CAPTION_FILE)
    return next((line.strip() for line in text.split("\n") if line.strip()), None)


def image_field(row: Mapping[str, Any], columns: Columns, place: str) -> str:
    """The name of the field of a row that holds the image's file name; ValueError where it is missing."""
    return _field_of(row, columns.image_column, IMAGE_FIELDS, "--image-column", place)


def caption_field(row: Mapping[str, Any], columns: Columns, place: str) -> str:
    """The name of the field of a row that holds the caption; ValueError where it is missing."""
    return _field_of(row, columns.caption_column, FIELDS, "--caption-column", place)


def _field_of(row: Mapping[str, Any], named: str | None, known: Sequence[str], flag: str, place: str) -> str:
    found = find_field(row, known) if named is None else named if named in row else None
    if found is None:
        wanted = named if named is not None else f"{', '.join(known[:-1])} or {known[-1]}"
        raise ValueError(f"{place} has no {wanted}; {flag} names one of {', '.join(row) or 'its columns'}")
    return found


def image_of(folder: ImageFolder, name: str, place: str) -> str:
    """The image that a row names, relative to the folder's root; ValueError where it is missing or leads out of the folder."""
    *others, last = folder.candidates(name)
    if others:
        check_name(name, place)
    path = next((path for path in others if (folder.root / path).is_file()), last)
    inside(folder.root, path, place)
    return path


def caption_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """The caption of a row; ValueError where it is none."""
    if is_empty(row[name]):
        raise ValueError(f"{place}: {name} is empty")
    return text_field(row, name, place)


def is_empty(value: object) -> bool:
    """Whether a cell of a table is empty: None, or NaN, which pandas writes."""
    return value is None or (isinstance(value, float) and value != value)


def read_rankings(folder: Path) -> list[Ranking]:
    """The rankings of folder/rankings.jsonl, in its order; rows that cannot be used are left out and said.

    Raises ValueError where no row can be used, with the reason of the first.
    """
    rankings, skipped = read_usable_rankings(folder)
    if skipped:
        say(f"{folder}: {counted(len(skipped), 'ranking')} left out; the first: {skipped[0].reason}")
    return rankings


def read_usable_rankings(folder: Path) -> tuple[list[Ranking], list[Skipped]]:
    """The rankings of folder/rankings.jsonl, in its order, and the rows that cannot be used; no image is opened.

    Raises ValueError as `read_rankings`.
    """
    rankings, skipped = list[Ranking](), list[Skipped]()
    known: dict[str, Path] = {}  # several annotators name the same images
    path = folder / "rankings.jsonl"
    if not path.exists():
        raise ValueError(
            f"{folder} {'has no rankings.jsonl' if folder.exists() else 'does not exist'}; `preftune preferences` writes"
            " rankings of published preferences, `preftune simulate-rankings` of the shapes world"
        )
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            prompt, names, ranks, source, weight = ranking_fields(parse_object(line, place), place)
            known |= {name: inside(folder, name, place) for name in names if name not in known}
        except ValueError as error:
            skipped.append(Skipped(place=place, reason=str(error)))
            continue
        paths = tuple(known[name] for name in names)
        rankings.append(Ranking(prompt=prompt, paths=paths, ranks=ranks, source=source, weight=weight))
    if not rankings:
        raise ValueError(f"{path} holds no rankings{_none_usable(skipped)}")
    return rankings, skipped


def _none_usable(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    return f"; none of {counted(len(skipped), 'row')} can be used, the first: {skipped[0].reason}"


def ranking_fields(row: dict[str, Any], place: str) -> tuple[str, list[str], tuple[int, ...], str, float]:
    """The prompt, file names (unchecked, each once), ranks, source and weight of a ranking; the last two may be left out."""
    names, ranks = field(row, "generations", list, place), field(row, "ranking", list, place)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: generations must be file names")
    if not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise ValueError(f"{place}: ranking is {ranks}; it must hold whole numbers from 1, the best")
    if len(names) != len(ranks) or len(names) < 2:
        raise ValueError(
            f"{place}: {len(names)} generations and {len(ranks)} ranks; there must be one rank each, and two or more"
        )
    paths = [PurePosixPath(name) for name in names]  # a.png and ./a.png are one image
    if len(set(paths)) < len(paths):
        twice = max(paths, key=paths.count)
        raise ValueError(f"{place}: {str(twice)!r} is there more than once among the generations")
    source = field(row, "source", str, place) if "source" in row else ""
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight <= sys.float_info.max:
        raise ValueError(f"{place}: weight is {weight!r}; it must be a finite number above 0")
    return text_field(row, "prompt", place), names, tuple(ranks), source, float(weight)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are passed over. Raises ValueError that names the line."""
    return [row for _, row in _objects(path)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one piece. ValueError for a number that JSON lacks, such as NaN."""
    write_lines(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(place for messages, text) of each line of a file, without a byte order mark and the blank lines that end it."""
    lines = read_text_lines(path).rstrip().split("\n")
    return [(f"{path} line {number}", line) for number, line in enumerate(lines if lines != [""] else [], 1)]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, in one piece."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def parse_object(line: str, place: str) -> dict[str, Any]:
    """The object of a line."""
    row = parse_json(line, place)
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object, not a {type(row).__name__}")
    return row


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of each line that is not blank."""
    return [(place, parse_object(line, place)) for place, line in read_lines(path) if line.strip()]


def field(row: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    """A field of a line, of the right type."""
    if key not in row:
        raise ValueError(f"{place} has no {key}")
    if row[key] is None:
        raise ValueError(f"{place}: {key} is empty")
    if not isinstance(row[key], kind):
        raise ValueError(f"{place}: {key} is a {type(row[key]).__name__}; it must be a {kind.__name__}")
    return row[key]


def text_field(row: Mapping[str, Any], key: str, place: str) -> str:
    """A field that holds words."""
    text: str = field(row, key, str, place)
    if not text.strip():
        raise ValueError(f"{place}: {key} is empty")
    if has_surrogate(text):
        raise ValueError(f"{place}: {key} holds half of a surrogate pair, which is no character")
    return text


def inside(folder: Path, name: str, place: str) -> Path:
    """The file of a name that a data set gave, which may lie only below the data set's folder."""
    check_name(name, place)
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{place}: {path} {'is no file' if path.exists() else 'does not exist'}")
    if not _leads_to(path).is_relative_to(_resolved(folder)) and not _is_cached(path, folder):
        raise ValueError(f"{place}: file name {name!r} is a link that leads out of the folder")
    return path


def _leads_to(path: Path) -> Path:
    """The file that a path leads to; of a data set with a million images their few folders are resolved once."""
    return path.resolve() if path.is_symlink() else _resolved(path.parent) / path.name


@functools.lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def _is_cached(path: Path, folder: Path) -> bool:
    """Whether the folder is a snapshot in the hub's cache and the path a link to a file of the same repository's."""
    blobs = _blobs(folder)
    return blobs is not None and path.resolve().is_relative_to(blobs)


@functools.lru_cache(maxsize=16)
def _blobs(folder: Path) -> Path | None:
    """The folder of the files of a repository in the hub's cache, models--NAME/blobs beside models--NAME/snapshots/HASH."""
    resolved = folder.resolve()
    for snapshots in resolved.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith(
            ("datasets--", "models--", "spaces--")
        ):
            return (repository / "blobs").resolve()
    return None


def check_name(name: str, place: str) -> None:
    """Raise ValueError for a name from a data set, or in an archive, that could lead out of its folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name
        or "\\" in name
        or "\0" in name
        or has_surrogate(name)
        or len(name) > MAX_NAME
        or posix.is_absolute()
        or windows.drive
        or ".." in posix.parts
    ):
        raise ValueError(
            f"{place}: file name {name[:MAX_NAME]!r} must be a relative path with / inside the folder, without .., NUL and half"
            f" characters, of at most {MAX_NAME} letters"
        )
