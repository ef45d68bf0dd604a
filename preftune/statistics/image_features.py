"""Features of image files, for the diversity of what a model makes, and statistics of their pixels, in one pass.

A tower turns pixels into unit vectors: the image tower of a CLIP scorer that is loaded anyway, or DINOv2. It must not be trained, and
a diversity compares only with others by the same tower. B batch, N images, m images of a prompt, D features.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from preftune.images import opened
from preftune.prepared_images import Recipe, View, prepared_slices
from preftune.statistics.image_statistics import image_statistics
from rewards import Preprocess, Scorer
from rewards.aesthetic import Aesthetic
from rewards.clip import ClipScorer
from rewards.pixels import prepare

Floats = NDArray[np.float64]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of pixels that DINOv2 was trained with."""


class ImageTower(Protocol):
    """What makes features: pixels (B, 3, H, W) in [0, 1] to unit vectors (B, D) float32."""

    preprocess: Preprocess

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the unit vectors."""
        ...


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is known of N images without a prompt."""

    features: Floats | None
    """(N, D) unit vectors; None without a tower."""
    statistics: dict[str, Floats]
    """Name -> (N,): image_statistics.STATISTICS."""


@dataclass(frozen=True)
class _Open:
    """What worker processes do: read and decode an image."""

    def __call__(self, item: Path, recipe: Recipe) -> tuple[Path, list[View]]:
        with opened(item) as image:
            image.load()
            return item, [recipe.view(image, "")]


def clip_tower(scorers: Sequence[Scorer]) -> ImageTower | None:
    """Return the image tower of the first scorer that has a CLIP's, in the order given; None where none has."""
    return next((one.vision for one in scorers if isinstance(one, ClipScorer | Aesthetic)), None)


@torch.no_grad()
def describe(
    files: Sequence[Path],
    tower: ImageTower | None,
    device: torch.device,
    *,
    batch_size: int = 16,
    workers: int = 0,
) -> Described:
    """Return features and statistics of N image files, which are decoded once, `batch_size` in memory at a time.

    ValueError, which names the file, for one that cannot be read.
    """
    rules = [None] if tower is None else [None, tower.preprocess]
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    features: list[Tensor] = []
    rows: dict[str, list[float]] = {}
    for part in prepared_slices(_Open(), batches, rules, workers=workers, device=device):
        here = part.to(device)
        if tower is not None:
            features.append(tower(here.inputs(tower.preprocess)).double().cpu())
        for _, pixels in here.natives():
            for name, values in image_statistics(pixels[None]).items():
                rows.setdefault(name, []).append(values.item())
    return Described(
        features=torch.cat(features).numpy() if features else None,
        statistics={name: np.array(values) for name, values in rows.items()},
    )


class Dino(nn.Module):
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193) as transformers has it: the [CLS] vector at 224 pixels, of length 1."""

    def __init__(self, model: nn.Module, size: int = 224) -> None:
        super().__init__()
        self.model = model
        self.preprocess = Preprocess(size=size, mean=IMAGENET[0], std=IMAGENET[1])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, D) float32."""
        states = self.model(pixel_values=prepare(pixels, self.preprocess)).last_hidden_state
        return F.normalize(states[:, 0].float(), dim=1)


def load_dino(name: str, device: torch.device | str = "cpu") -> Dino:
    """Return DINOv2 of a folder or the hub, such as facebook/dinov2-base. ValueError where it is not there."""
    from transformers import Dinov2Model

    try:
        model = Dinov2Model.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot load DINOv2 from {name} ({reason}); give a folder with its config.json and model.safetensors, or"
            " download it: hf download facebook/dinov2-base"
        ) from error
    return Dino(model.to(device).eval().requires_grad_(False))


def load_lpips(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS by AlexNet (Zhang et al. 2018, arXiv 1801.03924): two times pixels (B, 3, H, W) in [0, 1] to distances (B,).

    ValueError where the library lpips is not installed.
    """
    if importlib.util.find_spec("lpips") is None:
        raise ValueError("LPIPS needs the library lpips, which is not installed; pip install lpips")
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    return lambda one, other: network(one, other, normalize=True).flatten()


@torch.no_grad()
def mean_pairwise(pixels: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the mean distance over all pairs of images (m, 3, H, W) of one prompt; ValueError for fewer than two."""
    if len(pixels) < 2:
        raise ValueError(f"diversity needs 2 images or more of a prompt, got {len(pixels)}")
    pairs = list(combinations(range(len(pixels)), 2))
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return float(distance(pixels[first], pixels[second]).mean())
