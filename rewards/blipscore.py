"""BLIP score: the cosine between an image and a caption, encoded separately by BLIP's two towers.

Paper: Li et al. 2022 (BLIP), section 3.2, image-text contrastive loss. The towers are those of ImageReward
before its training, without its head; the caption does not attend to the image. The weights are the
pre-training file of BLIP ViT-L; its other tensors (momentum encoders, queues, a decoder and a matching
head) are ignored.

Shapes: B batch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.blip_state_dict import to_transformers
from rewards.card import Card, ImageRewardConfig
from rewards.imagereward import FULL_SIZE, ImageReward, find_parts
from rewards.pixels import takes_images
from rewards.text_cache import TextCache
from rewards.trained_cards import with_statistics
from rewards.weights import check, find_file, read

_PASSED_OVER = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "text_decoder.",
    "itm_head.",
    "image_queue",
    "text_queue",
    "queue_ptr",
    "ptr_queue",
    "temp",
)


class BlipScore(nn.Module):
    """The scorer: pixels (B, 3, H, W) in [0, 1] and captions to cosines (B,) float32."""

    def __init__(self, card: Card, config: ImageRewardConfig, vocab: str) -> None:
        super().__init__()
        self.card = card
        self.blip = ImageReward(config, vocab)
        del self.blip.mlp  # what turns BLIP into ImageReward
        self.cache = TextCache(self.blip.text_embedding)

    @takes_images
    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images for B prompts; gradients reach pixels alone."""
        texts = self.cache(prompts, self.blip.text_proj.weight.device)
        return (self.blip.image_embedding(pixels) * texts).sum(dim=1).float()


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> BlipScore:
    """Return the scorer of a card: frozen, in eval mode, towers in dtype, the two projections in float32."""
    model = load(card, find_files(card, weights)[0], FULL_SIZE)
    for tower in (model.blip.vision_model, model.blip.text_model):
        tower.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def start(card: Card, weights: Path | None, seed: int, config: ImageRewardConfig = FULL_SIZE) -> ImageReward:
    """Return an ImageReward before its training: these towers, and a new head whose weights depend on seed alone."""
    scorer = load(card, find_files(card, weights)[0], config).blip
    scorer.renew_head(seed)
    scorer.card = with_statistics(card, 0.0, 1.0)  # no cosine any more
    return scorer


def load(card: Card, file: Path, config: ImageRewardConfig) -> BlipScore:
    """Return the model of a file in the authors' layout; ValueError names what is missing or unexpected."""
    _, vocab, _ = find_parts(file)
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = BlipScore(card, config, vocab.read_text(encoding="utf-8"))
    state = {key: value for key, value in read(file).items() if not key.startswith(_PASSED_OVER)}
    state = to_transformers({f"blip.{key}": value for key, value in state.items()})
    check(model.blip.state_dict(), state, file, f"the towers of {card.name}")
    model.blip.fill(state)
    return model


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the weights file and the vocabulary; ValueError says which file to put where."""
    file = find_file(card, weights)
    _, vocab, _ = find_parts(file)
    return file, vocab
