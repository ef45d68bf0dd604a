"""Plot of the training of a reward model: overfitting shows as held-out accuracy below training accuracy."""

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from preftune.images import save_figure
from preftune.records import read_jsonl


def plot(folder: Path) -> None:
    """Write RUN/accuracy.png of RUN/metrics.jsonl: training (mean of the updates between) and held-out accuracy, and loss."""
    rows = read_jsonl(folder / "metrics.jsonl")
    held = [(row["step"] + 1, row["validation_accuracy"]) for row in rows if "validation_accuracy" in row]
    if not held:
        return
    bounds = [0, *(step for step, _ in held)]
    steps = np.array([row["step"] for row in rows if "accuracy" in row])
    between = [(steps >= low) & (steps < high) for low, high in pairwise(bounds)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, name, title in (
        (axes[0], "accuracy", "share of pairs in the right order"),
        (axes[1], "loss", "loss"),
    ):
        values = np.array([row[name] for row in rows if "accuracy" in row])
        means = [values[part].mean() if part.any() else np.nan for part in between]
        axis.plot([step for step, _ in held], means, marker=".", label="training pairs")
        axis.set_xlabel("updates")
        axis.set_title(title, fontsize=10)
    axes[0].plot(*zip(*held, strict=True), marker=".", label="held-out pairs")
    axes[0].legend()
    save_figure(figure, folder / "accuracy.png")
