"""Several scorers, one reward: columns of scores (B, n), in common units if asked, weighted at the end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewards import CARDS
from rewards.card import Scorer


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What a mix of n scorers says about B pictures."""

    scores: Tensor
    """(B, n) float32, each column in its scorer's own units."""
    rewards: Tensor
    """(B,) float32, the weighted sum."""


class Mix:
    """The weighted sum of scorers. `raw` adds scores as they are, `card` adds (score - mean) / std of the card.

    Columns stand in the order of scorers, and `names` says whose they are.
    """

    def __init__(
        self, scorers: Sequence[Scorer], weights: Mapping[str, float], normalise: Literal["raw", "card"]
    ) -> None:
        self.names = tuple(scorer.card.name for scorer in scorers)
        if not scorers or len(set(self.names)) != len(self.names) or set(self.names) != set(weights):
            raise ValueError(
                f"a mix needs one weight for each of its scorers; scorers: {', '.join(self.names) or 'none'},"
                f" weights for: {', '.join(weights) or 'none'}"
            )
        if normalise not in ("raw", "card"):
            raise ValueError(f"unknown normalise {normalise!r}; one of raw, card")
        self.scorers = tuple(scorers)
        self.weights = tuple(weights[name] for name in self.names)
        self.normalise = normalise

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Mixed:
        """Return scores and rewards of pixels (B, 3, H, W) in [0, 1] for B prompts; gradients flow to pixels.

        FloatingPointError names the scorer whose score is not finite, with the prompt.
        """
        columns = [scorer(pixels, prompts) for scorer in self.scorers]
        scores = torch.stack(columns, dim=1)
        finite = scores.detach().isfinite()
        if not finite.all():  # one synchronisation for all scorers
            row, column = (int(index) for index in (~finite).nonzero()[0])
            raise FloatingPointError(
                f"{self.names[column]} gave {scores[row, column].item()} for {prompts[row]!r};"
                " look at the picture for values that are not numbers, and at the scorer's precision"
            )
        rewards = torch.zeros_like(columns[0])
        for scorer, weight, column_scores in zip(self.scorers, self.weights, columns, strict=True):
            if self.normalise == "card":
                column_scores = (column_scores - scorer.card.mean) / scorer.card.std
            rewards = rewards + weight * column_scores
        return Mixed(scores=scores, rewards=rewards)


def parse_weights(terms: Sequence[str]) -> dict[str, float]:
    """Return {"imagereward": 1.0, "brightness": 0.5} for ["imagereward=1.0", "brightness=0.5"], in that order.

    ValueError names the term that is malformed, repeated, zero, not finite, or of an unknown scorer.
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, equals, text = term.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not equals or not math.isfinite(weight) or weight == 0:
            raise ValueError(
                f"reward {term!r} is not scorer=weight with a finite weight other than 0, as in shapes=1.0"
            )
        if name not in CARDS:
            raise ValueError(f"reward {term!r} names an unknown scorer; one of {', '.join(CARDS)}")
        if name in weights:
            raise ValueError(f"reward {term!r} repeats {name}; give it one weight")
        weights[name] = weight
    if not weights:
        raise ValueError(
            f"no reward is given; name at least one scorer=weight with one of {', '.join(CARDS)}"
        )
    return weights
