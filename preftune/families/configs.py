"""Checks of a diffusers pipeline folder that read only its JSON files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.resolution import Resolution
from rewards.input_files import parse_json, read_text

Config = Mapping[str, Any]

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PIPELINES: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": AUTOENCODERS,
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": _TOKENIZERS,
        "scheduler": (),
    },
    "StableDiffusionXLPipeline": {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder": ("CLIPTextModel",),
        "unet": ("UNet2DConditionModel",),
        "vae": AUTOENCODERS,
        "tokenizer": _TOKENIZERS,
        "tokenizer_2": _TOKENIZERS,
        "scheduler": (),
    },
}
"""`_class_name` of model_index.json -> the parts that are read -> their classes; any scheduler will do."""
# UNets with more input channels than latents, which need a second image
_CHANNELS = {
    9: " (an inpainting model)",
    8: " (such as InstructPix2Pix)",
    7: " (an upscaler)",
    5: " (a depth-to-image model)",
}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds; ValueError where it is not there or holds none."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; name a folder that save_pretrained(folder) wrote")
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; save a pipeline with pipe.save_pretrained(folder)")
    return content


def check_parts(folder: Path, index: Config) -> None:
    """Raise ValueError unless model_index.json names each part with one of its classes, and the part has a folder."""
    parts = PIPELINES[index["_class_name"]]
    for part, classes in parts.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found is None:
            raise ValueError(
                f"{folder} has no {part}; a {index['_class_name']} needs {' or '.join(classes) or 'one'}"
            )
        if classes and found not in classes:
            raise ValueError(f"{folder}: its {part} is {found}; expected {' or '.join(classes)}")
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} lacks the folder {part}, which its model_index.json names")


def read_model(folder: Path, class_name: str, library: str = "diffusers") -> Config:
    """Return the config.json of a model's folder; ValueError for another class.

    transformers' configurations name a model type instead of the class: that of a CLIP text encoder.
    """
    config = read_json(folder / "config.json")
    if library == "diffusers":
        found, expected = config.get("_class_name"), [class_name]
    else:
        found, expected = config.get("model_type"), ["clip_text_model", "clip"]
    if found not in expected:
        raise ValueError(f"{folder} is {found}, not {class_name}: its config.json says so")
    return config


def check_unet(folder: Path, unet: Config, vae: Config, text_width: int, *, addition: str | None) -> None:
    """Raise ValueError unless the UNet takes latents, a timestep and text alone, as the other parts make them.

    addition is the `addition_embed_type` that the family's call fills in, or None.
    """
    channels = (unet.get("in_channels", 4), unet.get("out_channels", 4))
    latents = vae.get("latent_channels", 4)
    if channels != (latents, latents):
        raise ValueError(
            f"{folder}: its unet has {channels[0]} input{_CHANNELS.get(channels[0], '')} and {channels[1]} output channels;"
            f" expected {latents} and {latents}, the latent channels of its vae"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{folder}: its unet has time_cond_proj_dim {unet['time_cond_proj_dim']} (a latent consistency model, which takes"
            " the guidance scale as an input); expected none"
        )
    for key, expected in (
        ("addition_embed_type", addition),
        ("class_embed_type", None),
        ("num_class_embeds", None),
        ("encoder_hid_dim", None),
        ("encoder_hid_dim_type", None),
    ):
        if unet.get(key) != expected:
            raise ValueError(f"{folder}: its unet has {key} {unet.get(key)}; expected {expected or 'none'}")
    widths = unet.get("cross_attention_dim", 1280)
    if any(width != text_width for width in (widths if isinstance(widths, list) else [widths])):
        raise ValueError(
            f"{folder}: its unet has cross_attention_dim {widths}, but its text is {text_width} wide (hidden_size); expected"
            " the same"
        )


def check_vae(folder: Path, like: Config | None = None) -> Config:
    """Return the configuration of the folder of an AutoencoderKL or AutoencoderTiny (TAESD).

    ValueError for another autoencoder, or where latents are not of the same kind as those of `like`, which it replaces.
    """
    vae = read_json(folder / "config.json")
    if (kind := vae.get("_class_name")) not in AUTOENCODERS:
        raise ValueError(
            f"{folder} is {kind}, not {' or '.join(AUTOENCODERS)}: its config.json says so; name the folder of such a one"
        )
    name = "block_out_channels" if kind == "AutoencoderKL" else "decoder_block_out_channels"
    if not isinstance(vae.get(name), list):
        raise ValueError(f"{folder}: its config.json lacks the list {name}")
    found = (vae.get("latent_channels", 4), vae_factor(vae))
    if like is not None and found != (expected := (like.get("latent_channels", 4), vae_factor(like))):
        raise ValueError(
            f"{folder} has {found[0]} latent channels and a factor of {found[1]}; expected {expected[0]} and {expected[1]}"
        )
    return vae


def check_text_encoder(folder: Path, class_name: str) -> Config:
    """Return the configuration of a CLIP text encoder, with hidden_size; ValueError for another kind of model."""
    config = read_model(folder, class_name, "transformers")
    text = config.get("text_config") if config["model_type"] == "clip" else config
    if not isinstance(text, dict) or not isinstance(text.get("hidden_size"), int):
        raise ValueError(f"{folder}: its config.json has no hidden_size of the text encoder")
    return text


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError unless a tokenizer's files are there."""
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} has no tokenizer.json and lacks {' and '.join(missing)}")


def trained_resolution(unet: Config, vae: Config, default: int) -> Resolution:
    """Return the size that the UNet was trained at; `default` (in latents) where its configuration says none."""
    size = unet.get("sample_size") or default
    height, width = size if isinstance(size, list | tuple) else (size, size)
    factor = vae_factor(vae)
    return Resolution(height=int(height) * factor, width=int(width) * factor)


def vae_factor(vae: Config) -> int:
    """Return how many pixels one latent stands for, along each side."""
    # AutoencoderTiny's own config.json has no block_out_channels, its object has; its last level does not double the size either
    widths = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
    return int(2 ** (len(widths) - 1))


def force_upcast(vae: Config) -> bool:
    """Return whether an autoencoder's activations overflow in float16; where it says nothing, its class's own default."""
    return bool(vae.get("force_upcast", vae.get("_class_name") != "AutoencoderTiny"))
