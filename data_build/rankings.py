"""Rankings of pictures of the shapes world by simulated annotators: what a reward model is trained on.

Each ranking holds several pictures for one caption, ordered by gold score plus normal noise. The pictures are *rendered*
(the caption's scene or one or two words away from it, with or without defects), or *drawn* by a pipeline at several
guidance scales and step counts: a scorer that has seen only rendered pictures does not carry over to drawn ones.

The noise is set so that two annotators order a pair alike about 65 % of the time, which is what papers 001 and 002 report
of people; both that and one annotator's agreement with the noiseless judge are printed and written to `summary.json`.

    python data_build/rankings.py --output data/rankings_rendered --count 20000 --pictures 8 --annotators 5
    python data_build/rankings.py --output data/rankings_drawn --count 1500 --pictures 8 --annotators 5 --model assets/tiny/pipeline

`rankings.jsonl` rows, one for each annotator: prompt, generations (file names), ranking (1 = best), source (the annotator),
pictures (rendered or drawn), gold (noiseless, for evaluation only).
Hardware: rendered 350 pictures/s, most of it the judge's time, and drawn 25 pictures/s on one CPU core.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from preftune import families
from preftune.cli import exit_on_user_error, parse
from preftune.images import to_pil
from preftune.records import write_jsonl
from preftune.sampling import Drawing, sample
from rewards.shapes import SIZE, Scene, judge
from rewards.shapes_drawing import change_one_word, draw, place, random_defects, random_scene, to_bytes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write rankings of rendered or drawn pictures by simulated annotators."""

    output: Path
    """Folder to create; it must not exist yet."""
    count: int = 1000
    """Number of rankings."""
    pictures: int = 4
    """Pictures in a ranking, at least 2."""
    model: Path | None = None
    """Pipeline folder that draws the pictures; None = they are rendered."""
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales to draw at, one picked for each picture."""
    step_counts: tuple[int, ...] = (4, 8, 16)
    """Numbers of denoising steps (ddim) to draw with, one picked for each picture."""
    annotators: int = 1
    """Annotators of each ranking's pictures: as many rows, one each."""
    annotator_noise: float = 0.17
    """Standard deviation of the noise that an annotator adds to each gold score."""
    seed: int = 1
    """Ranking i is a function of (seed, i) and the model."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.pictures < 2:
            raise ValueError(
                f"--count must be at least 1 and --pictures at least 2, got {self.count} and {self.pictures}"
            )
        if self.annotators < 1:
            raise ValueError(f"--annotators must be at least 1, got {self.annotators}")
        if not self.annotator_noise >= 0:
            raise ValueError(f"--annotator-noise must be at least 0, got {self.annotator_noise}")
        if not self.guidances or not self.step_counts or min(self.guidances) < 0 or min(self.step_counts) < 1:
            raise ValueError(
                f"--guidances and --step-counts must be positive, got {self.guidances} and {self.step_counts}"
            )


def scene_of(index: int, config: Config) -> tuple[Scene, Generator]:
    """Return the scene of ranking `index` and the generator for all else about it."""
    rng = np.random.default_rng((config.seed, index))
    return random_scene(rng), rng


def render(scene: Scene, rng: Generator) -> Tensor:
    """Return a picture (3, SIZE, SIZE): half the time faithful, otherwise one or two words off; often with defects."""
    for _ in range(int(rng.choice(3, p=(0.5, 0.3, 0.2)))):
        scene = change_one_word(scene, rng)
    image = to_bytes(draw(place(scene, rng), scene.background, rng, random_defects(rng, 0.6)))
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def rank(scores: Sequence[float]) -> list[int]:
    """Return places, 1 = best; equal scores share a place."""
    return [1 + sum(other > score for other in scores) for score in scores]


def draw_all(config: Config, model: Path) -> Tensor:
    """Return all pictures (count x pictures, 3, SIZE, SIZE), drawn in groups of equal settings."""
    family = families.load(model)
    settings, captions = [], []
    for index in range(config.count):
        scene, rng = scene_of(index, config)
        for _ in range(config.pictures):
            settings.append((float(rng.choice(config.guidances)), int(rng.choice(config.step_counts))))
            captions.append(scene.caption())
    pixels = torch.empty(len(captions), 3, SIZE, SIZE)
    for guidance, steps in sorted(set(settings)):
        rows = [row for row, setting in enumerate(settings) if setting == (guidance, steps)]
        drawing = Drawing(
            num_steps=steps, guidance=guidance, scheduler="ddim", height=SIZE, width=SIZE, batch=64
        )
        seeds = [config.seed * 1_000_003 + row for row in rows]
        name = f"drawing at guidance {guidance:g}, {steps} steps"
        pixels[rows] = sample(family, [captions[row] for row in rows], seeds, drawing, progress=name)
    return pixels


def main(config: Config) -> None:
    """Draw, judge, annotate; write the folder under a temporary name, then rename it."""
    with exit_on_user_error():
        if config.output.exists():
            raise ValueError(f"{config.output} exists already; remove it or choose another --output")
        if config.model is not None:
            families.check(config.model)
    partial = config.output.with_name(config.output.name + f".tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    drawn = draw_all(config, config.model) if config.model is not None else None
    rows, golds = [], []
    for index in tqdm(range(config.count), desc="annotating", unit="ranking", mininterval=1):
        scene, rng = scene_of(index, config)
        first = index * config.pictures
        if drawn is None:
            pixels = torch.stack([render(scene, rng) for _ in range(config.pictures)])
        else:
            pixels = drawn[first : first + config.pictures]
        names = [f"{index // 500:03d}/{index:06d}_{k}.png" for k in range(config.pictures)]
        (partial / names[0]).parent.mkdir(exist_ok=True)
        for name, picture in zip(names, pixels, strict=True):
            to_pil(picture).save(partial / name, compress_level=1)
        gold = judge(pixels, [scene.caption()] * config.pictures).gold.numpy()
        golds.append(gold)
        for annotator, ranks in enumerate(annotate(gold, index, config)):
            rows.append(
                {
                    "prompt": scene.caption(),
                    "generations": names,
                    "ranking": ranks,
                    "source": f"annotator {annotator}",
                    "pictures": "rendered" if drawn is None else "drawn",
                    "gold": [round(float(value), 4) for value in gold],
                }
            )
    write_jsonl(partial / "rankings.jsonl", rows)
    summary = agreement(np.stack(golds), config.annotator_noise)
    (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    partial.rename(config.output)
    print(json.dumps(summary))  # noqa: T201


def annotate(gold: NDArray[np.float32], index: int, config: Config) -> list[list[int]]:
    """Return each annotator's places, 1 = best, of the pictures of ranking `index` with these gold scores."""
    noises = (
        np.random.default_rng((config.seed, index, 1, annotator)) for annotator in range(config.annotators)
    )
    return [rank((gold + rng.normal(0, config.annotator_noise, len(gold))).tolist()) for rng in noises]


def agreement(golds: NDArray[np.float32], noise: float) -> dict[str, float]:
    """Return how often annotators order two pictures of one ranking alike, and as the judge does; golds (N, pictures).

    By the normal distribution: an annotator's order of a pair of gold difference d is right with probability
    p = Phi(|d| / (noise sqrt 2)), and two annotators agree with probability p^2 + (1 - p)^2.
    """
    i, j = np.triu_indices(golds.shape[1], 1)
    difference = np.abs(golds[:, i] - golds[:, j]).ravel()
    scaled = torch.from_numpy(difference / max(noise * np.sqrt(2), 1e-12))
    right = torch.special.ndtr(scaled)
    return {
        "gold_mean": float(golds.mean()),
        "gold_deviation_within_ranking": float(golds.std(1).mean()),
        "annotator_agrees_with_judge": float(right.mean()),
        "annotator_agrees_with_annotator": float((right**2 + (1 - right) ** 2).mean()),
    }


if __name__ == "__main__":
    main(parse(Config))
