"""The judge of the shapes world can be trusted: it is right on clean rendering, and each error costs what its docstring says.

That no edit for the worse can gain is tested in `test_shapes_edits.py`.
"""

from dataclasses import dataclass, replace
from math import exp

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor

import rewards
from rewards.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, coverage, wobbled
from rewards.shapes_judge import judge
from rewards.shapes_outlines import shape_probabilities
from rewards.shapes_rendering import Placed, place, random_scene, render
from shape_edits import as_pixels

NUM = 200


@dataclass(frozen=True, kw_only=True)
class World:
    scenes: list[Scene]
    placed: list[list[Placed]]
    alignment: Tensor
    fidelity: Tensor

    def judged(self, placed: list[list[Placed]], indices: list[int], defects: dict[str, float]) -> Tensor:
        """How much (alignment, fidelity) fall, on average, when these things are rendered instead."""
        images = [
            render(things, self.scenes[i].background, default_rng((8, i)), defects)
            for i, things in zip(indices, placed, strict=True)
        ]
        judged = judge(as_pixels(images), [self.scenes[i].caption() for i in indices])
        falls = self.alignment[indices] - judged.alignment, self.fidelity[indices] - judged.fidelity
        return torch.stack(falls).mean(1)


@pytest.fixture(scope="module")
def world() -> World:
    rngs = [default_rng((7, i)) for i in range(NUM)]
    scenes = [random_scene(rng) for rng in rngs]
    placed = [place(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    images = [
        render(things, scene.background, rng, {})
        for things, scene, rng in zip(placed, scenes, rngs, strict=True)
    ]
    clean = judge(as_pixels(images), [scene.caption() for scene in scenes])
    return World(scenes=scenes, placed=placed, alignment=clean.alignment, fidelity=clean.fidelity)


def test_clean_drawings_score_high(world: World) -> None:
    """Means above 0.97, and not one clean rendering is misread."""
    for scores in (world.alignment, world.fidelity):
        assert scores.mean() >= 0.97
        assert scores.min() >= 0.9, world.scenes[int(scores.argmin())].caption()
        assert scores.max() <= 1


@pytest.mark.parametrize(
    ("defect", "least"),
    [("specks", 0.1), ("noise", 0.3), ("blur", 0.12), ("off_palette", 0.08), ("wobble", 0.28)],
)
def test_defects_of_drawing_lower_fidelity(world: World, defect: str, least: float) -> None:
    """`least` is the fall of the mean at strength 0.5; alignment falls by less than a third of it, or hardly."""
    indices = list(range(80))
    placed = [world.placed[i] for i in indices]
    strengths = (0.25, 0.5, 0.75, 1.0)
    falls = [world.judged(placed, indices, {defect: strength}) for strength in strengths]
    fidelity = [float(fall[1]) for fall in falls]
    assert 0 < fidelity[0] < fidelity[1] < fidelity[2] < fidelity[3]
    assert fidelity[1] >= least
    assert abs(float(falls[1][0])) < max(fidelity[1] / 3, 0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.35, 0.7, 1.0])
def test_a_wobbly_shape_is_still_that_shape(shape: str, strength: float) -> None:
    """Phases and a radius that the bank of outlines does not have; its centre and area are measured."""
    axis = np.arange(40, dtype=np.float32)
    for i in range(10):
        rng = default_rng((11, i))
        radius, phases = float(rng.uniform(5.5, 11)), rng.uniform(0, 2 * np.pi, 2)
        x, y = np.meshgrid(axis - np.float32(19.6), axis - np.float32(20.3))
        outline = coverage(shape, *wobbled(x, y, radius, strength, phases), radius)
        area = outline.sum()
        centre = float(outline.sum(0) @ axis / area), float(outline.sum(1) @ axis / area)
        found = shape_probabilities(outline, *centre, float(np.sqrt(area / np.pi)))
        assert found.sum() == pytest.approx(1, abs=1e-5)
        assert found[SHAPES.index(shape)] > 0.7, (i, radius)


def test_things_that_touch_are_two() -> None:
    """Of two colours, or of one colour with a thin bridge; a speck inside a thing does not split it."""
    pixels = torch.ones(3, 3, SIZE, SIZE)
    for image, second in zip(pixels, ("blue", "red", "red"), strict=True):
        block(image, 10, 24, "red")
        block(image, 26 if second == "blue" else 30, 24, second)
    block(pixels[1], 26, 31, "red", 4)
    block(pixels[2], 15, 29, "yellow", 4)
    red = "two red squares on a white background"
    judged = judge(pixels, ["a red square and a blue square on a white background", red, red])
    assert judged.alignment.min() > 0.9


def spoil(kind: str, things: list[Placed], rng: np.random.Generator) -> list[Placed] | None:
    """The things of a scene, rendered otherwise than the caption says; None when this kind has nothing to spoil."""
    first, *others = things
    if kind == "colour":
        wrong = str(rng.choice([name for name in COLOURS if name != first.thing.colour]))
        return [replace(first, thing=replace(first.thing, colour=wrong)), *others]
    if kind == "shape":
        wrong = str(rng.choice([name for name in SHAPES if name != first.thing.shape]))
        return [replace(first, thing=replace(first.thing, shape=wrong)), *others]
    if kind == "missing":
        return others or None
    if kind == "swapped":
        second = others[0]
        return [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)]
    assert kind == "size"
    if first.thing.size is None:
        return None
    return [replace(first, radius={"small": 10.0, "large": 6.0}[first.thing.size]), *others]


