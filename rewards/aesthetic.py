"""LAION's aesthetic predictor: a rating of the image from 1 to 10; the prompt is ignored.

Source: github.com/christophschuhmann/improved-aesthetic-predictor. Five linear layers without activations
are applied to the unit vector of OpenAI's CLIP ViT-L/14, so the score is a linear function of it. There are
two weights files: the layers of the predictor, and the image tower of the scorer `clipscore`.

Shapes: B batch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards import CARDS
from rewards.card import Card
from rewards.clip import ClipVision, fill, to_transformers
from rewards.head import apply_head, new_head
from rewards.pixels import takes_images
from rewards.weights import check, find, find_file, read

CLIP_CARD = CARDS["clipscore"]


class Aesthetic(nn.Module):
    """The scorer: pixels (B, 3, H, W) in [0, 1] to scores (B,) float32."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        assert card.clip is not None, f"{card.name} has no CLIP"
        assert card.preprocess is not None, f"{card.name} has no preprocessing"
        self.card = card
        self.vision = ClipVision(card.clip, card.preprocess)
        self.layers = new_head(card.clip.embed)  # its dropout does nothing in eval mode

    @takes_images
    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images; the B prompts are not read."""
        return self.of_vectors(self.vision(pixels), prompts)

    def of_vectors(self, vectors: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images of which the image tower made these vectors (B, E)."""
        return apply_head(self.layers, vectors).float()


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> Aesthetic:
    """Return the scorer of a card: frozen, in eval mode, the image tower in dtype, the layers in float32."""
    file, clip_file = find_files(card, weights)
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = Aesthetic(card)
    state = read(file)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith("layers.")}
    check(expected, state, file, f"the layers of {card.name}")
    model.layers.load_state_dict(
        {key.removeprefix("layers."): state[key].float() for key in expected}, assign=True
    )
    names = model.vision.state_dict()
    # The file's text tower is not needed, and not looked at.
    tower = {key: value for key, value in to_transformers(read(clip_file)).items() if not _is_text(key)}
    check(names, tower, clip_file, f"the image tower of {CLIP_CARD.name}")
    fill(model.vision, tower)
    model.vision.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the files of the layers and of the image tower; ValueError says which file to put where.

    CLIP is looked for beside the layers, under the name that the card of clipscore gives, then in its own place.
    """
    file = find_file(card, weights)
    assert CLIP_CARD.file is not None
    beside = file.with_name(CLIP_CARD.file)
    return file, find(CLIP_CARD, beside if beside.is_file() else None)


def _is_text(key: str) -> bool:
    return key.startswith(("text_model.", "text_projection.")) or key == "logit_scale"
