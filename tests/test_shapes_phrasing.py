"""Captions in free English say what the strict caption says, and their words of quality are true.

A small reader, written apart from the tables of the module, reads the scene back from every caption.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from data_build import shapes
from rewards.clip_tokenizer import MERGES, ClipTokenizer
from rewards.shapes import Scene, Thing, parse_caption
from rewards.shapes_phrasing import free_caption
from rewards.shapes_rendering import change_one_word, random_defects, random_scene

STRICT = {
    "disc": "circle", "disk": "circle", "dot": "circle", "box": "square", "boxe": "square", "plus sign": "cross",
    "crimson": "red", "golden": "yellow", "violet": "purple", "little": "small", "tiny": "small", "big": "large",
    "huge": "large", "gray": "grey", "backdrop": "background", "pair of": "two", "a two": "two", "2": "two", "3": "three",
}  # fmt: skip
THING = re.compile(
    r"(?:\b(?P<number>two|three|one|an?|the) )?(?:(?:blurry|noisy|wobbly) )?(?:(?P<size>small|large) )?"
    r"\b(?P<colour>red|orange|yellow|green|blue|purple) (?P<shape>circle|square|triangle|cross)(?:e?s)?\b"
)
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
BETWEEN = {
    "above": "above", "over": "above", "higher than": "above", "below": "below", "under": "below", "beneath": "below",
    "left of": "left of", "to the left of": "left of", "on the left of": "left of",
    "right of": "right of", "to the right of": "right of", "on the right of": "right of",
}  # fmt: skip
OF_IT = {
    "above it": "above", "over it": "above", "below it": "below", "under it": "below", "beneath it": "below",
    "to the left of it": "left of", "on its left": "left of", "to the right of it": "right of", "on its right": "right of",
}  # fmt: skip
PLACES = {
    "at the top": "above", "at the bottom": "below", "on the left": "left of", "on the right": "right of",
}  # fmt: skip
BAD_WORDS, GOOD_WORDS = re.compile(r"weird|strange|bad"), re.compile(r"clean|beautiful|good|best")
NAMES = {"blur": "blurry", "noise": "noisy", "specks": "specks", "wobble": "wobbly", "off_palette": "tint"}


def read(text: str) -> tuple[Counter[Thing], str | None, str | None]:
    """The things, how the first that is named lies to the second, and the background, of a free caption."""
    text = text.lower().rstrip(".")
    for word, strict in STRICT.items():
        text = re.sub(rf"\b{word}(?=e?s?\b)", strict, text)
    found = list(THING.finditer(text))
    things: Counter[Thing] = Counter()
    for match in found:
        number = {"two": 2, "three": 3}.get(match["number"], 1)
        things[Thing(colour=match["colour"], shape=match["shape"], size=match["size"])] += number
    grounds = re.findall(r"\b(white|black|grey)\b", text)
    assert len(grounds) <= 1, text
    return things, relation(text, found), grounds[0] if grounds else None


def relation(text: str, found: list[re.Match[str]]) -> str | None:
    """How the first thing of a caption lies to the second."""
    if len(found) != 2:
        return None
    between = text[found[0].end() : found[1].start()].strip()
    after = text[found[1].end() :].strip()
    if between in BETWEEN:
        return BETWEEN[between]
    if between == "with":
        return OPPOSITE[next(r for words, r in OF_IT.items() if re.match(rf"{words}\b", after))]
    for words, place in PLACES.items():
        if between in (f"{words} and", f"{words},"):
            other = next(p for w, p in PLACES.items() if after.startswith(w))
            assert other == OPPOSITE[place], text
            return place
    assert between in ("and", ",", "next to", "together with"), text
    return None


def first_thing(text: str) -> tuple[str, str]:
    things = read(text)[0]
    return next((thing.colour, thing.shape) for thing in things)


Case = tuple[Scene, dict[str, float], bool, str]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """(what the caption says, defects, whether it is wrong, caption): 3,000 of them."""
    made = []
    for k in range(3000):
        rng = default_rng((4, k))
        scene, defects, wrong = random_scene(rng), random_defects(rng, 0.4), rng.random() < 0.2
        said = change_one_word(scene, rng) if wrong else scene
        made.append((said, defects, wrong, free_caption(said, defects, wrong, rng)))
    return made


def test_a_caption_says_its_scene(cases: list[Case]) -> None:
    silent = 0
    for scene, _, _, text in cases:
        things, found, background = read(text)
        assert things == Counter(scene.things), (text, scene.caption())
        first, *rest = scene.things
        expected = scene.relation if rest and rest[0] != first else None
        if expected and first_thing(text) != (first.colour, first.shape):
            expected = OPPOSITE[expected]
        if (first.colour, first.shape) not in {(thing.colour, thing.shape) for thing in rest}:
            assert found == expected, (text, scene.caption())
        assert background in (scene.background, None), text
        silent += background is None
        assert "dot" not in text or any(thing.size == "small" for thing in scene.things)
    free = sum(text not in said_strictly(scene) for scene, _, _, text in cases)
    assert silent == pytest.approx(0.1 * free, abs=4 * (0.09 * free) ** 0.5)


def said_strictly(scene: Scene) -> list[str]:
    leads = "Weird image. ", "a weird image of ", "clean image. ", "a clean image of "
    return [lead + scene.caption() for lead in leads]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle above a blue square on white", "above"),
        ("A crimson disc with the blue box to the left of it.", "right of"),
        ("golden plus sign on the right and green triangle on the left, black background", "right of"),
        ("weird, a red dot at the bottom, a red box at the top", "below"),
        ("red circle next to blue square over a gray backdrop", None),
    ],
)
def test_the_reader(text: str, expected: str | None) -> None:
    assert read(text)[1] == expected


def test_all_patterns_of_a_relation_are_used_and_right() -> None:
    scene = parse_caption("a red circle left of a blue square on a white background")
    orders = Counter()
    for k in range(600):
        text = free_caption(scene, {}, False, default_rng(k))
        red_first = first_thing(text) == ("red", "circle")
        assert read(text)[1] == ("left of" if red_first else "right of"), text
        patterns = {"it": r"with .*(of it|on its)", "place": r"on the (left|right)( and|,) "}
        orders[red_first, next((name for name, p in patterns.items() if re.search(p, text)), "between")] += 1
    assert len(orders) == 6
    assert min(orders.values()) > 30


def test_words_of_quality_are_true(cases: list[Case]) -> None:
    shares: dict[str, list[bool]] = {"weird": [], "clean": [], "named": [], "strict": []}
    for scene, defects, wrong, text in cases:
        weird, clean = bool(BAD_WORDS.search(text.lower())), bool(GOOD_WORDS.search(text.lower()))
        may_be_weird, may_be_clean = wrong or sum(defects.values()) >= 0.5, not wrong and not defects
        assert may_be_weird or not weird, text
        assert may_be_clean or not clean, text
        named = {name for name, word in NAMES.items() if re.search(rf"\b{word}\b", text.lower())}
        assert named <= {name for name, strength in defects.items() if strength >= 0.3}, text
        if may_be_weird:
            shares["weird"].append(weird)
        if may_be_clean:
            shares["clean"].append(clean)
        if defects:
            shares["named"].append(bool(named))
        if weird:
            shares["strict"].append(text in said_strictly(scene)[:2])
    means = {name: float(np.mean(values)) for name, values in shares.items()}
    assert means["weird"] == pytest.approx(0.6, abs=0.07)
    assert means["clean"] == pytest.approx(0.4, abs=0.05)
    assert 0.15 < means["named"] < 0.4
    assert means["strict"] >= 0.3
    assert min(Counter(text.partition(". ")[0] == "Weird image" for *_, text in cases).values()) > 50


@pytest.mark.parametrize("form", ["Weird image. {}", "a weird image of {}"])
def test_the_exact_prefixes_are_frequent(form: str) -> None:
    scene = parse_caption("a red circle on a white background")
    texts = [free_caption(scene, {"blur": 0.9}, False, default_rng(k)) for k in range(1000)]
    weird = sum(bool(BAD_WORDS.search(text.lower())) for text in texts)
    assert texts.count(form.format(scene.caption())) > 0.15 * weird


def test_captions_are_short_and_tidy(cases: list[Case]) -> None:
    tokens = ClipTokenizer("openai", MERGES, 77)
    longest = parse_caption("a small purple cross left of a large orange cross on a white background")
    texts = [text for *_, text in cases]
    texts += [
        free_caption(longest, {"specks": 1, "off_palette": 1}, True, default_rng(k)) for k in range(1000)
    ]
    for text in texts:
        assert len(text.split()) <= 34, text
        assert len(tokens.encode(text)) <= 48, text
        assert text == " ".join(text.split()), "single spaces"
        assert not re.search(r" [,.]|[,.]{2}|\ba [aeiou]|\ban [^aeiou]|[{}]", text), text


def test_a_caption_is_a_function_of_its_seed() -> None:
    scene = parse_caption("a red circle, a blue cross and a green square on a black background")
    first, second = (
        [free_caption(scene, {"noise": 0.6}, False, default_rng(k)) for k in range(50)] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 30


# ---------------------------------------------------------------- preftune shapes --free-share


@pytest.mark.parametrize(
    ("name_defects", "digest"),
    [
        (False, "a3fdb99319e742879cda79f8d62f4232b412538f6acec46b36faab3218662e63"),
        (True, "e5477b8ba0815efbcfef9b9c2d582e1cfedebd78889867fca352ce17313eccdf"),
    ],
)
def test_without_the_flag_rows_are_as_before_it_existed(
    name_defects: bool, digest: str, tmp_path: Path
) -> None:
    config = shapes.Config(output_dir=tmp_path, seed=5, name_defects=name_defects)
    rows = [shapes.render_image(i, config)[1] for i in range(200)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digest


def test_the_share_is_as_asked_and_all_else_is_unchanged(tmp_path: Path) -> None:
    strict = shapes.Config(output_dir=tmp_path, seed=2)
    some, every = replace(strict, free_share=0.3), replace(strict, free_share=1.0)
    changed = 0
    for i in range(600):
        image, row = shapes.render_image(i, strict)
        for config in (some, every):
            other, new = shapes.render_image(i, config)
            assert (other == image).all()
            assert {name: new[name] for name in ("rendered", "defects")} == {
                name: row[name] for name in ("rendered", "defects")
            }
            if config is every or new["text"] != row["text"]:
                things, _, _ = read(str(new["text"]))
                assert things == Counter(parse_caption(str(row["text"])).things)
                wrong = row["text"] != row["rendered"]
                assert wrong or row["defects"] or not BAD_WORDS.search(str(new["text"]).lower())
                assert not (wrong and GOOD_WORDS.search(str(new["text"]).lower()))
            changed += config is some and new["text"] != row["text"]
    assert changed == pytest.approx(0.3 * 600, abs=4 * (0.21 * 600) ** 0.5)


def test_near_misses_of_free_captions_are_worded_alike_and_wrong(tmp_path: Path) -> None:
    config = shapes.Config(output_dir=tmp_path, seed=3, wrong_share=0, free_share=1.0)
    about_quality = 0
    own, others = Counter[str](), Counter[str]()
    for i in range(1500):
        row = shapes.render_image(i, config)[1]
        own.update(str(row["text"]).lower().split())
        for miss in row["near_misses"]:
            others.update(miss.lower().split())
            things, _, _ = read(miss)
            if things != Counter(parse_caption(str(row["rendered"])).things):
                continue
            said = miss.lower()
            if (
                BAD_WORDS.search(said)
                or GOOD_WORDS.search(said)
                or any(name in said for name in NAMES.values())
            ):
                about_quality += 1
    assert 500 < about_quality < 1100  # of 3,000
    for word in ("a", "the", "disc", "background", "picture", "against", "golden"):
        assert others[word] == pytest.approx(2 * own[word], rel=0.35, abs=30), word


def test_free_captions_beside_named_defects(tmp_path: Path) -> None:
    config = shapes.Config(output_dir=tmp_path, seed=2, weird_share=1, free_share=0.5, name_defects=True)
    plain = replace(config, free_share=0)
    rows = [(shapes.render_image(i, config)[1], shapes.render_image(i, plain)[1]) for i in range(300)]
    strict = [row for row, old in rows if row == old]
    assert len(strict) == pytest.approx(150, abs=35)
    assert all(", with " in row["text"] for row in strict)


def test_a_free_share_outside_its_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--free-share must lie in \[0, 1\], got -0.1"):
        shapes.Config(output_dir=tmp_path, free_share=-0.1)
