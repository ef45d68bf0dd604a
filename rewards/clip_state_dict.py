"""Conversion of CLIP's state dict between the key names of OpenAI and open_clip and those of transformers."""

from collections.abc import Mapping

import torch
from torch import Tensor

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


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the names of transformers under those of OpenAI and open_clip: `to_transformers` undone."""
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    projections = {ours: theirs for theirs, ours in _PROJECTIONS.items()}
    renamed = {}
    for key, value in state.items():
        if key in projections:
            renamed[projections[key]] = value.T.contiguous()
            continue
        name = names.get(key, key)
        for theirs, ours in _PREFIXES:
            if key.startswith(ours):
                name = theirs + key.removeprefix(ours)
                for their_part, our_part in _BLOCK_NAMES if "resblocks" in theirs else ():
                    name = name.replace(our_part, their_part)
                break
        before, letter, kind = name.partition(".self_attn.q_proj.")
        if letter:
            block = key.removesuffix(f"q_proj.{kind}")
            thirds = [state[f"{block}{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{before}.attn.in_proj_{kind}"] = torch.cat(thirds)
        elif ".self_attn." not in name:  # keys and values went with their query
            renamed[name] = value
    return renamed
