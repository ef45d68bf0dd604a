"""Prompts as tokens of a CLIP text encoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NO_LIMIT = 10**6
"""transformers gives a tokenizer without a model_max_length one of 1e30."""


def token_ids(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Return ids (B, L), padded or cut to the tokenizer's length, or where it has none to the encoder's."""
    length = tokenizer.model_max_length
    if length > _NO_LIMIT:
        length = encoder.config.max_position_embeddings
    batch = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids.to(device)
    return ids


def to_save(tokenizer: Any) -> Any:
    """Return a tokenizer whose saved file is the same whether or not it was called: a call leaves its padding and length there."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer
