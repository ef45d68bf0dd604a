"""Whether the image files of a data set can be decoded, found out before the first update of a training.

Every image is decoded once, by threads; a JPEG at an eighth of its size, which reads all its bytes. Above FULL images a PNG is
read against its checksums instead, which takes a tenth of the time and finds every damage on the disk. The result for a large
data set is kept in the user's cache and holds as long as no file has another name, size or time of change: a resumed run and the
other processes of a machine do not check again. What is checked decides which samples there are, so the same data give the same
list in every process.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from PIL import ExifTags, Image, ImageOps, __version__
from tqdm.auto import tqdm

from preftune.files import write_text
from preftune.images import FORMATS, opened

FULL = 10_000
"""Images up to which a PNG is decoded, too."""
KEPT = 2_000
"""Images from which on the result is kept; fewer are checked in seconds."""
SMALL = 8
"""Pixels of the short side below which an image is counted as tiny."""
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the check found in N image files."""

    unreadable: dict[int, str]
    """Index of a file -> why it cannot be decoded."""
    turned: int
    """Number of images that are shown in another orientation than they are stored, by their EXIF data."""
    animated: int
    """Number of files with several images, of which the first is used."""
    tiny: int
    """Number of images with a side of less than SMALL pixels."""


def check_images(paths: Sequence[Path]) -> Checked:
    """Return which of these files cannot be decoded, and what else is to be said of them."""
    if len(paths) < KEPT:
        return _check(paths)
    record = _cache() / f"{_digest(paths)}.json"
    with _locked(record):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # none, or damaged
            found = json.loads(record.read_text(encoding="utf-8"))
            return Checked(
                **found | {"unreadable": {int(at): why for at, why in found["unreadable"].items()}}
            )
        checked = _check(paths)
        with suppress(OSError):  # the cache cannot be written
            write_text(record, json.dumps(asdict(checked)))
    return checked


def _check(paths: Sequence[Path]) -> Checked:
    full = len(paths) <= FULL

    def look_at(start: int) -> list[tuple[str, int, int, int]]:
        return [_look(path, full=full) for path in paths[start : start + _CHUNK]]

    found = list[tuple[str, int, int, int]]()
    quiet = os.environ.get("RANK", "0") != "0"
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads,  # decoding lets others run
        tqdm(
            total=len(paths), desc="checking images", unit="image", delay=3, disable=quiet, mininterval=1
        ) as bar,
    ):
        for some in threads.map(look_at, range(0, len(paths), _CHUNK)):
            found += some
            bar.update(len(some))
    return Checked(
        unreadable={at: why for at, (why, *_) in enumerate(found) if why},
        turned=sum(turned for _, turned, _, _ in found),
        animated=sum(animated for _, _, animated, _ in found),
        tiny=sum(tiny for *_, tiny in found),
    )


def _look(path: Path, *, full: bool) -> tuple[str, int, int, int]:
    """Why an image cannot be decoded, else an empty text; whether it is turned, animated and tiny."""
    try:
        with opened(path) as file:
            tiny = int(min(file.size) < SMALL)
            animated = int(
                file.format != "MPO" and getattr(file, "is_animated", False)
            )  # MPO: previews of cameras
            file.draft("RGB", (1, 1))
            decoded = full or file.format != "PNG"
            if decoded:
                file.load()
            exif = file.getexif() if decoded else Image.Image.getexif(file)  # a PNG's own would decode it
            turned = int(exif.get(ExifTags.Base.Orientation, 1) in range(2, 9))
            if turned and decoded:
                ImageOps.exif_transpose(file)
            elif not decoded:
                file.verify()
    except ValueError as error:
        return str(error), 0, 0, 0
    return "", turned, animated, tiny


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftune" / "checked"


def _digest(paths: Sequence[Path]) -> str:
    """What the result depends on: the files by name, size and time of change, and what reads them."""
    digest = hashlib.sha256(f"{__version__} {FORMATS} {FULL} {SMALL}".encode())
    for path in paths:
        try:
            status = path.stat()
            facts = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            facts = f"{path.absolute()}\n"
        digest.update(facts.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


@contextmanager
def _locked(record: Path) -> Iterator[None]:
    """Let one process check, and the others wait for what it finds; without a cache folder each checks on its own."""
    lock = FileLock(record.with_suffix(".lock"))
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()
