"""Scorers of images: `load(name)` returns a function of pixels and prompts; the table of scorers needs no
torch.

>>> import rewards
>>> score = rewards.load("brightness")
>>> score(torch.ones(2, 3, 64, 64), ["white", "white too"])
tensor([1., 1.])
"""

import difflib
import importlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rewards import embedded, own
from rewards.atomic_folder import left_behind
from rewards.card import Card, Clip, Preprocess, Scorer
from rewards.trained_cards import card_of

if TYPE_CHECKING:
    import torch

__all__ = ["CARDS", "Card", "Clip", "Preprocess", "Scorer", "check", "check_all", "find_card", "load"]

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
    about_bytes=4 * 986_109_441,
    preprocess=Preprocess(size=224, resize="longest", crop="pad", files="tensor"),
    clip=_VIT_H_14,
)
_JPEG = Card(
    name="jpeg-compressibility",
    module="rewards.jpeg_size",
    summary="minus the size of the image as a JPEG file of quality 95, in kB: the lower the detail, the better",
    prompted=False,
    differentiable=False,
    typical_range=(-200.0, -50.0),  # of 512 pixels; it grows with the number of pixels
    mean=-125.0,
    std=37.5,
    licence="Apache-2.0",
    paper="arXiv:2305.13301",
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
        module="rewards.shapes_judge",
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
        about_bytes=4 * 427_616_513,
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
        about_bytes=4 * 986_109_441,
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
        about_bytes=4 * 427_616_513,
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
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        file="sac+logos+ava1-l14-linearMSE.pth",
        num_bytes=3_714_759,
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        preprocess=Preprocess(size=224),
        clip=_VIT_L_14,
        needs=("clipscore",),
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
        url="https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large.pth",
        file="model_large.pth",
        preprocess=Preprocess(size=224),
    ),
    _JPEG,
    replace(
        _JPEG,
        name="jpeg-incompressibility",
        summary="the size of the image as a JPEG file of quality 95, in kB: the more detail, the better",
        typical_range=(50.0, 200.0),
        mean=125.0,
    ),
)

CARDS: dict[str, Card] = {card.name: card for card in _CARDS}


def find_card(name: str) -> Card:
    """Return the card of a scorer of the table, of one that was trained here and is called by its folder's path, or of a
    reward of the user's own (rewards.own), whose file is not run.

    ValueError for a name that is none of them, for a folder that is no scorer's, and for a file without that function.
    """
    if name in CARDS:
        if own.is_given(name):
            raise ValueError(f"{name} is a scorer of the table; give your own reward another name")
        return CARDS[name]
    if own.is_own(name):
        return own.card_of(name)
    if not name or not embedded.find(name).is_dir():
        if name and (previous := left_behind(Path(name))) is not None:
            raise ValueError(
                f"{name} is missing, because a write of it was cut short; its last state is {previous}: rename it to {name}"
            )
        near = difflib.get_close_matches(name, CARDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"unknown scorer {name!r}{hint}; one of {', '.join(CARDS)}, or the folder of one that was trained here, or"
            " FILE.py:FUNCTION for a function of your own"
        )
    return card_of(name)


def check_differentiable(name: str, flag: str) -> None:
    """Raise ValueError, which names the flag, for a scorer without a gradient, and as `find_card`."""
    if not find_card(name).differentiable:
        usable = ", ".join(card.name for card in CARDS.values() if card.differentiable)
        raise ValueError(f"{flag} {name} is not differentiable, but its gradient is needed; one of {usable}")


def load(
    name: str,
    *,
    weights: Path | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> Scorer:
    """Return a scorer, frozen and in eval mode, its towers in dtype (None is float32); `name` as for `find_card`.

    `weights` names a file or folder to use instead of the card's own; without it, published weights are
    downloaded as by `check`. ValueError when the name is unknown, when weights are missing, damaged or not this
    scorer's, or when weights are given to a scorer that has none.
    """
    import torch

    card = _card(name, weights)
    _obtain([card], {} if weights is None else {name: weights})
    module = importlib.import_module(card.module)
    return module.load_scorer(card, weights, device, torch.float32 if dtype is None else dtype)


def check(name: str, weights: Path | None = None) -> tuple[Path, ...]:
    """Return the files that `load` would read; missing ones are downloaded, and ValueError as `check_all`."""
    return check_all([name], {} if weights is None else {name: weights})[name]


def check_all(
    names: Collection[str], files: Mapping[str, Path], *, download: bool = True
) -> dict[str, tuple[Path, ...]]:
    """Return, by name, the files that scorers would be loaded from; `files` gives weights to use instead of a card's own.

    Published weights that are not on this machine are downloaded from the hub (rewards/download.py). Without
    `download`, scorers that wait for one have no entry. ValueError for an unknown name, and for altered files;
    one ValueError names all missing weights that cannot be downloaded.
    """
    cards = {name: _card(name, files.get(name)) for name in names}
    waiting = _obtain(cards.values(), files, download=download)
    return {
        name: importlib.import_module(card.module).find_files(card, files.get(name))
        if card.has_weights or card.module == own.MODULE
        else ()
        for name, card in cards.items()
        if not waiting & {name, *card.needs}
    }


def _obtain(cards: Collection[Card], files: Mapping[str, Path], *, download: bool = True) -> set[str]:
    """Return the names of scorers whose weights are not here; with `download` there are none."""
    needed = dict.fromkeys(needed for card in cards for needed in _needed(card, files.get(card.name)))
    if not needed:
        return set()
    from rewards.download import obtain, to_download  # needs torch, which the table does not

    if download:
        obtain(needed)
        return set()
    return {card.name for card in to_download(needed)}


def _needed(card: Card, weights: Path | None) -> list[Card]:
    """Return the cards whose own weights are read: this one unless `weights` are given, and those that it needs.

    What a card needs may stand beside the given weights.
    """
    others = [CARDS[name] for name in card.needs]
    if weights is None:
        return [card, *others] if card.has_weights else others
    folder = weights if weights.is_dir() else weights.parent
    return [other for other in others if not (folder / str(other.file)).is_file()]


def _card(name: str, weights: Path | None) -> Card:
    card = find_card(name)
    if weights is not None and card.module == own.MODULE:
        raise ValueError(
            f"{name} is a function of your own, which loads its weights itself; leave {weights} out"
        )
    if weights is not None and name not in CARDS:
        raise ValueError(
            f"{name} has weights of its own, but {weights} was given for it; leave the weights out"
        )
    if weights is not None and not card.has_weights:
        raise ValueError(f"{name} has no weights, but {weights} was given for it; leave the weights out")
    return card
