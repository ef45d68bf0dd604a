"""Images to scores, view by view: as they are, and mirrored with the centre cut out (paper 000, Table 1).

Each image is read and decoded once, in worker processes; each view is prepared as the scorers' authors do and scored once.
The judge of the shapes world takes whole images only and scores the first view. In captions of that world left and right
change sides with the image; other prompts stay as they are, as in the paper.

Letters: N images, V views, B images of a batch, H W pixels of any size, S those that a scorer wants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from eval.agreement import AS_IS, GOLD, Floats
from preftune.images import opened
from rewards import Preprocess, Scorer
from rewards.pixels import from_pil
from rewards.shapes import SIZE, in_world, parse_caption
from rewards.shared_towers import score_all

MAX_ASPECT = 100
"""Long to short side of an image: scorers resize the short one, so a thread of pixels would grow without bound."""


@dataclass(frozen=True, kw_only=True)
class RankedImage:
    """A ranked image and the prompt that it was ranked for."""

    path: Path
    prompt: str


def mirrored(prompt: str) -> str:
    """Return what the mirrored image of a caption shows: in the shapes world left and right change sides."""
    if not in_world([prompt]):
        return prompt
    scene = parse_caption(prompt)
    other = {"left of": "right of", "right of": "left of"}
    return replace(scene, relation=other.get(scene.relation or "", scene.relation)).caption()


def check_crops(crops: Sequence[float]) -> None:
    """Raise ValueError unless all are different shares of an image's side."""
    if len(set(crops)) != len(crops) or not all(0 < crop <= 1 for crop in crops):
        raise ValueError(f"--crops must be different shares in (0, 1], got {tuple(crops)}")


def view_names(crops: Sequence[float]) -> list[str]:
    """Return the names of the views, V of them."""
    return [AS_IS, *(f"flip + crop {crop:g}" for crop in crops)]


def views_of(image: Image.Image, crops: Sequence[float]) -> Iterator[Image.Image]:
    """Yield an image as it is, then mirrored and cut to the middle share of each side (paper 000, Table 1)."""
    yield image
    for crop in crops:
        width, height = (max(round(crop * side), 1) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        yield ImageOps.mirror(image).crop((left, top, left + width, top + height))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch of B images, each with V views, ready for the scorers."""

    numbers: list[int]
    """Places of the B images."""
    inputs: dict[Preprocess, Tensor]
    """(B, V, 3, S, S) for each way to prepare an image."""
    natives: list[list[NDArray[np.float32]]]
    """B of V of (3, H, W), where a scorer takes images as they are."""
    rejected: dict[int, str]
    """Place -> why it could not be read."""


@dataclass(frozen=True, kw_only=True)
class Preparing(Dataset[Prepared]):
    """What worker processes do: read and decode each image once, and prepare its views."""

    images: Sequence[RankedImage]
    rules: Sequence[Preprocess | None]
    crops: Sequence[float]
    judged: bool
    """Whether the judge of the shapes world reads them, too, which takes one size only."""

    def __getitem__(self, numbers: list[int]) -> Prepared:
        """Return the prepared batch; the loader's sampler yields lists of places."""
        sound: dict[int, dict[Preprocess | None, list[Tensor]]] = {}
        rejected = {}
        for number in numbers:
            try:
                sound[number] = self.prepare(self.images[number].path)
            except ValueError as error:
                rejected[number] = str(error)
        ways = [rule for rule in self.rules if rule is not None and sound]
        return Prepared(
            numbers=list(sound),
            inputs={
                rule: torch.stack([torch.stack(views[rule]) for views in sound.values()]) for rule in ways
            },
            natives=[[pixels.numpy() for pixels in views.get(None, ())] for views in sound.values()],
            rejected=rejected,
        )

    def prepare(self, path: Path) -> dict[Preprocess | None, list[Tensor]]:
        """Return V views for each way to prepare them; ValueError for an image that is damaged or of no use."""
        with opened(path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_ASPECT} : 1")
            if self.judged and image.size != (SIZE, SIZE):
                raise ValueError(f"the scorer {GOLD} reads {SIZE} x {SIZE} pixels, not {image.size}")
            image.load()
            views = list(views_of(image, self.crops))
            return {rule: [from_pil(view, rule) for view in views] for rule in self.rules}


def score_batch(
    scorers: Sequence[Scorer], prepared: Prepared, prompts: Sequence[str], views: int, device: torch.device
) -> dict[str, Floats]:
    """Return name -> scores (B, V) of a batch with B prompts; the judge scores the first view only, and leaves NaN elsewhere."""
    found = {scorer.card.name: np.full((len(prompts), views), np.nan) for scorer in scorers}
    texts = [[prompt] + [mirrored(prompt)] * (views - 1) for prompt in prompts]
    for rule, pixels in prepared.inputs.items():
        group = [scorer for scorer in scorers if scorer.card.preprocess == rule]
        columns = score_all(group, pixels.flatten(0, 1).to(device), [text for row in texts for text in row])
        for scorer, column in zip(group, columns, strict=True):
            found[scorer.card.name][:] = column.double().cpu().reshape(-1, views).numpy()
    for row, natives in enumerate(prepared.natives):
        for view, native in enumerate(natives):
            pixels = torch.from_numpy(native)[None].to(device)  # each of its own size
            for scorer in scorers:
                if scorer.card.preprocess is None and (view == 0 or scorer.card.name != GOLD):
                    found[scorer.card.name][row, view] = scorer(pixels, [texts[row][view]]).item()
    return found


@torch.no_grad()
def score(
    images: Sequence[RankedImage],
    scorers: Sequence[Scorer],
    crops: Sequence[float],
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
) -> tuple[dict[str, Floats], dict[int, str]]:
    """Return name -> scores (V, N), NaN for images that were set aside, and why those were.

    FloatingPointError names scorer and image for a score that is no finite number.
    """
    names = [scorer.card.name for scorer in scorers]
    rules = list(dict.fromkeys(scorer.card.preprocess for scorer in scorers))
    preparing = Preparing(images=images, rules=rules, crops=crops, judged=GOLD in names)
    numbers = range(len(images))
    batches = [list(numbers[start : start + batch_size]) for start in numbers[::batch_size]]
    loader = DataLoader(preparing, sampler=batches, batch_size=None, num_workers=workers)
    views = 1 + len(crops)
    scores = {name: np.full((views, len(images)), np.nan) for name in names}
    rejected: dict[int, str] = {}
    with tqdm(total=len(images), desc="scoring", unit="image", mininterval=1) as bar:
        for prepared in loader:
            rejected |= prepared.rejected
            prompts = [images[number].prompt for number in prepared.numbers]
            for name, found in score_batch(scorers, prepared, prompts, views, device).items():
                scores[name][:, prepared.numbers] = found.T
                expected = found[:, :1] if name == GOLD else found
                for row in np.flatnonzero(~np.isfinite(expected).all(1))[:1]:
                    image = images[prepared.numbers[row]]
                    raise FloatingPointError(
                        f"{name} gave {found[row]} for {image.path} with the prompt {image.prompt!r}; look at the image"
                    )
            bar.update(len(prepared.numbers) + len(prepared.rejected))
    return scores, rejected
