"""Random scenes of the shapes world, and their rendering, without or with the defects that the judge must
detect.

The judge is tested against these renderings, and data_build renders its data sets with them. All random
numbers come from the numpy Generator that is passed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from rewards.shapes import (
    AXIS,
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    WOBBLE,
    Floats,
    Scene,
    Thing,
    coverage,
    extent,
    wobbled,
)

DEFECTS = ("specks", "noise", "blur", "off_palette", "wobble")
_KINDS = {"one": 0.25, "relation": 0.35, "pair": 0.15, "count": 0.15, "three": 0.10}
_GAP = 3.0  # pixels between two rendered things, and between a thing and the border


# ---------------------------------------------------------------- scenes


def pick(rng: Generator, options: Sequence[str]) -> str:
    """Return one of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def _random_thing(rng: Generator) -> Thing:
    size = pick(rng, list(SIZES)) if rng.random() < 0.3 else None
    return Thing(colour=pick(rng, list(COLOURS)), shape=pick(rng, SHAPES), size=size)


def random_scene(rng: Generator, *, single: float = 0.0) -> Scene:
    """Return a scene; no two things share both colour and shape unless the caption counts them.

    A share `single` in [0, 1] has one thing alone, beside the quarter of the others that have.
    """
    alone = single > 0 and rng.random() < single
    kind = "one" if alone else str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    background = pick(rng, list(BACKGROUNDS))
    if kind == "count":
        thing = replace(_random_thing(rng), size=None)
        return Scene(things=(thing,) * int(rng.integers(2, 4)), relation=None, background=background)
    number = {"one": 1, "three": 3}.get(kind, 2)
    things: list[Thing] = []
    while len(things) < number:
        thing = _random_thing(rng)
        if number == 3:
            thing = replace(thing, size=None)
        if all((thing.colour, thing.shape) != (other.colour, other.shape) for other in things):
            things.append(thing)
    relation = pick(rng, list(RELATIONS)) if kind == "relation" else None
    return Scene(things=tuple(things), relation=relation, background=background)


def change_one_word(scene: Scene, rng: Generator, ways: Sequence[str] = ()) -> Scene:
    """Return a scene that differs in one thing: a colour, a shape, a size, the relation, the background or the number.

    Of the `ways` that are given, those that the scene has, or all that it has.
    """
    things, counted = list(scene.things), len(set(scene.things)) == 1
    has = [
        "colour",
        "shape",
        "background",
        *["relation"] * (scene.relation is not None),
        *["number"] * (not scene.relation),
    ]
    has += ["size"] * any(thing.size for thing in things)
    way = pick(rng, [way for way in has if way in ways] or has)
    if way == "background":
        return replace(
            scene, background=pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        )
    if way == "relation":
        return replace(scene, relation=OPPOSITE[str(scene.relation)])
    if way == "number":
        if counted:
            single = replace(things[0], size=None)
            return replace(scene, things=(single,) * _other(rng, [1, 2, 3], len(things)))
        gone = int(rng.integers(len(things)))
        return replace(scene, things=tuple(thing for k, thing in enumerate(things) if k != gone))
    sized = [k for k, thing in enumerate(things) if thing.size]
    k = int(rng.choice(sized)) if way == "size" else int(rng.integers(len(things)))
    old = things[k]
    if way == "size":
        new = replace(old, size="small" if old.size == "large" else "large")
    elif way == "colour":
        new = replace(old, colour=pick(rng, [name for name in COLOURS if name != old.colour]))
    else:
        new = replace(old, shape=pick(rng, [name for name in SHAPES if name != old.shape]))
    changed = [new if counted or j == k else thing for j, thing in enumerate(things)]
    return replace(scene, things=tuple(changed))


def _other(rng: Generator, options: list[int], not_this: int) -> int:
    return int(rng.choice([option for option in options if option != not_this]))


# ---------------------------------------------------------------- rendering


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A thing with its place: centroid and radius in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


def _radius(thing: Thing, number: int, rng: Generator) -> float:
    low, high = SIZES[thing.size] if thing.size else (SIZES["small"][0], SIZES["large"][1])
    crowded = {1: 11.0, 2: 11.0, 3: 8.0}[number]
    return float(rng.uniform(low, max(min(high, crowded), low)))


