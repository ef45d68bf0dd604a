"""Where the captions of a folder of images are: in a table of metadata, or in a text file beside each image.

    metadata.jsonl, .csv or .parquet    as `datasets.load_dataset("imagefolder")` reads them, also in train/
    a.png with a.txt or a.caption       as kohya's sd-scripts read them, also in folders below

Nothing here opens an image. `preftune/records.py` makes samples of the rows for training, and `data_build/readers.py` entries.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.cli.notes import counted
from preftune.images import SUFFIXES
from preftune.prompts import FIELDS, MAX_HEADER, MISSING, csv_delimiter, find_field
from rewards.input_files import check_regular

IMAGE_FIELDS = ("file_name", "image", "image_path", "image_file", "filename", "path", "file")
"""Names of the column that holds the file names of images, in order of preference."""
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PLACES = (".", "train", "data", "data/train")
"""Folders below a data set's own where its table may be, in order of preference."""
CAPTION_FILES = (".txt", ".caption")
PACKED = (".parquet", ".tar", ".tar.gz", ".tgz", ".zip")
"""Endings of tables and archives with images, which data_build/unpack.py reads."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; the defaults find the usual names."""

    image_column: str | None = None
    """Column with the file names of images; None = the first of file_name, image, image_path, path and so on."""
    caption_column: str | None = None
    """Column with the captions; None = the first of text, prompt and caption."""

    def check_unused(self, folder: Path) -> None:
        """Raise ValueError where a column is named, of a folder that has no table and so no columns."""
        for flag, name in (("image", self.image_column), ("caption", self.caption_column)):
            if name is not None:
                raise ValueError(
                    f"--{flag}-column {name} names a column, but {folder} has no table of metadata, so it has no columns;"
                    " leave the flag out"
                )

    def where_any(self, folder: Path) -> "Columns":
        """Return these columns where a folder has a table, else none: for a second data set beside one with a table."""
        return self if find_table(folder) is not None else Columns()


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder of images and where their captions are."""

    root: Path
    """Names of images are relative to it."""
    table: Path | None
    """The table of metadata; None: the captions are files beside the images."""
    images: tuple[str, ...] = ()
    """Without a table: the image files, sorted."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Without a table: suffix -> number of files that are neither images nor captions."""

    @property
    def source(self) -> Path:
        """The table, or the folder."""
        return self.table or self.root

    def candidates(self, name: str) -> list[str]:
        """Return what a name in the table may be, relative to the root: beside the table first, then below the root."""
        if self.table is None or self.table.parent == self.root:
            return [name]
        return [f"{self.table.parent.relative_to(self.root).as_posix()}/{name}", name]


def find_captions(folder: Path, image_column: str | None = None) -> ImageFolder | None:
    """Return where the captions of a folder are; None where its images have none, or it holds no images.

    Raises ValueError as `find_table`.
    """
    return find_table(folder, image_column) or find_pairs(folder)


def find_table(folder: Path, image_column: str | None = None) -> ImageFolder | None:
    """Return the folder's table of metadata; of several the first of TABLES in the first of PLACES.

    A metadata.parquet that holds images themselves is none, but one with a column of their file names is. Raises ValueError
    for a table that is no regular file.
    """
    for place in PLACES:
        for name in TABLES:
            table = folder / place / name
            if _is_there(table) and (table.suffix != ".parquet" or _names_images(table, image_column)):
                return ImageFolder(root=folder, table=table)
    return None


def _is_there(table: Path) -> bool:
    """Whether there is such a file; ValueError for a pipe, a folder, and a link that leads nowhere."""
    if not os.path.lexists(table):
        return False
    try:
        check_regular(table)
    except OSError as error:
        raise ValueError(f"cannot read {table}: {error.strerror or error}") from error
    return True


def find_pairs(folder: Path) -> ImageFolder | None:
    """Return the images below a folder, where one of them or more have a caption in a file beside them."""
    images, others = list_images(folder)
    stems = {os.path.splitext(name)[0] for name in images}
    captions = {
        name for name in others if name.lower().endswith(CAPTION_FILES) and os.path.splitext(name)[0] in stems
    }
    if not captions:
        return None
    passed_over = suffixes(name for name in others if name not in captions)
    return ImageFolder(root=folder, table=None, images=images, passed_over=passed_over)


