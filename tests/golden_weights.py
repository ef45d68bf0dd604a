"""What the recorded numbers in tests/golden/ were computed with: weights from a formula, by name.

Weights depend on (seed, published name, shape) alone, so that both sides hold the same ones without a file.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rewards import CARDS, Card, Clip

FOLDER = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"
BLIP = json.loads((FOLDER / "imagereward_tiny.json").read_text(encoding="utf-8"))
CLIP = json.loads((FOLDER / "clip_tiny.json").read_text(encoding="utf-8"))
CLIP_NAMES = tuple(CLIP["models"])

_SIZES = {"embed": 64, "patch": 14, "vision_layers": 2, "text_layers": 2, "text_width": 64}
_TINY = {
    "hpsv1": Clip(
        **_SIZES, vision_width=64, vision_heads=1, text_heads=1, activation="quick_gelu", tokenizer="openai"
    ),
    "hpsv2": Clip(
        **_SIZES, vision_width=80, vision_heads=2, text_heads=4, activation="gelu", tokenizer="open_clip"
    ),
}


def tiny_card(name: str) -> Card:
    """The card of a CLIP scorer with the sizes of the recorded models; all else is the published card's."""
    published = CARDS[name].clip
    assert published is not None
    tiny = _TINY["hpsv1" if published.activation == "quick_gelu" else "hpsv2"]
    return replace(CARDS[name], clip=replace(tiny, tokenizer=published.tokenizer, scaled=published.scaled))


def formula(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One tensor; numpy's generator is seeded with the SHA-256 of "seed:name"."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    values = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).standard_normal(shape)
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).reshape(shape)
    if name == "logit_scale":
        return torch.tensor(math.log(100), dtype=torch.float32)
    offset, std = 0.0, float(np.prod(shape[1:])) ** -0.5
    if name.endswith("bias"):
        std = 0.02
    elif name.endswith(("word_embeddings.weight", "token_embedding.weight", "cls_token", "class_embedding")):
        std = 0.05
    elif name.endswith(
        (
            "pos_embed",
            "position_embeddings.weight",
            "positional_embedding",
            "position_embedding.weight",
        )
    ):
        std = 0.02
    elif len(shape) == 1:
        offset, std = 1.0, 0.1
    elif name.endswith(("visual.proj", "text_projection")):
        std = shape[0] ** -0.5
    elif name.endswith(("patch_embed.proj.weight", "conv1.weight", "patch_embedding.weight")):
        std *= 0.25
    elif name.endswith(
        ("attn.proj.weight", "mlp.fc2.weight", "output.dense.weight", "out_proj.weight", "c_proj.weight")
    ):
        std *= 0.5
    return torch.from_numpy((values * std + offset).astype(np.float32))


def fill(shapes: Mapping[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """A state dict of the published names."""
    return {name: formula(name, tuple(shape), seed) for name, shape in shapes.items()}


def write_clip(name: str, folder: Path) -> Path:
    """The recorded model of a CLIP scorer as a file in the authors' layout, wrapped as theirs."""
    state = fill(CLIP["models"][name]["shapes"], CLIP["weights_seed"])
    torch.save(state if name == "pickscore" else {"state_dict": state}, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def write_aesthetic(folder: Path) -> Path:
    """The layers of the aesthetic predictor for the recorded HPS v1, which stands beside them as CLIP score's file."""
    save_file(fill(CLIP["models"]["hpsv1"]["shapes"], CLIP["weights_seed"]), folder / "model.safetensors")
    shapes = json.loads((FOLDER / "aesthetic.json").read_text(encoding="utf-8"))["shapes"]
    torch.save(fill(shapes | {"layers.0.weight": [1024, 64]}, seed=0), folder / "aesthetic.pt")
    return folder / "aesthetic.pt"


def unit_vectors(count: int, width: int, seed: int) -> torch.Tensor:
    """Vectors (count, width) of length 1, in place of images' embeddings."""
    digest = hashlib.sha256(f"{seed}:unit_vectors".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    rows = generator.standard_normal((count, width))
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
