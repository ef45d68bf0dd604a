"""The measured models at real size with random weights: Stable Diffusion 1.x and the published scorers."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.hardware import fresh
from preftune.families import tiny
from preftune.families.sd import SD
from preftune.files import replacing
from rewards import CARDS
from rewards.aesthetic import Aesthetic
from rewards.clip import ClipScorer
from rewards.clip_tokenizer import MERGES, read_vocab
from rewards.imagereward import FULL_SIZE, VOCAB, ImageReward, to_authors

CLIP_TOKENS = 49408
"""Vocabulary of CLIP's text encoder: 512 bytes, 48,894 merges, start and end."""


THIN = (32, 64, 128, 128)
"""Widths of a UNet with Stable Diffusion 1.x's layers and a tenth of its width: what a step costs besides arithmetic."""


def unet(
    widths: tuple[int, ...] = (320, 640, 1280, 1280), text_width: int = 768, side: int = 64
) -> UNet2DConditionModel:
    """Return the UNet of Stable Diffusion 1.4 and 1.5, 860 M random weights, or one of its depth with other widths."""
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def autoencoder(widths: tuple[int, ...] = (128, 256, 512, 512), side: int = 512) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion 1.x, 84 M random weights, or one of its depth with other widths."""
    return AutoencoderKL(
        sample_size=side,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )


def text_encoder(width: int = 768) -> CLIPTextModel:
    """Return the text tower of CLIP ViT-L/14, 123 M random weights, or one of its depth with another width."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP_TOKENS,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            projection_dim=width,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=2,  # the published file says so, though the tokenizer does not: pooling relies on it
            pad_token_id=1,
        )
    )


def tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer, 77 tokens."""
    vocab, merges = read_vocab(MERGES)
    special = {"<|startoftext|>": CLIP_TOKENS - 2, "<|endoftext|>": CLIP_TOKENS - 1}
    return CLIPTokenizer(vocab=vocab | special, merges=merges, model_max_length=77)


def build_sd1(folder: Path) -> None:
    """Write folder/pipeline (diffusers' format, fp16 on disk) and folder/scorer (ImageReward.save), unless both are there.

    Takes 6 GB of memory and a minute; 4 GB of disk.
    """
    if (folder / "scorer").is_dir() and (folder / "pipeline").is_dir():
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _write_pipeline(folder / "pipeline", unet().half(), autoencoder().half(), text_encoder().half())
    with replacing(folder / "scorer") as partial:
        ImageReward.build(FULL_SIZE, VOCAB, seed=0).save(partial)


def build_thin(folder: Path) -> None:
    """Write the pipeline of `THIN` for images of 64 pixels, unless it is there."""
    if folder.is_dir():
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _write_pipeline(
            folder, unet(THIN, 64, side=8), autoencoder((32, 32, 64, 64), side=64), text_encoder(64)
        )


def _write_pipeline(
    folder: Path, denoiser: UNet2DConditionModel, vae: AutoencoderKL, encoder: CLIPTextModel
) -> None:
    with replacing(folder) as partial:
        family = SD(
            unet=denoiser,
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer(),
            scheduler_config=tiny.SCHEDULER_CONFIG,
        )
        family.save_pipeline(partial)


def write_scorer(name: str, folder: Path) -> Path:
    """Write random weights of a published scorer's size to folder/name, unless they are there; return the weights file.

    ViT-H takes 9 GB of memory and 4 GB of disk.
    """
    home = folder / name
    if (home / "weights.safetensors").is_file():
        return home / "weights.safetensors"
    with replacing(home) as partial, torch.random.fork_rng(devices=[]):
        partial.mkdir()
        torch.default_generator.manual_seed(0)
        for file, state in random_states(name).items():
            save_file({key: value.contiguous() for key, value in state.items()}, partial / file)
    return home / "weights.safetensors"


def fresh_scorer(name: str, folder: Path) -> Path:
    """Do what `write_scorer` does in a separate process, to release its memory; ValueError where it was killed, too."""
    path: Path | None = fresh(write_scorer, name, folder)
    if path is None:
        raise ValueError(
            f"the process that wrote the weights of {name} was killed; it needs more memory, 9 GB for ViT-H"
        )
    return path


def random_states(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return file name -> tensors of a scorer, under names that its loader takes."""
    card = CARDS[name]
    if name == "aesthetic":
        predictor = Aesthetic(card)
        layers = {f"layers.{key}": value for key, value in predictor.layers.state_dict().items()}
        return {"weights.safetensors": layers, str(CARDS["clipscore"].file): predictor.vision.state_dict()}
    if card.clip is not None:
        clip = ClipScorer(card, MERGES)
        towers = {**clip.vision.state_dict(), **clip.text.state_dict()}
        return {"weights.safetensors": {**towers, "logit_scale": clip.logit_scale.detach()}}
    state = to_authors(ImageReward.build(FULL_SIZE, VOCAB, seed=0).state_dict())
    if name == "blipscore":  # the towers alone, as BLIP names them
        state = {key.removeprefix("blip."): value for key, value in state.items() if key.startswith("blip.")}
    return {"weights.safetensors": state}
