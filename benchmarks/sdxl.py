"""Stable Diffusion XL's parts at real size, with random weights or, inside `torch.device("meta")`, with none at all."""

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.models import CLIP_TOKENS


def unet() -> UNet2DConditionModel:
    """Return the UNet of Stable Diffusion XL 1.0, 2.57 G weights."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def autoencoder() -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion XL 1.0, 84 M weights."""
    return AutoencoderKL(
        sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def text_encoder() -> CLIPTextModel:
    """Return the first text encoder, that of CLIP ViT-L, 123 M weights."""
    return CLIPTextModel(_config(hidden=768, layers=12, heads=12, act="quick_gelu"))


def text_encoder_2() -> CLIPTextModelWithProjection:
    """Return the second text encoder, that of OpenCLIP ViT-bigG, 695 M weights."""
    return CLIPTextModelWithProjection(_config(hidden=1280, layers=32, heads=20, act="gelu"))


def _config(*, hidden: int, layers: int, heads: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=CLIP_TOKENS, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=hidden, max_position_embeddings=77, hidden_act=act,
        bos_token_id=CLIP_TOKENS - 2, eos_token_id=CLIP_TOKENS - 1, pad_token_id=CLIP_TOKENS - 1,
    )  # fmt: skip
