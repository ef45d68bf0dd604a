"""The parts of a pipeline from its folder or from a single file."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from preftune.families import single_file, weights
from preftune.families.configs import read_json
from preftune.families.source import Source, models_of
from rewards.clip_tokenizer import MERGES, SPECIAL, VOCAB_SIZE, read_vocab


def load(
    source: Source,
    pipeline: Any,
    classes: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    vae: Path | None = None,
    vae_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the parts of a checked pipeline of this class: models by their classes, in dtype, and tokenizers.

    `vae` is the folder of another autoencoder; the autoencoder is read in vae_dtype where that is given.
    """
    parts: dict[str, Any] = {
        part: _tokenizer(source, part) for part in classes if part.startswith("tokenizer")
    }
    parts["vae"] = _vae(source, vae, dtype if vae_dtype is None else vae_dtype)
    if source.file is not None:
        return single_file.load(pipeline, source.file, source.folder, dtype, parts)
    libraries = models_of(source.index())
    for part, model_class in classes.items():
        if part not in parts:
            parts[part] = _model(model_class, source.folder / part, libraries[part], source.variant, dtype)
    return parts


def _vae(source: Source, vae: Path | None, dtype: torch.dtype) -> Any:
    """Return the autoencoder, or that of another folder."""
    if source.file is not None and vae is None:
        return single_file.load_vae(source.file, source.folder, dtype)
    return load_vae(vae or source.folder / "vae", source.variant, dtype)


def load_vae(folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Return the autoencoder of a checked folder."""
    tiny = read_json(folder / "config.json")["_class_name"] == "AutoencoderTiny"
    return _model(AutoencoderTiny if tiny else AutoencoderKL, folder, "diffusers", variant, dtype)


def _model(model_class: Any, folder: Path, library: str, variant: str | None, dtype: torch.dtype) -> Any:
    """Return a model from its folder; nothing is unpickled but tensors. ValueError for weights that are damaged or not all there."""
    found = weights.find(folder, library, variant)
    try:
        model, info = model_class.from_pretrained(
            folder,
            variant=found.variant,
            use_safetensors=found.safetensors,
            local_files_only=True,
            output_loading_info=True,
            **{"torch_dtype" if library == "diffusers" else "dtype": dtype},
        )
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights in {folder} cannot be read ({reason}); download or save the model again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # the libraries would put random ones in their place
        raise ValueError(
            f"{folder} lacks {len(missing)} weights, such as {missing[0]}; download or save the model again"
        )
    return model


def _tokenizer(source: Source, part: str) -> Any:
    """Return a tokenizer; the published configurations have CLIP's, whose vocabulary comes with the scorers."""
    folder = source.folder / part
    if source.file is None or (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    vocab, merges = read_vocab(MERGES)
    start, end = SPECIAL["transformers"]
    config = read_json(folder / "tokenizer_config.json")
    return CLIPTokenizer(
        vocab=vocab | {start: VOCAB_SIZE - 2, end: VOCAB_SIZE - 1},
        merges=merges,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=config["pad_token"],
        model_max_length=config["model_max_length"],
    )
