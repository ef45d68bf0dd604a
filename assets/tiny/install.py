r"""Copy trained models into this folder; UNet, autoencoder and scorers are converted to half precision to
save space.

    python assets/tiny/install.py --pipeline runs/pretrain_second/pipeline --scorer runs/reward_model_second/scorer \
        --blip runs/pretrain_scorer/scorer --clip runs/pretrain_clip/scorer

The text encoder stays in float32, because transformers loads a model in the precision of its file,
diffusers in float32.
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
    """Install trained models as the embedded models; models that are not given are unchanged."""

    pipeline: Path | None = None
    """Pipeline folder, as pretrain.py wrote it."""
    scorer: Path | None = None
    """Scorer folder, as reward_model.py wrote it."""
    blip: Path | None = None
    """Scorer folder, as pretrain_scorer.py wrote it: what reward models of ImageReward's architecture start from."""
    clip: Path | None = None
    """Scorer folder of the pre-trained CLIP."""
    output_dir: Path = HERE
    """Folder that gets pipeline/, imagereward/, pretrained/blip/ and pretrained/clip/."""


def halve(path: Path) -> None:
    """Rewrite the floating-point tensors of a safetensors file in float16."""
    state = load_file(path)
    half = {key: value.half() if value.dtype == torch.float32 else value for key, value in state.items()}
    save_file(half, path, metadata={"format": "pt"})


def main(config: Config) -> None:
    """Copy each folder to a temporary name, halve, and rename."""
    weights = ("model.safetensors",)
    for source, name, files in (
        (config.pipeline, "pipeline", HALF),
        (config.scorer, "imagereward", weights),
        (config.blip, "pretrained/blip", weights),
        (config.clip, "pretrained/clip", weights),
    ):
        if source is None:
            continue
        target = config.output_dir / name
        partial = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        for file in files:
            halve(partial / file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


if __name__ == "__main__":
    main(parse(Config))
