"""Conversion of ImageReward's state dict between the authors' key names and those of transformers."""

from collections.abc import Mapping

import torch
from torch import Tensor

_POSITION_IDS = "blip.text_encoder.embeddings.position_ids"
_NAMES = (  # the authors' prefix, ours
    ("blip.visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision_model.post_layernorm."),
    ("blip.text_encoder.", "text_model."),
    ("blip.vision_proj.", "vision_proj."),
    ("blip.text_proj.", "text_proj."),
    ("mlp.layers.", "mlp."),
)
_BLOCK_NAMES = (  # inside a block of the image tower
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the authors' names under this class's; names that are not theirs stay as they are."""
    renamed = {}
    for key, value in state.items():
        if key == _POSITION_IDS:  # a buffer 0..max_positions-1 that old and new files may or may not have
            continue
        for theirs, ours in _NAMES:
            if key.startswith(theirs):
                name = ours + key.removeprefix(theirs)
                for their_part, our_part in _BLOCK_NAMES if "blocks." in theirs else ():
                    name = name.replace(their_part, our_part)
                renamed[name] = value
                break
        else:
            renamed[key] = value
    return renamed


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this class's state dict in the authors' names, their position_ids buffer included."""
    renamed = {}
    for key, value in state.items():
        theirs, ours = next(pair for pair in _NAMES if key.startswith(pair[1]))
        name = theirs + key.removeprefix(ours)
        for their_part, our_part in _BLOCK_NAMES if "blocks." in theirs else ():
            name = name.replace(our_part, their_part)
        renamed[name] = value
    positions = len(state["text_model.embeddings.position_embeddings.weight"])
    return {_POSITION_IDS: torch.arange(positions)[None]} | renamed
