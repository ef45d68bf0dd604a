"""What a driver shows of its progress: pictures from fixed seeds, their scores, and the comparison of before and after.

Pictures drawn at a step lie in `RUN/samples/step_000000/`: 0000.png, ... and `scores.json`, so that a resumed run, or a
reader, finds the ones from before. Gold is the judge's, where every prompt is a caption of the shapes world.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preftune.families.base import Family
from preftune.images import captioned_grid, load_pixels, save_image, to_pil
from preftune.sampling import Drawing, sample
from rewards.mix import Mix
from rewards.shapes import SIZE, in_world, judge

_KEPT_PICTURES = 16  # of those drawn, how many are kept as files


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Pictures of some prompts with what was said of them; gold is None outside the shapes world."""

    prompts: list[str]
    pictures: Tensor  # (at most _KEPT_PICTURES, 3, H, W) in [0, 1]
    proxy: list[float]
    gold: list[float] | None

    def means(self) -> dict[str, float]:
        """Return the mean proxy and gold scores."""
        gold = {} if self.gold is None else {"held_out_gold": float(np.mean(self.gold))}
        return {"held_out_proxy": float(np.mean(self.proxy)), **gold}


@torch.no_grad()
def show(family: Family, mix: Mix, prompts: list[str], draw: Drawing, device: torch.device) -> Shown:
    """Draw prompt i with seed i and score it."""
    pixels = sample(
        family, prompts, range(len(prompts)), draw, progress=f"drawing {len(prompts)} held-out prompts"
    )
    proxy: list[float] = []
    for start in range(0, len(prompts), draw.batch):
        part = slice(start, start + draw.batch)
        proxy += mix(pixels[part].to(device), prompts[part]).rewards.cpu().tolist()
    gold = (
        judge(pixels, prompts).gold.tolist()
        if in_world(prompts) and pixels.shape[-2:] == (SIZE, SIZE)
        else None
    )
    return Shown(prompts=prompts, pictures=pixels[:_KEPT_PICTURES], proxy=proxy, gold=gold)


def save(shown: Shown, run: Path, step: int) -> None:
    """Write pictures, scores and a grid under `run/samples`."""
    folder = run / "samples" / f"step_{step:06d}"
    partial = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, picture in enumerate(shown.pictures):
        to_pil(picture).save(partial / f"{index:04d}.png")
    text = json.dumps({"prompts": shown.prompts, "proxy": shown.proxy, "gold": shown.gold})
    (partial / "scores.json").write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    columns = range(0, len(shown.pictures), 4)
    pictures = list(shown.pictures)
    captions = [f"{prompt} ({caption(shown, i)})" for i, prompt in enumerate(shown.prompts[: len(pictures)])]
    grid = captioned_grid(
        [pictures[i : i + 4] for i in columns], cell_captions=[captions[i : i + 4] for i in columns]
    )
    save_image(grid, run / "samples" / f"step_{step:06d}.png")


def read(run: Path, step: int) -> Shown | None:
    """Return what `save` wrote, or None where it did not."""
    folder = run / "samples" / f"step_{step:06d}"
    if not (folder / "scores.json").is_file():
        return None
    pictures = torch.stack([load_pixels(path) for path in sorted(folder.glob("*.png"))])
    return Shown(pictures=pictures, **json.loads((folder / "scores.json").read_text()))


def caption(shown: Shown, index: int) -> str:
    """Return the scores of one picture in words."""
    gold = "" if shown.gold is None else f", gold {shown.gold[index]:.2f}"
    return f"proxy {shown.proxy[index]:.2f}{gold}"


def before_after(before: Shown, after: Shown, path: Path, number: int = 8) -> None:
    """Write a grid: one row for the model before, one for it after, the same prompts and seeds, scores below."""
    pictures = [list(shown.pictures[:number]) for shown in (before, after)]
    captions = [
        [caption(shown, i) for i in range(len(row))]
        for shown, row in zip((before, after), pictures, strict=True)
    ]
    titles = before.prompts[: len(pictures[0])]
    save_image(
        captioned_grid(
            pictures, row_captions=["before", "after"], column_titles=titles, cell_captions=captions
        ),
        path,
    )


def interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean paired difference and its 95 % percentile-bootstrap interval over prompts (10,000 resamples)."""
    difference = np.asarray(after) - np.asarray(before)
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(10_000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def summary(before: Shown, after: Shown) -> str:
    """Return lines that say what changed between two showings of the same prompts."""
    lines = []
    for name, old, new in (("proxy", before.proxy, after.proxy), ("gold", before.gold, after.gold)):
        if old is not None and new is not None:
            mean, low, high = interval(old, new)
            lines.append(
                f"{name:5s} {np.mean(old):.3f} -> {np.mean(new):.3f}  change {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    return "\n".join(
        [f"{len(before.prompts)} held-out prompts, before -> after, 95 % interval of the change:", *lines]
    )


def conclude(after: Shown, run: Path) -> None:
    """Write `run/before_after.png` against the pictures of step 0, and print what changed."""
    before = read(run, 0)
    if before is not None:
        before_after(before, after, run / "before_after.png")
        print(summary(before, after))  # noqa: T201
    print(f"tuned weights, metrics and pictures: {run}")  # noqa: T201
