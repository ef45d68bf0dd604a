"""CLIP's two towers as a scorer: HPS v1, v2 and v2.1, PickScore and CLIP score are one network with other weights.

Papers: Radford et al. 2021 (CLIP), Wu et al. 2023 (HPS, HPS v2), Kirstain et al. 2023 (PickScore). A score is
the cosine between picture and prompt, for PickScore times exp(logit_scale). The towers are those of
transformers; what no checkpoint says (activation, epsilon, heads, tokeniser, resizing) is in the card. Files in
the layout of OpenAI and open_clip and in that of transformers are read alike.

Left out: training. Weights are frozen, and the vector of a prompt is worked out once.

Shapes: B batch, L = clip.context tokens, E = clip.embed, S = preprocess.size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from rewards.card import Card, Clip, Preprocess
from rewards.clip_tokenizer import END, START, ClipTokenizer, find_vocab
from rewards.pixels import at_least_float32, check_prompts, prepare
from rewards.text_cache import TextCache
from rewards.weights import check, find_file, read


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
        self.tokenizer = ClipTokenizer(clip.tokenizer, vocab, clip.context)
        config = CLIPTextConfig(
            vocab_size=clip.vocab_size,
            hidden_size=clip.text_width,
            intermediate_size=4 * clip.text_width,
            num_hidden_layers=clip.text_layers,
            num_attention_heads=clip.text_heads,
            max_position_embeddings=clip.context,
            hidden_act=clip.activation,
            layer_norm_eps=clip.eps,
            bos_token_id=START,
            eos_token_id=END,  # the text is read off at the first one
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

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B pictures for B prompts; gradients reach pixels alone."""
        check_prompts(pixels, prompts)
        return self.of_vectors(self.vision(pixels), prompts)

    def of_vectors(self, vectors: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) float32 of B pictures of which the image tower made these vectors (B, E)."""
        cosines = (vectors * self.cache(prompts, self.logit_scale.device)).sum(dim=1)
        return self.logit_scale.exp() * cosines if self.scaled else cosines


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> ClipScorer:
    """Return the scorer of a card: frozen, in eval mode, towers in dtype."""
    file, vocab = find_files(card, weights)
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
    """Return the weights file and the vocabulary; ValueError says which file to put where."""
    file = find_file(card, weights)
    return file, find_vocab(file)


def fill(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a tower that was built on the meta device its tensors, in float32; the state may hold more."""
    part.load_state_dict({key: state[key].float() for key in part.state_dict()}, assign=True)
    for module in part.modules():  # the one kind of buffer that is in no file
        if isinstance(getattr(module, "position_ids", None), Tensor):
            embedding: Any = module
            embedding.position_ids = torch.arange(embedding.position_ids.shape[1])[None]


# ---------------------------------------------------------------- names

_NAMES = {  # OpenAI's and open_clip's, those of transformers
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_PREFIXES = (
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
_BLOCK_NAMES = (  # inside a block of either tower
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NOT_WEIGHTS = {  # numbers 0, 1, 2, ... and sizes, which old and new files may or may not have
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "input_resolution",
    "context_length",
    "vocab_size",
}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in either layout under the names of transformers; unknown names stay as they are."""
    renamed = {}
    for key, value in state.items():
        if key in _NOT_WEIGHTS:
            continue
        if key in _PROJECTIONS:
            renamed[_PROJECTIONS[key]] = value.T.contiguous()  # theirs are used as x @ W
            continue
        name = _NAMES.get(key, key)
        for theirs, ours in _PREFIXES:
            if key.startswith(theirs):
                name = ours + key.removeprefix(theirs)
                for their_part, our_part in _BLOCK_NAMES if "resblocks" in theirs else ():
                    name = name.replace(their_part, our_part)
                break
        before, fused, kind = name.partition(".attn.in_proj_")
        if fused:  # query, key and value in one matrix
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{before}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            renamed[name] = value
    return renamed
