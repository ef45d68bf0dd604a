"""Rankings of images of the shapes world by simulated annotators: training data of a reward model.

Each ranking has several images for one caption, ordered by gold score plus normal noise. The images are
*rendered* (the caption's scene or one that differs in one or two words, with or without defects), or
*generated* by a pipeline at several guidance scales and step counts. Both kinds are needed: a scorer that
is trained on rendered images alone does not generalise to generated ones. With `--climbed-by SCORER` they are
*climbed*: a generated image, and what the gradient of that scorer makes of it (data_build/climbed.py), to
train the scorer again.

The noise is set so that two annotators agree on a pair about 65 % of the time, as HPS (arXiv 2303.14420)
and ImageReward (arXiv 2304.05977) report for people. This agreement, and that of one annotator with the
noiseless judge, are printed and written to `summary.json`. Measured for 300 rankings of 8 rendered images, from
which the default was chosen:

    --annotator-noise                    0.17   0.30   0.35   0.40   0.45   0.50
    annotator agrees with annotator      0.79   0.70   0.68   0.65   0.63   0.61
    annotator agrees with the judge      0.84   0.77   0.75   0.73   0.71   0.69

Whoever changes the judge measures this again: an annotator's mistakes are in units of gold.

    python data_build/simulate_rankings.py --output-dir data/rankings_rendered --count 20000 --images 8 --annotators 5
    python data_build/simulate_rankings.py --output-dir data/rankings_drawn --count 1500 --images 8 --annotators 5 --model assets/tiny/pipeline
    python data_build/simulate_rankings.py --output-dir data/rankings_climbed --count 400 --images 6 --annotators 2 --model assets/tiny/pipeline --climbed-by imagereward-tiny

`rankings.jsonl` rows, one for each annotator: prompt, generations (file names), ranking (1 = best), source
(the annotator), images (rendered, generated or climbed), gold (noiseless, for evaluation only). Hardware: on one CPU
core 350 images/s when rendering (most of it is the judge) and 25 images/s when generating.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rewards
from preftune import families
from preftune.cli import exit_on_user_error, parse
from preftune.families import Source
from rewards import own

CLIMB_STEPS, CLIMB_RATE = 12, 0.05
"""--climb-steps and --climb-rate where they are not given."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write rankings of rendered or generated images by simulated annotators."""

    output_dir: Path
    """Folder to create; it must not exist yet."""
    count: int = 1000
    """Number of rankings."""
    images: int = 4
    """Images in a ranking, at least 2."""
    model: str | None = None
    """Model that generates the images: pipeline folder, .safetensors or .ckpt file, or a hub id; None = render them."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = main."""
    variant: str | None = None
    """Variant of the weights, as fp16; None = those without one, or the only one there is."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales, one chosen at random for each image."""
    step_counts: tuple[int, ...] = (4, 8, 16)
    """Values of num_inference_steps (ddim), one chosen at random for each image."""
    climbed_by: str | None = None
    """Differentiable scorer, by its name or folder, whose gradient makes the images of a ranking from its first one, with a --model; None = none."""
    climb_steps: int | None = None
    """Adam steps, on the latents, to the last image that --climbed-by makes; the others stop evenly spaced before it; None = 12."""
    climb_rate: float | None = None
    """Learning rate of these steps: how far, about, one moves each latent; None = 0.05."""
    annotators: int = 1
    """Number of annotators per caption; each gives one ranking."""
    annotator_noise: float = 0.4
    """Standard deviation of the noise that an annotator adds to each gold score; 0.4: two agree on 65 % of rendered pairs."""
    seed: int = 1
    """Ranking i is a function of (seed, i) and the model."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.images < 2:
            raise ValueError(
                f"--count must be at least 1 and --images at least 2, got {self.count} and {self.images}"
            )
        if self.model is None and (self.revision or self.variant):
            raise ValueError("--revision and --variant belong to a --model; name one, or leave them out")
        if self.annotators < 1:
            raise ValueError(f"--annotators must be at least 1, got {self.annotators}")
        if not self.annotator_noise >= 0:
            raise ValueError(f"--annotator-noise must be at least 0, got {self.annotator_noise}")
        if (
            not self.guidance_scales
            or not self.step_counts
            or min(self.guidance_scales) < 0
            or min(self.step_counts) < 1
        ):
            scales, steps = (
                " ".join(map(str, some)) or "none" for some in (self.guidance_scales, self.step_counts)
            )
            raise ValueError(
                f"--guidance-scales must be at least 0 and --step-counts at least 1, got {scales} and {steps}"
            )

        self.check_climb()

    def check_climb(self) -> None:
        """Raise ValueError for wrong flags of the climb."""
        if self.climbed_by is None:
            if self.climb_steps is not None or self.climb_rate is not None:
                raise ValueError(
                    "--climb-steps and --climb-rate belong to --climbed-by; name its scorer, or leave them out"
                )
            return
        if self.model is None:
            raise ValueError(
                f"--climbed-by {self.climbed_by} starts from images of a --model; name one, or leave it out"
            )
        rewards.check_differentiable(self.climbed_by, "--climbed-by")
        own.named_by_user(self.climbed_by)
        steps, rate = self.climb()
        if steps < self.images // 2:
            raise ValueError(
                f"--climb-steps must be at least {self.images // 2}, half of --images, one for each image of a climb, got {steps}"
            )
        if not 0 < rate < math.inf:
            raise ValueError(f"--climb-rate must be a number above 0, got {rate}")

    def climb(self) -> tuple[int, float]:
        """Return --climb-steps and --climb-rate with their defaults in place of None."""
        steps, rate = self.climb_steps, self.climb_rate
        return CLIMB_STEPS if steps is None else steps, CLIMB_RATE if rate is None else rate

    def source(self) -> Source | None:
        """Return where the model is, None without one; ValueError as `families.locate`."""
        return None if self.model is None else families.locate(self.model, self.revision, self.variant)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_build import climbed
from preftune import seeds
from preftune.cli.precision import device_here
from preftune.cli.printable import show
from preftune.files import replacing, write_text
from preftune.files.one_writer import one_writer
from preftune.images import load_pixels, to_pil
from preftune.records import write_jsonl
from preftune.sampling import sample, sample_latents
from preftune.sampling_config import Sampling
from rewards.mix import Mix
from rewards.shapes import SIZE, Scene
from rewards.shapes_judge import judge
from rewards.shapes_rendering import change_one_word, place, random_defects, random_scene, render, to_bytes


def scene_of(index: int, config: Config) -> tuple[Scene, Generator]:
    """Return the scene of ranking `index` and the generator for all else about it."""
    rng = seeds.rng(config.seed, index)
    return random_scene(rng), rng


def rendered_image(scene: Scene, rng: Generator) -> Tensor:
    """Return an image (3, SIZE, SIZE): half the time faithful, otherwise one or two words off; often with defects."""
    for _ in range(int(rng.choice(3, p=(0.5, 0.3, 0.2)))):
        scene = change_one_word(scene, rng)
    image = to_bytes(render(place(scene, rng), scene.background, rng, random_defects(rng, 0.6)))
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def rank(scores: Sequence[float]) -> list[int]:
    """Return places, 1 = best; equal scores share a place."""
    return [1 + sum(other > score for other in scores) for score in scores]


def image_names(index: int, config: Config) -> list[str]:
    """Return the file names of the images of ranking `index`."""
    return [f"{index // 500:03d}/{index:06d}_{k}.png" for k in range(config.images)]


def write_image(pixels: Tensor, path: Path) -> None:
    """Write an image of pixels (3, SIZE, SIZE)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(pixels).save(path, compress_level=1)


