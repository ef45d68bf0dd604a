"""The output folder of `score.py`: written chunk by chunk during the job, and as one table at the end.

    job.json        data, scorers, weights and settings; a different job in this folder is refused
    chunks/         finished chunks of entries, one file each, removed at the end; the last one holds where to continue
    scores.parquet  file, member, text and a float32 column for each scorer, in the order of the data
    rejected.jsonl  file, member, reason and detail of rejected images
    best_worst.png  the best and the worst images of each scorer
    summary.json    counts and statistics; it is written last, so a folder that has it is complete

Every file is written atomically. A chunk's number is its position in the order of the data, so no entry is
lost or duplicated.
"""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from data_build.decode import ImageEntry, decode, upright
from data_build.readers import DataSet, entries, read_bytes
from preftune.files import is_leftover, replacing, tidy
from preftune.files.lock import is_lock
from preftune.grid import captioned_grid
from preftune.images import save_image, to_pil
from preftune.records import parse_object, read_jsonl, read_lines, write_jsonl, write_lines
from rewards.pixels import from_pil

QUANTILES = {"min": 0, "q25": 25, "median": 50, "q75": 75, "max": 100}
CELL = 192
"""Pixels of an image's side in best_worst.png."""
MAX_CAPTION = 90
"""Characters of a prompt there."""

_FLAGS = ("precision", "chunk")
"""What of a job has a flag of its name, with whose value it goes on."""

ScoreRow = Mapping[str, Any]
"""An image's line in a chunk: file and member, then text and scores, or reason and detail."""


def begin_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Make the folder, or find in it the same job; ValueError for another one, and for a folder of something else."""
    record = folder / "job.json"
    inside = [folder] if folder.is_file() else [*folder.iterdir()] if folder.is_dir() else []
    if not record.is_file() and not all(is_leftover(path) or is_lock(path) for path in inside):
        raise ValueError(f"{folder} exists and holds no scores; choose another --output-dir")
    tidy(folder, folder / "chunks")
    if not is_complete(folder) and not _chunks(folder):  # nothing is scored yet, so it may become another job
        write_jsonl(record, [job])
    begun = read_jsonl(record)[0]
    for key in {**begun, **job}:
        if begun.get(key) != job.get(key):
            same = f"go on with --{key} {begun[key]}, " if key in _FLAGS and key in begun else ""
            raise ValueError(
                f"{folder} was begun with {key} {begun.get(key)}, not {job.get(key)}; {same}choose another --output-dir, or"
                " remove the folder"
            )


def is_complete(folder: Path) -> bool:
    """Return whether the job is done."""
    return (folder / "summary.json").is_file()


def progress(folder: Path) -> tuple[int, tuple[int, int]]:
    """Return the number of finished chunks, and the source and entry where the next one begins."""
    chunks = _chunks(folder)
    if not chunks:
        return 0, (0, 0)
    _, first = read_lines(chunks[-1])[0]
    source, entry = parse_object(first, str(chunks[-1]))["next"]
    return len(chunks), (source, entry)


def write_chunk(folder: Path, number: int, rows: Sequence[ScoreRow], place: tuple[int, int]) -> None:
    """Write a chunk, and where the next one begins."""
    write_jsonl(folder / "chunks" / f"{number:06d}.jsonl", [{"next": place}, *rows])


def write_results(folder: Path, data: DataSet, names: Sequence[str], best: int) -> None:
    """Make the final files of the chunks, whose job is done; `best` is how many images of each end are shown."""
    table = folder / "scores.parquet"
    _write_table(folder, names)
    write_jsonl(
        folder / "rejected.jsonl", (row for rows in chunk_rows(folder) for row in rows if "reason" in row)
    )
    summary = summarise(folder, names)
    if turned := sum("turned" in row for rows in chunk_rows(folder) for row in rows):
        summary["exif_turned"] = turned
    if best and summary["count"]:
        save_image(_best_worst(table, data, names, best), folder / "best_worst.png")
    write_lines(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).splitlines())


def remove_chunks(folder: Path) -> None:
    """Remove the chunks of a complete job."""
    if (folder / "chunks").is_dir():
        shutil.rmtree(folder / "chunks")


def summarise(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return counts, and each scorer's statistics; std is the deviation of these images (divided by their number)."""
    table = folder / "scores.parquet"
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        values = _column(table, name).astype(np.float64)
        if len(values):
            quantiles = zip(QUANTILES, np.percentile(values, [*QUANTILES.values()]).tolist(), strict=True)
            scores[name] = {"mean": float(values.mean()), "std": float(values.std()), **dict(quantiles)}
    rejected = Counter(row["reason"] for row in read_jsonl(folder / "rejected.jsonl"))
    count = pyarrow.parquet.read_metadata(table).num_rows
    return {"count": count, "rejected": dict(sorted(rejected.items())), "scores": scores}


