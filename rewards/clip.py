"""CLIP's two towers as a scorer: HPS v1, v2 and v2.1, PickScore and CLIP score are one architecture with
different weights.

Papers: Radford et al. 2021 (CLIP), Wu et al. 2023 (HPS, HPS v2), Kirstain et al. 2023 (PickScore). A score
is the cosine between image and prompt, for PickScore times exp(logit_scale). The towers are those of
transformers. What a checkpoint does not contain (activation, epsilon, heads, tokeniser, resizing) is in the
card. Files in the layouts of OpenAI, open_clip and transformers can be read.

A CLIP with an MLP head is the other backbone of Xu et al. 2023 (ImageReward), Table 2b: "We add MLP to
CLIP, training in a similar way". The paper does not state the input of the head. Here it is E times the
element-wise product of the two unit vectors, whose mean is then the cosine. Concatenated vectors would not
work: the head is linear, so the score would be an image term plus a prompt term. The factor E is needed,
too. Without it, coordinates are of order 1 / E instead of 1 as in the [CLS] of ImageReward, and with the
published initialisation the signal vanishes: on random vectors of E = 768 the last layer's gradients are
2e-11, where Adam's epsilon is 1e-8. After 2000 updates of the head at 1e-5 the pair accuracy is at chance;
with the factor it is 83 %.

`load_scorer` freezes the weights; the vector of a prompt is then computed once and cached. Training
(rewards.training) makes the weights trainable again and computes its losses on `raw`, as in all of these
papers.

Shapes: B batch, L = clip.context tokens, E = clip.embed, S = preprocess.size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from rewards.card import HEAD_DROPOUT, Card, Clip, Preprocess
from rewards.clip_state_dict import to_authors, to_transformers
from rewards.clip_tokenizer import MERGES, ClipTokenizer
from rewards.distinct import distinct
from rewards.head import apply_head, draw_head, new_head, set_dropout
from rewards.on_device import upload
from rewards.pixels import at_least_float32, one_each, prepare, takes_images
from rewards.text_cache import TextCache
from rewards.towers import Tower
from rewards.trained_cards import to_json, with_statistics
from rewards.vit_init import initialise_image_embeddings, initialise_layers, initialise_text_embeddings
from rewards.weights import FOLDER_FILE, check, find_file, read, write_folder

HEAD = "mlp.layers."
"""Prefix of the names of a head's tensors in files, as in those of ImageReward's authors."""


class ClipVision(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to unit vectors (B, E) float32; resizing happens inside and is differentiable."""

    def __init__(self, clip: Clip, preprocess: Preprocess) -> None:
        super().__init__()
        self.clip = clip
        self.preprocess = preprocess
        config = CLIPVisionConfig(
            hidden_size=clip.vision_width,
            intermediate_size=4 * clip.vision_width,
            num_hidden_layers=clip.vision_layers,
            num_attention_heads=clip.vision_heads,
            patch_size=clip.patch,
            image_size=preprocess.size,
            hidden_act=clip.activation,
            layer_norm_eps=clip.eps,
        )
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(clip.vision_width, clip.embed, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the images' unit vectors (B, E) float32."""
        pooled = self.vision_model(prepare(pixels, self.preprocess)).pooler_output
        return F.normalize(at_least_float32(self.visual_projection(pooled)), dim=1)


class ClipText(nn.Module):
    """Prompts to unit vectors (B, E) float32."""

    def __init__(self, clip: Clip, vocab: Path) -> None:
        super().__init__()
        self.tokenizer = ClipTokenizer(clip.tokenizer, vocab, clip.context, clip.vocab_size)
        config = CLIPTextConfig(
            vocab_size=clip.vocab_size,
            hidden_size=clip.text_width,
            intermediate_size=4 * clip.text_width,
            num_hidden_layers=clip.text_layers,
            num_attention_heads=clip.text_heads,
            max_position_embeddings=clip.context,
            hidden_act=clip.activation,
            layer_norm_eps=clip.eps,
            bos_token_id=self.tokenizer.start,
            eos_token_id=self.tokenizer.end,  # the text is read off at the first one
        )
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(clip.text_width, clip.embed, bias=False)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' unit vectors (B, E) float32."""
        # No attention mask: padding stands behind the end token, which causal attention cannot see from there.
        ids = upload(self.tokenizer(prompts), self.text_projection.weight.device)
        pooled = self.text_model(input_ids=ids).pooler_output
        return F.normalize(at_least_float32(self.text_projection(pooled)), dim=1)


class ClipScorer(nn.Module):
    """The scorer: the cosine between image and prompt, (B,) float32, or the score that the card defines.

    That is exp(logit_scale) times the cosine, or the output of an MLP head, which no mean and deviation change: the card has them.
    """

    def __init__(self, card: Card, vocab: Path) -> None:
        super().__init__()
        assert card.clip is not None, f"{card.name} has no CLIP"
        assert card.preprocess is not None, f"{card.name} has no preprocessing"
        self.card = card
        self.scaled = card.clip.scaled
        self.vision = ClipVision(card.clip, card.preprocess)
        self.text = ClipText(card.clip, vocab)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        dropout = card.clip.head_dropout
        self.mlp = None if dropout is None else new_head(card.clip.embed, dropout=dropout)
        self.cache = TextCache(self.text.forward)

    @classmethod
    def build(cls, card: Card, vocab: Path, seed: int, temperature: float) -> "ClipScorer":
        """Return a scorer whose random weights depend on seed alone: OpenAI's (rewards/vit_init.py), logit_scale -ln(temperature)."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(card, vocab)
            vision, text = model.vision.vision_model, model.text.text_model
            for tower in (vision, text):
                initialise_layers(tower, tower.config.hidden_size, tower.config.num_hidden_layers)
            image = vision.embeddings
            initialise_image_embeddings(
                image.patch_embedding, image.position_embedding.weight, image.class_embedding
            )
            initialise_text_embeddings(text.embeddings.token_embedding, text.embeddings.position_embedding)
            for projection in (model.vision.visual_projection, model.text.text_projection):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            nn.init.constant_(model.logit_scale, -math.log(temperature))
        return model

    @takes_images
    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images for B prompts; gradients reach pixels, and weights that are trained."""
        return self.of_vectors(self.vision(pixels), prompts)

    def of_vectors(self, vectors: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B images of which the image tower made these vectors (B, E)."""
        # While a tower is trained, cached text vectors would be out of date.
        training = self.text.text_projection.weight.requires_grad
        texts = self.texts(prompts) if training else self.cache(prompts, self.logit_scale.device)
        return self.compare(vectors, texts) if self.scaled else (vectors * texts).sum(dim=1)

    def raw(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return exp(logit_scale) times the cosine, or the head's output, (B,) float32: what losses are computed on.

        Gradients reach all weights, but logit_scale where there is a head.
        """
        return self.compare(self.vision(pixels), self.texts(one_each(prompts, len(pixels))))

    def compare(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the raw scores (B,) float32 of the unit vectors (B, E) of images and of prompts."""
        products = images * texts
        if self.mlp is None:
            return self.logit_scale.exp() * products.sum(dim=1)
        return apply_head(self.mlp, products * products.shape[1])

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' unit vectors (B, E), of those that are alike from one pass."""
        different, places = distinct(prompts)
        vectors = self.text(different)
        return vectors[upload(torch.tensor(places), vectors.device)]

    def renew_head(self, seed: int) -> None:
        """Put an MLP head with random weights that depend on seed alone on the towers; scores are its output from now on."""
        assert self.card.clip is not None
        clip = replace(self.card.clip, scaled=True, head_dropout=HEAD_DROPOUT)
        self.card = with_statistics(replace(self.card, clip=clip), 0.0, 1.0)  # nothing is known about them
        self.scaled = True
        self.mlp = draw_head(clip.embed, seed)

    def set_dropout(self, probability: float) -> None:
        """Let all dropout of the head act with this probability, in [0, 1)."""
        assert self.card.clip is not None
        assert self.mlp is not None, f"{self.card.name} has no head"
        self.card = replace(self.card, clip=replace(self.card.clip, head_dropout=(probability,) * 3))
        set_dropout(self.mlp, probability)

    def towers(self) -> tuple[Tower, Tower]:
        """Return the image tower and the text tower; a head is on top of both."""
        vision, text = self.vision.vision_model, self.text.text_model
        before = (vision.embeddings, vision.pre_layrnorm)
        after = (vision.post_layernorm, self.vision.visual_projection)
        return (
            Tower(before, (*vision.encoder.layers,), after),
            Tower(
                (text.embeddings,),
                (*text.encoder.layers,),
                (text.final_layer_norm, self.text.text_projection),
            ),
        )

    def set_statistics(self, mean: float, std: float) -> None:
        """Set the mean and deviation of raw scores over held-out images; the card has them in the units of calls."""
        factor = 1.0 if self.scaled else math.exp(-self.logit_scale.item())
        self.card = with_statistics(self.card, mean * factor, std * factor)

    def save(self, folder: Path) -> None:
        """Write config.json, merges.txt and model.safetensors (authors' names, float32) as one.

        The authors of what has the tokeniser of transformers (PickScore) publish its CLIPModel, those of all else OpenAI's layout.
        """
        assert self.card.clip is not None
        state = {key: value.float() for key, value in self.named_weights().items()}
        write_folder(
            folder,
            state if self.card.clip.tokenizer == "transformers" else to_authors(state),
            {"config.json": to_json(self.card), "merges.txt": self.text.tokenizer.merges},
        )

    def named_weights(self) -> dict[str, Tensor]:
        """Return all weights under the names of transformers' CLIPModel, those of a head under ImageReward's."""
        head = {} if self.mlp is None else self.mlp.state_dict()
        return {
            **self.vision.state_dict(),
            **self.text.state_dict(),
            "logit_scale": self.logit_scale.detach(),
            **{HEAD + key: value for key, value in head.items()},
        }


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> ClipScorer:
    """Return the scorer of a card: frozen, in eval mode, towers in dtype, a head always in float32."""
    file, vocab, *_ = find_files(card, weights)
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = ClipScorer(card, vocab)
    state = to_transformers(read(file))
    check(model.named_weights(), state, file, f"the CLIP of {card.name}")
    for part in (model.vision, model.text):
        fill(part, state)
        part.to(dtype)
    model.logit_scale = nn.Parameter(state["logit_scale"].float())
    if model.mlp is not None:
        fill(model.mlp, {key.removeprefix(HEAD): value for key, value in state.items()})
    return model.to(device).eval().requires_grad_(False)


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the files that a scorer is made of; ValueError says which file to put where."""
    if card.folder is not None:
        folder = Path(card.folder)
        return folder / FOLDER_FILE, folder / "merges.txt", folder / "config.json"
    return find_file(card, weights), MERGES


def fill(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a part that was built on the meta device its tensors, in float32; the state may hold more."""
    part.load_state_dict({key: state[key].float() for key in part.state_dict()}, assign=True)
    for module in part.modules():  # the one kind of buffer that is in no file
        if isinstance(getattr(module, "position_ids", None), Tensor):
            embedding: Any = module
            embedding.position_ids = torch.arange(embedding.position_ids.shape[1])[None]
