"""Scorers of images: `load(name)` returns a function of pixels and prompts; the table of scorers needs no
torch.

>>> import rewards
>>> score = rewards.load("brightness")
>>> score(torch.ones(2, 3, 64, 64), ["white", "white too"])
tensor([1., 1.])
"""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.atomic_folder import left_behind
from rewards.card import Card, Clip, Preprocess, Scorer
from rewards.trained_cards import card_of

if TYPE_CHECKING:
    import torch

__all__ = ["CARDS", "Card", "Clip", "Preprocess", "Scorer", "check", "find_card", "load"]

_VIT_L_14 = Clip(
    embed=768,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    patch=14,
    text_width=768,
    text_layers=12,
    text_heads=12,
    activation="quick_gelu",
    tokenizer="openai",
)
_VIT_H_14 = Clip(
    embed=1024,
    vision_width=1280,
    vision_layers=32,
    vision_heads=16,
    patch=14,
    text_width=1024,
    text_layers=24,
    text_heads=16,
    activation="gelu",
    tokenizer="open_clip",
)

# Where no deviation of the scores is published, a card has a quarter of the typical range, and its middle as the mean.
_HPS_V2 = Card(
    name="hpsv2",
    module="rewards.clip",
    summary="HPS v2: CLIP ViT-H/14 tuned on human choices; the benchmark reports 100 times this cosine",
    prompted=True,
    differentiable=True,
    typical_range=(0.2, 0.35),
    mean=0.275,
    std=0.0375,
    licence="Apache-2.0",
    paper="arXiv:2306.09341",
    repo="xswu/HPSv2",
    file="HPS_v2_compressed.pt",
    preprocess=Preprocess(size=224, resize="longest", crop="pad", files="tensor"),
    clip=_VIT_H_14,
)
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
        summary="the judge of the shapes world: does the rendering follow its caption, and is it clean",
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
        mean=0.0,  # the score is already standardised over the authors' test images
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
    Card(
        name="hpsv1",
        module="rewards.clip",
        summary="HPS v1: OpenAI's CLIP ViT-L/14 tuned on human choices; the paper reports 100 times this cosine",
        prompted=True,
        differentiable=True,
        typical_range=(0.19, 0.22),
        mean=0.205,
        std=0.0075,
        licence="not stated",
        paper="arXiv:2303.14420",
        source="github.com/tgxs002/align_sd (OneDrive)",
        file="hpc.pt",
        preprocess=Preprocess(size=224),
        clip=_VIT_L_14,
    ),
    _HPS_V2,
    replace(
        _HPS_V2,
        name="hpsv2.1",
        summary="HPS v2.1: HPS v2 with better training data",
        file="HPS_v2.1_compressed.pt",
    ),
    Card(
        name="pickscore",
        module="rewards.clip",
        summary="PickScore v1: CLIP ViT-H/14 tuned on the choices of Pick-a-Pic; 100 times a cosine",
        prompted=True,
        differentiable=True,
        typical_range=(20.0, 22.0),
        mean=21.0,
        std=0.5,
        licence="not stated",
        paper="arXiv:2305.01569",
        repo="yuvalkirstain/PickScore_v1",
        file="model.safetensors",
        preprocess=Preprocess(size=224, crop_offset="floor", files="rgb"),
        clip=replace(_VIT_H_14, tokenizer="transformers", scaled=True),
    ),
    Card(
        name="clipscore",
        module="rewards.clip",
        summary="CLIP score: the cosine of OpenAI's CLIP ViT-L/14, as it is (no factor, nothing cut off at 0)",
        prompted=True,
        differentiable=True,
        typical_range=(0.15, 0.35),
        mean=0.25,
        std=0.05,
        licence="MIT",
        paper="arXiv:2103.00020",
        repo="openai/clip-vit-large-patch14",
        file="model.safetensors",
        preprocess=Preprocess(size=224),
        clip=_VIT_L_14,
    ),
    Card(
        name="aesthetic",
        module="rewards.aesthetic",
        summary="LAION's aesthetic predictor: linear layers on clipscore's image tower, a scale of 1 to 10",
        prompted=False,
        differentiable=True,
        typical_range=(4.0, 7.0),
        mean=5.5,
        std=0.75,
        licence="Apache-2.0",
        paper="none",
        source="github.com/christophschuhmann/improved-aesthetic-predictor",
        file="sac+logos+ava1-l14-linearMSE.pth",
        num_bytes=3_714_759,
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        preprocess=Preprocess(size=224),
        clip=_VIT_L_14,
    ),
    Card(
        name="blipscore",
        module="rewards.blipscore",
        summary="BLIP score: the cosine of BLIP ViT-L, each tower reading on its own",
        prompted=True,
        differentiable=True,
        typical_range=(0.2, 0.5),
        mean=0.35,
        std=0.075,
        licence="BSD-3-Clause",
        paper="arXiv:2201.12086",
        source="storage.googleapis.com/sfr-vision-language-research/BLIP/models",
        file="model_large.pth",
        preprocess=Preprocess(size=224),
    ),
)

CARDS: dict[str, Card] = {card.name: card for card in _CARDS}


def find_card(name: str) -> Card:
    """Return the card of a scorer of the table, or of one that was trained here and is called by its folder's path.

    ValueError for a name that is neither, and for a folder that is no scorer's.
    """
    if name in CARDS:
        return CARDS[name]
    if not name or not Path(name).is_dir():
        if name and (previous := left_behind(Path(name))) is not None:
            raise ValueError(
                f"{name} is missing, because a write of it was cut short; its last state is {previous}: rename it to {name}"
            )
        raise ValueError(
            f"unknown scorer {name!r}; one of {', '.join(CARDS)}, or the folder of one that was trained here"
        )
    return card_of(name)


def load(
    name: str,
    *,
    weights: Path | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> Scorer:
    """Return a scorer, frozen and in eval mode, its towers in dtype (None is float32); `name` as for `find_card`.

    `weights` names a file or folder to use instead of the card's own. ValueError when the name is unknown,
    when weights are missing, damaged or not this scorer's, or when weights are given to a scorer that has
    none.
    """
    import torch

    card = _card(name, weights)
    module = importlib.import_module(card.module)
    return module.load_scorer(card, weights, device, torch.float32 if dtype is None else dtype)


def check(name: str, weights: Path | None = None) -> tuple[Path, ...]:
    """Return the files that `load` would read; raises what it would about the name and missing or altered ones."""
    card = _card(name, weights)
    return importlib.import_module(card.module).find_files(card, weights) if card.has_weights else ()


def _card(name: str, weights: Path | None) -> Card:
    card = find_card(name)
    if weights is not None and name not in CARDS:
        raise ValueError(
            f"{name} has weights of its own, but {weights} was given for it; leave the weights out"
        )
    if weights is not None and not card.has_weights:
        raise ValueError(f"{name} has no weights, but {weights} was given for it; leave the weights out")
    return card
