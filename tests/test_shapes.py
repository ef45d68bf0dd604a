"""The shapes world: its captions parse back, and its renderings are as their scenes say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng

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
from rewards.shapes_rendering import (
    DEFECTS,
    change_one_word,
    place,
    random_defects,
    random_scene,
    render,
)

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
