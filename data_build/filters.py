"""Filters for DiffusionDB images: by its JSON and metadata before an image is read, by its pixels afterwards.

An active filter removes every image with missing information, for example without an NSFW value or without
a sampler.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from data_build.decode import BROKEN, Entry, Filtered, ImageEntry

BLURRED = 10
"""Of 255: an image whose neighbours in a row never rise by as much is one that Stable Diffusion's safety filter blurred."""
ROWS = 1 << 16
"""Rows of the metadata that are in memory at a time."""
PART = re.compile(r"part-(\d+)\.zip")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Conditions on images; by default blurred images and duplicates are removed."""

    keep_blurred: bool = False
    """Keep blurred images. Published test: no pixel exceeds its left neighbour by 10 of 255."""
    sizes: tuple[str, ...] = ()
    """Widths and heights to keep, such as 512x512; none = all."""
    samplers: tuple[str, ...] = ()
    """Samplers to keep, such as k_lms; none = all."""
    metadata: Path | None = None
    """metadata.parquet, or metadata-large.parquet for the Large set, with the NSFW values."""
    max_image_nsfw: float | None = None
    """Maximum image_nsfw, in [0, 1]; 1 removes only images blurred by Stable Diffusion, whose value is 2."""
    max_prompt_nsfw: float | None = None
    """Maximum prompt_nsfw, in [0, 1]."""
    normalise_prompts: bool = False
    """Strip prompts and collapse repeated spaces before scoring and grouping."""
    keep_duplicates: bool = False
    """Keep duplicates (same prompt, seed, guidance, steps, sampler and size); else only the first is kept."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
                raise ValueError(f"--sizes must be like 512x512, got {size!r}")
        limits = (("max-image-nsfw", self.max_image_nsfw), ("max-prompt-nsfw", self.max_prompt_nsfw))
        for name, limit in limits:
            if limit is not None and not 0 <= limit <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {limit}")
            if limit is not None and self.metadata is None:
                raise ValueError(f"--{name} needs --metadata, DiffusionDB's metadata.parquet")
        if self.metadata is not None and all(limit is None for _, limit in limits):
            raise ValueError(
                "--metadata is read for --max-image-nsfw and --max-prompt-nsfw; give one, or leave it out"
            )

    def __call__(self, image: Image.Image) -> str | None:
        """Return the name of the filter that a decoded image does not pass, or None."""
        if self.sizes and f"{image.width}x{image.height}" not in self.sizes:
            return "size"
        return "blurred" if not self.keep_blurred and is_blurred(image) else None

    def listed(self, entry: Entry, nsfw: "Nsfw | None") -> Entry:
        """Return an entry with its prompt normalised, or filtered by what is known before it is read."""
        if not isinstance(entry, ImageEntry):
            return entry
        if self.normalise_prompts:
            entry = replace(entry, text=" ".join(entry.text.split()))
        reason = "sampler" if self.samplers and entry.made[3] not in self.samplers else None
        if reason is None and nsfw is not None:
            reason = nsfw.reason(entry)
        return entry if reason is None else Filtered(file=entry.file, member=entry.member, filter=reason)


def is_blurred(image: Image.Image) -> bool:
    """Return whether no pixel is BLURRED or more above its left neighbour, in any channel."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    return bool(np.diff(pixels, axis=1).max(initial=0) < BLURRED)


def identity(text: str, made: Sequence[object]) -> int:
    """Return a number (64 bits) of a prompt, its seed, guidance, steps, sampler, width and height; 0 where one is not
    known.
    """
    if None in made:
        return 0
    seed, guidance, *others = made
    return number((text, seed, float(str(guidance)), *others))


def number(value: object) -> int:
    """Return a number in [1, 2^64) that tells a value from others; two of n values share one by a chance of n^2 / 2^65."""
    content = value if isinstance(value, str) else repr(value)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") or 1


class Nsfw:
    """What the metadata says about the images of some parts: nine bytes for each."""

    REASONS = (None, "image_nsfw", "prompt_nsfw")

    def __init__(self, filters: Filters, sources: Iterable[str]) -> None:
        """Read the metadata once, a few rows at a time; ValueError where it is of no use."""
        parts = {source: _part_of(source) for source in sources}
        path = filters.metadata
        assert path is not None
        keys, codes, known_ids = list[NDArray[np.uint64]](), list[NDArray[np.uint8]](), set[int]()
        names = ("image_name", "part_id", "image_nsfw", "prompt_nsfw")
        wanted = np.array(sorted(set(parts.values())))
        limits = (filters.max_image_nsfw, filters.max_prompt_nsfw)
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                if lacking := [name for name in names if name not in table.schema_arrow.names]:
                    raise ValueError(f"it has no column {lacking[0]}")
                for batch in table.iter_batches(ROWS, columns=list(names)):
                    rows = batch.filter(
                        pyarrow.array(np.isin(_numbers(batch.column("part_id")), wanted), pyarrow.bool_())
                    )
                    ids = _numbers(rows.column("part_id")).astype(np.int64)
                    pairs = zip(ids.tolist(), rows.column("image_name").to_pylist(), strict=True)
                    keys.append(np.array([number(pair) for pair in pairs], np.uint64))
                    codes.append(_codes([_numbers(rows.column(name)) for name in names[2:]], limits))
                    known_ids.update(ids.tolist())
        except BROKEN as error:
            raise ValueError(
                f"--metadata {path} is no metadata of DiffusionDB: {_first_line(error)}"
            ) from error
        for source, part in parts.items():
            if part not in known_ids:
                raise ValueError(
                    f"--metadata {path} knows no image of {source}; the 2M and Large sets have one each"
                )
        self.parts = parts
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self.keys, self.codes = joined[order], np.concatenate(codes)[order]

    def reason(self, image: ImageEntry) -> str | None:
        """Return the name of the filter that an image does not pass, or None."""
        key = np.uint64(number((self.parts[image.file], PurePosixPath(image.member).name)))
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            return "not in the metadata"
        return self.REASONS[self.codes[place]]


def _codes(columns: Sequence[NDArray[np.float64]], limits: Sequence[float | None]) -> NDArray[np.uint8]:
    """0 for what is wanted, else the number of the first figure that is above its limit or missing."""
    codes = np.zeros(len(columns[0]), np.uint8)
    for code in range(len(limits), 0, -1):
        limit = limits[code - 1]
        if limit is not None:
            codes[~(columns[code - 1] <= limit)] = code
    return codes


def _numbers(column: pyarrow.Array) -> NDArray[np.float64]:
    """A column of numbers; NaN where it has none."""
    return column.cast(pyarrow.float64()).to_numpy(zero_copy_only=False)


def _part_of(source: str) -> int:
    """The number of a part, as the metadata calls it."""
    match = PART.fullmatch(PurePosixPath(source).name)
    if match is None:
        raise ValueError(
            f"--metadata knows parts by their numbers, and {source} is not named part-NNNNNN.zip"
        )
    return int(match[1])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
