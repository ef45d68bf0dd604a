"""When a run over-optimises its reward, and which of its checkpoints is the best: decided by scorers that it never trains on.

At each validation the same prompts are sampled with the same seeds. A held-out scorer's *standing* is, for each prompt, its score less
the base's, in standard deviations of the base's scores over prompts; of several scorers the weighted mean of their standings is taken.

- The best checkpoint is the one with the highest mean standing. The base is one of them, with standing 0.
- *over-optimisation*: since the best checkpoint the held-out standing has fallen, the 95 % bootstrap interval of the paired difference
  lies below 0, and the mean proxy has not fallen. Rising proxy and falling gold is Gao et al.'s picture (arXiv 2210.10760, figure 1).
- *decline*: the held-out standing has fallen in the same way, and the proxy with it: the training breaks the model.
- *diversity*: the Vendi score of the images has lost more than a stated share of the base's.

P prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from preftune.statistics import bootstrap, paired

Floats = NDArray[np.float64]
Kind = Literal["over-optimisation", "decline", "diversity"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What one validation found."""

    updates: int
    proxy: Floats | None
    """Rewards (P,); None without trained scorers."""
    holdout: Mapping[str, Floats]
    """Held-out scorer -> scores (P,)."""
    diversity: float | None
    """Vendi score of the P images; None where nothing makes features of them."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Why a run should stop."""

    kind: Kind
    updates: int
    best: int
    """Updates of the best checkpoint."""
    change: tuple[float, float, float]
    """Held-out standing since the best checkpoint with its 95 % interval; of `diversity` the Vendi scores then and now, and the share lost."""


def standing(base: Moment, now: Moment, weights: Mapping[str, float]) -> Floats | None:
    """Return the weighted mean of the held-out scorers' standardised paired differences, (P,).

    None without a scorer that tells the base's images apart.
    """
    columns: list[Floats] = []
    shares: list[float] = []
    for name, weight in weights.items():
        if name in base.holdout and name in now.holdout:
            before = base.holdout[name][:, None]
            differences = paired.paired_differences(before, now.holdout[name][:, None])
            column = paired.standardised(differences, before)
            if np.isfinite(column).all():
                columns.append(column)
                shares.append(weight)
    return np.average(columns, axis=0, weights=shares) if columns else None


def best_of(moments: Sequence[Moment], weights: Mapping[str, float]) -> int | None:
    """Return the index of the moment with the highest mean standing, of equal ones the first; None where none has one."""
    found = [standing(moments[0], moment, weights) for moment in moments]
    means = [-np.inf if values is None else float(values.mean()) for values in found]
    return int(np.argmax(means)) if means and max(means) > -np.inf else None


def alarm(moments: Sequence[Moment], weights: Mapping[str, float], drop: float) -> Alarm | None:
    """Return what is wrong with the last of the moments, the first of which is the base; None where nothing is.

    `drop` is the share of the base's diversity, in (0, 1], beyond whose loss it is an alarm.
    """
    base, now = moments[0], moments[-1]
    best = best_of(moments, weights)
    if best is not None and best < len(moments) - 1:
        then, after = (standing(base, moment, weights) for moment in (moments[best], now))
        if then is not None and after is not None:
            change = bootstrap.mean(after - then)
            if change[2] < 0:  # False where the bound is NaN: a single prompt
                kind: Kind = "decline" if _fell(moments[best].proxy, now.proxy) else "over-optimisation"
                return Alarm(kind=kind, updates=now.updates, best=moments[best].updates, change=change)
    if base.diversity is not None and now.diversity is not None:
        lost = 1 - now.diversity / base.diversity
        if lost > drop:
            found = base.diversity, now.diversity, lost
            return Alarm(kind="diversity", updates=now.updates, best=moments[best or 0].updates, change=found)
    return None


def _fell(before: Floats | None, after: Floats | None) -> bool:
    """Whether the mean proxy is lower than before."""
    return before is not None and after is not None and float(after.mean()) < float(before.mean())
