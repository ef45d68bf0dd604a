"""Edits that spoil an image of the shapes world: each makes it follow its caption worse, however it is drawn.

`drawn` edits a rendering, where it is known what is in the image. `generated` edits the pixels of an image that a
model made, of which only the judge's own detection says what is in it; None when the image has nothing to spoil.
`tests/test_shapes_edits.py` counts the edits that gain.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator, default_rng
from scipy import ndimage
from torch import Tensor

from preftune import families
from preftune.sampling import Sampling, sample
from rewards.shapes import (
    AXIS,
    BACKGROUNDS,
    COLOURS,
    NUM_COLOURS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZE,
    Floats,
    Scene,
    Thing,
    coverage,
    parse_caption,
)
from rewards.shapes_judge import Found, assign, detect, errors_of, judge
from rewards.shapes_rendering import DEFECTS, Placed, place, random_scene, render, to_bytes

EDITS = ("vanish", "colour", "shape", "background", "add", "side")
QUALITIES = ("clean", *DEFECTS, "two")
"""How a rendering is drawn before and after the edit; "two" is two defects of at most 0.6 each."""
STRONGEST = {"off_palette": 0.5}
"""Beyond this a colour may be nearer to another of the palette, or to its background, than to its own: an edit may then mend it."""
STRONGEST_OF_TWO = 0.6
FITS = 0.3
"""Errors up to which a detected object is what its thing says."""

TINY = Path(__file__).parents[1] / "assets/tiny"


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One edit: the image before and after it, and the edited image drawn without defects; (SIZE, SIZE, 3)."""

    caption: str
    before: Floats
    after: Floats
    redrawn: Floats


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What edits did to gold: (number of edits,) each."""

    gains: Tensor
    cleaner_gains: Tensor


def tally(edits: list[Edited]) -> Tally:
    """Judge the images of edits as 8-bit files would hold them."""
    captions = [edit.caption for edit in edits]
    before, after, redrawn = (
        judge(as_pixels([getattr(edit, name) for edit in edits]), captions).gold
        for name in ("before", "after", "redrawn")
    )
    return Tally(gains=after - before, cleaner_gains=redrawn - before)


def as_pixels(images: list[Floats]) -> Tensor:
    """Return images (B, 3, SIZE, SIZE) as 8-bit files would hold them."""
    return torch.from_numpy(np.stack([to_bytes(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def other(rng: Generator, options: list[str], but: set[str]) -> str:
    """Return one of the options at random that is not in `but`."""
    return str(rng.choice([option for option in options if option not in but]))


# ---------------------------------------------------------------- the edits, of things whose places are known


def edited(
    kind: str, scene: Scene, placed: list[Placed], ground: str, rng: Generator
) -> tuple[list[Placed], str] | None:
    """Return other things and another background, of which the scene's caption is less true; None without room.

    Colours and shapes that come in are of no thing of the caption, or the edit might right another thing.
    """
    colour = other(rng, list(COLOURS), {thing.colour for thing in scene.things})
    shape = other(rng, list(SHAPES), {thing.shape for thing in scene.things})
    k = int(rng.integers(len(scene.things)))
    first = placed[k]
    if kind == "vanish":
        return placed[:k] + placed[k + 1 :], ground
    if kind == "colour":
        new = replace(first, thing=replace(first.thing, colour=colour))
        return [*placed[:k], new, *placed[k + 1 :]], ground
    if kind == "shape":
        new = replace(first, thing=replace(first.thing, shape=shape))
        return [*placed[:k], new, *placed[k + 1 :]], ground
    if kind == "background":
        return placed, other(rng, list(BACKGROUNDS), {ground})
    if kind == "add":
        radius = float(rng.uniform(5.5, 8))
        at = _free(placed, radius, rng)
        thing = Thing(colour=colour, shape=shape)
        return at and ([*placed, Placed(thing=thing, x=at[0], y=at[1], radius=radius)], ground)
    assert kind == "side"
    if scene.relation is None:
        return None
    a, b = placed
    return [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)], ground


def _free(placed: list[Placed], radius: float, rng: Generator) -> tuple[float, float] | None:
    for _ in range(200):
        x, y = rng.uniform(12, SIZE - 13, 2)
        if all(np.hypot(x - one.x, y - one.y) > 1.5 * (one.radius + radius) for one in placed):
            return float(x), float(y)
    return None


# ---------------------------------------------------------------- renderings


def drawn(kind: str, quality: str, count: int, seed: int) -> list[Edited]:
    """Return edits of renderings with the defects of a quality, each before and after with the same random numbers."""
    found: list[Edited] = []
    i = 0
    while len(found) < count:
        i += 1
        rng = default_rng((seed, EDITS.index(kind), QUALITIES.index(quality), i))
        scene = random_scene(rng)
        placed = place(scene, rng)
        spoilt = edited(kind, scene, placed, scene.background, rng)
        if spoilt is None:
            continue
        names = {"clean": [], "two": list(rng.permutation(DEFECTS)[:2])}.get(quality, [quality])
        strongest = STRONGEST_OF_TWO if quality == "two" else 1.0
        defects = {
            str(name): float(rng.uniform(0.15, min(strongest, STRONGEST.get(str(name), 1.0))))
            for name in names
        }
        found.append(
            Edited(
                caption=scene.caption(),
                before=render(placed, scene.background, default_rng(i), defects),
                after=render(*spoilt, default_rng(i), defects),
                redrawn=render(*spoilt, default_rng(i), {}),
            )
        )
    return found


# ---------------------------------------------------------------- generated images


def sampled(prompts: list[str]) -> list[Floats]:
    """Return images that the embedded model makes of captions, guidance 3, ten steps, seeds 0, 1, ..."""
    sampling = Sampling(
        num_inference_steps=10, guidance_scale=3.0, solver="ddim", resolution=str(SIZE), batch_size=64
    )
    batches = sample(families.load(TINY / "pipeline"), prompts, range(len(prompts)), sampling)
    return list(torch.cat(list(batches)).permute(0, 2, 3, 1).numpy())


def _as_placed(one: Found) -> Placed:
    thing = Thing(
        colour=list(COLOURS)[int(one.colour[:NUM_COLOURS].argmax())], shape=SHAPES[one.shape.argmax()]
    )
    return Placed(thing=thing, x=one.x, y=one.y, radius=one.radius)


def _pixels(
    kind: str, image: Floats, objects: list[Found], placed: list[Placed], spoilt: tuple[list[Placed], str]
) -> Floats | None:
    """Return the image with an edit's pixels; None where a thing that is moved would leave the image."""
    ground = detect(image)[0]
    things, background = spoilt
    after = image.copy()
    if kind == "background":
        new = np.array(BACKGROUNDS[background], np.float32) / 255
        bare = np.ones((SIZE, SIZE, 1), np.float32)
        for one in objects:
            bare[one.window] = np.minimum(bare[one.window], 1 - one.soft[..., None])
        return np.clip(image + bare * (new - ground), 0, 1)
    if kind == "add":
        return _painted(image, things[-1])
    for one, old in zip(objects, placed, strict=True):
        if old in things:
            continue
        new = next((thing for thing in things if (thing.x, thing.y) == (old.x, old.y)), None)
        if kind == "colour" and new:
            shift = PALETTE[list(COLOURS).index(new.thing.colour)] - PALETTE[one.colour.argmax()]
            after[one.window] += one.soft[..., None] * shift
        else:
            after[one.window] += ndimage.maximum_filter(one.soft, 5)[..., None] * (ground - after[one.window])
            after = _painted(after, new) if kind == "shape" and new else after
    return _swapped(image, after, objects) if kind == "side" else np.clip(after, 0, 1)


