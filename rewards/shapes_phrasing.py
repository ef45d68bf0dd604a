"""Free English for the shapes world: a scene in other words than its one strict caption, and words for quality.

`free_caption` says the same as `Scene.caption()` with synonyms, other articles, orders and sentence
patterns ("Golden disc with a tiny box below it, against grey."). What it adds has a meaning:

- *weird*, *strange* and *bad* are said only of a picture that is badly drawn (strengths of its defects sum to
  STRONG or more) or that shows something else than the caption;
- *clean*, *good*, *beautiful* and *best quality* are said only of a right picture without defects;
- *blurry*, *noisy*, *wobbly*, *with specks* and *with a tint* name a defect that the picture has.

A share of the captions with such a word of quality is the word before the strict caption: "Weird image. a red
circle on a white background", "a weird image of a red circle on a white background". All captions have at
most MOST_WORDS words.
"""

from collections.abc import Mapping, Sequence

from numpy.random import Generator

from rewards.shapes import OPPOSITE, Scene, Thing
from rewards.shapes_rendering import pick

STRONG = 0.5
"""Sum of the strengths of a picture's defects from which on it may be called weird."""
VISIBLE = 0.3
"""Strength from which on a defect may be named."""
MOST_WORDS = 34

# The first word of each row is the strict one; it is taken half of the time. Other words have no synonym.
SYNONYMS = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square", "box"),
    "cross": ("cross", "plus sign"),
    "red": ("red", "crimson"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "grey": ("grey", "gray"),
}
SMALL_SYNONYMS = {"circle": ("circle", "dot", "disc", "disk")}
NUMBERS = {2: ("two", "a pair of", "2"), 3: ("three", "3")}
ARTICLES: Sequence[str] = ("a", "", "the", "one")  # one style a caption
ARTICLES_OF_THERE: Sequence[str] = ("a", "one")  # after "there is"

BETWEEN = {  # A ... B
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
}
OF_IT = {  # B with A ...
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it"),
    "left of": ("to the left of it", "on its left"),
    "right of": ("to the right of it", "on its right"),
}
PLACES = {
    "above": "at the top",
    "below": "at the bottom",
    "left of": "on the left",
    "right of": "on the right",
}
PAIRS = ("{} and {}", "{}, {}", "{} next to {}", "{} together with {}")
THREES = ("{}, {} and {}", "{}, {}, {}", "{} and {} and {}", "{} together with {} and {}")

GROUNDS = (
    " on a {} background",
    " on {}",
    " in front of a {} background",
    " against {}",
    ", {} background",
    " over a {} backdrop",
)
SILENT_GROUND = 0.1  # share of captions that do not name the background

PREFIXES = ("a picture of ", "an image of ", "a drawing of ", "there {} ", "an illustration of ", "photo of ")
# The first two are those before a strict caption.
WEIRD = (
    "Weird image. ",
    "a weird image of ",
    "a weird picture of ",
    "a strange image of ",
    "weird, ",
    "a bad drawing of ",
)
CLEAN = (
    "clean image. ",
    "a clean image of ",
    "a clean drawing of ",
    "a beautiful picture of ",
    "a good drawing of ",
    "best quality, ",
)
DEFECT_NAMES = {
    "specks": "with specks",
    "noise": "noisy",
    "blur": "blurry",
    "off_palette": "with a tint",
    "wobble": "wobbly",
}
NOUNS = ("picture", "image", "drawing")
SAYS_WEIRD, SAYS_CLEAN, SAYS_DEFECTS, HAS_PREFIX, STRICT = 0.6, 0.4, 0.4, 0.5, 0.4  # shares
CAPITAL, PERIOD = 0.3, 0.25  # shares