@pytest.mark.parametrize(
    ("kind", "errors"),
    [("colour", 1.2), ("shape", 1.2), ("missing", 1.6), ("swapped", 1.0), ("size", 0.5)],
)
def test_wrong_contents_lower_alignment(world: World, kind: str, errors: float) -> None:
    """The first thing is rendered otherwise than the caption says."""
    indices, placed = [], []
    for i, scene in enumerate(world.scenes):
        if kind == "swapped" and scene.relation is None:
            continue
        things = spoil(kind, world.placed[i], default_rng((9, i)))
        if things is not None:
            indices.append(i)
            placed.append(things)
    assert len(indices) >= 20
    alignment, fidelity = world.judged(placed, indices, {}).tolist()
    extra = 1.0 if kind == "missing" else 0.0  # the relation of a thing that is missing does not hold, either
    assert 1 - exp(-errors) - 0.03 <= alignment <= 1 - exp(-errors - extra) + 0.01
    assert abs(fidelity) < 0.05


def test_a_wrong_background_lowers_alignment(world: World) -> None:
    indices = list(range(60))
    images = []
    for i in indices:
        rng = default_rng((9, i))
        wrong = str(rng.choice([name for name in BACKGROUNDS if name != world.scenes[i].background]))
        images.append(render(world.placed[i], wrong, rng, {}))
    judged = judge(as_pixels(images), [world.scenes[i].caption() for i in indices])
    torch.testing.assert_close(judged.alignment, exp(-1) * world.alignment[indices], rtol=0.03, atol=0)
    assert (world.fidelity[indices] - judged.fidelity).abs().mean() < 0.05


def block(pixels: Tensor, x: int, y: int, colour: str, side: int = 16) -> None:
    """Paint a square of whole pixels with its first pixel at (x, y): an ideal square, exactly."""
    rgb = torch.tensor(COLOURS[colour]) / 255
    pixels[:, y : y + side, x : x + side] = rgb[:, None, None]


ONE = {  # a red square of 16 x 16 pixels on white: radius 8.96 without its corners, explained by its ideal without remainder
    "a red square on a white background": 0.0,
    "a large red square on a white background": 0.0,
    "a red square on a black background": 1.0,
    "a blue square on a white background": 1.2,
    "a red circle on a white background": 1.2,
    "a small red square on a white background": 0.5,
    "a green cross on a white background": 2.4,
    "a small green cross on a grey background": 1.6 + 1 + 1,  # less than 0.5 + 2 x 1.2 + 1
    "two red squares on a white background": 1.6,
    "three red squares on a grey background": 1.6 + 1.6 + 1,
    "a red square above a blue circle on a white background": 1.6 + 1,  # the relation has nothing to hold
    "a red square, a blue circle and a green cross on a white background": 3.2,
}


