"""Write the WordPiece vocabulary of the tiny scorer: BERT's special tokens, the words of the shapes world,
and single letters.

    python assets/tiny/vocab.py --data data/scorer --output-dir data/vocab.txt
"""

import re
import string
from dataclasses import dataclass
from pathlib import Path

from preftune.cli import parse
from preftune.records import read_imagefolder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the WordPiece vocabulary of the words in a data set's captions."""

    data: Path
    """Imagefolder with metadata.jsonl."""
    output_dir: Path
    """vocab.txt to write."""


def main(config: Config) -> None:
    """Collect and write the words, most general first."""
    words = sorted(
        {word for row in read_imagefolder(config.data) for word in re.findall(r"[a-z]+", row.text.lower())}
    )
    symbols = string.ascii_lowercase + string.digits + ",.!?'-"
    pieces = [*symbols, *("##" + symbol for symbol in string.ascii_lowercase + string.digits)]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *words])
    config.output_dir.write_text("\n".join(tokens) + "\n")


if __name__ == "__main__":
    main(parse(Config))
