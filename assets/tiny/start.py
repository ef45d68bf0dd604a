"""Assemble an untrained Stable-Diffusion-format pipeline around a trained autoencoder: what pretrain.py starts from.

python assets/tiny/start.py --vae runs/autoencoder/vae --data data/shapes --output-dir runs/start
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL

from preftune.cli import parse
from preftune.families.sd import SD
from preftune.families.tiny import SCHEDULER_CONFIG, build_text_encoder, build_tokenizer, build_unet
from preftune.records import read_imagefolder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Assemble an untrained pipeline folder around a trained autoencoder."""

    vae: Path
    """AutoencoderKL folder."""
    data: Path
    """Imagefolder whose captions the tokenizer learns its vocabulary from."""
    output_dir: Path
    """Pipeline folder to write."""
    widths: tuple[int, ...] = (80, 160)
    """Channels of the UNet's levels."""
    text_width: int = 128
    """Width of the text states."""
    text_layers: int = 3
    """Layers of the text encoder."""
    max_length: int = 48
    """Tokens of a prompt, start and end included."""
    seed: int = 0
    """Seed of the random weights."""


def main(config: Config) -> None:
    """Build the parts and save the folder."""
    vae = AutoencoderKL.from_pretrained(config.vae)
    captions = [sample.text for sample in read_imagefolder(config.data)]
    tokenizer = build_tokenizer(
        captions, config.output_dir / "tokenizer", num_merges=400, max_length=config.max_length
    )
    latent_size = int(vae.config["sample_size"]) // 8
    SD(
        unet=build_unet(config.widths, 1, config.text_width, latent_size, config.seed),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer, config.text_width, config.text_layers, config.seed),
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER_CONFIG | {"prediction_type": "v_prediction"},
    ).save_pipeline(config.output_dir)


if __name__ == "__main__":
    main(parse(Config))
