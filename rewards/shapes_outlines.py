"""Which of the four shapes an outline is, in the shapes world: the nearest of a bank of outlines.

The bank holds every shape crisp, blurred, and wobbled by several strengths and phases, each scaled to the same
area and centre, as the outline that is compared is. A blurred or wobbly square is therefore still a square. What is far
from all of them, as a line or a ring is, is none of the shapes.
"""

from functools import cache

import numpy as np
from scipy import ndimage

from rewards.shapes import SHAPES, Floats, coverage, wobbled

_CELLS, _REACH = 24, 2.0  # outlines are compared on 24 x 24 cells that reach two radii from the centre
_STEP = 2 * _REACH / _CELLS
_CELL = _STEP**2 / np.pi  # the area of a cell, in parts of an outline's
_BLURS = (0.0, 0.12, 0.22, 0.32)  # standard deviations, radii
_WOBBLES = (0.25, 0.5, 0.75, 1.0)  # strengths; each is blurred by a pixel or so, too
_PHASES = 2 * np.pi * np.arange(6) / 6
_WOBBLE_COST = 0.08  # as if this part of the area differed, at strength 1: a shape is as plain as it can be
_NONE = 0.3  # a distance beyond which an outline (a line, a ring) is of no shape; those of wobble 1 stay below 0.16
_NOISE = 0.005  # mean squared difference, in parts of the area, that makes a shape e times less likely


def _scaled(outline: Floats, x: float, y: float, radius: float) -> Floats:
    """Return an outline (h, w) with this centre and radius on the cells, flat."""
    first = radius * (_REACH - _STEP / 2)
    cells = (_CELLS, _CELLS)
    return ndimage.affine_transform(
        outline, np.full(2, _STEP * radius), offset=[y - first, x - first], output_shape=cells, order=1
    ).ravel()


@cache
def _bank() -> tuple[Floats, Floats]:
    """Return outlines (4, number, cells), and what each one's squares (in parts of the area) and wobble add to a distance, (4, number)."""
    radius, half = 12.0, 32
    axis = np.arange(-half, half, dtype=np.float32)
    x, y = np.broadcast_arrays(axis[None, :], axis[:, None])
    grids = [(x, y, blur, 0.0) for blur in _BLURS]
    grids += [
        (*wobbled(x, y, radius, strength, phases), 0.08, strength)
        for strength in _WOBBLES
        for phases in np.stack(np.meshgrid(_PHASES, _PHASES), -1).reshape(-1, 2)
    ]
    bank = []
    for shape in SHAPES:
        for along, down, blur, _ in grids:
            outline = ndimage.gaussian_filter(coverage(shape, along, down, radius), blur * radius)
            area = outline.sum()
            centre = (outline.sum(0) @ axis / area + half, outline.sum(1) @ axis / area + half)
            bank.append(_scaled(outline, *centre, float(np.sqrt(area / np.pi))))
    costs = np.array([_WOBBLE_COST * strength for *_, strength in grids], np.float32)
    outlines = np.stack(bank).reshape(len(SHAPES), len(grids), -1)
    return outlines, (outlines * outlines).sum(-1) * _CELL + costs


def shape_probabilities(outline: Floats, x: float, y: float, radius: float) -> Floats:
    """Return probabilities (4,) over SHAPES of an outline (h, w) in [0, 1] with this centroid and radius, in its pixels.

    They sum to less than 1 where the outline may be of none.
    """
    bank, costs = _bank()
    one = _scaled(outline, x, y, radius)
    nearest = (costs - 2 * _CELL * (bank @ one)).min(-1) + _CELL * (one @ one)
    distances = np.append(nearest, np.float32(_NONE))
    weights = np.exp((distances.min() - distances) / _NOISE)
    return (weights / weights.sum())[:-1]
