"""A program that writes a file with each library that the real programs write with, and says what failed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where to write."""

    output_dir: Path


def main(config: Config) -> int:
    """Write; return how many of the libraries could not."""
    folder, weights = config.output_dir, {"weight": torch.zeros(10_000)}
    table = pyarrow.table({"column": np.zeros(10_000)})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    writes: dict[str, Callable[[], object]] = {
        "text": lambda: (folder / "a.txt").write_text("text"),
        "torch": lambda: torch.save(weights, folder / "a.pt"),
        "safetensors": lambda: save_file(weights, folder / "a.safetensors"),
        "parquet": lambda: pyarrow.parquet.write_table(table, folder / "a.parquet"),
        "image": lambda: image.save(folder / "a.png"),
        "folder": lambda: (folder / "folder").mkdir(),
    }
    failed = 0
    for name, write in writes.items():
        try:
            write()
        except Exception as error:
            failed += 1
            sys.stderr.write(f"{name} failed: {type(error).__name__}\n")
    return failed