def _swapped(image: Floats, empty: Floats, objects: list[Found]) -> Floats | None:
    first, second = objects
    for one, at in ((first, second), (second, first)):
        rows, columns = one.window
        down, right = round(at.y - one.y), round(at.x - one.x)
        top, left = rows.start + down, columns.start + right
        height, width = one.soft.shape
        if min(top, left) < 0 or top + height > SIZE or left + width > SIZE:
            return None
        target = empty[top : top + height, left : left + width]
        target += ndimage.maximum_filter(one.soft, 3)[..., None] * (image[one.window] - target)
    return empty


def _painted(image: Floats, one: Placed) -> Floats:
    alpha = coverage(one.thing.shape, AXIS[None, :] - one.x, AXIS[:, None] - one.y, one.radius)[..., None]
    return image + alpha * (PALETTE[list(COLOURS).index(one.thing.colour)] - image)


def _related(scene: Scene, placed: list[Placed]) -> bool:
    dx, dy = RELATIONS[str(scene.relation)]
    return dx * (placed[0].x - placed[1].x) + dy * (placed[0].y - placed[1].y) > 4


def of_generated(kind: str, images: list[Floats], captions: list[str], seed: int) -> list[Edited]:
    """Return the edits of one kind of those images that have something to spoil."""
    found = (
        generated(kind, image, parse_caption(caption), default_rng((seed, EDITS.index(kind), i)))
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
    )
    return [one for one in found if one is not None]


def generated(kind: str, image: Floats, scene: Scene, rng: Generator) -> Edited | None:
    """Edit the pixels of an image that shows what its caption says (for its background: on the one it says), no more."""
    _, grounds, objects = detect(image)
    chosen = assign(scene, objects)
    there = [one for one in chosen if one is not None]
    if len(there) < len(scene.things) or len(objects) > len(there):
        return None  # an object that is not asked for could stand in for another
    if grounds[list(BACKGROUNDS).index(scene.background)] < 0.5:
        return None
    fits = [errors_of(thing, one) < FITS for thing, one in zip(scene.things, there, strict=True)]
    placed = [_as_placed(one) for one in there]
    spoilt = edited(kind, scene, placed, scene.background, rng)
    if spoilt is None:
        return None
    if (kind != "background" and not all(fits)) or (kind == "side" and not _related(scene, placed)):
        return None
    after = _pixels(kind, image, there, placed, spoilt)
    if after is None:
        return None
    return Edited(
        caption=scene.caption(),
        before=image,
        after=after,
        redrawn=render(*spoilt, rng, {}),
    )
