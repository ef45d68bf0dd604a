"""Several scorers as one reward: scores (B, n), optionally normalized, weighted, then summed, or the least of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from rewards.card import Scorer
from rewards.offload import Offloaded
from rewards.own_scorer import OwnReward
from rewards.pixels import one_each
from rewards.shared_towers import score_all, share_towers
from rewards.terms import Combination, Normalization, units


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Scores and rewards of B images by n scorers."""

    scores: Tensor
    """(B, n) float32, each column in its scorer's own units."""
    rewards: Tensor
    """(B,) float32, the weighted sum, or the least weighted score."""
    scorers: tuple[Scorer, ...]
    """Those of the columns."""
    prompts: Sequence[str]

    def detach(self) -> Self:
        """Return the same without the graph of gradients."""
        return replace(self, scores=self.scores.detach(), rewards=self.rewards.detach())

    def check(self) -> None:
        """Raise FloatingPointError, which names the scorer and the prompt, for a score that is not finite; a GPU is waited for."""
        scores = self.scores.detach().cpu()
        finite = scores.isfinite()
        if not finite.all():
            row, column = (int(index) for index in (~finite).nonzero()[0])
            scorer = self.scorers[column]
            raise FloatingPointError(
                f"{scorer.card.name} gave {scores[row, column].item()} for {self.prompts[row]!r}; check the image for NaN values,"
                f" and {_suspect(scorer)}"
            )


@contextmanager
def named(scored: Sequence[Mixed]) -> Iterator[None]:
    """Context of an update whose scores nobody looked at: its FloatingPointError names the scorer that gave the first of them that
    is not finite, if one did.
    """
    try:
        yield
    except FloatingPointError:
        for mixed in scored:
            mixed.check()
        raise


class Mix:
    """The weighted sum of scorers. `none` adds scores as they are, the others add (score - mean) / std: `card` with
    those of the card, `dataset` with those that data_build/score.py found on images like these (summary.json).

    With the combination `min` the reward is the least of the weighted scores instead: what one scorer alone is fooled by is not
    rewarded (worst-case optimization of Coste et al. 2023, arXiv 2310.02743, section 3). Its gradient is that of this scorer.

    Columns are in the order of the scorers, `names`. Scorers with equal image towers share one.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        weights: Mapping[str, float],
        normalization: Normalization,
        stats: Path | None = None,
        combination: Combination = "sum",
    ) -> None:
        self.names = tuple(scorer.card.name for scorer in scorers)
        if not scorers or len(set(self.names)) != len(self.names) or set(self.names) != set(weights):
            raise ValueError(
                f"a mix needs one weight for each of its scorers; scorers: {', '.join(self.names) or 'none'},"
                f" weights for: {', '.join(weights) or 'none'}"
            )
        self.scorers = tuple(scorers)
        self.weights = tuple(weights[name] for name in self.names)
        self.combination = combination
        self.units = units([scorer.card for scorer in scorers], normalization, stats)
        share_towers(self.scorers)
        self._offloaded: Offloaded | None = None

    def offload(self, device: torch.device | str) -> None:
        """Keep the weights of the scorers in the CPU's memory, and on the device from a call to the end of its backward pass."""
        modules = [scorer for scorer in self.scorers if isinstance(scorer, nn.Module)]
        self._offloaded = Offloaded(modules, device) if modules else None

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Mixed:
        """Return scores and rewards of pixels (B, 3, H, W) in [0, 1] for B prompts; gradients flow to pixels.

        FloatingPointError names the scorer whose score is not finite, with the prompt.
        """
        mixed = self.unchecked(pixels, prompts)
        mixed.check()
        return mixed

    def unchecked(self, pixels: Tensor, prompts: Sequence[str]) -> Mixed:
        """Return what a call does, but do not wait for the scores: `Mixed.check` looks at them later."""
        prompts = one_each(prompts, len(pixels))
        pixels = pixels if self._offloaded is None else self._offloaded.around(pixels)
        columns = score_all(self.scorers, pixels, prompts)
        if self._offloaded is not None and not any(column.requires_grad for column in columns):
            self._offloaded.unload()
        scores = torch.stack(columns, dim=1)
        weighted = [
            weight * ((column_scores - mean) / std)
            for weight, (mean, std), column_scores in zip(self.weights, self.units, columns, strict=True)
        ]
        rewards = (
            torch.stack(weighted).amin(0)
            if self.combination == "min"
            else sum(weighted, torch.zeros_like(columns[0]))
        )
        return Mixed(scores=scores, rewards=rewards, scorers=self.scorers, prompts=prompts)


def _suspect(scorer: Scorer) -> str:
    """Return what else may be wrong where a score is not finite."""
    return f"the function {scorer.place}" if isinstance(scorer, OwnReward) else "the precision of the scorer"