def free_caption(scene: Scene, defects: Mapping[str, float], wrong: bool, rng: Generator) -> str:
    """Return a caption in free English.

    scene is what the caption says, defects are those of the picture ({name: strength in [0, 1]}), and wrong
    is True when the picture shows another scene.
    """
    lead = _quality(defects, wrong, rng)
    if lead and rng.random() < STRICT:
        first_two = (WEIRD if lead in WEIRD else CLEAN)[:2]
        return pick(rng, first_two) + scene.caption()
    adjective, articles = "", ARTICLES
    names = _defect_names(defects, rng)
    if names and not lead and not names[0].startswith("with") and rng.random() < 0.6:
        first, *names = names
        if len(set(scene.things)) == 1 and rng.random() < 0.5:
            adjective = first
        else:
            lead = f"a {first} {pick(rng, NOUNS)} of "
    tail = "".join(f", {name}" for name in names)
    if not lead and rng.random() < HAS_PREFIX:
        lead = pick(rng, PREFIXES)
        if "{}" in lead:
            counted = len(scene.things) > 1 and len(set(scene.things)) == 1
            lead, articles = lead.format("are" if counted else "is"), ARTICLES_OF_THERE
    text = lead + _subject(scene, adjective, _often_first(rng, articles), rng) + _ground(scene, rng) + tail
    if rng.random() < CAPITAL:
        text = text[0].upper() + text[1:]
    return text + "." * (rng.random() < PERIOD)


def tells_quality(text: str) -> bool:
    """Return whether a caption has words of quality or names a defect."""
    lower = text.lower()
    return any(words.lower() in lower for words in (*WEIRD, *CLEAN, *DEFECT_NAMES.values()))


def _quality(defects: Mapping[str, float], wrong: bool, rng: Generator) -> str:
    """Return the words of quality that a caption begins with, or ""."""
    if (wrong or sum(defects.values()) >= STRONG) and rng.random() < SAYS_WEIRD:
        return pick(rng, WEIRD)
    if not wrong and not defects and rng.random() < SAYS_CLEAN:
        return pick(rng, CLEAN)
    return ""


def _defect_names(defects: Mapping[str, float], rng: Generator) -> list[str]:
    """Return the names of the visible defects in random order, or none of them."""
    names = [DEFECT_NAMES[name] for name in sorted(defects) if defects[name] >= VISIBLE]
    return [str(name) for name in rng.permutation(names)] if names and rng.random() < SAYS_DEFECTS else []


def _subject(scene: Scene, adjective: str, article: str, rng: Generator) -> str:
    """Return the part of a caption that names the things: "two golden discs", "red circle with a box below it"."""
    things = scene.things
    if len(things) > 1 and len(set(things)) == 1:
        words = f"{adjective} {_words(things[0], rng)}".strip()
        return f"{pick(rng, NUMBERS[len(things)])} {words}{'es' if words[-1] in 'sx' else 's'}"
    named = [_with_article(article, f"{adjective} {_words(thing, rng)}".strip()) for thing in things]
    if scene.relation:
        return _related(named[0], scene.relation, named[1], rng)
    named = [named[int(k)] for k in rng.permutation(len(named))]
    return pick(rng, {1: ("{}",), 2: PAIRS, 3: THREES}[len(named)]).format(*named)


def _related(first: str, relation: str, second: str, rng: Generator) -> str:
    """Return a sentence in which `first` lies in this relation to `second`; half of the time it begins with the second."""
    if rng.random() < 0.5:
        first, relation, second = second, OPPOSITE[relation], first
    way = rng.random()
    if way < 0.5:
        return f"{first} {pick(rng, BETWEEN[relation])} {second}"
    if way < 0.75:
        return f"{first} with {second} {pick(rng, OF_IT[OPPOSITE[relation]])}"
    return f"{first} {PLACES[relation]}{pick(rng, (' and', ','))} {second} {PLACES[OPPOSITE[relation]]}"


def _ground(scene: Scene, rng: Generator) -> str:
    if rng.random() < SILENT_GROUND:
        return ""
    return pick(rng, GROUNDS).format(_often_first(rng, SYNONYMS.get(scene.background, (scene.background,))))


def _words(thing: Thing, rng: Generator) -> str:
    rows = SYNONYMS | SMALL_SYNONYMS if thing.size == "small" else SYNONYMS
    words = (thing.size, thing.colour, thing.shape)
    return " ".join(_often_first(rng, rows.get(word, (word,))) for word in words if word)


def _with_article(article: str, words: str) -> str:
    return f"{'an' if article == 'a' and words[0] in 'aeiou' else article} {words}".lstrip()


def _often_first(rng: Generator, options: Sequence[str]) -> str:
    """Return the first option half of the time, else any other."""
    return options[0] if len(options) == 1 or rng.random() < 0.5 else pick(rng, options[1:])
