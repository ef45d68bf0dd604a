"""CLIP's three tokenisers: OpenAI's, open_clip's as shipped with HPS v2, and that of transformers
(PickScore).

All three share one byte-level vocabulary. The first two repair a text (ftfy), resolve HTML entities and
convert it to lower case; the third only composes accents (NFC). They also differ in which spellings of
their two special tokens they recognise inside a text. Ids equal those of the authors' own code. A CLIP that
was trained here may have a smaller vocabulary (fewer merges); its ids are assigned in the same order:
bytes, bytes that end a word, merges, start, end.
"""

import functools
import gzip
import hashlib
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import ftfy
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPTokenizer as HubTokenizer

from rewards.input_files import MAX_JSON, parse_json

Kind = Literal["openai", "open_clip", "transformers"]

MERGES = Path(__file__).with_name("vocabularies") / "clip_merges.txt"
"""CLIP's merges, a part of this package: the used part of OpenAI's bpe_simple_vocab_16e6.txt.gz."""
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
"""Of the used merges, one a line: of every file that holds them, whatever its format and what follows them."""
VOCAB_SIZE = 49408
_NOT_MERGES = 2 * 256 + 2
"""Tokens of a vocabulary that are no merges: each byte, each at the end of a word, start and end."""

SPECIAL = {
    "openai": ("<|startoftext|>", "<|endoftext|>"),
    "open_clip": ("<start_of_text>", "<end_of_text>"),
    "transformers": ("<|startoftext|>", "<|endoftext|>"),
}


class ClipTokenizer:
    """Texts to ids (B, context) int64: start, at most context - 2 pieces, end, zeros. Longer texts are cut, the end kept."""

    def __init__(self, kind: Kind, merges: Path, context: int, vocab_size: int = VOCAB_SIZE) -> None:
        if kind not in SPECIAL:
            raise ValueError(f"unknown tokenizer {kind!r}; one of {', '.join(SPECIAL)}")
        self.context = context
        self.ahead: Mapping[str, list[int]] = {}
        """The ids of texts that were read elsewhere."""
        self.start, self.end = vocab_size - 2, vocab_size - 1
        self._ids: Callable[[str], list[int]]
        self.special = dict(zip(SPECIAL[kind], (self.start, self.end), strict=True))
        vocab, pairs = read_vocab(merges, vocab_size)
        self.merges = "\n".join(["#version: 0.2", *map(" ".join, pairs)]) + "\n"
        if kind == "transformers":
            self._ids = functools.partial(_hub_ids, HubTokenizer(vocab=vocab | self.special, merges=pairs))
        else:
            self.bpe = BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>")
            spellings = "|".join(regex.escape(token) for token in self.special)
            self.pieces = regex.compile(
                rf"{spellings}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
                regex.IGNORECASE,
            )
            self._ids = self._authors_ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, start and end included, at most `context` of them."""
        if text in self.ahead:
            return self.ahead[text]
        ids = [self.start, *self._ids(text), self.end]
        return ids if len(ids) <= self.context else [*ids[: self.context - 1], self.end]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of B texts, (B, context) int64, padded with zeros."""
        rows = [self.encode(text) for text in texts]
        return torch.tensor([row + [0] * (self.context - len(row)) for row in rows])

    def _authors_ids(self, text: str) -> list[int]:
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
        lower = regex.sub(r"\s+", " ", cleaned).strip().lower()
        ids = []
        for piece in self.pieces.findall(lower):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                letters = "".join(_letters()[byte] for byte in piece.encode())
                ids += [token.id for token in self.bpe.tokenize(letters)]
        return ids


def _hub_ids(tokenizer: HubTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- vocabulary


def read_merges(path: Path) -> list[str]:
    """Return the merges, at most as many as CLIP has, of a list or a tokenizer.json; ValueError when the file is neither."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"it unpacks to more than {MAX_JSON} bytes")
        text = content.decode()
        if path.suffix == ".json":
            return [" ".join(pair) for pair in parse_json(text, str(path))["model"]["merges"]]
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no list of merges ({type(error).__name__}); download it again"
        ) from error
    return text.rstrip("\n").split("\n")[1 : 1 + VOCAB_SIZE - _NOT_MERGES]


def vocab_size(path: Path) -> int:
    """Return the number of tokens that a list of merges makes."""
    return len(read_merges(path)) + _NOT_MERGES


@functools.cache
def read_vocab(path: Path, vocab_size: int = VOCAB_SIZE) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id without the two special ones, merges in order) of a vocabulary of so many tokens.

    ValueError when the file is no list of merges or has not so many, and when they should be CLIP's but are not.
    """
    lines = read_merges(path)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if vocab_size == VOCAB_SIZE and digest != MERGES_SHA256:
        raise ValueError(f"{path} has merges of SHA-256 {digest}, CLIP's have {MERGES_SHA256}")
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    if len(merges) != vocab_size - _NOT_MERGES or not all(second for _, second in merges):
        raise ValueError(
            f"{path} has {len(merges)} merges, not the {vocab_size - _NOT_MERGES} pairs of a vocabulary of {vocab_size} tokens"
        )
    letters = list(_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    return {token: index for index, token in enumerate(tokens)}, merges


@functools.cache
def _letters() -> dict[int, str]:
    """Return a printable letter for each byte, in the order of the vocabulary (Radford et al. 2019, GPT-2).

    Printable bytes stand for themselves and come first; the others get the letters from code point 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }
