"""The shapes world: palette, caption grammar and ideal shapes.

An image of the world is SIZE x SIZE pixels: one to three flat shapes on a plain background. The judge of such
images, the *gold* score of all offline runs, is in `rewards.shapes_judge`.

A shape's `radius` is that of the circle of equal area, so area = pi radius^2 for all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 30),
    "green": (30, 160, 60),
    "blue": (30, 80, 220),
    "purple": (140, 40, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (5.5, 7.0), "large": (9.0, 11.0)}  # radius, pixels
RELATIONS: dict[str, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}
WOBBLE = 0.32  # how far a wobbly outline swings at strength 1, in radii
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
COUNTS = {2: "two", 3: "three"}

PALETTE: NDArray[np.float32] = np.divide(
    [*COLOURS.values(), *BACKGROUNDS.values()], 255, dtype=np.float32
)  # (9, 3)

NUM_COLOURS = len(COLOURS)

Floats = NDArray[np.float32]
AXIS: Floats = np.arange(SIZE, dtype=np.float32)  # where the pixels lie along x, and along y


# ---------------------------------------------------------------- captions


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a caption; size None means that the caption does not say."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: one to three things, how the first lies to the second (or None), and the background."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        """Return the one caption of this scene; `parse_caption` is its inverse."""
        things = self.things
        if len(things) > 1 and len(set(things)) == 1:
            plural = "es" if things[0].shape.endswith("s") else "s"
            subject = f"{COUNTS[len(things)]} {str(things[0]).split(' ', 1)[1]}{plural}"
        elif self.relation:
            subject = f"{things[0]} {self.relation} {things[1]}"
        else:
            subject = ", ".join(str(thing) for thing in things[:-1])
            subject = f"{subject} and {things[-1]}" if subject else str(things[0])
        return f"{subject} on a {self.background} background"


_THING = rf"(?:(?:{'|'.join(SIZES)}) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:(?P<count>{'|'.join(COUNTS.values())}) (?P<many>{_THING})e?s"
    rf"|an? (?P<a>{_THING})(?:(?:, an? (?P<b>{_THING}))? and an? (?P<c>{_THING})| (?P<rel>{'|'.join(RELATIONS)}) an? (?P<d>{_THING}))?)"
    rf" on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


def _thing(words: str) -> Thing:
    *size, colour, shape = words.split()
    return Thing(colour=colour, shape=shape, size=size[0] if size else None)


def parse_caption(text: str) -> Scene:
    """Return the scene of a caption; ValueError names the text and the grammar when it is not one of this world."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"not a caption of the shapes world: {text!r}; an example is 'a red circle above a small blue square on a white"
            f" background' with colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}, sizes {', '.join(SIZES)},"
            f" relations {', '.join(RELATIONS)}, backgrounds {', '.join(BACKGROUNDS)}"
        )
    group = match.groupdict()
    if group["count"]:
        number = next(n for n, word in COUNTS.items() if word == group["count"])
        things = (_thing(group["many"]),) * number
    else:
        things = tuple(_thing(group[key]) for key in ("a", "b", "c", "d") if group[key])
    return Scene(things=things, relation=group["rel"], background=group["background"])


def in_world(captions: Sequence[str]) -> bool:
    """Return True when the judge can read every caption."""
    return all(_CAPTION.fullmatch(caption.strip()) for caption in captions)


def check_judgeable(captions: Sequence[str], size: tuple[int, int], what: str) -> None:
    """Raise ValueError unless the judge can score images of this size, (width, height), for all of these captions.

    `what` names the images, as in "the images of prompts.txt".
    """
    foreign = [caption for caption in captions if not in_world([caption])]
    if not foreign and size == (SIZE, SIZE):
        return
    reason = f"{size[0]} x {size[1]} pixels" if not foreign else f"the caption {foreign[0][:80]!r}"
    raise ValueError(
        f"the scorer shapes judges {SIZE} x {SIZE} images of captions of the shapes world only, and {what} have {reason};"
        " leave it out of --rewards"
    )


# ---------------------------------------------------------------- ideal shapes


def coverage(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Return the anti-aliased coverage in [0, 1] of an ideal shape of area pi radius^2 at offsets x, y from its centroid.

    x and y are pixels, y pointing down; they broadcast against each other.
    """
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * 0.8862269  # sqrt(pi) / 2
    elif shape == "triangle":  # equilateral, one tip up; inradius such that 3 sqrt(3) rho^2 = pi radius^2
        inradius = radius * 0.7775653
        distance = np.maximum(np.abs(x) * 0.8660254 - y * 0.5, y) - inradius
    elif shape == "cross":  # arms of width 2L/3, area 20/9 L^2
        half = radius * 1.1889706
        ax, ay = np.abs(x), np.abs(y)
        distance = np.minimum(np.maximum(ax - half, ay - half / 3), np.maximum(ax - half / 3, ay - half))
    else:
        raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def wobbled(
    x: Floats, y: Floats, radius: float, strength: float, phases: NDArray[np.float64]
) -> tuple[Floats, Floats]:
    """Return the offsets at which a shape of wobbly outline has the coverage that `coverage` gives it at x, y."""
    swing, wave = WOBBLE * radius * strength, 2 * np.pi / (1.6 * radius)
    return x + swing * np.sin(wave * y + phases[0]), y + swing * np.sin(wave * x + phases[1])


def extent(shape: str, radius: float) -> float:
    """Return how far a shape of this radius reaches from its centroid, in pixels, along x or y."""
    return radius * {"circle": 1.0, "square": 0.8862269, "triangle": 1.5551306, "cross": 1.1889706}[shape]
