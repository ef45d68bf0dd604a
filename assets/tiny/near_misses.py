"""Which words a scorer of the shapes world knows: how often it puts the right caption of an image above one with a wrong word.

    python assets/tiny/near_misses.py --scorers imagereward-tiny assets/tiny/pretrained/clip

Prints a Markdown table, a row for each scorer and kind of word and a column for each number of things in the scene, with the number of
pairs in brackets. 0.5 is chance; a tie counts as wrong. Images are rendered without defects.
"""

from dataclasses import dataclass

import numpy as np
import torch

import rewards
from preftune import seeds
from preftune.cli import parse
from preftune.cli.precision import device_here
from preftune.cli.printable import show
from preftune.cli.scorer_flags import Measured
from rewards import Scorer
from rewards.shapes_rendering import change_one_word, place, random_scene, render, to_bytes
from rewards.terms import parse_names

BATCH = 64
WORDS = ("shape", "relation", "colour", "number", "size", "background")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure which wrong words scorers notice."""

    scorers: Measured
    count: int = 600
    """Scenes; each has a near miss of every kind of word that its caption has."""
    seed: int = 77
    """Scene i is a function of (seed, i)."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        parse_names(self.scorers)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image with its caption and one that is wrong about one word."""

    pixels: torch.Tensor
    right: str
    wrong: str
    word: str
    things: int


def pairs(config: Config) -> list[Pair]:
    """Return the near misses of all scenes."""
    found = []
    for index in range(config.count):
        rng = seeds.rng(config.seed, index)
        scene = random_scene(rng)
        image = to_bytes(render(place(scene, rng), scene.background, rng, {}))
        pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)
        has = {"relation": scene.relation is not None, "number": not scene.relation}
        has["size"] = any(thing.size for thing in scene.things)
        for word in WORDS:
            if has.get(word, True):
                wrong = change_one_word(scene, rng, (word,))
                found.append(
                    Pair(
                        pixels=pixels,
                        right=scene.caption(),
                        wrong=wrong.caption(),
                        word=word,
                        things=len(scene.things),
                    )
                )
    return found


@torch.no_grad()
def noticed(scorer: Scorer, some: list[Pair]) -> list[bool]:
    """Return of each pair whether the right caption scores higher."""
    found: list[bool] = []
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        pixels = torch.stack([pair.pixels for pair in part]).to(device_here())
        right = scorer(pixels, [pair.right for pair in part])
        wrong = scorer(pixels, [pair.wrong for pair in part])
        found += (right > wrong).tolist()
    return found


def main(config: Config) -> None:
    """Print the table."""
    some = pairs(config)
    show("| scorer | wrong word | 1 thing | 2 things | 3 things |")
    show("| --- | --- | --- | --- | --- |")
    for name in parse_names(config.scorers):
        hits = noticed(rewards.load(name, device=device_here()), some)
        for word in WORDS:
            cells = []
            for number in (1, 2, 3):
                mine = [
                    hit
                    for hit, pair in zip(hits, some, strict=True)
                    if (pair.word, pair.things) == (word, number)
                ]
                cells.append(f"{np.mean(mine):.2f} ({len(mine)})" if mine else "-")
            show(f"| {name} | {word} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(parse(Config))
