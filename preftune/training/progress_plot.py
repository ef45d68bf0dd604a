"""Plot of a run's validations: what is optimised beside what is not, each in standard deviations of the base's scores over prompts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from preftune.images import save_figure
from preftune.statistics import bootstrap, paired
from preftune.training.guard_rule import Moment, best_of, standing
from preftune.training.validation import Validation, short_names

FILE = "progress.png"
Floats = NDArray[np.float64]


def draw(
    folder: Path, moments: Sequence[Moment], found: Sequence[Validation], weights: Mapping[str, float]
) -> None:
    """Write RUN/progress.png of the validations so far, the first of which is the base; nothing for that one alone.

    Left: means over prompts of the change since the base with 95 % bootstrap intervals, of the proxy, the held-out scorers and, in
    the shapes world, gold. Right: diversity and statistics of the images, relative to the base's.
    """
    if len(moments) < 2:
        return
    updates = [moment.updates for moment in moments]
    margins = {
        "left": 0.05,
        "right": 0.99,
        "bottom": 0.12,
        "top": 0.92,
        "wspace": 0.12,
    }  # a layout would draw everything twice
    figure, (scores, images) = plt.subplots(1, 2, figsize=(11, 4), gridspec_kw=margins)
    for name, changes in _changes(moments, found, weights):
        rows = np.array([bootstrap.mean(change, resamples=2000) for change in changes])
        (line,) = scores.plot(updates, rows[:, 0], marker=".", label=name)
        scores.fill_between(updates, rows[:, 1], rows[:, 2], color=line.get_color(), alpha=0.15)
    scores.axhline(0, color="0.6", linewidth=0.8)
    best = best_of(moments, weights)
    if best is not None:
        scores.axvline(
            updates[best], color="0.4", linestyle=":", label=f"best held-out, {updates[best]} updates"
        )
    scores.set_title("change since the base, in its standard deviations over prompts", fontsize=10)
    for name, values in _relative(moments, found):
        images.plot(updates, values, marker=".", label=name)
    images.axhline(1, color="0.6", linewidth=0.8)
    images.set_title("images, relative to the base's", fontsize=10)
    for axis in (scores, images):
        axis.set_xlabel("updates")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, folder / FILE)


def _changes(
    moments: Sequence[Moment], found: Sequence[Validation], weights: Mapping[str, float]
) -> Iterator[tuple[str, list[Floats]]]:
    """Yield (name, standardised change of each moment (P,)) of what all validations have scored."""
    gold = [None if one.gold is None else np.asarray(one.gold) for one in found]
    for name, values in (("proxy", [one.proxy for one in moments]), ("gold", gold)):
        arrays = [value[:, None] for value in values if value is not None]
        if len(arrays) == len(moments):
            base = arrays[0]
            changes = [paired.standardised(paired.paired_differences(base, one), base) for one in arrays]
            if np.isfinite(changes).all():
                yield name, changes
    standings = [standing(moments[0], moment, weights) for moment in moments]
    known = [one for one in standings if one is not None]
    if len(known) == len(moments):
        yield "held-out: " + ", ".join(short_names(weights).values()), known


def _relative(moments: Sequence[Moment], found: Sequence[Validation]) -> Iterator[tuple[str, list[float]]]:
    """Yield (name, value of each moment divided by the base's)."""
    columns = {"diversity (Vendi)": [one.diversity for one in moments]}
    for name in found[0].statistics:
        columns[name] = [
            float(np.mean(one.statistics[name])) if name in one.statistics else None for one in found
        ]
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        if len(known) == len(values) and known[0] > 0:
            yield name, [value / known[0] for value in known]