def drawn_setting(rng: Generator, config: Config) -> tuple[float, int]:
    """Return a guidance scale and a step count, chosen at random."""
    return float(rng.choice(config.guidance_scales)), int(rng.choice(config.step_counts))


def by_setting(
    settings: Sequence[tuple[float, int]], batch_size: int
) -> Iterator[tuple[Sampling, list[int]]]:
    """Yield each setting, as the sampling that it asks for, with its places in the list."""
    for guidance, steps in sorted(set(settings)):
        sampling = Sampling(
            num_inference_steps=steps,
            guidance_scale=guidance,
            solver="ddim",
            resolution=str(SIZE),
            batch_size=batch_size,
        )
        yield sampling, [row for row, setting in enumerate(settings) if setting == (guidance, steps)]


def title_of(sampling: Sampling, what: str) -> str:
    """Return the title of a progress bar."""
    return f"{what} at guidance {sampling.guidance_scale:g}, {sampling.num_inference_steps} steps"


def image_seed(row: int, config: Config) -> int:
    """Return the seed of an image; row = ranking * images + place in the ranking."""
    return config.seed * 1_000_003 + row


def write_generated(config: Config, model: Source, folder: Path) -> None:
    """Generate and write all images, in groups of equal settings."""
    family = families.load(model, device_here())
    settings, captions, names = [], [], []
    for index in range(config.count):
        scene, rng = scene_of(index, config)
        settings += [drawn_setting(rng, config) for _ in range(config.images)]
        captions += [scene.caption()] * config.images
        names += image_names(index, config)
    for sampling, rows in by_setting(settings, batch_size=64):
        image_seeds = [image_seed(row, config) for row in rows]
        title = title_of(sampling, "sampling")
        batches = sample(family, [captions[row] for row in rows], image_seeds, sampling, progress=title)
        for row, pixels in zip(rows, itertools.chain.from_iterable(batches), strict=True):
            write_image(pixels, folder / names[row])


