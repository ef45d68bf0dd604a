"""Prompts as tokens of a CLIP text encoder."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from rewards.on_device import upload

States = TypeVar("States")

_NO_LIMIT = 10**6
"""transformers gives a tokenizer without a model_max_length one of 1e30."""


def token_ids(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Return ids (B, L), padded or cut to the tokenizer's length, or where it has none to the encoder's.

    A token of textual inversion with several vectors (<cat>, <cat>_1, ... in the tokenizer) expands to all of them, as in the
    pipeline.
    """
    length = tokenizer.model_max_length
    if length > _NO_LIMIT:
        length = encoder.config.max_position_embeddings
    added = tokenizer.added_tokens_encoder
    texts = list(prompts)
    if any(f"{token}_1" in added for token in added):
        texts = TextualInversionLoaderMixin().maybe_convert_prompt(texts, tokenizer)
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return upload(batch.input_ids, device)


def encoded_once(
    prompt: str,
    encoders: Iterable[nn.Module],
    encode: Callable[[Sequence[str]], States],
    kept: dict[str, States],
) -> States:
    """Return what `encode` says of one prompt, from `kept` where it is there; anew each time where an encoder is trained."""
    if any(_is_open(encoder) for encoder in encoders):
        return encode([prompt])
    if prompt not in kept:
        with torch.no_grad():
            kept[prompt] = encode([prompt])
    return kept[prompt]


def _is_open(encoder: nn.Module) -> bool:
    """Whether an encoder is trained, so that what it says of a prompt may not be kept."""
    return encoder.training or any(weight.requires_grad for weight in encoder.parameters())


def to_save(tokenizer: Any) -> Any:
    """Return a tokenizer whose saved file is the same whether or not it was called: a call leaves its padding and length there."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer
