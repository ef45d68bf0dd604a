"""Write the vocabulary of the tiny scorers from the captions of a data set.

The tiny ImageReward's is a WordPiece vocab.txt: BERT's special tokens, the words, and single letters. The tiny CLIP's, which is
the pipeline's too, is a folder with a byte-pair tokenizer.json.

    python assets/tiny/vocab.py --data data/scorer --output-dir data/vocab.txt
    python assets/tiny/vocab.py --data data/clip --architecture clip --output-dir data/tokenizer
"""

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune.cli import parse
from preftune.families.tiny import build_tokenizer
from preftune.records import read_imagefolder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the vocabulary of the words in a data set's captions."""

    data: Path
    """Imagefolder with metadata.jsonl."""
    output_dir: Path
    """vocab.txt, or the tokenizer folder, to write."""
    architecture: Literal["imagereward", "clip"] = "imagereward"
    """imagereward: WordPiece; clip: byte pairs."""
    num_merges: int = 400
    """Byte pairs that a clip's tokenizer learns."""
    max_length: int = 48
    """Tokens of a clip's prompt, start and end included."""


def main(config: Config) -> None:
    """Collect and write the words."""
    captions = [row.text for row in read_imagefolder(config.data)]
    if config.architecture == "clip":
        build_tokenizer(
            captions, config.output_dir, num_merges=config.num_merges, max_length=config.max_length
        ).save_pretrained(config.output_dir)
        return
    words = sorted({word for text in captions for word in re.findall(r"[a-z]+", text.lower())})
    symbols = string.ascii_lowercase + string.digits + ",.!?'-"
    pieces = [*symbols, *("##" + symbol for symbol in string.ascii_lowercase + string.digits)]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *words])
    config.output_dir.write_text("\n".join(tokens) + "\n")


if __name__ == "__main__":
    main(parse(Config))
