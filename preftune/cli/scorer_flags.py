"""The flags that name scorers: one grammar, one help text and one set of error sentences for all programs."""

from typing import Annotated

import tyro

_NAMES = (
    "Scorers, each NAME or NAME=WEIGHT; NAME is one that `preftune scorers` lists, or the folder of a trained scorer, or"
    " FILE.py:FUNCTION, a function of your own of pixels (B, 3, H, W) in [0, 1] and B prompts that returns B scores."
)
Weighted = Annotated[tuple[str, ...], tyro.conf.arg(help=f"{_NAMES} A scorer without a weight has weight 1.")]
"""Scorers that make one reward: rewards.terms.parse_weights."""
Measured = Annotated[
    tuple[str, ...], tyro.conf.arg(help=f"{_NAMES} Each is reported by itself, so no weight but 1 is taken.")
]
"""Scorers that are reported one by one: rewards.terms.parse_names."""
Files = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Weights of scorers on disk, as NAME=PATH; others are read from this repository or the Hugging Face cache,"
        " and downloaded where they are in neither."
    ),
]
"""Weights to use instead of a scorer's own: rewards.terms.parse_files."""
