"""The judge of the shapes world can be trusted: it is right on clean rendering, and each planted defect costs what it should."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor

import rewards
from rewards.shapes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    coverage,
    extent,
    in_world,
    parse_caption,
)
from rewards.shapes_judge import judge
from rewards.shapes_rendering import (
    DEFECTS,
    Placed,
    change_one_word,
    place,
    random_defects,
    random_scene,
    render,
    to_bytes,
)

NUM = 200


def as_pixels(images: list[np.ndarray]) -> Tensor:
    """Drawings as the 8-bit files would hold them."""
    return torch.from_numpy(np.stack([to_bytes(image) for image in images])).permute(0, 3, 1, 2).float() / 255


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


# ---------------------------------------------------------------- captions


def test_every_caption_parses_back() -> None:
    rng = default_rng(0)
    scenes = [random_scene(rng) for _ in range(500)]
    for scene in scenes:
        assert parse_caption(scene.caption()) == scene
    assert in_world([scene.caption() for scene in scenes])
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)


def test_captions_by_hand() -> None:
    orange = Thing(colour="orange", shape="cross")
    small = Thing(colour="blue", shape="square", size="small")
    three = Thing(colour="red", shape="triangle")
    expected = {
        "an orange cross on a grey background": Scene(things=(orange,), relation=None, background="grey"),
        "an orange cross above a small blue square on a white background": Scene(
            things=(orange, small), relation="above", background="white"
        ),
        "two orange crosses on a black background": Scene(
            things=(orange, orange), relation=None, background="black"
        ),
        "an orange cross, a small blue square and a red triangle on a black background": Scene(
            things=(orange, small, three), relation=None, background="black"
        ),
    }
    for text, scene in expected.items():
        assert scene.caption() == text
        assert parse_caption(text) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red circle",
        "a pink circle on a white background",
        "four red circles on a white background",
        "a red circle beside a blue square on a white background",
        "a red circle on a white background, please",
    ],
)
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the shapes world") as error:
        parse_caption(text)
    assert repr(text) in str(error.value)
    assert not in_world(["a red circle on a white background", text])


def differences(a: Scene, b: Scene) -> int:
    """In how many things two scenes differ; a counted group is one thing."""
    number = (a.background != b.background) + (a.relation != b.relation)
    if len(a.things) == len(b.things):
        pairs = set(zip(a.things, b.things, strict=True))
        return number + sum(
            (x.colour != y.colour) + (x.shape != y.shape) + (x.size != y.size) for x, y in pairs
        )
    fewer, more = sorted(
        (Counter(replace(thing, size=None) for thing in scene.things) for scene in (a, b)),
        key=Counter.total,
    )
    return number + 1 + (not fewer <= more)


def test_one_word_is_changed() -> None:
    """A "wrong" caption that says the same as the right one would spoil every stated share."""
    rng = default_rng(1)
    for _ in range(1000):
        scene = random_scene(rng)
        other = change_one_word(scene, rng)
        assert differences(scene, other) == 1, f"{scene.caption()!r} became {other.caption()!r}"
        assert scene.caption() != other.caption()
        assert in_world([other.caption()])


# ---------------------------------------------------------------- rendering


@pytest.mark.parametrize("shape", SHAPES)
def test_ideal_shapes_have_the_area_of_their_circle(shape: str) -> None:
    axis = np.arange(SIZE, dtype=np.float32)
    rng = default_rng(2)
    for radius in (5.5, 7.0, 9.0, 11.0):
        areas = []
        for x, y in rng.uniform(30, 34, (8, 2)).astype(np.float32):
            ideal = coverage(shape, axis[None, :] - x, axis[:, None] - y, radius)
            areas.append(float(ideal.sum()))
            rows, columns = np.nonzero(ideal)
            furthest = max(np.abs(columns - x).max(), np.abs(rows - y).max())
            assert furthest < extent(shape, radius) + 1
        assert np.mean(areas) == pytest.approx(np.pi * radius**2, rel=0.02)


def test_shapes_are_centred_and_point_up() -> None:
    axis = np.arange(-20, 21, dtype=np.float32)
    for shape in SHAPES:
        ideal = coverage(shape, axis[None, :], axis[:, None], 9.0)
        assert float((ideal.sum(0) * axis).sum() / ideal.sum()) == pytest.approx(0, abs=1e-4)
        assert float((ideal.sum(1) * axis).sum() / ideal.sum()) == pytest.approx(0, abs=0.1)
    triangle = coverage("triangle", axis[None, :], axis[:, None], 9.0)
    widths = (triangle > 0.5).sum(1)[8:26]
    assert (np.diff(widths) >= 0).all()
    assert widths[0] < widths[-1]
    with pytest.raises(ValueError, match="'star'; one of circle, square, triangle, cross"):
        coverage("star", axis, axis, 9.0)


def test_things_are_placed_apart_inside_and_in_relation() -> None:
    axis = np.arange(SIZE, dtype=np.float32)
    for i in range(300):
        rng = default_rng((3, i))
        scene = random_scene(rng)
        placed = place(scene, rng)
        covered = np.zeros((SIZE, SIZE), np.float32)
        for item in placed:
            alpha = coverage(item.thing.shape, axis[None, :] - item.x, axis[:, None] - item.y, item.radius)
            assert not (covered * alpha).any(), f"{scene.caption()}: two things overlap"
            inner = np.pad(np.ones((SIZE - 2, SIZE - 2)), 1)
            assert not alpha[inner == 0].any(), f"{scene.caption()}: a thing touches the border"
            covered += alpha
        if scene.relation:
            dx, dy = RELATIONS[scene.relation]
            assert dx * (placed[0].x - placed[1].x) + dy * (placed[0].y - placed[1].y) >= 8


def test_defects_are_named_and_shared() -> None:
    with pytest.raises(ValueError, match="'smudge'; one of specks, noise, blur, off_palette, wobble"):
        render([], "white", default_rng(0), {"smudge": 1.0})
    rng = default_rng(4)
    rendered = [random_defects(rng, 0.5) for _ in range(600)]
    sizes = Counter(len(defects) for defects in rendered)
    assert sizes[0] == pytest.approx(300, abs=50)  # four deviations
    assert sizes[2] == pytest.approx(100, abs=37)
    assert {name for defects in rendered for name in defects} == set(DEFECTS)
    assert all(0.15 <= strength <= 1 for defects in rendered for strength in defects.values())


# ---------------------------------------------------------------- the judge


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
    ("kind", "least"),
    [("colour", 0.12), ("shape", 0.12), ("missing", 0.25), ("swapped", 0.15), ("size", 0.06)],
)
def test_wrong_contents_lower_alignment(world: World, kind: str, least: float) -> None:
    """The first thing is rendered otherwise than the caption says; `least` is the fall of the mean."""
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
    assert alignment >= least
    assert abs(fidelity) < max(alignment / 3, 0.05)


def test_a_wrong_background_lowers_alignment(world: World) -> None:
    indices = list(range(60))
    wrong = [
        replace(
            world.scenes[i],
            background=str(
                default_rng((9, i)).choice([n for n in BACKGROUNDS if n != world.scenes[i].background])
            ),
        )
        for i in indices
    ]
    images = [
        render(world.placed[i], scene.background, default_rng(i), {})
        for i, scene in zip(indices, wrong, strict=True)
    ]
    judged = judge(as_pixels(images), [world.scenes[i].caption() for i in indices])
    falls = world.alignment[indices] - judged.alignment
    assert falls.min() > 0.18  # 2 parts of 10, or of 8 where no relation is stated
    assert falls.max() < 0.27
    assert (world.fidelity[indices] - judged.fidelity).abs().mean() < 0.05


def block(pixels: Tensor, x: int, y: int, colour: str, side: int = 16) -> None:
    """Paint a square of whole pixels with its first pixel at (x, y): an ideal square, exactly."""
    rgb = torch.tensor(COLOURS[colour]) / 255
    pixels[:, y : y + side, x : x + side] = rgb[:, None, None]


@pytest.mark.parametrize(
    ("caption", "alignment"),
    [
        ("a red square on a white background", 1.0),
        ("a red square on a black background", 6 / 8),  # objects 5 and count 1; background 0 of 2
        ("a blue square on a white background", 5.5 / 8),  # half of the object: its shape
        ("a red circle on a white background", 5.5 / 8),
        ("a green cross on a grey background", 1 / 8),  # the count alone is right
        ("a large red square on a white background", 1.0),
        ("a small red square on a white background", 7 / 8),  # size is a fifth of the object
        ("two red squares on a white background", 5 / 8),  # one of two: 2.5, background 2, count 0.5
        (
            "a red square above a blue circle on a white background",
            5 / 10,
        ),  # the relation has nothing to hold
    ],
)
def test_one_square_by_hand(caption: str, alignment: float) -> None:
    """A red square of 16 x 16 pixels: radius 9.03, in reach of `large`, explained by its ideal without remainder."""
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red")
    judged = judge(pixels, [caption])
    assert judged.alignment.item() == pytest.approx(alignment, abs=4e-3)
    assert judged.fidelity.item() == pytest.approx(1.0, abs=1e-3)
    assert judged.gold.item() == pytest.approx((alignment + 1) / 2, abs=4e-3)


@pytest.mark.parametrize(
    ("caption", "lift", "alignment"),
    [
        ("a red square left of a blue square on a black background", 0, 1.0),
        ("a red square right of a blue square on a black background", 0, 8 / 10),
        ("a red square above a blue square on a black background", 0, 8 / 10),
        (
            "a red square above a blue square on a black background",
            3,
            9 / 10,
        ),  # half of the 6 pixels that are plain
        ("a red square above a blue square on a black background", 6, 1.0),
        ("a blue square and a red square on a black background", 0, 1.0),
        ("a red square and a green square on a black background", 0, 6.75 / 8),
        ("a red square on a black background", 0, 7 / 8),  # count 1 - |2 - 1| / 1
        ("a red square, a blue square and a blue circle on a black background", 0, (10 / 3 + 2 + 2 / 3) / 8),
    ],
)
def test_two_squares_by_hand(caption: str, lift: int, alignment: float) -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    block(pixels[0], 8, 24 - lift, "red")
    block(pixels[0], 40, 24, "blue")
    assert judge(pixels, [caption]).alignment.item() == pytest.approx(alignment, abs=4e-3)


def test_fidelity_by_hand() -> None:
    caption = ["a red square on a white background"]
    pixels = torch.ones(1, 3, SIZE, SIZE)
    block(pixels[0], 20, 24, "red")
    dotted = pixels.clone()
    for k in range(8):  # eight lone pixels astray over an object of 256
        dotted[0, :, 4, 4 + 6 * k] = torch.tensor(COLOURS["blue"]) / 255
    assert judge(dotted, caption).fidelity.item() == pytest.approx(
        0.5 + 0.5 * np.exp(-8 / 256 / 0.5), abs=1e-3
    )
    tinted = pixels.clone()
    tinted[0, 1, 24:40, 20:36] += 0.205  # midway between 0.06 and 0.35: a quarter of its quality is gone
    error = 0.205 / 3 * 256 / SIZE**2
    assert judge(tinted, caption).fidelity.item() == pytest.approx(
        0.5 * 0.75 + 0.5 * np.exp(-(error - 0.004) / 0.03), abs=1e-3
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
    assert judged.alignment.max() <= 0.2 + 1e-6  # white has the background right, and that is all
    assert judged.gold.min() >= 0
    overshoot = judge(torch.stack([noise * 9 - 4, noise]), ["a red circle on a white background"] * 2)
    assert torch.isfinite(overshoot.gold).all()


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
