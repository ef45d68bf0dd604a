"""The MLP head of ImageReward, LAION's aesthetic predictor and CLIP with a head: five linear layers from a
vector to a number.

Paper: Xu et al. 2023 (ImageReward), section 2.2; widths, dropout and initialisation are those of the
authors' code. There are no activations, so the head is a linear function of its input; dropout is active in
training only.

Shapes: B batch, D width of the head's input.
"""

import itertools

import torch
from torch import Tensor, nn

from rewards.card import HEAD_DROPOUT, HEAD_WIDTHS
from rewards.pixels import at_least_float32


def new_head(
    width: int,
    widths: tuple[int, int, int, int] = HEAD_WIDTHS,
    dropout: tuple[float, float, float] = HEAD_DROPOUT,
) -> nn.Sequential:
    """Return a head for vectors of this width, which `initialise` gives its weights: linear layers are 0, 2, 4, 6 and 7."""
    linear = [nn.Linear(before, after) for before, after in itertools.pairwise((width, *widths, 1))]
    first, second, third = (nn.Dropout(probability) for probability in dropout)
    return nn.Sequential(linear[0], first, linear[1], second, linear[2], third, linear[3], linear[4])


def initialise(head: nn.Sequential) -> None:
    """Give a head the authors' random weights, std 1 / (D + 1) where the paper writes N(0, 1 / (D + 1)), and biases 0."""
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.normal_(layer.weight, std=1 / (linear[0].in_features + 1))
        nn.init.zeros_(layer.bias)


def draw_head(
    width: int,
    seed: int,
    widths: tuple[int, int, int, int] = HEAD_WIDTHS,
    dropout: tuple[float, float, float] = HEAD_DROPOUT,
) -> nn.Sequential:
    """Return a head with the authors' random weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = new_head(width, widths, dropout)
        initialise(head)
    return head


def set_dropout(head: nn.Sequential, probability: float) -> None:
    """Let all dropout of a head act with this probability, in [0, 1)."""
    for layer in head:
        if isinstance(layer, nn.Dropout):
            layer.p = probability


def apply_head(head: nn.Sequential, vectors: Tensor) -> Tensor:
    """Return the head's output (B,), float32 or wider, of vectors (B, D).

    Never in half precision, also under autocast: bfloat16 has 8 bits, and similar images would get equal
    scores.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        return head(at_least_float32(vectors)).squeeze(1)
