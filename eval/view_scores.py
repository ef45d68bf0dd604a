"""Scores of images in several views: unchanged, and mirrored with a centre crop (Stable Preference, Table 1).

Each image is read and decoded once, in worker processes (preftune/score_files.py). Each view is
preprocessed like the scorers' authors do and scored once. The judge of the shapes world needs complete
images and scores only the first view. In captions of that world, left and right are swapped for a mirrored
image; other prompts are unchanged, as in the paper.

Letters: N images, V views, S scorers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from eval.agreement import AS_IS, GOLD, Floats
from preftune.images import opened
from preftune.prepared_images import Recipe, View
from preftune.score_files import score_files
from rewards import Scorer
from rewards.shapes import SIZE, in_world, parse_caption


@dataclass(frozen=True, kw_only=True)
class PromptedImage:
    """An image file, and the prompt that it was made or ranked for."""

    path: Path
    prompt: str


def mirrored(prompt: str) -> str:
    """Return what the mirrored image of a caption shows: in the shapes world left and right change sides."""
    if not in_world([prompt]):
        return prompt
    scene = parse_caption(prompt)
    other = {"left of": "right of", "right of": "left of"}
    return replace(scene, relation=other.get(scene.relation or "", scene.relation)).caption()


def view_names(crops: Sequence[float]) -> list[str]:
    """Return the names of the views, V of them."""
    return [AS_IS, *(f"flip + crop {crop:g}" for crop in crops)]


def views_of(image: Image.Image, crops: Sequence[float]) -> Iterator[Image.Image]:
    """Yield an image as it is, then mirrored and cut to the middle share of each side (Stable Preference, Table 1)."""
    yield image
    for crop in crops:
        width, height = (max(round(crop * side), 1) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        yield ImageOps.mirror(image).crop((left, top, left + width, top + height))


@dataclass(frozen=True, kw_only=True)
class PrepareImage:
    """What worker processes do: read and decode an image once, and prepare its views. Items are (place, why it was set
    aside).
    """

    images: Sequence[PromptedImage]
    crops: Sequence[float]
    judged: bool
    """Whether the judge of the shapes world reads them, too, which takes one size only."""

    def __call__(self, item: tuple[int, str], recipe: Recipe) -> tuple[tuple[int, str], list[View]]:
        """Return the image's place with its V views; or why it is of no use, and no view."""
        place, _ = item
        try:
            return item, self.views(self.images[place], recipe)
        except ValueError as error:
            return (place, str(error)), []

    def views(self, image: PromptedImage, recipe: Recipe) -> list[View]:
        """Return V prepared views; ValueError for an image that is damaged or of no use."""
        with opened(image.path) as file:
            if self.judged and file.size != (SIZE, SIZE):
                raise ValueError(f"the scorer {GOLD} reads {SIZE} x {SIZE} pixels, not {file.size}")
            file.load()
            prompts = [image.prompt] + [mirrored(image.prompt)] * len(self.crops)
            return [
                recipe.view(view, prompt)
                for view, prompt in zip(views_of(file, self.crops), prompts, strict=True)
            ]


def score_views(
    images: Sequence[PromptedImage],
    scorers: Sequence[Scorer],
    crops: Sequence[float],
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    progress: str = "scoring",
) -> tuple[dict[str, Floats], dict[int, str]]:
    """Return name -> scores (V, N), NaN for images that were set aside, and why those were.

    The judge scores the first view only, and leaves NaN elsewhere. FloatingPointError names scorer and image for a
    score that is no finite number.
    """
    names = [scorer.card.name for scorer in scorers]
    prepare = PrepareImage(images=images, crops=crops, judged=GOLD in names)
    places = [(place, "") for place in range(len(images))]
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    table = np.full((len(scorers), 1 + len(crops), len(images)), np.nan)
    rejected: dict[int, str] = {}
    results = score_files(prepare, batches, scorers, device, workers=workers, first_view_only=(GOLD,))
    with tqdm(total=len(images), desc=progress, unit="image", mininterval=1) as bar:
        for results_of_batch in results:
            for result in results_of_batch:
                place, why = result.item
                if why or result.refused:
                    rejected[place] = why or f"{images[place].path}: {result.refused}"
                    continue
                _check_finite(images[place], names, result.scores)
                table[:, :, place] = result.scores.T
            bar.update(len(results_of_batch))
    return dict(zip(names, table, strict=True)), rejected


def _check_finite(image: PromptedImage, names: Sequence[str], scores: Floats) -> None:
    """Raise FloatingPointError for scores (V, S) that are no finite numbers; the judge has the first view alone."""
    for name, column in zip(names, scores.T, strict=True):
        if not np.isfinite(column[:1] if name == GOLD else column).all():
            raise FloatingPointError(
                f"{name} gave {column} for {image.path} with the prompt {image.prompt!r}; look at the image"
            )
