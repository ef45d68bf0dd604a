"""Write the images of tables and archives as files with a metadata.jsonl, which training programs read.

    python data_build/unpack.py --data data/train-00000-of-00001.parquet --output-dir data/unpacked
    python data_build/unpack.py --data shards/ --caption-column blip_caption --output-dir data/unpacked

Reads what score.py reads: parquet tables with images (as the Hugging Face hub has them), webdataset's tar
archives, zip files of DiffusionDB, and folders of captioned images. An image is copied byte for byte.

    000/000000.jpg ...   a thousand images in a folder
    metadata.jsonl       file_name, text, source (the table or archive), member (its row or name there)
    rejected.jsonl       file, member, reason and detail of images that are left out

Images without a prompt, and those that cannot be decoded, are left out and counted; where none is left the
program ends with exit code 2. Hardware: decoding uses all cores. Left out: other columns of a table.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.cli import exit_on_user_error, parse

SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
"""Format of PIL -> suffix, where it is not the format's name."""
AT_ONCE = 256
"""Images in memory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the images of tables and archives as files with a metadata.jsonl."""

    data: Path
    """Parquet table, tar archive, DiffusionDB zip, or a folder of one of them."""
    output_dir: Path
    """Folder to create; it must not exist yet."""
    image_column: str | None = None
    """Column of a table with the images; None = the usual names."""
    caption_column: str | None = None
    """Column of a table, or field of a .json in an archive, with the prompts; None = text, prompt or caption."""


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from tqdm import tqdm

from data_build.decode import Entry, ImageEntry, Rejected, UnusableError, decode
from data_build.readers import DataSet, entries, find_data_set, read_bytes, survey
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.records import write_jsonl


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """An image to write."""

    entry: ImageEntry
    content: bytes
    suffix: str


def unpack(data: DataSet, entry: Entry) -> Unpacked | Rejected:
    """Return an entry's bytes, if they can be decoded."""
    if not isinstance(entry, ImageEntry):
        assert isinstance(entry, Rejected), "nothing is filtered"
        return entry
    try:
        content = read_bytes(data, entry)
        kind = str(decode(content).format)
    except UnusableError as unusable:
        return unusable.of(entry.file, entry.member)
    return Unpacked(entry=entry, content=content, suffix=SUFFIX_OF.get(kind, f".{kind.lower()}"))


def unpacked(data: DataSet, total: int) -> Iterator[Unpacked | Rejected]:
    """Yield what becomes of each entry, in order."""
    listed = (entry for *_, entry in entries(data))
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads,
        tqdm(total=total, desc="unpacking", unit="image", mininterval=1) as bar,
    ):
        while some := list(itertools.islice(listed, AT_ONCE)):
            yield from threads.map(lambda entry: unpack(data, entry), some)
            bar.update(len(some))


def write_folder(data: DataSet, total: int, folder: Path) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Write the folder; returns reason -> number of images left out, under "" the number written, and the rows left out."""
    rejected, counts = list[dict[str, Any]](), Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for one in unpacked(data, total):
            if isinstance(one, Rejected):
                rejected.append(asdict(one))
                counts[one.reason] += 1
                continue
            name = f"{counts[''] // 1000:03d}/{counts['']:06d}{one.suffix}"
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(one.content)
            counts[""] += 1
            source = {"source": one.entry.file, "member": one.entry.member}
            yield {"file_name": name, "text": one.entry.text, **source}

    write_jsonl(folder / "metadata.jsonl", rows())
    write_jsonl(folder / "rejected.jsonl", rejected)
    return counts, rejected


@one_writer
def main(config: Config) -> None:
    """Check, write under a temporary name, rename."""
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        data = find_data_set(
            config.data,
            prompted=True,
            prompt="",
            image_column=config.image_column,
            text_column=config.caption_column,
        )
        _, total = survey(data)
        if not total:
            raise ValueError(f"{config.data} holds no images")
    with replacing(config.output_dir) as partial:
        partial.mkdir()
        counts, rejected = write_folder(data, total, partial)
        with exit_on_user_error():
            if not counts[""]:
                first = rejected[0]
                raise ValueError(
                    f"{config.data} has no image to write, {len(rejected)} left out; the first: {first['file']}"
                    f" {first['member']}: {first['reason']}, {first['detail']}"
                )
    written = counts.pop("")
    reasons = "".join(f"; {number} {reason}" for reason, number in sorted(counts.items()))
    show(f"{written} written, {counts.total()} left out{reasons}\n{config.output_dir}")


if __name__ == "__main__":
    main(CONFIG)