def place(scene: Scene, rng: Generator) -> list[Placed]:
    """Return places for a scene's things: no overlap, inside the image, the relation plainly true."""
    number = len(scene.things)
    for attempt in range(1000):
        radii = [_radius(thing, number, rng) * (0.97 ** (attempt // 50)) for thing in scene.things]
        reach = [
            extent(thing.shape, radius) + _GAP for thing, radius in zip(scene.things, radii, strict=True)
        ]
        corner = [  # a square and a cross reach furthest at their corners, 1.2533 radii away
            max(r - _GAP, 1.2533 * radius * (thing.shape in ("square", "cross")))
            for thing, r, radius in zip(scene.things, reach, radii, strict=True)
        ]
        xy = [rng.uniform(r, SIZE - 1 - r, 2) for r in reach]
        if scene.relation:
            dx, dy = RELATIONS[scene.relation]
            along = dx * (xy[0][0] - xy[1][0]) + dy * (xy[0][1] - xy[1][1])
            across = abs(dy * (xy[0][0] - xy[1][0])) + abs(dx * (xy[0][1] - xy[1][1]))
            if along < max(8.0, across):
                continue
        pairs = [(i, j) for i in range(number) for j in range(i)]
        if all(np.hypot(*(xy[i] - xy[j])) > corner[i] + corner[j] + _GAP for i, j in pairs):
            rows = zip(scene.things, xy, radii, strict=True)
            return [
                Placed(thing=thing, x=float(at[0]), y=float(at[1]), radius=radius)
                for thing, at, radius in rows
            ]
    raise AssertionError(f"no room for {scene}")


def _paint(image: Floats, alpha: Floats, rows: slice, columns: slice, rgb: Floats) -> None:
    patch = image[rows, columns]
    patch += alpha[..., None] * (rgb - patch)


def _window(x: float, y: float, reach: float) -> tuple[slice, slice, Floats, Floats]:
    rows = slice(max(int(y - reach) - 1, 0), int(y + reach) + 3)
    columns = slice(max(int(x - reach) - 1, 0), int(x + reach) + 3)
    return rows, columns, AXIS[columns][None, :] - np.float32(x), AXIS[rows][:, None] - np.float32(y)


def render(placed: list[Placed], background: str, rng: Generator, defects: dict[str, float]) -> Floats:
    """Render things on a background; `defects` maps names of DEFECTS to strengths in [0, 1]. Returns (SIZE, SIZE, 3) in [0, 1]."""
    unknown = set(defects) - set(DEFECTS)
    if unknown:
        raise ValueError(f"unknown defect {sorted(unknown)[0]!r}; one of {', '.join(DEFECTS)}")
    off = 0.35 * defects.get("off_palette", 0.0)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = np.array(BACKGROUNDS[background], np.float32) / 255
    for item in placed:
        wobble = defects.get("wobble", 0.0)
        reach = extent(item.thing.shape, item.radius) + WOBBLE * item.radius * wobble
        rows, columns, x, y = _window(item.x, item.y, reach)
        if wobble:
            x, y = wobbled(x, y, item.radius, wobble, rng.uniform(0, 2 * np.pi, 2))
        rgb = np.array(COLOURS[item.thing.colour], np.float32) / 255
        if off:
            direction = rng.normal(size=3)
            rgb = np.clip(rgb + off * direction / np.linalg.norm(direction), 0, 1)
        _paint(image, coverage(item.thing.shape, x, y, item.radius), rows, columns, rgb.astype(np.float32))
    return _spoil(image, rng, defects)


def _spoil(image: Floats, rng: Generator, defects: dict[str, float]) -> Floats:
    if strength := defects.get("specks", 0.0):
        colours = np.array(list(COLOURS.values()), np.float32) / 255
        for _ in range(1 + round(7 * strength)):
            x, y, radius = rng.uniform(2, SIZE - 3), rng.uniform(2, SIZE - 3), rng.uniform(1.0, 2.4)
            rows, columns, dx, dy = _window(x, y, radius)
            _paint(
                image, coverage("circle", dx, dy, radius), rows, columns, colours[rng.integers(len(colours))]
            )
    if strength := defects.get("blur", 0.0):
        sigma = 0.4 + 1.4 * strength
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    if strength := defects.get("noise", 0.0):
        image = image + rng.standard_normal(image.shape, np.float32) * np.float32(0.2 * strength)
    return np.clip(image, 0, 1)


def random_defects(rng: Generator, share: float) -> dict[str, float]:
    """Return no defect, or with probability `share` one or (one time in three) two, of uniform strength in [0.15, 1]."""
    if rng.random() >= share:
        return {}
    names = rng.permutation(DEFECTS)[: 2 if rng.random() < 1 / 3 else 1]
    return {str(name): float(rng.uniform(0.15, 1.0)) for name in names}


def to_bytes(image: Floats) -> NDArray[np.uint8]:
    """Return 8-bit pixels of a rendering in [0, 1]."""
    return (image * 255 + 0.5).astype(np.uint8)
