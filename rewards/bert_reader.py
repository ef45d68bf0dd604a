"""BERT's tokeniser as BLIP uses it: texts to ids and a mask of a fixed length."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import BertTokenizer


class BertReader:
    """Texts to ids (B, L) and masks (B, L) int64: [CLS], at most L - 2 pieces, [SEP], padding."""

    def __init__(self, tokenizer: BertTokenizer, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.ahead: Mapping[str, list[int]] = {}
        """The ids of texts that were read elsewhere."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, start and end included, at most L of them."""
        return self.ahead.get(text) or self._rows([text])[0]

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, each (B, L) int64; longer texts are cut."""
        new = [text for text in dict.fromkeys(texts) if text not in self.ahead]
        known = {**self.ahead, **dict(zip(new, self._rows(new), strict=True))}
        rows = [known[text] for text in texts]
        pad = self.tokenizer.pad_token_id
        ids = [row + [pad] * (self.length - len(row)) for row in rows]
        masks = [[1] * len(row) + [0] * (self.length - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor(masks)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if not texts:
            return []
        return self.tokenizer([*texts], truncation=True, max_length=self.length)["input_ids"]
