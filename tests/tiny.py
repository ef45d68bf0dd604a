"""Tiny real components for the tests: everything of Stable Diffusion but the size.

The parts are built in code from a seed, so a test needs no download and no stored weight. They are the library's own
classes with random weights, because a mock can only confirm a driver against itself.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PIXELS = 64
"""Height and width of the tiny pipeline's images: latents are (4, 8, 8)."""

MAX_LENGTH = 16
"""Text tokens, the start and end tokens included."""


def _byte_symbols() -> list[str]:
    """The 256 printable characters that CLIP's byte-level vocabulary writes the bytes 0..255 with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    codes = dict(zip(printable, printable, strict=True))
    codes |= {byte: 256 + position for position, byte in enumerate(unprintable)}
    return [chr(codes[byte]) for byte in range(256)]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, 514 tokens in all. Writes its two files into folder."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet on (4, 8, 8) latents and 32-wide text, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=PIXELS // 8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type=None,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()


def vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder with factor 8 and 4 latent channels, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderKL(
            sample_size=PIXELS,
            block_out_channels=(8, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ).eval()


def text_encoder(seed: int = 0) -> CLIPTextModel:
    """A text tower of 2 layers and width 32 over the byte vocabulary, in eval mode."""
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CLIPTextModel(config).eval()


def pipeline_folder(
    path: Path, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0
) -> Path:
    """Write a Stable-Diffusion-format folder that StableDiffusionPipeline.from_pretrained loads, and return it."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=text_encoder(seed),
        tokenizer=tokenizer(path / "tokenizer"),
        unet=unet(seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    # The published file says so for DDIM, whose own default would clip x0; PNDM has no such argument.
    config_file = path / "scheduler" / "scheduler_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"clip_sample": False}
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path
