"""Readers of published preference data; all layouts are read as rankings with ties.

    imagereward          ImageReward's train, valid and test.json: generations, ranking
    imagerewarddb        ImageRewardDB's train_1.zip, the JSON in it, or metadata-train.parquet: a row an image
    imagerewarddb-group  parquet: a row a prompt, with its images and ranks
    imagerewarddb-pair   parquet: img_better, img_worse
    hpdv1                preference_*.json: human_preference is the index of the preferred image in file_path
    hpdv2-train          train.json: human_preference marks the preferred of two with 1
    hpdv2-test           test.json: a ranking for each of raw_annotations; without them, that of the averaged rank
    pickapic             parquet: two images, label_0 and label_1 (0.5 = tie); weighs 1 / num_example_per_prompt
    aspects              JSON lines: prompt, images with an image_id and a score for each aspect (VisionPrefer (arXiv 2404.15100))
    ratings              CSV: prompt, image, rater, score; a ranking for each rater of a prompt, higher is better
    rankings             our rankings.jsonl, such as the shapes world's

A choice of one among n is ranked 1, 2, ..., 2. Where a row holds no bytes, images have names alone, so that
rankings can be read without them. Annotations of HPD v2 are read as the rank of each image, as the averaged
rank is. VisionPrefer's data are not public: the fields of `aspects` are ours.
"""

import functools
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_build.published_rows import (
    BROKEN,
    PlacedRow,
    SchemaError,
    field,
    grouped,
    grouped_of_parquet,
    has_column,
    of_archive,
    of_csv,
    of_json,
    of_jsonl,
    of_parquet,
    text_field,
)
from preftune.records import ranking_fields

Layout = Literal[
    "imagereward",
    "imagerewarddb",
    "imagerewarddb-group",
    "imagerewarddb-pair",
    "hpdv1",
    "hpdv2-train",
    "hpdv2-test",
    "pickapic",
    "aspects",
    "ratings",
    "rankings",
]
ASPECTS = ("prompt_following", "aesthetics", "fidelity", "harmlessness")
Aspect = Literal["mean", "prompt_following", "aesthetics", "fidelity", "harmlessness"]
Repeats = Literal["last", "mean", "refuse"]
"""What several ratings of an image by the same person for the same prompt are: the last one, their mean, or a bad row."""


@dataclass(frozen=True, kw_only=True)
class PublishedImage:
    """An image in a published ranking."""

    name: str
    """Its file name in the data, unchecked; equal names are one image."""
    content: bytes | None = None
    """The encoded image, where the row holds it."""


