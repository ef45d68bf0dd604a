"""What a driver shows of its progress: images from fixed seeds, their scores, and the comparison of before and after.

Images generated at one time lie in `RUN/samples/NAME/`: 0000.png, ... and `scores.json`, so that a resumed run, or a
reader, finds the ones from before. Gold is the judge's, where every prompt is a caption of the shapes world.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from preftune.families.base import Family
from preftune.images import captioned_grid, load_pixels, save_image, to_pil
from preftune.sampling import Sampling, sample
from rewards.mix import Mix
from rewards.shapes import SIZE, in_world, judge

_KEPT_IMAGES = 16  # of those generated, how many are kept as files


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Images of some prompts with what was said of them; proxy is None without scorers, gold outside the shapes world."""

    prompts: list[str]
    images: Tensor  # (at most _KEPT_IMAGES, 3, H, W) in [0, 1]
    proxy: list[float] | None
    gold: list[float] | None

    def scores(self) -> dict[str, list[float]]:
        """Return those of proxy and gold that there are."""
        both = {"proxy": self.proxy, "gold": self.gold}
        return {name: values for name, values in both.items() if values is not None}

    def means(self) -> dict[str, float]:
        """Return the mean proxy and gold scores."""
        return {f"held_out_{name}": float(np.mean(values)) for name, values in self.scores().items()}


@torch.no_grad()
def show(
    family: Family,
    mix: Mix | None,
    prompts: list[str],
    sampling: Sampling,
    device: torch.device,
    negative: str = "",
) -> Shown:
    """CaptionedImage prompt i with seed i and score it; guidance points away from `negative`."""
    pixels = sample(
        family,
        prompts,
        range(len(prompts)),
        sampling,
        negative=negative,
        progress=f"sampling {len(prompts)} validation prompts",
    )
    proxy: list[float] = []
    for start in range(0, len(prompts), sampling.batch_size) if mix else ():
        part = slice(start, start + sampling.batch_size)
        assert mix is not None
        proxy += mix(pixels[part].to(device), prompts[part]).rewards.cpu().tolist()
    gold = (
        judge(pixels, prompts).gold.tolist()
        if in_world(prompts) and pixels.shape[-2:] == (SIZE, SIZE)
        else None
    )
    return Shown(prompts=prompts, images=pixels[:_KEPT_IMAGES], proxy=proxy or None, gold=gold)


def save(shown: Shown, run: Path, name: str) -> None:
    """Write images and scores to `run/samples/name`, and a grid of them beside it."""
    folder = run / "samples" / name
    partial = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, image in enumerate(shown.images):
        to_pil(image).save(partial / f"{index:04d}.png")
    text = json.dumps({"prompts": shown.prompts, "proxy": shown.proxy, "gold": shown.gold})
    (partial / "scores.json").write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    columns = range(0, len(shown.images), 4)
    images = list(shown.images)
    captions = [f"{prompt}\n{caption(shown, i)}" for i, prompt in enumerate(shown.prompts[: len(images)])]
    grid = captioned_grid(
        [images[i : i + 4] for i in columns], cell_captions=[captions[i : i + 4] for i in columns]
    )
    save_image(grid, run / "samples" / f"{name}.png")


def read(run: Path, name: str) -> Shown | None:
    """Return what `save` wrote, or None where it did not."""
    folder = run / "samples" / name
    if not (folder / "scores.json").is_file():
        return None
    images = torch.stack([load_pixels(path) for path in sorted(folder.glob("*.png"))])
    return Shown(images=images, **json.loads((folder / "scores.json").read_text()))


def caption(shown: Shown, index: int) -> str:
    """Return the scores of one image in words."""
    return ", ".join(f"{name} {values[index]:.2f}" for name, values in shown.scores().items())


def comparison(shown: Mapping[str, Shown], number: int = 8) -> Image.Image:
    """Return a grid with a row for each showing of the same prompts and seeds, scores below."""
    first = next(iter(shown.values()))
    return captioned_grid(
        [list(row.images[:number]) for row in shown.values()],
        row_captions=list(shown),
        column_titles=first.prompts[: min(number, len(first.images))],
        cell_captions=[[caption(row, i) for i in range(len(row.images[:number]))] for row in shown.values()],
    )


def interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean paired difference and its 95 % percentile-bootstrap interval over prompts (10,000 resamples)."""
    difference = np.asarray(after) - np.asarray(before)
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(10_000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def summary(shown: Mapping[str, Shown]) -> str:
    """Return lines that say how each later showing of the same prompts differs from the first."""
    (title, first), *others = shown.items()
    lines = [f"{len(first.prompts)} held-out prompts; change with its 95 % interval:"]
    for other_title, other in others:
        for name, old in first.scores().items():
            new = other.scores().get(name, [])
            if len(new) != len(old):  # the run was resumed with other scorers or prompts
                continue
            mean, low, high = interval(old, new)
            lines.append(
                f"{name:5s} {title} {np.mean(old):.3f} -> {other_title} {np.mean(new):.3f}"
                f"  change {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    return "\n".join(lines)


def conclude(run: Path, names: Mapping[str, str]) -> None:
    """Write `run/before_after.png` of showings that were saved, {title: name}, and print what changed since the first."""
    shown = {title: found for title, name in names.items() if (found := read(run, name)) is not None}
    if len(shown) == len(names):
        save_image(comparison(shown), run / "before_after.png")
        print(summary(shown))  # noqa: T201
    print(f"tuned weights, metrics and images: {run}")  # noqa: T201
