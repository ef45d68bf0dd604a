"""CLIP's three tokenisers: OpenAI's, open_clip's as shipped with HPS v2, and that of transformers (PickScore).

All three share one byte-level vocabulary. The first two repair a text (ftfy), resolve HTML entities and put it
in lower case; the third does none of that but composes accents (NFC). They also differ in which spellings of
their two special tokens they recognise inside a text. Ids equal those of the authors' own code.
"""

import functools
import gzip
import hashlib
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import ftfy
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPTokenizer as HubTokenizer

from rewards.weights import LOOSE, cached, loose

Kind = Literal["openai", "open_clip", "transformers"]

VOCAB_FILE = "bpe_simple_vocab_16e6.txt.gz"
"""OpenAI's list of merges; transformers ships the used part of it, uncompressed, as merges.txt."""
VOCAB_REPO = "openai/clip-vit-large-patch14"
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
"""Of the used merges, one a line: of every file that holds them, whatever its format and what follows them."""
_NUM_MERGES = 48894

START, END = 49406, 49407
SPECIAL = {
    "openai": ("<|startoftext|>", "<|endoftext|>"),
    "open_clip": ("<start_of_text>", "<end_of_text>"),
    "transformers": ("<|startoftext|>", "<|endoftext|>"),
}


class ClipTokenizer:
    """Texts to ids (B, context) int64: start, at most context - 2 pieces, end, zeros. Longer texts are cut, the end kept."""

    def __init__(self, kind: Kind, merges: Path, context: int) -> None:
        if kind not in SPECIAL:
            raise ValueError(f"unknown tokenizer {kind!r}; one of {', '.join(SPECIAL)}")
        self.context = context
        self._ids: Callable[[str], list[int]]
        self.special = dict(zip(SPECIAL[kind], (START, END), strict=True))
        vocab, pairs = read_vocab(merges)
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
        ids = [START, *self._ids(text), END]
        return ids if len(ids) <= self.context else [*ids[: self.context - 1], END]

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


def find_vocab(weights: Path | None) -> Path:
    """Return the merges beside a weights file, in weights/ or in the hub's cache; ValueError says where to put them."""
    beside = [weights.with_name(name) for name in (VOCAB_FILE, "merges.txt")] if weights is not None else []
    found = next((path for path in beside if path.is_file()), None)
    path = found or loose(VOCAB_FILE) or cached(VOCAB_REPO, "merges.txt", None)
    if path is None:
        raise ValueError(
            f"CLIP's vocabulary is not here; put {VOCAB_FILE} of github.com/openai/CLIP beside the weights or into"
            f" {LOOSE}/, or run `hf download {VOCAB_REPO} merges.txt`"
        )
    return path


@functools.cache
def read_vocab(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id without the two special ones, merges in order) of a list of merges.

    ValueError when the file is no list of merges, or not CLIP's.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = file.read().decode().split("\n")[1 : 1 + _NUM_MERGES]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no list of merges ({type(error).__name__}); download it again"
        ) from error
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if digest != MERGES_SHA256:
        raise ValueError(f"{path} has merges of SHA-256 {digest}, CLIP's have {MERGES_SHA256}")
    merges = [tuple(line.split()) for line in lines]
    letters = list(_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    return {token: index for index, token in enumerate(tokens)}, merges  # type: ignore[return-value]


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