@dataclass(frozen=True, kw_only=True)
class PublishedRanking:
    """Images of one prompt, ordered by an annotator; what records.Ranking is of images on the disk."""

    place: str
    """Where it stands, for messages."""
    prompt: str
    images: tuple[PublishedImage, ...]
    """Two or more, each once."""
    ranks: tuple[int, ...]
    """One for each image; 1 is best, equal ranks are ties."""
    source: str = ""
    """The annotator; empty where it is not known."""
    weight: float = 1.0
    repeated: int = 0
    """Ratings of an image by one person beyond the first, which a rule made one (layout `ratings`)."""


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A row without a ranking."""

    place: str
    reason: Literal["no label", "bad row", "too few images"]
    detail: str


class TooFewImagesError(ValueError):
    """A ranking of one image, which says nothing."""


def read_published(
    layout: Layout, path: Path, aspect: Aspect = "mean", repeats: Repeats = "last"
) -> Iterator[PublishedRanking | SetAside]:
    """The rankings of a file, in its order (grouped rows: in that of their first); aspect is for `aspects` alone, repeats
    for `ratings`.

    Raises ValueError that names the field where the first row (or group of rows) lacks one or has another type in it, as a
    file of another layout does, and the place where the file is broken. A bad value, and what does not fit later, is
    set aside.
    """
    rows, judge = LAYOUTS[layout]
    if layout == "aspects":
        judge = functools.partial(_aspects, aspect=aspect)
    elif layout == "ratings":
        judge = functools.partial(_ratings, repeats=repeats)
    for number, (place, row) in enumerate(rows(path)):
        try:
            if BROKEN in row:
                raise ValueError(row[BROKEN])
            yield from judge(place, row)
        except TooFewImagesError as error:
            yield SetAside(place=place, reason="too few images", detail=str(error))
        except ValueError as error:
            if number == 0 and isinstance(error, SchemaError):
                raise
            yield SetAside(place=place, reason="bad row", detail=str(error))


def dense(values: Sequence[float]) -> tuple[int, ...]:
    """Places without gaps: 1 for the least value, equal values share one. [2.5, 1.1, 2.5] -> (2, 1, 2)."""
    places = {value: place for place, value in enumerate(sorted(set(values)), 1)}
    return tuple(places[value] for value in values)


# ---------------------------------------------------------------- a row of each layout


def _ranking(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    images = _named(
        row, "generations", place
    )  # the types first: ranking_fields does not tell them from values
    _check_number([image.name for image in images], _numbers(row, "ranking", place), place)
    field(row, "prompt", str, place)
    if "source" in row:
        field(row, "source", str, place)
    if "weight" in row:
        _number(row, "weight", place)
    prompt, names, ranks, source, weight = ranking_fields(row, place)
    return [_judged(place, prompt, [PublishedImage(name=name) for name in names], ranks, source, weight)]


def _imagerewarddb(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    rows = row["rows"]
    first = rows[0][1]
    name = field(first, "prompt_id", int if isinstance(first.get("prompt_id"), int) else str, place)
    prompt = text_field(first, "prompt", place)
    for where, one in rows:
        if (other := text_field(one, "prompt", where)) != prompt:
            raise ValueError(
                f"{where}: prompt_id {name!r} must have one prompt, not {prompt!r} and {other!r}"
            )
    ranks = [field(one, "rank", int, where) for where, one in rows]
    if min(ranks) < 1:
        raise ValueError(f"{place}: rank is {min(ranks)}; it must be 1, the best, or more")
    images = [_cell(one, "image" if "image" in one else "image_path", where) for where, one in rows]
    return [_judged(place, prompt, images, ranks)]


def _imagerewarddb_group(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    cells = field(row, "image", list, place)
    images = [_cell({"image": cell}, "image", place) for cell in cells]
    return [_judged(place, text_field(row, "prompt", place), images, dense(_numbers(row, "rank", place)))]


def _imagerewarddb_pair(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    images = [_cell(row, "img_better", place), _cell(row, "img_worse", place)]
    return [_judged(place, text_field(row, "prompt", place), images, (1, 2))]


def _hpdv1(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    images, best = _named(row, "file_path", place), field(row, "human_preference", int, place)
    if not 0 <= best < len(images):
        raise ValueError(
            f"{place}: human_preference is {best}; it must be a place in file_path, 0 to {len(images) - 1}"
        )
    ranks = [1 if index == best else 2 for index in range(len(images))]
    source = field(row, "user_hash", str, place) if "user_hash" in row else ""
    return [_judged(place, text_field(row, "prompt", place), images, ranks, source)]


def _hpdv2_train(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    marks = _numbers(row, "human_preference", place)
    if not set(marks) <= {0, 1}:
        raise ValueError(
            f"{place}: human_preference is {_json(marks)}; it must hold 1 for preferred, 0 for others"
        )
    ranks = dense([-mark for mark in marks])
    return [_judged(place, text_field(row, "prompt", place), _named(row, "file_path", place), ranks)]


def _hpdv2_test(place: str, row: dict[str, Any]) -> list[PublishedRanking]:
    prompt, images = text_field(row, "prompt", place), _named(row, "image_path", place)
    if "raw_annotations" not in row:
        return [_judged(place, prompt, images, dense(_numbers(row, "rank", place)))]
    notes = _objects(row, "raw_annotations", place)
    return [
        _judged(
            place, prompt, images, dense(_numbers(note, "rank", place)), field(note, "user_hash", str, place)
        )
        for note in notes
    ]  # fmt: skip


def _pickapic(place: str, row: dict[str, Any]) -> list[PublishedRanking | SetAside]:
    if not field(row, "has_label", bool, place):
        return [SetAside(place=place, reason="no label", detail="has_label is false")]
    labels = (_number(row, "label_0", place), _number(row, "label_1", place))
    ranks = {(1, 0): (1, 2), (0, 1): (2, 1), (0.5, 0.5): (1, 1)}.get(labels)
    if ranks is None:
        raise ValueError(
            f"{place}: label_0 and label_1 are {labels[0]:g} and {labels[1]:g}; they must be 1 and 0, 0 and 1, or both 0.5"
        )
    count = field(row, "num_example_per_prompt", int, place)
    if count < 1:
        raise ValueError(f"{place}: num_example_per_prompt is {count}; it must be at least 1")
    uids = [field(row, f"image_{index}_uid", str, place) for index in range(2)]
    images = [  # below folders, for there are a million
        PublishedImage(name=f"{uid[:2]}/{uid}.jpg", content=row.get(f"jpg_{index}"))
        for index, uid in enumerate(uids)
    ]
    source = str(field(row, "user_id", int, place))
    return [_judged(place, text_field(row, "caption", place), images, ranks, source, 1 / count)]


def _aspects(place: str, row: dict[str, Any], aspect: Aspect) -> list[PublishedRanking]:
    rows = _objects(row, "images", place)
    wanted = ASPECTS if aspect == "mean" else (aspect,)
    scores = [statistics.mean(_number(row, name, place) for name in wanted) for row in rows]
    images = [PublishedImage(name=field(row, "image_id", str, place)) for row in rows]
    return [_judged(place, text_field(row, "prompt", place), images, dense([-score for score in scores]))]


def _ratings(place: str, row: dict[str, Any], repeats: Repeats) -> list[PublishedRanking]:
    scores: dict[str, list[float]] = {}
    for where, one in row["rows"]:
        score = _parsed(one["score"], "score", where)
        scores.setdefault(field(one, "image", str, where), []).append(score)
    repeated = len(row["rows"]) - len(scores)
    if repeated and repeats == "refuse":
        name = next(name for name, found in scores.items() if len(found) > 1)
        raise ValueError(f"{place}: {name!r} is rated more than once by the same person")
    values = [statistics.mean(found) if repeats == "mean" else found[-1] for found in scores.values()]
    first = row["rows"][0][1]
    source, prompt = field(first, "rater", str, place), text_field(first, "prompt", place)
    images = [PublishedImage(name=name) for name in scores]
    ranking = _judged(place, prompt, images, dense([-value for value in values]), source)
    return [replace(ranking, repeated=repeated)]


# ---------------------------------------------------------------- fields


def _judged(
    place: str,
    prompt: str,
    images: Sequence[PublishedImage],
    ranks: Sequence[int],
    source: str = "",
    weight: float = 1.0,
) -> PublishedRanking:
    """The ranking; ValueError where images and ranks do not belong together, or a text is none."""
    names = [image.name for image in images]
    _check_number(names, ranks, place)
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: {max(names, key=names.count)!r} is there more than once")
    try:
        "".join((prompt, source, *names)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair, which is no character") from error
    return PublishedRanking(
        place=place, prompt=prompt, images=tuple(images), ranks=tuple(ranks), source=source, weight=weight
    )  # fmt: skip


def _check_number(names: Sequence[str], ranks: Sequence[float], place: str) -> None:
    """TooFewImagesError for one image; ValueError for none, or where images and ranks differ in number."""
    if len(names) == len(ranks) == 1:
        raise TooFewImagesError(f"{place}: one image, {names[0]!r}; a ranking needs two or more")
    if len(names) != len(ranks) or not names:
        raise ValueError(
            f"{place}: {len(names)} images and {len(ranks)} ranks; there must be one rank each, and two or more"
        )


def _named(row: dict[str, Any], key: str, place: str) -> list[PublishedImage]:
    """A list of file names."""
    names = field(row, key, list, place)
    if not all(isinstance(name, str) for name in names):
        raise SchemaError(f"{place}: {key} must hold file names")
    return [PublishedImage(name=name) for name in names]


def _cell(row: dict[str, Any], key: str, place: str) -> PublishedImage:
    """An image in a table: its file name, or {"bytes", "path"} as the datasets library writes it."""
    value = field(row, key, object, place)
    if isinstance(value, str):
        return PublishedImage(name=value)
    cell = value if isinstance(value, dict) else {}
    name, content = cell.get("path"), cell.get("bytes")
    if isinstance(content, bytes):
        return PublishedImage(name=name or f"{hashlib.sha256(content).hexdigest()}.webp", content=content)
    if isinstance(name, str):
        return PublishedImage(name=name)
    fault = ValueError if isinstance(value, dict | None) else SchemaError
    raise fault(f"{place}: {key} is a {type(value).__name__}; it must be a file name, or hold bytes")


def _objects(row: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """A list of objects."""
    values: list[dict[str, Any]] = field(row, key, list, place)
    if not values or not all(isinstance(value, dict) for value in values):
        raise (SchemaError if values else ValueError)(f"{place}: {key} must hold objects")
    return values


def _number(row: dict[str, Any], key: str, place: str) -> float:
    """A finite number."""
    return _numbers({key: [row[key]]} if key in row else row, key, place)[0]


def _json(values: object) -> str:
    """Values as a file of data has them."""
    return json.dumps(values, ensure_ascii=False, default=str)


def _numbers(row: dict[str, Any], key: str, place: str) -> list[float]:
    """A list of finite numbers."""
    values: list[float] = field(row, key, list, place)
    if not all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values):
        fault = ValueError if {type(value) for value in values} <= {int, float, type(None)} else SchemaError
        raise fault(f"{place}: {key} is {_json(values)}; it must hold finite numbers")
    return values


def _parsed(text: object, key: str, place: str) -> float:
    """A finite number that is written out."""
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}: {key} is {text!r}; it must be a finite number")
    return value


# ---------------------------------------------------------------- the layouts


def _rows_of_imagerewarddb(path: Path) -> Iterator[PlacedRow]:
    """All images of a prompt, which nothing promises to be neighbours."""
    if path.suffix in (".zip", ".json"):
        return grouped(of_archive(path) if path.suffix == ".zip" else of_json(path), "prompt_id")
    columns = ("prompt_id", "prompt", "rank")
    if has_column(path, "image"):
        return grouped_of_parquet(path, columns, "prompt_id", images="image")
    return grouped(of_parquet(path, columns, optional=("image_path",)), "prompt_id")


_PICKAPIC = ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label", "user_id", "num_example_per_prompt")  # fmt: skip

LAYOUTS: dict[Layout, tuple[Callable[[Path], Iterator[PlacedRow]], Callable[..., Sequence[PublishedRanking | SetAside]]]] = {
    "imagereward": (of_json, _ranking),
    "imagerewarddb": (_rows_of_imagerewarddb, _imagerewarddb),
    "imagerewarddb-group": (
        functools.partial(of_parquet, columns=("prompt", "image", "rank")), _imagerewarddb_group,
    ),
    "imagerewarddb-pair": (
        functools.partial(of_parquet, columns=("prompt", "img_better", "img_worse")), _imagerewarddb_pair,
    ),
    "hpdv1": (of_json, _hpdv1),
    "hpdv2-train": (of_json, _hpdv2_train),
    "hpdv2-test": (of_json, _hpdv2_test),
    "pickapic": (functools.partial(of_parquet, columns=_PICKAPIC, optional=("jpg_0", "jpg_1")), _pickapic),
    "aspects": (of_jsonl, _aspects),
    "ratings": (
        lambda path: grouped(of_csv(path, ("prompt", "image", "rater", "score")), "prompt", "rater"), _ratings,
    ),
    "rankings": (of_jsonl, _ranking),
}  # fmt: skip
"""For each layout the rows of a file, and the rankings of a row."""
