"""What a data set on the disk is: recognised from what is there, before any image is read."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from data_build.decode import BROKEN
from preftune.image_folders import (
    PLACES,
    Columns,
    ImageFolder,
    find_pairs,
    find_table,
    hub_hint,
    list_images,
    suffixes,
)
from preftune.images import SUFFIXES
from preftune.prompts import FIELDS, find_field

Kind = Literal["imagefolder", "images", "parquet", "zip", "tar"]

CONTAINERS: dict[str, Kind] = {
    ".zip": "zip", ".parquet": "parquet", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar",
}  # fmt: skip
"""Ending of files that hold many images -> kind of data."""
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "img", "bytes")
"""Names of the column of a table that holds encoded images, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Images with prompts on the disk; `find_data_set` makes it."""

    root: Path
    """The folder that names of files are relative to."""
    kind: Kind
    sources: tuple[str, ...]
    """The table of metadata, or the folder itself where captions are beside the images; or each image, table or archive, in
    order.
    """
    prompted: bool
    """Whether an entry without a prompt is set aside."""
    prompt: str
    """The prompt of all images of a folder without captions."""
    image_column: str
    """Of tables with images."""
    text_column: str | None
    """Of tables with images; without one, prompts are empty."""
    folder: ImageFolder | None = None
    """Of an imagefolder: where its captions are."""
    columns: Columns = field(default_factory=Columns)
    """Of the table of an imagefolder, or of the .json files in tar archives."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Suffix -> number of files of a folder of images that are not read."""


def find_data_set(
    path: Path, *, prompted: bool, prompt: str, image_column: str | None, text_column: str | None
) -> DataSet:
    """Return the data set of a folder or file, recognised from what is there; ValueError says what is wrong with it.

    prompted: a scorer reads the prompts. A column that is None is the first with a usual name. No image is read, and broken
    archives and tables are left for later.
    """
    root, kind, sources, folder = _recognise(path, image_column)
    if kind == "images" and prompted and not prompt.strip():
        if (path / "rankings.jsonl").is_file():
            raise ValueError(
                f"{path} holds rankings (rankings.jsonl), not captioned images;"
                f" `preftune preference-accuracy --data {path}` scores them"
            )
        raise ValueError(
            f"{path} holds images without captions (no metadata.jsonl), and a scorer reads the prompt; give --prompt,"
            " or scorers that read none"
        )
    if kind != "images" and prompt:
        raise ValueError(f"--prompt is for images without captions, and {path} has captions; leave it out")
    with_columns = kind in ("parquet", "tar") or (folder is not None and folder.table is not None)
    if not with_columns:
        Columns(image_column=image_column, caption_column=text_column).check_unused(path)
    image, text = "", None
    if kind == "parquet":
        image, text = _columns(root, sources, image_column, text_column, prompted=prompted)
    named = (
        image_column if image_column not in IMAGE_COLUMNS else None
    )  # "image" is file_name's other name, too
    columns = Columns(image_column=named, caption_column=text_column)
    return DataSet(
        root=root, kind=kind, sources=sources, prompted=prompted, prompt=prompt, image_column=image, text_column=text,
        folder=folder, columns=columns if with_columns and kind != "parquet" else Columns(),
        passed_over=_passed_over(root, kind, folder),
    )  # fmt: skip


def _recognise(
    path: Path, image_column: str | None
) -> tuple[Path, Kind, tuple[str, ...], ImageFolder | None]:
    """Return the root, the kind and the sources of a data set, and where an imagefolder has its captions."""
    if path.is_file():
        kind = _kind_of(path.name)
        if kind is None:
            raise ValueError(
                f"{path} is a file; data is a folder, a .zip of DiffusionDB, a .parquet table or a .tar of webdataset"
            )
        return path.parent, kind, (path.name,), None
    if not path.is_dir():
        raise ValueError(f"there is no data at {path}{hub_hint(path)}")
    folder = find_table(path, image_column)
    if folder is not None and folder.table is not None:
        return path, "imagefolder", (folder.table.relative_to(path).as_posix(),), folder
    if (found := _containers(path)) is not None:
        return path, *found, None
    folder = find_pairs(path)
    if folder is not None:
        return path, "imagefolder", (".",), folder
    images, _ = list_images(path)
    if images:
        return path, "images", images, None
    raise ValueError(
        f"{path} is no data set: it has no metadata.jsonl, .zip, .parquet or .tar, and no images ({', '.join(SUFFIXES)})"
    )


def _containers(path: Path) -> tuple[Kind, tuple[str, ...]] | None:
    """The zip files or tables of a folder, or of the first of PLACES below it that has some; the hub's are often in data/."""
    for place in PLACES:
        found: dict[Kind, list[str]] = {}
        for name in sorted(_names(path / place, path)):
            if (kind := _kind_of(name)) is not None:
                found.setdefault(kind, []).append(name)
        if len(found) > 1:
            kinds = " and ".join(f".{kind}" for kind in sorted(found, reverse=True))
            raise ValueError(
                f"{path / place} holds both {kinds} files; name one of them, or a folder of one kind"
            )
        for kind, names in found.items():
            return kind, tuple(names)
    return None


def _kind_of(name: str) -> Kind | None:
    return next((kind for suffix, kind in CONTAINERS.items() if name.lower().endswith(suffix)), None)


def _names(folder: Path, root: Path) -> Iterator[str]:
    """The files of a folder that hold many images, relative to the root; hidden ones are passed over."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _kind_of(path.name) is not None and not path.name.startswith(".") and path.is_file():
            yield path.relative_to(root).as_posix()


def _passed_over(root: Path, kind: Kind, folder: ImageFolder | None) -> Counter[str]:
    if kind == "images":
        return suffixes(list_images(root)[1])
    return folder.passed_over if folder is not None else Counter()


def _columns(
    root: Path, sources: tuple[str, ...], image: str | None, text: str | None, *, prompted: bool
) -> tuple[str, str | None]:
    """Return the columns of images and texts of the first table that can be read; ValueError where one that is needed is
    missing or of no use.
    """
    for name in sources:
        try:
            schema = pyarrow.parquet.read_schema(root / name)
        except BROKEN:
            continue  # set aside when its turn comes
        found = []
        for column, usual, flag in (
            (image, IMAGE_COLUMNS, "--image-column"),
            (text, FIELDS, "--caption-column"),
        ):
            there = column if column in schema.names else None if column else find_field(schema.names, usual)
            if there is None and (prompted or flag == "--image-column"):
                raise ValueError(
                    f"{root / name} has no column {column or ' or '.join(usual)}; name one of {', '.join(schema.names)} with"
                    f" {flag}"
                )
            found.append(there)
        assert found[0] is not None, "an image column is always needed"
        kind = value = schema.field(found[0]).type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            value = kind.field("bytes").type
        if not (pyarrow.types.is_binary(value) or pyarrow.types.is_large_binary(value)):
            raise ValueError(
                f"column {found[0]} of {root / name} holds {kind}, not images; see --image-column"
            )
        return found[0], found[1]
    return image or IMAGE_COLUMNS[0], text or (FIELDS[0] if prompted else None)