@pytest.mark.parametrize(("caption", "errors"), ONE.items())
def test_one_square_by_hand(caption: str, errors: float) -> None:
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red")
    judged = judge(pixels, [caption])
    assert judged.alignment.item() == pytest.approx(exp(-errors), rel=0.02)
    assert judged.fidelity.item() == pytest.approx(1.0, abs=1e-3)
    assert judged.gold.item() == pytest.approx(judged.alignment.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("caption", "lift", "errors"),
    [
        ("a red square left of a blue square on a black background", 0, 0.0),
        ("a red square right of a blue square on a black background", 0, 1.0),
        ("a red square above a blue square on a black background", 0, 1.0),
        (
            "a red square above a blue square on a black background",
            3,
            0.5,
        ),  # half of the 6 pixels that are plain
        ("a red square above a blue square on a black background", 6, 0.0),
        ("a blue square and a red square on a black background", 0, 0.0),
        ("a red square and a green square on a black background", 0, 1.2),
        ("a green square and a yellow circle on a black background", 0, 3.6),
        ("a red square on a black background", 0, 1.0),  # one that nobody asked for
        ("a red square on a white background", 0, 2.0),
        ("a green circle on a black background", 0, 3.4),
        ("a red square, a blue square and a blue circle on a black background", 0, 1.6),
        ("two red squares on a black background", 0, 1.2),
    ],
)
def test_two_squares_by_hand(caption: str, lift: int, errors: float) -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    block(pixels[0], 8, 24 - lift, "red")
    block(pixels[0], 40, 24, "blue")
    assert judge(pixels, [caption]).alignment.item() == pytest.approx(exp(-errors), rel=0.02)


def test_nothing_stands_in_for_a_lost_thing() -> None:
    """A red and a blue square where red is asked for: the red one's loss costs, though the blue one is no longer unwanted."""
    both = torch.zeros(1, 3, SIZE, SIZE)
    block(both[0], 40, 24, "blue")
    lost = both.clone()
    block(both[0], 8, 24, "red")
    before, after = judge(torch.cat([both, lost]), ["a red square on a black background"] * 2).gold.tolist()
    assert after == pytest.approx(exp(-0.2) * before, rel=0.02)


@pytest.mark.parametrize(("side", "large"), [(12, 0.0), (14, 0.409), (16, 0.978)])
def test_size_is_a_ramp(side: int, large: float) -> None:
    """Between radii 7 and 9 an object is in part small and in part large; the median filter takes the four corner pixels."""
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red", side)
    for word, right in (("large", large), ("small", 1 - large)):
        judged = judge(pixels, [f"a {word} red square on a white background"])
        assert judged.alignment.item() == pytest.approx(exp(-0.5 * (1 - right)), rel=0.01)


def test_gold_is_a_product() -> None:
    """A spoilt drawing of the right thing is worth more than a perfect one of another thing, and no less than the floor."""
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red")
    pixels = (pixels + 0.15 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )
    judged = judge(pixels, ["a red square on a white background"])
    assert judged.fidelity.item() < 0.6
    product = judged.alignment.item() * (0.4 + 0.6 * judged.fidelity.item())
    assert judged.gold.item() == pytest.approx(product)
    assert judged.gold.item() > 0.4 * judged.alignment.item() > exp(-1)


def test_fidelity_by_hand() -> None:
    caption = ["a red square on a white background"]
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red")
    dotted = pixels.clone()
    for k in range(8):  # eight lone pixels astray over an object of 256
        dotted[0, :, 4, 4 + 6 * k] = torch.tensor(COLOURS["blue"]) / 255
    assert judge(dotted, caption).fidelity.item() == pytest.approx(0.5 + 0.5 * exp(-8 / 256 / 0.5), abs=1e-3)
    tinted = pixels.clone()
    tinted[0, 1, 24:40, 20:36] += 0.205  # midway between 0.06 and 0.35: a quarter of its quality is gone
    error = 0.205 / 3 * 256 / SIZE**2
    assert judge(tinted, caption).fidelity.item() == pytest.approx(
        0.5 * 0.75 + 0.5 * exp(-(error - 0.004) / 0.03), abs=1e-3
    )
    assert (
        judge(torch.ones_like(pixels), caption).fidelity.item() == 0
    )  # nothing rendered is not a clean rendering


