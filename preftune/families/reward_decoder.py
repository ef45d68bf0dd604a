"""Another autoencoder's decoder for the pixels that a reward's gradient runs through, such as TAESD for Stable Diffusion.

At 512 px Stable Diffusion's decoder takes 2.5 TFLOP an image in the forward pass and as many in the backward pass, together 15 % of an
update of ReFL, and most of its memory; TAESD's takes 0.14. What it decodes is near to what the pipeline decodes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from preftune.families import configs, guard, parts, weights
from preftune.families import unet as unets
from preftune.families.locate import locate_vae
from preftune.families.sdxl import vae_dtype
from preftune.families.source import Source

_FLAG = "--reward-vae"


def check(source: Source, name: Path, vae: Path | None = None) -> Path:
    """Return the folder of an autoencoder that is named by its path or hub id, for latents of a model (and its --vae).

    ValueError where it is none, has no weights, or where its latents have another shape.
    """
    folder = locate_vae(str(name), _FLAG)
    own = source.folder / "vae" if vae is None else locate_vae(str(vae))
    like = configs.check_vae(own)
    try:
        configs.check_vae(folder, like)
        weights.find(folder, "diffusers")
    except ValueError as error:
        raise ValueError(f"{_FLAG} {name}: {error}") from error
    return folder


def load(
    folder: Path, device: torch.device | str, dtype: torch.dtype, *, checkpointing: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return a function from latents (B, C, h, w), scaled as the model's, to pixels (B, 3, H, W), float32 and not clamped.

    `folder` is what `check` returned. The autoencoder is frozen, and in dtype unless it overflows there.
    """
    with guard.loading(folder):
        dtype = vae_dtype(configs.read_json(folder / "config.json"), dtype)
        vae = parts.load_vae(folder, None, dtype)
    unets.freeze([vae])
    vae.encoder = None  # never called
    vae.to(device)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    return lambda x0: unets.decode(vae, x0)
