"""Render captioned images of the shapes world: a seeded imagefolder with metadata.jsonl, imperfect on
purpose.

A share of the captions is wrong (one word of the scene was changed after rendering), and a share of the
renderings has defects (specks, noise, blur, colours off the palette, wobbly outlines), so that a model
trained on the folder can still be improved. `metadata.jsonl` rows: file_name, text, rendered (the caption
of what was actually rendered), defects ({name: strength}), near_misses (two captions that differ from
`rendered` in one word: hard negatives for image-text matching; the first in a shape or the relation, which
small models learn last). With `--name-defects` the captions name the
defects and their degree, as web captions say "blurry" ("a red circle on a white background, with strong
blur"), and half of the second near misses have wrong defects. A model that learns to match such captions also
learns to detect defects.

With `--free-share` a share of the captions is in free English (`rewards/shapes_phrasing.py`): synonyms, other
orders and sentences, and words of quality that are true. A picture with strong defects or a wrong caption
is often called weird, a right picture without defects clean. Near misses are then worded as the caption is, and some are
wrong about the quality alone; `rendered` stays strict. `--name-defects` is of the strict captions beside them.

    golden disc with a tiny blue box below it, against grey     (a yellow circle above a small blue square ...)
    Weird image. a red circle on a white background             (strong defects, or the picture shows something else)
    a clean drawing of two crimson boxes on black               (no defects)
    There is one purple cross on a white background, blurry.    (the defect blur)

    python data_build/shapes.py --output-dir data/shapes --count 20000          # hardware: one CPU core; > 500 images/s

Left out: outlines, textures, overlap and rotation; the world is simple so that the judge can measure it
from pixels alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from preftune.cli import exit_on_user_error, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """Render captioned images of the shapes world into an imagefolder."""

    output_dir: Path
    """Folder to create; it must not exist yet."""
    count: int = 20_000
    """Number of images."""
    wrong_share: float = 0.15
    """Share of captions with one wrong word, in [0, 1]."""
    weird_share: float = 0.35
    """Share of renderings with one or two defects, in [0, 1]."""
    name_defects: bool = False
    """Name the defects of the rendering in strict captions and near misses."""
    single_share: float = 0.0
    """Share of scenes with one thing alone, beside the quarter of the others that have, in [0, 1]: from them a model learns
    shapes sooner."""
    free_share: float = 0.0
    """Share of captions in free English, with words of quality that are true of the picture, in [0, 1]."""
    seed: int = 0
    """Image i is a function of (seed, i) alone."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        for name in ("wrong_share", "weird_share", "single_share", "free_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1], got {share}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from preftune import seeds
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.records import write_jsonl
from rewards.shapes import Scene
from rewards.shapes_phrasing import free_caption, tells_quality
from rewards.shapes_rendering import (
    DEFECTS,
    change_one_word,
    pick,
    place,
    random_defects,
    random_scene,
    render,
    to_bytes,
)

HARD_WORDS = ("shape", "relation")
DEFECT_WORDS = dict(zip(DEFECTS, DEFECTS, strict=True)) | {"off_palette": "tint"}


def render_image(index: int, config: Config) -> tuple[NDArray[np.uint8], dict[str, object]]:
    """Return image `index` (SIZE, SIZE, 3) uint8 and its metadata row without file_name."""
    rng = seeds.rng(config.seed, index)
    scene = random_scene(rng, single=config.single_share)
    defects = random_defects(rng, config.weird_share)
    image = render(place(scene, rng), scene.background, rng, defects)
    said = change_one_word(scene, rng) if rng.random() < config.wrong_share else scene
    words = free_words(index, config)
    if words is None:
        named = with_defects(defects) if config.name_defects else ""
        text = said.caption() + named
        hard = change_one_word(scene, rng, HARD_WORDS)
        misses = [hard.caption() + named, near_miss(scene, defects, rng, config.name_defects)]
    else:
        text = free_caption(said, defects, said != scene, words)
        hard = change_one_word(scene, words, HARD_WORDS)
        misses = [
            free_caption(hard, defects, said != scene, words),
            free_near_miss(scene, said != scene, defects, words),
        ]
    return to_bytes(image), {
        "text": text,
        "rendered": scene.caption(),
        "defects": {name: round(strength, 3) for name, strength in defects.items()},
        "near_misses": misses,
    }


def free_words(index: int, config: Config) -> Generator | None:
    """Return the random numbers for the free English of image `index`, or None where its captions are strict.

    They are apart from all others, so that the images do not depend on the words.
    """
    rng = seeds.rng(config.seed, index, 2)
    return rng if rng.random() < config.free_share else None


def free_near_miss(scene: Scene, wrong: bool, defects: Mapping[str, float], rng: Generator) -> str:
    """Return a caption in free English that is wrong about one word or, at most half the time, about the quality.

    The image's own caption is worded in the same ways, so that a near miss cannot be told by its style.
    """
    if rng.random() < 0.5:
        other = {} if defects else {pick(rng, DEFECTS): 1.0}
        text = free_caption(scene, other, False, rng)
        if tells_quality(text):
            return text
    return free_caption(change_one_word(scene, rng), defects, wrong, rng)


def with_defects(defects: Mapping[str, float]) -> str:
    """Return what a caption says of these defects: "", ", with blur" or ", with slight blur and strong specks"."""
    named = sorted((DEFECT_WORDS[name], degree(strength)) for name, strength in defects.items())
    return f", with {' and '.join(f'{how} {word}'.lstrip() for word, how in named)}" if named else ""


def degree(strength: float) -> str:
    """Return the adjective of a defect's strength in [0, 1]: slight, none or strong."""
    return "slight" if strength < 0.4 else "strong" if strength >= 0.7 else ""


def near_miss(scene: Scene, defects: Mapping[str, float], rng: Generator, name_defects: bool) -> str:
    """Return a caption that is wrong about one word or, half the time if captions name them, about the defects.

    Wrong about defects: silent about them, wrong about the degree of one, or naming another.
    """
    if not name_defects:
        return change_one_word(scene, rng).caption()
    if rng.random() < 0.5:
        return change_one_word(scene, rng).caption() + with_defects(defects)
    way = rng.random()
    if defects and way < 0.4:
        return scene.caption()
    if defects and way < 0.75:
        name = str(rng.choice(list(defects)))
        others = [strength for strength in (0.0, 0.5, 1.0) if degree(strength) != degree(defects[name])]
        return scene.caption() + with_defects({**defects, name: float(rng.choice(others))})
    other = str(rng.choice([name for name in DEFECTS if name not in defects]))
    return scene.caption() + with_defects({other: rng.random()})


@one_writer
def main(config: Config) -> None:
    """Write the folder under a temporary name, then rename it."""
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
    with replacing(config.output_dir) as partial:
        rows = []
        for index in tqdm(range(config.count), desc="rendering", unit="image"):
            image, row = render_image(index, config)
            name = f"{index // 1000:03d}/{index:06d}.png"
            if index % 1000 == 0:
                (partial / name).parent.mkdir(parents=True)
            Image.fromarray(image).save(partial / name, compress_level=1)
            rows.append({"file_name": name, **row})
        write_jsonl(partial / "metadata.jsonl", rows)


if __name__ == "__main__":
    main(CONFIG)