def summary_text(folder: Path) -> str:
    """Return the summary of a complete job as a table."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    heads = ("mean", "std", *QUANTILES)
    rows = [("scorer", *heads)]
    rows += [(name, *(f"{row[head]:.4g}" for head in heads)) for name, row in summary["scores"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rejected, turned = summary["rejected"], summary.get("exif_turned", 0)
    reasons = ", ".join(f"{number} {reason}" for reason, number in rejected.items())
    return "\n".join(
        [
            *lines,
            f"{summary['count']} scored, {sum(rejected.values())} set aside{f': {reasons}' if reasons else ''}"
            + (f"; {turned} turned as their EXIF data say" if turned else ""),
        ]
    )


def check_any_scored(folder: Path, data: Path) -> None:
    """Raise ValueError where a complete job has scored no image, with the reason of the first."""
    if json.loads((folder / "summary.json").read_text(encoding="utf-8"))["count"]:
        return
    rejected = read_jsonl(folder / "rejected.jsonl")
    first = rejected[0]
    where = " ".join(part for part in (first["file"], first["member"]) if part)
    raise ValueError(
        f"no image of {data} was scored, {len(rejected)} set aside; the first: {where}: {first['reason']}, {first['detail']};"
        f" all are listed in {folder / 'rejected.jsonl'}"
    )


def add_to_metadata(folder: Path, data: DataSet, names: Sequence[str]) -> None:
    """Write the scores into the metadata.jsonl of an imagefolder; lines that were set aside stay as they are, and NaN where
    Python or pandas wrote it.
    """
    table = pyarrow.parquet.read_table(folder / "scores.parquet")
    keys = zip(table.column("file").to_pylist(), table.column("text").to_pylist(), strict=True)
    values = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    known = dict(zip(keys, values, strict=True))
    path, lines = data.root / data.sources[0], []
    listed = entries(data)
    for place, line in read_lines(path):
        entry = next(listed)[2] if line.strip() else None  # entries are the lines that are not blank
        scores = known.get((entry.file, entry.text)) if isinstance(entry, ImageEntry) else None
        if scores is None:
            lines.append(line)
        else:
            row = parse_object(line, place) | dict(zip(names, scores, strict=True))
            lines.append(json.dumps(row, ensure_ascii=False))
    write_lines(path, lines)


def _best_worst(table: Path, data: DataSet, names: Sequence[str], most: int) -> Image.Image:
    """A row a scorer: its best images, then its worst, in falling order, with scores and prompts."""
    count = pyarrow.parquet.read_metadata(table).num_rows
    shown = min(most, max(count // 2, 1))
    columns = {name: _column(table, name) for name in names}
    order = {name: np.argsort(-values, kind="stable").tolist() for name, values in columns.items()}
    chosen = {
        name: [*ranked[:shown], *ranked[-min(shown, count - 1) :]][:count] for name, ranked in order.items()
    }
    rows = _rows_at(table, {index for ranked in chosen.values() for index in ranked})
    thumbnails = {index: _thumbnail(data, row) for index, row in rows.items()}
    titles = [f"best {place}" for place in range(1, shown + 1)]
    titles += [f"worst {place}" for place in range(shown, 0, -1)]
    return captioned_grid(
        [[thumbnails[index] for index in ranked] for ranked in chosen.values()],
        row_captions=list(chosen),
        column_titles=titles[:count],
        cell_captions=[
            [f"{columns[name][index]:.4g}\n{_shortened(rows[index]['text'])}" for index in ranked]
            for name, ranked in chosen.items()
        ],
        cell_size=CELL,
    )


def _thumbnail(data: DataSet, row: ScoreRow) -> Image.Image:
    """A small copy of the image of a row, as scorers see it."""
    entry = ImageEntry(file=row["file"], member=row["member"], text=row["text"])
    image = to_pil(from_pil(upright(decode(read_bytes(data, entry)))[0]))
    image.thumbnail((CELL, CELL))
    return image


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 3] + "..."


def _write_table(folder: Path, names: Sequence[str]) -> None:
    """Write scores.parquet, a row group for each chunk."""
    texts = [(name, pyarrow.string()) for name in ("file", "member", "text")]
    schema = pyarrow.schema([*texts, *((name, pyarrow.float32()) for name in names)])
    with (
        replacing(folder / "scores.parquet") as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema) as writer,
    ):
        for rows in chunk_rows(folder):
            scored = [row for row in rows if "scores" in row]
            columns = [[row[name] for row in scored] for name in ("file", "member", "text")]
            columns += [[row["scores"][index] for row in scored] for index in range(len(names))]
            if scored:
                arrays = [
                    pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)
                ]
                writer.write_table(pyarrow.table(arrays, schema=schema))


def _column(table: Path, name: str) -> NDArray[np.float32]:
    return pyarrow.parquet.read_table(table, columns=[name]).column(0).to_numpy()


def _rows_at(table: Path, indices: Collection[int]) -> dict[int, dict[str, Any]]:
    """The rows of a table at these numbers; only the row groups that hold them are read."""
    found, first = {}, 0
    with pyarrow.parquet.ParquetFile(table) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = [index for index in indices if first <= index < first + count]
            if inside:
                rows = file.read_row_group(group)
                found.update({index: rows.slice(index - first, 1).to_pylist()[0] for index in inside})
            first += count
    return found


def _chunks(folder: Path) -> list[Path]:
    chunks = sorted((folder / "chunks").glob("[0-9]*.jsonl"))
    assert [path.stem for path in chunks] == [f"{number:06d}" for number in range(len(chunks))], (
        "a chunk is missing"
    )
    return chunks


def chunk_rows(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of each chunk."""
    for path in _chunks(folder):
        yield read_jsonl(path)[1:]
