"""Sharing of image towers: scorers with equal image towers hold one copy, which runs once per batch.

For example, the aesthetic predictor and CLIP score use the same CLIP tower, which takes nearly all of their
time.

Shapes: B batch, H W pixels of any size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewards import check_all, load
from rewards.aesthetic import Aesthetic
from rewards.card import Scorer
from rewards.clip import ClipScorer, ClipVision
from rewards.pixels import one_each


def load_all(
    names: Sequence[str], *, files: Mapping[str, Path], device: torch.device | str, dtype: torch.dtype
) -> list[Scorer]:
    """Return scorers in the order of names, equal towers shared; `files` names weights that are not in their own place.

    Published weights that are not on this machine are downloaded first, those of all scorers (rewards.check_all).
    """
    check_all(names, files)
    scorers: list[Scorer] = []
    for name in names:
        scorers.append(load(name, weights=files.get(name), device=device, dtype=dtype))
        share_towers(scorers)  # at once: there is never more than one tower too many
    return scorers


def share_towers(scorers: Sequence[Scorer]) -> None:
    """Let scorers whose image towers are equal, tensor for tensor, hold one and the same."""
    towers: list[ClipVision] = []
    for scorer in scorers:
        if isinstance(scorer, ClipScorer | Aesthetic):
            equal = [tower for tower in towers if _equal(tower, scorer.vision)]
            scorer.vision = equal[0] if equal else scorer.vision
            towers += [] if equal else [scorer.vision]


def score_all(scorers: Sequence[Scorer], pixels: Tensor, prompts: Sequence[str]) -> list[Tensor]:
    """Return each scorer's scores (B,) of pixels (B, 3, H, W): what calling it gives, but a shared tower runs once."""
    prompts = one_each(prompts, len(pixels))
    vectors: dict[ClipVision, Tensor] = {}
    columns = []
    for scorer in scorers:
        if isinstance(scorer, ClipScorer | Aesthetic):
            if scorer.vision not in vectors:
                vectors[scorer.vision] = scorer.vision(pixels)
            columns.append(scorer.of_vectors(vectors[scorer.vision], prompts))
        else:
            columns.append(scorer(pixels, prompts))
    return columns


def _equal(first: ClipVision, second: ClipVision) -> bool:
    """Whether two towers make the same vectors: sizes, preparation, precision, place and weights."""
    if first is second:
        return True
    if (first.clip, first.preprocess) != (second.clip, second.preprocess):
        return False
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)
