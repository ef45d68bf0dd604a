"""Builders of small models in Stable Diffusion's format with random seeded weights."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

# Stable Diffusion 1.x's own scheduler_config.json
SCHEDULER_CONFIG: dict[str, object] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_autoencoder(widths: Sequence[int], size: int, seed: int) -> AutoencoderKL:
    """Return an AutoencoderKL of factor 8 with 4 latent channels; widths are those of its four levels.

    The posterior starts narrow (log-variance -6), or its noise would drown the latents of the first thousand updates.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=size,
        )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
        vae.quant_conv.weight[4:] *= 0.1
    return vae


def build_unet(
    widths: Sequence[int], layers: int, text_width: int, latent_size: int, seed: int
) -> UNet2DConditionModel:
    """Return a UNet with cross-attention at every level; widths are multiples of 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * len(widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=16,
        )


def build_tokenizer(
    captions: Iterable[str], folder: Path, *, num_merges: int, max_length: int
) -> CLIPTokenizer:
    """Learn CLIP's byte-pair encoding on captions; write vocab.json and merges.txt into folder and read them back.

    All 256 bytes are in the vocabulary, so that any text can be encoded.
    """
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    words = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *("".join(pair) for pair in merges),
        _START,
        _END,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    )
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length)
