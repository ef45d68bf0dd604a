"""CLIP's two towers as a scorer: HPS v1, v2 and v2.1, PickScore and CLIP score are one network with other weights.

Papers: Radford et al. 2021 (CLIP), Wu et al. 2023 (HPS, HPS v2), Kirstain et al. 2023 (PickScore). A score is
the cosine between picture and prompt, for PickScore times exp(logit_scale). The towers are those of
transformers; what no checkpoint says (activation, epsilon, heads, tokeniser, resizing) is in the card. Files in
the layout of OpenAI and open_clip and in that of transformers are read alike.

`load_scorer` freezes the weights, and then the vector of a prompt is worked out once. Training (rewards.trainable) opens them
again and computes its losses on `raw`, as all of these were trained.

Shapes: B batch, L = clip.context tokens, E = clip.embed, S = preprocess.size.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from rewards.card import Card, Clip, Preprocess
from rewards.clip_names import to_authors, to_transformers
from rewards.clip_tokenizer import ClipTokenizer, find_vocab
from rewards.pixels import at_least_float32, check_prompts, prepare
from rewards.text_cache import TextCache
from rewards.towers import Tower
from rewards.trained import to_json, with_statistics
from rewards.weights import FOLDER_FILE, check, find_file, read, write_folder


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
        """Return the pictures' unit vectors (B, E) float32."""
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
        ids = self.tokenizer(prompts).to(self.text_projection.weight.device)
        pooled = self.text_model(input_ids=ids).pooler_output
        return F.normalize(at_least_float32(self.text_projection(pooled)), dim=1)


class ClipScorer(nn.Module):
    """The scorer: the cosine between picture and prompt, (B,) float32, times exp(logit_scale) if the card says so."""

    def __init__(self, card: Card, vocab: Path) -> None:
        super().__init__()
        assert card.clip is not None, f"{card.name} has no CLIP"
        assert card.preprocess is not None, f"{card.name} has no preprocessing"
        self.card = card
        self.scaled = card.clip.scaled
        self.vision = ClipVision(card.clip, card.preprocess)
        self.text = ClipText(card.clip, vocab)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.cache = TextCache(self.text.forward)

    @classmethod
    def build(cls, card: Card, vocab: Path, seed: int, temperature: float) -> "ClipScorer":
        """Return a scorer whose random weights depend on seed alone: projections N(0, 1 / width), logit_scale -ln(temperature)."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(card, vocab)
            for projection in (model.vision.visual_projection, model.text.text_projection):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            nn.init.constant_(model.logit_scale, -math.log(temperature))
        return model

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B pictures for B prompts; gradients reach pixels, and weights that are trained."""
        check_prompts(pixels, prompts)
        return self.of_vectors(self.vision(pixels), prompts)

    def of_vectors(self, vectors: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B pictures of which the image tower made these vectors (B, E)."""
        training = self.logit_scale.requires_grad  # then what is kept of a prompt would grow old
        texts = self.texts(prompts) if training else self.cache(prompts, self.logit_scale.device)
        cosines = (vectors * texts).sum(dim=1)
        return self.logit_scale.exp() * cosines if self.scaled else cosines

    def raw(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return exp(logit_scale) times the cosine, (B,) float32: what losses are computed on; gradients reach all weights."""
        check_prompts(pixels, prompts)
        return self.logit_scale.exp() * (self.vision(pixels) * self.texts(prompts)).sum(dim=1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' unit vectors (B, E), of those that are alike from one pass."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        return self.text([*places])[[places[prompt] for prompt in prompts]]

    def towers(self) -> tuple[Tower, Tower]:
        """Return the image tower and the text tower."""
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
        """Set the mean and deviation of raw scores over held-out pictures; the card has them in the units of calls."""
        factor = 1.0 if self.scaled else math.exp(-self.logit_scale.item())
        self.card = with_statistics(self.card, mean * factor, std * factor)

    def save(self, folder: Path) -> None:
        """Write config.json, merges.txt and model.safetensors (authors' names, float32), each atomically."""
        parts = {
            **self.vision.state_dict(),
            **self.text.state_dict(),
            "logit_scale": self.logit_scale.detach(),
        }
        state = to_authors({key: value.float() for key, value in parts.items()})
        write_folder(
            folder, state, {"config.json": to_json(self.card), "merges.txt": self.text.tokenizer.merges}
        )


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> ClipScorer:
    """Return the scorer of a card: frozen, in eval mode, towers in dtype."""
    file, vocab, *_ = find_files(card, weights)
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = ClipScorer(card, vocab)
    state = to_transformers(read(file))
    parts = (model.vision, model.text)
    expected = {key: value for part in parts for key, value in part.state_dict().items()}
    check(expected | {"logit_scale": model.logit_scale}, state, file, f"the CLIP of {card.name}")
    for part in parts:
        fill(part, state)
        part.to(dtype)
    model.logit_scale = nn.Parameter(state["logit_scale"].float())
    return model.to(device).eval().requires_grad_(False)


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the files that a scorer is made of; ValueError says which file to put where."""
    if card.folder is not None:
        folder = Path(card.folder)
        return folder / FOLDER_FILE, folder / "merges.txt", folder / "config.json"
    file = find_file(card, weights)
    return file, find_vocab(file)


def fill(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a tower that was built on the meta device its tensors, in float32; the state may hold more."""
    part.load_state_dict({key: state[key].float() for key in part.state_dict()}, assign=True)
    for module in part.modules():  # the one kind of buffer that is in no file
        if isinstance(getattr(module, "position_ids", None), Tensor):
            embedding: Any = module
            embedding.position_ids = torch.arange(embedding.position_ids.shape[1])[None]
