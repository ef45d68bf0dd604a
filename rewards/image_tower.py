"""The image tower of a CLIP as that of an ImageReward, which BLIP starts from a trained ViT as well (arXiv 2201.12086, section 4.1).

CLIP's tower has a layer norm between embeddings and layers, BLIP's has none. Of LN(x) = (x - mean(x)) / sigma(x) w + b, all but
sigma is linear, and becomes part of the embeddings: exact for the start token, whose x is constant; for a patch, sigma is that of an
image of one colour, averaged over colours and patches.
"""

import torch
from torch import Tensor

from rewards.clip import ClipScorer
from rewards.imagereward import ImageReward

COLOURS = 256
"""Images of one random colour that sigma is averaged over."""


@torch.no_grad()
def take_image_tower(scorer: ImageReward, clip: ClipScorer) -> None:
    """Give `scorer` the image tower and the image projection of `clip`, whose sizes must be the same.

    Raises:
        ValueError: The sizes or the activation differ.

    """
    theirs, ours = clip.vision.vision_model, scorer.vision_model
    wanted = {
        "image": scorer.config.image_size,
        "patch": scorer.config.patch_size,
        "width": scorer.config.vision_width,
        "layers": scorer.config.vision_layers,
        "heads": scorer.config.vision_heads,
        "projection": scorer.config.projection,
        "activation": "gelu",
    }
    facts = clip.vision.clip
    found = {
        "image": clip.vision.preprocess.size,
        "patch": facts.patch,
        "width": facts.vision_width,
        "layers": facts.vision_layers,
        "heads": facts.vision_heads,
        "projection": facts.embed,
        "activation": facts.activation,
    }
    if wrong := {name: (found[name], value) for name, value in wanted.items() if found[name] != value}:
        differences = ", ".join(f"{name} {one} instead of {other}" for name, (one, other) in wrong.items())
        raise ValueError(f"the image tower of {clip.card.name} does not fit: {differences}")
    _fill_embeddings(scorer, clip)
    for mine, layer in zip(ours.encoder.layers, theirs.encoder.layers, strict=True):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        mine.self_attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        mine.self_attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        mine.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(mine, name).load_state_dict(getattr(layer, name).state_dict())
    ours.post_layernorm.load_state_dict(theirs.post_layernorm.state_dict())
    scorer.vision_proj.weight.copy_(clip.vision.visual_projection.weight)
    scorer.vision_proj.bias.zero_()


def _fill_embeddings(scorer: ImageReward, clip: ClipScorer) -> None:
    theirs, ours = clip.vision.vision_model, scorer.vision_model.embeddings
    norm, embeddings = theirs.pre_layrnorm, theirs.embeddings
    colours = torch.rand(COLOURS, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    preprocess = clip.vision.preprocess
    mean, std = (torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))
    plain = ((colours - mean) / std).expand(-1, -1, preprocess.size, preprocess.size)
    sigma = (embeddings(plain).var(-1, unbiased=False) + norm.eps).sqrt()  # (COLOURS, 1 + patches)
    start, patch = sigma[0, 0], sigma[:, 1:].mean()

    def centred(value: Tensor, dim: int) -> Tensor:
        return value - value.mean(dim, keepdim=True)

    kernel, positions = embeddings.patch_embedding.weight, embeddings.position_embedding.weight
    ours.patch_embedding.weight.copy_(centred(kernel, 0) * norm.weight[:, None, None, None] / patch)
    ours.patch_embedding.bias.zero_()
    ours.position_embedding[0, 1:] = centred(positions[1:], 1) * norm.weight / patch + norm.bias
    ours.position_embedding[0, 0] = centred(positions[0], 0) * norm.weight / start
    ours.class_embedding[0, 0] = centred(embeddings.class_embedding, 0) * norm.weight / start + norm.bias
