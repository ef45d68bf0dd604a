"""Which of the bot's images a person has attached: by the name of the file, and by a perceptual hash.

Names say little alone: many images are called image.png. A name therefore only counts where the images are alike, as far as
both can be read; "name alone" is told where the upload cannot. Hashes are compared in the number of their bits that differ, of 256 (pHash of the library ImageHash, 16 x 16
coefficients of the cosine transform of a small grey copy). Measured: photographs and images of 512 pixels that are saved again
as JPEG of quality 30 to 90, as WebP of quality 50, at half, three quarters or twice the size differ in at most 12 bits, with 2
pixels cut off in 22, with 3 % cut off in 74; two different images of one prompt in 122 to 126, two photographs of one object in
82 or more. Images of 64 pixels differ in up to 34 bits as JPEG of quality 90, in up to 86 of quality 30.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import imagehash
from PIL import Image

from data_build import dream_bot
from data_build.decode import UnusableError, decode, upright
from data_build.discord_export import Attachment, read_attachment
from data_build.discord_groups import UNUSABLE, GroupImage, Groups

SIDE = 16
"""Of the square of bits of a hash."""
ALIKE = 38
"""Most bits that differ between an image and a copy of it."""
APART = 26
"""How many bits more differ from the second image that is nearest."""
NAMED = 77
"""Most bits that differ where the names agree."""

Missed = Literal[
    "upload not readable", "several images are alike", "the whole grid", "prompt changed", "image of another person", "foreign upload"
]  # fmt: skip
"""Why an attached image is no choice."""


def perceptual_hash(image: Image.Image) -> str:
    """Return the hash of an image as 64 hexadecimal digits, which stays nearly the same when the image is saved again."""
    return str(imagehash.phash(upright(image)[0].convert("RGB"), hash_size=SIDE))


def distance(a: str, b: str) -> int:
    """Return the number of bits in which two hashes differ, 0 to 256."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def nearest(distances: Sequence[int]) -> int | None:
    """Return the place of the least distance; None where it is above ALIKE, or another is less than APART above it."""
    order = sorted(range(len(distances)), key=distances.__getitem__)
    if not order or distances[order[0]] > ALIKE:
        return None
    if len(order) > 1 and distances[order[1]] < distances[order[0]] + APART:
        return None
    return order[0]


@functools.lru_cache(maxsize=2)
def _whole(folder: str, url: str) -> tuple[bytes, Image.Image]:
    """The bytes of a file and its image; of a grid all cells are asked for one after another."""
    content = read_attachment(Path(folder), url)
    return content, decode(content)


def read_image(image: GroupImage) -> tuple[bytes, Image.Image]:
    """Return the bytes of an image's file, and the image, which for a grid is cut from it; UnusableError with the reason."""
    content, whole = _whole(image.folder, image.url)
    if image.layout is None:
        return content, whole
    boxes = dream_bot.cells(*whole.size, image.layout)
    if not boxes:
        rows, columns = image.layout
        raise UnusableError(
            "undecodable",
            f"a grid of {whole.width} x {whole.height} pixels has no {rows} x {columns} equal images",
        )
    return content, whole.crop(boxes[image.place])


def hash_of(groups: Groups, image: GroupImage) -> str:
    """Return the hash of one of the bot's images, UNUSABLE where it cannot be read; it is made once."""
    if image.hash is not None:
        return image.hash
    try:
        found = perceptual_hash(read_image(image)[1])
    except UnusableError:
        found = UNUSABLE
    groups.set_hash(image, found)
    return found


class Upload:
    """An attached file: its bytes and hash, as far as they can be read."""

    def __init__(self, folder: Path, attachment: Attachment) -> None:
        self.name = attachment.name.casefold()
        self.content, self.hash = b"", UNUSABLE
        try:
            self.content = read_attachment(folder, attachment.url)
            self.hash = perceptual_hash(decode(self.content))
        except UnusableError:
            pass

    def is_like(self, groups: Groups, image: GroupImage) -> bool:
        """Whether an image with the same name is this one, or whether that cannot be seen."""
        other = hash_of(groups, image)
        return UNUSABLE in (self.hash, other) or distance(self.hash, other) <= NAMED


def match(
    groups: Groups, upload: Upload, candidates: Sequence[GroupImage]
) -> tuple[GroupImage, Literal["name", "name alone", "hash"]] | Missed:
    """Return which image of what a person got for a prompt is attached, and how that was seen, or why none is."""  # fmt: skip
    apart = [image for image in candidates if image.layout is None]
    named = [image for image in apart if image.name == upload.name]
    if len(named) == 1 and upload.is_like(groups, named[0]):
        return named[0], "name alone" if upload.hash == UNUSABLE else "name"
    if upload.hash == UNUSABLE:
        return "upload not readable"
    if any(image.name == upload.name and _is_file_of(image, upload) for image in candidates if image.layout):
        return "the whole grid"
    found = _most_alike(groups, upload, candidates)
    return (found, "hash") if isinstance(found, GroupImage) else found


def elsewhere(groups: Groups, upload: Upload, channel: str, person: str) -> Missed:
    """Return where an image that was not matched comes from: another prompt, another person (by its name), or from outside."""
    for image, owner in groups.named(channel, upload.name):
        if upload.is_like(groups, image):
            return "prompt changed" if owner == person else "image of another person"
    if (
        upload.hash == UNUSABLE
        or _most_alike(groups, upload, groups.recent(channel, person)) == "foreign upload"
    ):
        return "foreign upload"
    return "prompt changed"


def left_out(groups: Groups, upload: Upload, channel: str, person: str) -> str:
    """Return why the answer was left out that an image is from; empty for an image of none that was."""
    if upload.hash == UNUSABLE:
        return ""
    for image, _ in groups.named(channel, upload.name, left_out=True):
        if upload.is_like(groups, image):
            return groups.why_left_out(image)
    found = _most_alike(groups, upload, groups.recent(channel, person, left_out=True))
    return groups.why_left_out(found) if isinstance(found, GroupImage) else ""


def _most_alike(groups: Groups, upload: Upload, images: Sequence[GroupImage]) -> GroupImage | Missed:
    """The image whose hash is nearest, or why none is."""
    usable = [image for image in images if hash_of(groups, image) != UNUSABLE]
    distances = [distance(upload.hash, hash_of(groups, image)) for image in usable]
    place = nearest(distances)
    if place is not None:
        return usable[place]
    return "several images are alike" if distances and min(distances) <= ALIKE else "foreign upload"


def _is_file_of(image: GroupImage, upload: Upload) -> bool:
    try:
        return read_image(image)[0] == upload.content
    except UnusableError:
        return False
