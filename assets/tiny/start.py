"""Assemble an untrained Stable-Diffusion-format pipeline around a trained autoencoder and the text tower of a CLIP, as Stable
Diffusion 1.x has OpenAI's: what pretrain.py starts from.

    python assets/tiny/start.py --vae runs/autoencoder/vae --clip runs/pretrain_clip/scorer --tokenizer data/tokenizer --output-dir runs/start
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

import rewards
from preftune.cli import exit_on_user_error, parse
from preftune.families.sd import SD
from preftune.families.tiny import SCHEDULER_CONFIG, build_unet
from rewards.clip import ClipScorer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Assemble an untrained pipeline folder around a trained autoencoder and a trained CLIP."""

    vae: Path
    """AutoencoderKL folder."""
    clip: Path
    """Scorer folder of a CLIP, whose text tower is the text encoder."""
    tokenizer: Path
    """Tokenizer folder that the CLIP was trained with."""
    output_dir: Path
    """Pipeline folder to write."""
    widths: tuple[int, ...] = (80, 160)
    """Channels of the UNet's levels."""
    seed: int = 0
    """Seed of the UNet's random weights."""


def main(config: Config) -> None:
    """Build the parts and save the folder."""
    with exit_on_user_error():
        clip = rewards.load(str(config.clip), dtype=torch.float32)
        if not isinstance(clip, ClipScorer):
            raise ValueError(f"--clip: {config.clip} is {type(clip).__name__}; expected a CLIP")
        text_encoder = clip.text.text_model
        tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
        if len(tokenizer) != text_encoder.config.vocab_size:
            raise ValueError(
                f"--tokenizer {config.tokenizer} has {len(tokenizer)} tokens and --clip {config.clip} {text_encoder.config.vocab_size}; they do not belong together"
            )
    vae = AutoencoderKL.from_pretrained(config.vae)
    latent_size = int(vae.config["sample_size"]) // 8
    SD(
        unet=build_unet(config.widths, 1, text_encoder.config.hidden_size, latent_size, config.seed),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER_CONFIG | {"prediction_type": "v_prediction"},
    ).save_pipeline(config.output_dir)


if __name__ == "__main__":
    main(parse(Config))
