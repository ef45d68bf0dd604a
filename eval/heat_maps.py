"""A square table as colours with its numbers, of the same names in rows and columns."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray


def heat_map(
    axis: Axes,
    values: NDArray[np.float64],
    names: Sequence[str],
    *,
    limits: tuple[float, float],
    words: Callable[[float], str],
    cells: Iterable[tuple[int, int]] | None = None,
) -> None:
    """Draw values (M, M); `limits` are those of the colours, wide enough to write on, and `cells` get their number; None = all."""
    axis.imshow(values, cmap="RdBu", vmin=limits[0], vmax=limits[1])
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    for i, j in np.ndindex(*values.shape) if cells is None else cells:
        axis.text(j, i, words(float(values[i, j])), ha="center", va="center", fontsize=9)


def finite(values: NDArray[np.float64]) -> Iterable[tuple[int, int]]:
    """Return the places of the values that are numbers."""
    return zip(*np.nonzero(np.isfinite(values)), strict=True)
