"""Random weights of an image or text transformer as OpenAI's CLIP starts from.

Radford et al. 2021 (arXiv 2103.00020); the numbers are those of `initialize_parameters` and `VisionTransformer` in the authors'
clip/model.py. With transformers' own start, N(0, 0.02) for patches and positions alike, a small image tower takes twice as long to
tell shapes apart, since it hardly sees where a patch lies; see LOG.md.
"""

import torch
from torch import Tensor, nn

_INPUTS, _OUTPUTS = ("q_proj", "k_proj", "v_proj", "qkv"), ("out_proj", "projection", "fc2")


@torch.no_grad()
def initialise_layers(tower: nn.Module, width: int, layers: int) -> None:
    """Give the attention and MLP weights of all layers of a tower their deviations; biases and norms stay as they are."""
    for name, layer in tower.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        last = name.rpartition(".")[2]
        if last in _INPUTS:
            layer.weight.normal_(std=width**-0.5)
        elif last in _OUTPUTS:
            layer.weight.normal_(std=width**-0.5 * (2 * layers) ** -0.5)
        elif last == "fc1":
            layer.weight.normal_(std=(2 * width) ** -0.5)


@torch.no_grad()
def initialise_image_embeddings(patches: nn.Conv2d, positions: Tensor, start: Tensor) -> None:
    """Give an image tower's patch convolution, positions and start token their deviations; the first is torch's own."""
    patches.reset_parameters()
    for tensor in (positions, start):
        tensor.normal_(std=patches.out_channels**-0.5)


@torch.no_grad()
def initialise_text_embeddings(tokens: nn.Embedding, positions: nn.Embedding) -> None:
    """Give a CLIP's text embeddings their deviations."""
    tokens.weight.normal_(std=0.02)
    positions.weight.normal_(std=0.01)