def write_climbed(config: Config, scorer: str, model: Source, folder: Path) -> None:
    """Generate the first image of each ranking, as `write_generated` does, and write it with those that the scorer's gradient makes of it."""
    family = families.load(model, device_here())
    reward = Mix([rewards.load(scorer, device=family.device)], {scorer: 1.0}, "none")
    drawn = [scene_of(index, config) for index in range(config.count)]
    settings = [drawn_setting(rng, config) for _, rng in drawn]
    length, rate = config.climb()
    for sampling, indices in by_setting(settings, climbed.BATCH):
        captions = [drawn[index][0].caption() for index in indices]
        image_seeds = [image_seed(index * config.images, config) for index in indices]
        title = title_of(sampling, "climbing from images")
        batches = sample_latents(family, captions, image_seeds, sampling, progress=title)
        for start, latents in zip(range(0, len(indices), climbed.BATCH), batches, strict=True):
            part = slice(start, start + climbed.BATCH)
            movers = [seeds.generator(config.seed, index, 2) for index in indices[part]]
            pixels = climbed.climbed(
                family,
                lambda shown, texts: reward(shown, texts).rewards,
                latents,
                captions[part],
                movers,
                images=config.images,
                steps=length,
                rate=rate,
            )
            for index, ranking in zip(indices[part], pixels, strict=True):
                for name, image in zip(image_names(index, config), ranking, strict=True):
                    write_image(image, folder / name)


def write_rendered(config: Config, folder: Path) -> None:
    """Render and write all images."""
    for index in tqdm(range(config.count), desc="rendering", unit="ranking", mininterval=1):
        scene, rng = scene_of(index, config)
        for name in image_names(index, config):
            write_image(rendered_image(scene, rng), folder / name)


@one_writer
def main(config: Config) -> None:
    """Make the images, judge and annotate them; the folder has its name only when it is complete."""
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        model = config.source()
        if model is not None:
            families.check(model)
        if config.climbed_by is not None:
            rewards.check(config.climbed_by)
    with replacing(config.output_dir) as folder:
        if model is None:
            write_rendered(config, folder)
        elif config.climbed_by is not None:
            write_climbed(config, config.climbed_by, model, folder)
        else:
            write_generated(config, model, folder)
        summary = write_rankings(config, folder)
    show(json.dumps(summary))


def write_rankings(config: Config, folder: Path) -> dict[str, float]:
    """Judge the images of a folder, write rankings.jsonl and summary.json, and return the summary."""
    rows, golds = [], []
    kind = "rendered" if config.model is None else "generated" if config.climbed_by is None else "climbed"
    for index in tqdm(range(config.count), desc="annotating", unit="ranking", mininterval=1):
        caption, names = scene_of(index, config)[0].caption(), image_names(index, config)
        pixels = torch.stack([load_pixels(folder / name) for name in names])
        gold = judge(pixels, [caption] * config.images).gold.numpy()
        golds.append(gold)
        rows += [
            {
                "prompt": caption,
                "generations": names,
                "ranking": ranks,
                "source": f"annotator {annotator}",
                "images": kind,
                "gold": [round(float(value), 4) for value in gold],
            }
            for annotator, ranks in enumerate(annotate(gold, index, config))
        ]
    write_jsonl(folder / "rankings.jsonl", rows)
    summary = agreement(np.stack(golds), config.annotator_noise)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def annotate(gold: NDArray[np.float32], index: int, config: Config) -> list[list[int]]:
    """Return each annotator's places, 1 = best, of the images of ranking `index` with these gold scores."""
    noises = (seeds.rng(config.seed, index, 1, annotator) for annotator in range(config.annotators))
    return [rank((gold + rng.normal(0, config.annotator_noise, len(gold))).tolist()) for rng in noises]


def agreement(golds: NDArray[np.float32], noise: float) -> dict[str, float]:
    """Return how often annotators order two images of one ranking alike, and as the judge does; golds (N, images).

    By the normal distribution: an annotator's order of a pair of gold difference d is right with probability
    p = Phi(|d| / (noise sqrt 2)), and two annotators agree with probability p^2 + (1 - p)^2.
    """
    i, j = np.triu_indices(golds.shape[1], 1)
    difference = np.abs(golds[:, i] - golds[:, j]).ravel()
    scaled = torch.from_numpy(difference / max(noise * np.sqrt(2), 1e-12))
    right = torch.special.ndtr(scaled)
    return {
        "gold_mean": float(golds.mean()),
        "gold_std_within_ranking": float(golds.std(1).mean()),
        "annotator_agrees_with_judge": float(right.mean()),
        "annotator_agrees_with_annotator": float((right**2 + (1 - right) ** 2).mean()),
    }


if __name__ == "__main__":
    main(CONFIG)
