"""Tiny real components for the tests: everything of Stable Diffusion and of Stable Diffusion XL but the size.

The parts are built in code from a seed, so a test needs no download and no stored weight. They are the library's own
classes with random weights, because a mock can only confirm a driver against itself.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PIXELS = 64
"""Height and width of the tiny pipelines' images: latents are (4, 8, 8)."""

MAX_LENGTH = 16
"""Text tokens, the start and end tokens included."""


def _byte_symbols() -> list[str]:
    """The 256 printable characters that CLIP's byte-level vocabulary writes the bytes 0..255 with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    codes = dict(zip(printable, printable, strict=True))
    codes |= {byte: 256 + position for position, byte in enumerate(unprintable)}
    return [chr(codes[byte]) for byte in range(256)]


def tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, 514 tokens in all. Writes its files into folder."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "pad_token": pad_token,
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


def taesd(seed: int = 0) -> AutoencoderTiny:
    """TAESD's architecture with factor 8 and 4 latent channels, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
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


def unet_xl(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's UNet on (4, 8, 8) latents, text of width 32 + 48, pooled text of 24 and six time ids, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=PIXELS // 8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 + 48,
            attention_head_dim=(2, 4),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ).eval()


def text_encoder_2(seed: int = 0) -> CLIPTextModelWithProjection:
    """SDXL's second text tower: 3 layers of width 48, projected to 24, in eval mode."""
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=24,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 1)
        return CLIPTextModelWithProjection(config).eval()


_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def pipeline_folder(
    path: Path,
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
    seed: int = 0,
    *,
    zero_snr: bool = False,
) -> Path:
    """Write a Stable-Diffusion-format folder that StableDiffusionPipeline.from_pretrained loads, and return it."""
    kind, settings = (
        (
            DDIMScheduler,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
        )
        if zero_snr
        else (PNDMScheduler, {"skip_prk_steps": True})
    )
    scheduler = kind(**_BETAS, **settings, set_alpha_to_one=False, prediction_type=prediction_type)
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


def pipeline_xl_folder(
    path: Path,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    seed: int = 0,
    *,
    zero_snr: bool = False,
    force_zeros_for_empty_prompt: bool = True,
) -> Path:
    """Write an SDXL folder that StableDiffusionXLPipeline.from_pretrained loads, and return it."""
    autoencoder = vae(seed)
    autoencoder.register_to_config(scaling_factor=0.13025, force_upcast=True)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text_encoder(seed),
        text_encoder_2=text_encoder_2(seed),
        tokenizer=tokenizer(path / "tokenizer"),
        tokenizer_2=tokenizer(path / "tokenizer_2", pad_token="!"),
        unet=unet_xl(seed),
        scheduler=EulerDiscreteScheduler(
            **_BETAS,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
            timestep_spacing="trailing" if zero_snr else "leading",
        ),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    return path
