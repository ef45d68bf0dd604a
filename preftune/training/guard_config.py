"""The flags of the guard against over-optimisation (preftune/training/guard.py); needs no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from rewards.terms import parse_weights


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Held-out scorers, and what happens when a run leaves what they like."""

    holdout_rewards: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="Scorers that are never optimised, NAME or NAME=WEIGHT as in --rewards: they score the validation images beside the"
            " proxy, choose RUN/best and raise the alarm. Choose ones of another backbone than --rewards."
        ),
    ] = ()
    guard: Literal["warn", "stop", "off"] = "warn"
    """At an alarm, which is when held-out scores fall or diversity is lost: warn, or stop the run and keep RUN/best; off = never look."""
    guard_diversity_drop: float = 0.25
    """Share of the base's diversity (Vendi score of the validation images), in (0, 1], beyond whose loss there is an alarm."""

    def __post_init__(self) -> None:
        if not 0 < self.guard_diversity_drop <= 1:
            raise ValueError(
                f"--guard-diversity-drop must lie in (0, 1], got {self.guard_diversity_drop:g}; 0.25 is a quarter of the base's diversity"
            )

    def weights(self) -> dict[str, float]:
        """Return held-out scorer -> weight; ValueError for a wrong term, and for a weight that is not positive."""
        if not self.holdout_rewards:
            return {}
        weights = parse_weights(self.holdout_rewards, "--holdout-rewards")
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(
                    f"--holdout-rewards {name}={weight:g} must have a positive weight: what it likes is better"
                )
        return weights

    def check(self, trained: Collection[str]) -> Mapping[str, float]:
        """Return the weights; ValueError for a scorer that is trained on."""
        weights = self.weights()
        if both := [name for name in weights if name in trained]:
            raise ValueError(
                f"--holdout-rewards {both[0]} is in --rewards as well; a scorer that is optimised cannot tell whether the images got better"
            )
        return weights
