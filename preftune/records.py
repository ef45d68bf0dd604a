"""The file formats of data sets: images, and a file with one JSON object per line.

`metadata.jsonl` ({"file_name", "text", ...}) can be read by `datasets.load_dataset("imagefolder")`.
`rankings.jsonl` ({"prompt", "generations", "ranking", "source", "weight"}) holds preferences with the field
names of the ImageReward data.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from preftune.files import replacing
from rewards.input_files import has_surrogate, parse_json, read_text_lines

MAX_NAME = 1024
"""Letters of a file name in a data set, its folders included."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """A captioned image."""

    path: Path
    text: str
    extra: dict[str, Any]
    """The other fields of its line, such as scores."""


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
    """The samples of folder/metadata.jsonl, in its order.

    Raises ValueError that names the line for a file name outside the folder, a missing image or an empty text.
    """
    samples = []
    for place, row in _objects(folder / "metadata.jsonl"):
        path = inside(folder, field(row, "file_name", str, place), place)
        extra = {key: value for key, value in row.items() if key not in ("file_name", "text")}
        samples.append(CaptionedImage(path=path, text=text_field(row, "text", place), extra=extra))
    if not samples:
        raise ValueError(f"{folder / 'metadata.jsonl'} holds no samples")
    return samples


def read_rankings(folder: Path) -> list[Ranking]:
    """The rankings of folder/rankings.jsonl, in its order. Raises ValueError that names the line."""
    rankings = []
    known: dict[str, Path] = {}  # several annotators name the same images
    for place, row in _objects(folder / "rankings.jsonl"):
        prompt, names, ranks, source, weight = ranking_fields(row, place)
        known |= {name: inside(folder, name, place) for name in names if name not in known}
        paths = tuple(known[name] for name in names)
        rankings.append(Ranking(prompt=prompt, paths=paths, ranks=ranks, source=source, weight=weight))
    if not rankings:
        raise ValueError(f"{folder / 'rankings.jsonl'} holds no rankings")
    return rankings


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
    """The objects of a JSON-lines file; blank lines may end it. Raises ValueError that names the line."""
    return [row for _, row in _objects(path)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one piece. ValueError for a number that JSON lacks, such as NaN."""
    write_lines(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(place for messages, text) of each line of a file; blank lines may end it."""
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
    """(place for messages, object) of each line."""
    return [(place, parse_object(line, place)) for place, line in read_lines(path)]


def field(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    """A field of a line, of the right type."""
    if key not in row:
        raise ValueError(f"{place} has no {key}")
    if not isinstance(row[key], kind):
        raise ValueError(f"{place}: {key} is a {type(row[key]).__name__}; it must be a {kind.__name__}")
    return row[key]


def text_field(row: dict[str, Any], key: str, place: str) -> str:
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
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{place}: file name {name!r} is a link that leads out of the folder")
    return path


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
