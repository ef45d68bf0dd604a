"""Learned scorers of pictures: `load(name)` gives a function of pixels and prompts; the table needs no torch.

>>> import rewards
>>> score = rewards.load("brightness")
>>> score(torch.ones(2, 3, 64, 64), ["white", "white too"])
tensor([1., 1.])
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.card import Card, Preprocess, Scorer

if TYPE_CHECKING:
    import torch

__all__ = ["CARDS", "Card", "Preprocess", "Scorer", "check", "load"]

_CARDS = (
    Card(
        name="brightness",
        module="rewards.brightness",
        summary="the mean of all pixels: no weights, for tests and for a first read",
        prompted=False,
        differentiable=True,
        typical_range=(0.0, 1.0),
        mean=0.5,
        std=0.15,
        licence="Apache-2.0",
        paper="none",
    ),
    Card(
        name="shapes",
        module="rewards.shapes",
        summary="the judge of the shapes world: does the drawing follow its caption, and is it clean",
        prompted=True,
        differentiable=False,
        typical_range=(0.0, 1.0),
        mean=0.5,
        std=0.25,
        licence="Apache-2.0",
        paper="none",
    ),
    Card(
        name="imagereward",
        module="rewards.imagereward",
        summary="ImageReward-v1.0: BLIP ViT-L tuned on human rankings",
        prompted=True,
        differentiable=True,
        typical_range=(-2.0, 2.0),
        mean=0.0,  # the score is already standardised over the authors' test pictures
        std=1.0,
        licence="Apache-2.0",
        paper="arXiv:2304.05977",
        repo="zai-org/ImageReward",
        file="ImageReward.pt",
        num_bytes=1_786_880_927,
        sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
        preprocess=Preprocess(size=224),
    ),
    Card(
        name="imagereward-tiny",
        module="rewards.imagereward",
        summary="ImageReward's architecture, trained on rankings of the shapes world",
        prompted=True,
        differentiable=True,
        typical_range=(-2.0, 2.0),
        mean=0.0,
        std=1.0,
        licence="Apache-2.0",
        paper="arXiv:2304.05977",
        folder="assets/tiny/imagereward",
        preprocess=Preprocess(size=64),
    ),
)

CARDS: dict[str, Card] = {card.name: card for card in _CARDS}


def load(
    name: str,
    *,
    weights: Path | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> Scorer:
    """Return a scorer, frozen and in eval mode, its towers in dtype (None is float32).

    `weights` names a file or folder to use instead of the card's own. ValueError when the name is unknown,
    when weights are missing, damaged or not this scorer's, or when weights are given to a scorer that has
    none.
    """
    import torch

    card = _card(name, weights)
    module = importlib.import_module(card.module)
    return module.load_scorer(card, weights, device, torch.float32 if dtype is None else dtype)


def check(name: str, weights: Path | None = None) -> None:
    """Raise what `load` would raise about the name and missing or altered files, without reading weights."""
    card = _card(name, weights)
    if card.has_weights:
        importlib.import_module(card.module).find_files(card, weights)


def _card(name: str, weights: Path | None) -> Card:
    if name not in CARDS:
        raise ValueError(f"unknown scorer {name!r}; one of {', '.join(CARDS)}")
    card = CARDS[name]
    if weights is not None and not card.has_weights:
        raise ValueError(f"{name} has no weights, but {weights} was given for it; leave the weights out")
    return card