def list_images(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the image files below a folder and all other files, sorted and relative to it; hidden ones are passed over."""
    images, others = list[str](), list[str]()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                relative = (Path(place) / name).relative_to(folder).as_posix()
                (images if name.lower().endswith(SUFFIXES) else others).append(relative)
    return tuple(sorted(images)), tuple(sorted(others))


def suffixes(names: Iterable[str]) -> Counter[str]:
    """Return suffix -> number of files."""
    return Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)


def describe_passed_over(passed_over: Counter[str]) -> str:
    """Return "3 files are no images and are passed over: 2 .heic, 1 .psd", or nothing."""
    total = sum(passed_over.values())
    if not total:
        return ""
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in passed_over.most_common(6))
    return f"{counted(total, 'file is', 'files are')} not read as images and passed over: {kinds}"


def hub_hint(path: Path) -> str:
    """Return how to download what may be a data set of the Hugging Face hub, OWNER/NAME; else nothing."""
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or path.suffix:
        return ""
    return f"; one of the hub is downloaded with `hf download --repo-type dataset {path} --local-dir {path}`"


def no_captions(folder: Path) -> ValueError:
    """Return the error for a folder without captioned images, with what to do about what is there instead."""
    if not folder.exists():
        return ValueError(
            f"there is no data at {folder}; --data is a folder of captioned images{hub_hint(folder)}"
        )
    names = [folder.name] if folder.is_file() else sorted(os.listdir(folder))
    packed = next((name for name in names if name.lower().endswith(PACKED)), None)
    if packed is not None:
        return ValueError(
            f"{folder} holds images in {packed}; write them as files:"
            f" `preftune unpack --data {folder} --output-dir FOLDER`, and give FOLDER"
        )
    below = sorted(path.parent.name for name in TABLES for path in folder.glob(f"*/{name}"))
    if below:
        return ValueError(
            f"{folder} has no metadata.jsonl, but {below[0]}/ has one; give {folder / below[0]}"
        )
    images, _ = list_images(folder) if folder.is_dir() else ((), ())
    there = f"it holds {counted(len(images), 'image')} without captions" if images else "it holds no images"
    return ValueError(
        f"{folder} is no folder of captioned images: {there}; captions are in metadata.jsonl or metadata.csv"
        " (file_name, text), or in a .txt file beside each image"
    )


def caption_file(folder: ImageFolder, image: str) -> str | None:
    """Return the file beside an image that holds its caption, relative to the root; None where there is none."""
    stem = os.path.splitext(image)[0]
    return next(
        (stem + suffix for suffix in CAPTION_FILES if os.path.lexists(folder.root / (stem + suffix))), None
    )


def table_rows(table: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(place for messages, row) of each image of a csv or parquet table; an error in place of a row that cannot be read.

    Raises ValueError for a table that cannot be read at all.
    """
    check_regular(table)
    if table.suffix == ".csv":
        yield from _csv_rows(table, columns)
    else:
        yield from _parquet_rows(table)


def _csv_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """The rows of a csv table; numbers are numbers, file names and captions are texts, and cells of MISSING are None."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    wrong: dict[int, str] = {}

    def note(row: Any) -> str:
        wrong[row.number or 0] = f"{row.actual_columns} values for {row.expected_columns} columns"
        return "skip"

    try:
        delimiter, texts = _csv_header(path, columns)
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(texts, pyarrow.string()),
                null_values=list(MISSING),
                strings_can_be_null=True,
            ),
        )
        if any(map(pyarrow.types.is_binary, table.schema.types)):
            raise pyarrow.ArrowInvalid("invalid UTF8 data")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
            raise ValueError(
                f"{path} is not UTF-8 text; save it as UTF-8, in a spreadsheet as `CSV UTF-8`"
            ) from error
        raise ValueError(f"cannot read the table {path}: {error}") from error
    yield from (
        (f"{path} row {number}", ValueError(f"{path} row {number}: {why}")) for number, why in wrong.items()
    )
    yield from _table(path, table)


def _csv_header(path: Path, columns: Columns) -> tuple[str, list[str]]:
    """The delimiter of a csv table, and the columns that hold file names or captions, spelt as there."""
    with path.open("rb") as file:
        line = file.readline(MAX_HEADER)
        while line.endswith(b"\n") and not line.strip():  # pyarrow passes over blank lines
            line = file.readline(MAX_HEADER)
    header = line.split(b"\r")[0].decode("utf-8-sig").rstrip("\n")
    named = [name for name in (columns.image_column, columns.caption_column) if name is not None]
    delimiter = csv_delimiter(header, (*IMAGE_FIELDS, *named))
    names = next(csv.reader([header], delimiter=delimiter), [])
    return delimiter, [name for name in names if name.lower() in (*IMAGE_FIELDS, *FIELDS) or name in named]


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the table {path}: {error}") from error
    yield from _table(path, table)


def _table(path: Path, table: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in table.to_batches(4096):
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def _names_images(path: Path, image_column: str | None) -> bool:
    """Whether a parquet table has a text column that is named, or usual, for file names of images; or no column of images."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError):
        return False
    types = pyarrow.types
    kinds = [kind.value_type if types.is_dictionary(kind) else kind for kind in schema.types]
    texts = [
        name
        for name, kind in zip(schema.names, kinds, strict=True)
        if types.is_string(kind) or types.is_large_string(kind)
    ]
    if image_column in texts or find_field(texts, IMAGE_FIELDS):
        return True
    return not any(
        types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind) for kind in kinds
    )
