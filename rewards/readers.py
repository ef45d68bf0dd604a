"""What of a scorer reads prompts, apart from its weights: worker processes may do that ahead of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rewards.blipscore import BlipScore
from rewards.card import Scorer
from rewards.clip import ClipScorer
from rewards.imagereward import ImageReward


class Reader(Protocol):
    """A tokeniser. It can be pickled, without the scorer."""

    ahead: Mapping[str, list[int]]
    """The ids of texts that were read elsewhere."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, start and end included, cut where it is too long."""
        ...


def readers_of(scorers: Sequence[Scorer]) -> list[Reader]:
    """Return the tokenisers of those scorers that have one."""
    found: list[Reader] = []
    for scorer in scorers:
        if isinstance(scorer, ClipScorer):
            found.append(scorer.text.tokenizer)
        elif isinstance(scorer, ImageReward | BlipScore):
            found.append((scorer.blip if isinstance(scorer, BlipScore) else scorer).reader)
    return found
