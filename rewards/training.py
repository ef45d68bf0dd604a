"""Scorers with trainable weights: CLIP and ImageReward. A new head can be added to CLIP's towers and to
BLIP's.

Training can start from any learned scorer of the table, or from a folder that `save` wrote. `freeze` keeps
a part of each tower fixed: a share of its layers from the bottom (ImageReward), or all but the last layers
(HPS, Stable Preference).

Shapes: B batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from torch import Tensor, nn

import rewards
from rewards import blipscore, own
from rewards.card import Card, Head
from rewards.clip import ClipScorer
from rewards.imagereward import ImageReward
from rewards.towers import Tower

_STARTS = {
    name: card
    for name, card in rewards.CARDS.items()
    if card.module in ("rewards.clip", "rewards.imagereward", "rewards.blipscore")
}


class Trainable(Protocol):
    """Interface of a scorer in float32 whose weights can be trained and saved (a module)."""

    @property
    def card(self) -> Card:
        """Return the card, whose `preprocess` says how images in files are prepared."""
        ...

    def raw(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what losses are computed on, (B,) float32, of pixels (B, 3, H, W) in [0, 1]; gradients reach all weights.

        ImageReward: the head's output before mean and deviation. CLIP: exp(logit_scale) times the cosine, or its head's output.
        """
        ...

    def towers(self) -> tuple[Tower, Tower]:
        """Return the image tower and the text tower."""
        ...

    def set_statistics(self, mean: float, std: float) -> None:
        """Set the mean and deviation of raw scores over held-out images, which `save` writes."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that `rewards.load` and `load_trainable` take as a scorer's name, weights in the authors' names."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all weights."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch training mode, and with it dropout, on or off."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...


def check_trainable(
    model: str, weights: Path | None = None, *, head: Head = "own", dropout: float | None = None
) -> None:
    """Raise ValueError where `load_trainable` would for a name, a setting or a missing file; reads no weights."""
    if own.is_own(model) or (model in rewards.CARDS and model not in _STARTS):
        raise ValueError(
            f"{model} cannot be trained here; one of {', '.join(_STARTS)}, or a folder that training wrote"
        )
    card = rewards.find_card(model)
    if head not in get_args(Head):
        raise ValueError(f"unknown head {head!r}; one of {', '.join(get_args(Head))}")
    has_head = card.clip is None or card.clip.head_dropout is not None
    if head == "mlp" and has_head:
        raise ValueError(f"head 'mlp' is for a CLIP without one; {model} has such a head of its own")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"the dropout of a head must lie in [0, 1), got {dropout}")
    if dropout is not None and head == "own" and not has_head:
        raise ValueError(f"{model} has no head, whose dropout could be {dropout}; head 'mlp' puts one on it")
    rewards.check_all([model], {} if weights is None else {model: weights}, download=False)


def load_trainable(
    model: str,
    weights: Path | None = None,
    seed: int = 0,
    *,
    head: Head = "own",
    dropout: float | None = None,
) -> Trainable:
    """Return a scorer in float32 and in training mode, all of its weights requiring gradients.

    `model` is a scorer of the table or a folder that `save` wrote, `weights` a file to use instead of the card's own. From
    `blipscore` comes an ImageReward with BLIP's towers and a new head, drawn from the seed, as its authors start. Head "mlp"
    puts a new head, drawn from the seed, on a CLIP, and calls return its output (ImageReward, Table 2b: see rewards.clip);
    "own" is what the model has. `dropout`, in [0, 1), is that of the head everywhere; None = the architecture's own.
    ValueError, before weights are read, for scorers that cannot be trained, "mlp" where there is such a head already, and a
    dropout out of range or without a head.
    """
    check_trainable(model, weights, head=head, dropout=dropout)
    loaded = (
        blipscore.start(rewards.find_card(model), weights, seed)
        if model == "blipscore"
        else rewards.load(model, weights=weights)
    )
    scorer = cast(ClipScorer | ImageReward, loaded)
    if head == "mlp":
        scorer.renew_head(seed)
    if dropout is not None:
        scorer.set_dropout(dropout)
    return scorer.train().requires_grad_(True)


def freeze(scorer: Trainable, share: float | None = None, last: tuple[int, int] | None = None) -> None:
    """Leave weights as they are: a share of each tower's layers from the bottom, or all but the last (image, text) layers.

    The embeddings stay with the layers, unless the share is 0; final norms, projections and heads train. ImageReward's authors
    freeze a share of 0.7, HPS v1 keeps the last (10, 6) layers, Stable Preference (18, 8). What no score depends on never trains:
    ImageReward's projections for pre-training, and the scale of a CLIP with a head. ValueError for both, a share out of [0, 1]
    or too many layers.
    """
    if share is not None and last is not None:
        raise ValueError(f"freeze a share ({share}) or keep the last layers {last}, not both")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"the frozen share must lie in [0, 1], got {share}")
    if isinstance(scorer, ImageReward):
        scorer.vision_proj.requires_grad_(False)
        scorer.text_proj.requires_grad_(False)
    if isinstance(scorer, ClipScorer) and scorer.mlp is not None:
        scorer.logit_scale.requires_grad_(False)
    for index, (tower, kind) in enumerate(zip(scorer.towers(), ("image", "text"), strict=True)):
        layers = len(tower.layers)
        if last is not None and not 0 <= last[index] <= layers:
            raise ValueError(f"the last layers of the {kind} tower must be 0 to {layers}, got {last[index]}")
        frozen = int(layers * (share or 0)) if last is None else layers - last[index]
        if share or last is not None:
            for part in (*tower.embeddings, *tower.layers[:frozen]):
                part.requires_grad_(False)
