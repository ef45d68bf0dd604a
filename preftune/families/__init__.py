"""Model families: one file each, all with the methods of `base.Family`."""

from pathlib import Path

import torch

from preftune.families import sd
from preftune.families.base import Cond, Family

__all__ = ["Cond", "Family", "check", "load"]


def check(folder: Path) -> None:
    """Raise ValueError, in milliseconds, unless the folder is a pipeline of a known family."""
    sd.check(folder)


def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> sd.SD:
    """Load a diffusers pipeline folder as its family."""
    return sd.load(folder, device, dtype)
