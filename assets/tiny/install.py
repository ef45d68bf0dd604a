"""Put a trained pipeline and scorer into this folder, UNet, autoencoder and scorer in half precision to save space.

    python assets/tiny/install.py --pipeline runs/pretrain_second/pipeline --scorer runs/reward_model_second/scorer

The text encoder stays in float32: transformers loads a model in the precision of its file, diffusers in float32.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from preftune.cli import parse

HERE = Path(__file__).parent
HALF = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Install a trained pipeline and scorer as the embedded ones."""

    pipeline: Path
    """Pipeline folder, as pretrain.py wrote it."""
    scorer: Path
    """Scorer folder, as reward_model.py wrote it."""
    output: Path = HERE
    """Folder that gets pipeline/ and imagereward/."""


def halve(path: Path) -> None:
    """Rewrite the floating-point tensors of a safetensors file in float16."""
    state = load_file(path)
    half = {key: value.half() if value.dtype == torch.float32 else value for key, value in state.items()}
    save_file(half, path, metadata={"format": "pt"})


def main(config: Config) -> None:
    """Copy both folders to temporary names, halve, and rename."""
    for source, name, files in (
        (config.pipeline, "pipeline", HALF),
        (config.scorer, "imagereward", ("model.safetensors",)),
    ):
        partial = config.output / f".{name}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        for file in files:
            halve(partial / file)
        shutil.rmtree(config.output / name, ignore_errors=True)
        partial.rename(config.output / name)


if __name__ == "__main__":
    main(parse(Config))
