"""How far the answers of a model can be trusted: its agreement with itself in two orders, and what the place of an image is worth.

An honest annotator says the same of two images whichever is shown first. All numbers are of pairs of images that were shown together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_build.aspect_rules import of_scores
from data_build.mllm_tasks import SHARE, Answer, Task

Z = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def preferences(task: Task, answer: Answer) -> dict[tuple[int, int], float]:
    """Return (place that is shown earlier, place that is shown later) -> how far the earlier is preferred: 1, 0.5 or 0."""
    if answer.choice is not None:
        return {(task.shown[0], task.shown[1]): SHARE[answer.choice]}
    found = of_scores(answer.scores).preferences
    return {(task.shown[i], task.shown[j]): share for (i, j), share in found.items() if share is not None}


@dataclass
class Quality:
    """Counts over the groups of a data set; `see` each group once."""

    same: int = 0
    """Pairs that both orders decide alike."""
    opposite: int = 0
    half: int = 0
    """Pairs that one order decides and the other ties."""
    tied: int = 0
    """Pairs that both orders tie."""
    places: dict[int, list[int]] = field(default_factory=dict)
    """Place -> sum and number of the scores that were given there."""
    earlier: list[float] = field(default_factory=list)
    """For each group the share of its decided pairs whose earlier image is better."""

    def see(self, answers: Sequence[tuple[Task, Answer]]) -> None:
        """Add what was said of a group."""
        decided, by_pair = list[float](), dict[tuple[str, int, int], dict[int, float]]()
        for task, answer in answers:
            for (one, other), share in preferences(task, answer).items():
                if share != 0.5:
                    decided.append(share)
                low = min(one, other)
                pair = by_pair.setdefault((task.template.name, low, max(one, other)), {})
                pair[task.order] = share if one == low else 1 - share
            if len(task.shown) > 1:
                for place, score in enumerate(answer.scores):
                    total = self.places.setdefault(place, [0, 0])
                    total[0] += score
                    total[1] += 1
        if decided:
            self.earlier.append(sum(decided) / len(decided))
        for pair in by_pair.values():
            if len(pair) == 2:
                self._compare(pair)

    def _compare(self, pair: Mapping[int, float]) -> None:
        first, second = pair[0], pair[1]
        if 0.5 in (first, second):
            self.tied += first == second
            self.half += first != second
        else:
            self.same += first == second
            self.opposite += first != second

    def summary(self) -> dict[str, Any]:
        """Return the measures; None where there is nothing to measure."""
        both = self.same + self.opposite
        pairs = both + self.half + self.tied
        return {
            "pairs_in_two_orders": pairs,
            "agreement_of_orders": self.same / both if both else None,
            "agreement_with_ties": (self.same + self.tied) / pairs if pairs else None,
            "mean_score_by_place": [total / number for _, (total, number) in sorted(self.places.items())]
            or None,
            "earlier_is_better": mean_interval(self.earlier) if self.earlier else None,
        }


def mean_interval(values: Sequence[float]) -> list[float | None]:
    """Return a mean and its 95 % interval of independent values, by the normal distribution; without bounds for one value alone."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return [mean, None, None]
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return [mean, mean - Z * error, mean + Z * error]


def in_words(summary: Mapping[str, Any]) -> list[str]:
    """Return lines to print."""
    lines = []
    if (agreement := summary["agreement_of_orders"]) is not None:
        lines.append(
            f"two orders agree on {100 * agreement:.1f} % of the pairs that both decide, on"
            f" {100 * summary['agreement_with_ties']:.1f} % of {summary['pairs_in_two_orders']:,} pairs with ties"
        )
    if (places := summary["mean_score_by_place"]) is not None:
        means = " ".join(f"{mean:.2f}" for mean in places)
        lines.append(f"position: mean score by place {means}")
    if (earlier := summary["earlier_is_better"]) is not None:
        mean, low, high = earlier
        interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(
            f"position: the image that is shown earlier wins {100 * mean:.1f} %{interval} of decided pairs; 50 is no bias"
        )
    return lines
