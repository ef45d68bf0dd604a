"""Write the embedded prompts: training captions and disjoint held-out captions.

python assets/tiny/captions.py --output-dir assets/tiny
"""

from dataclasses import dataclass
from pathlib import Path

from preftune import seeds
from preftune.cli import parse
from rewards.shapes_rendering import random_scene


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write prompts.txt and held_out.txt, one caption a line, without repetition."""

    output_dir: Path
    """Folder to write them into."""
    train: int = 2000
    """Captions in prompts.txt."""
    held_out: int = 256
    """Captions in held_out.txt."""
    seed: int = 11
    """Seed of the captions."""


def main(config: Config) -> None:
    """Take random captions until there are enough different ones."""
    rng = seeds.rng(config.seed)
    captions: dict[str, None] = {}
    while len(captions) < config.train + config.held_out:
        captions[random_scene(rng).caption()] = None
    rows = list(captions)
    for name, part in (("held_out", rows[: config.held_out]), ("prompts", rows[config.held_out :])):
        (config.output_dir / f"{name}.txt").write_text("\n".join(part) + "\n")


if __name__ == "__main__":
    main(parse(Config))