def test_images_do_not_see_each_other(world: World) -> None:
    images = [
        render(world.placed[i], world.scenes[i].background, default_rng(i), {"blur": 0.5}) for i in range(8)
    ]
    pixels, captions = as_pixels(images), [scene.caption() for scene in world.scenes[:8]]
    together = judge(pixels, captions)
    reversed_ = judge(pixels.flip(0), captions[::-1])
    alone = [judge(pixels[i : i + 1], captions[i : i + 1]) for i in range(8)]
    for name in ("alignment", "fidelity"):
        scores = getattr(together, name)
        assert torch.equal(scores, getattr(reversed_, name).flip(0))
        assert torch.equal(scores, torch.cat([getattr(one, name) for one in alone]))


def test_images_of_nothing_are_finite_and_low() -> None:
    noise = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack(
        [torch.zeros_like(noise), torch.ones_like(noise), torch.full_like(noise, 0.5), noise]
    )
    judged = judge(pixels, ["a red circle above a blue square on a white background"] * 4)
    assert torch.isfinite(judged.gold).all()
    assert judged.fidelity.max() < 0.05
    assert (
        judged.alignment.max() <= exp(-1.6 - 1.6 - 1) + 1e-6
    )  # white has the background right, and that is all
    assert judged.gold.min() >= 0
    overshoot = judge(torch.stack([noise * 9 - 4, noise]), ["a red circle on a white background"] * 2)
    assert torch.isfinite(overshoot.gold).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_line_and_a_frame_are_no_shape(shape: str) -> None:
    pixels = torch.ones(2, 3, SIZE, SIZE)
    rgb = (torch.tensor(COLOURS["red"]) / 255)[:, None, None]
    pixels[0, :, 30:33, 5:60] = rgb
    block(pixels[1], 20, 20, "red", 24)
    pixels[1, :, 24:40, 24:40] = 1
    judged = judge(pixels, [f"a red {shape} on a white background"] * 2)
    torch.testing.assert_close(judged.alignment, torch.full((2,), exp(-1.2)), rtol=0.01, atol=0)


@pytest.mark.parametrize("colour", COLOURS)
def test_an_image_of_one_colour_shows_no_square(colour: str) -> None:
    """No background is seen, so the one that is asked for is wrong, and what fills the image is no object."""
    pixels = (torch.tensor(COLOURS[colour]) / 255)[:, None, None].expand(3, SIZE, SIZE)
    article = "an" if colour == "orange" else "a"
    captions = [f"{article} {colour} square on a {ground} background" for ground in BACKGROUNDS]
    judged = judge(pixels.expand(len(captions), -1, -1, -1), captions)
    torch.testing.assert_close(judged.alignment, torch.full_like(judged.alignment, exp(-1.6 - 1)))
    assert judged.fidelity.max() == 0


def test_what_the_judge_refuses() -> None:
    caption = ["a red circle on a white background"]
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\) pixels, got \(1, 3, 32, 32\)"):
        judge(torch.zeros(1, 3, 32, 32), caption)
    with pytest.raises(ValueError, match=r"got \(3, 64, 64\)"):
        judge(torch.zeros(3, SIZE, SIZE), caption)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        judge(torch.zeros(2, 3, SIZE, SIZE), caption)
    with pytest.raises(ValueError, match="'a cat'"):
        judge(torch.zeros(1, 3, SIZE, SIZE), ["a cat"])


def test_the_scorer_is_the_gold_score() -> None:
    rng = default_rng(5)
    scenes = [random_scene(rng) for _ in range(4)]
    pixels = as_pixels([render(place(s, rng), s.background, rng, {"noise": 0.3}) for s in scenes])
    captions = [scene.caption() for scene in scenes]
    scores = rewards.load("shapes")(pixels, captions)
    assert torch.equal(scores, judge(pixels, captions).gold)
    assert scores.dtype == torch.float32
