"""--precision, --batch-size and --workers of the programs for scoring and showing: checks, and what they are where nothing is asked."""

from typing import TYPE_CHECKING, Literal

from preftune.machine.cores import cores

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]

BATCH_SIZE = {"cuda": 128, "cpu": 32}
"""Images per forward pass of a scorer."""


def check_precision(precision: Precision | None) -> None:
    """Raise ValueError for fp16 without a GPU. Torch is imported for fp16 alone."""
    if precision != "fp16":
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a GPU; use fp32 or bf16")


def device_here() -> "torch.device":
    """Return the device of the programs that score and sample: the first CUDA GPU, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision_here(asked: Precision | None) -> Precision:
    """Return the precision of scorers: what is asked; else bf16 on a CUDA GPU, fp16 on one before Ampere, fp32 elsewhere."""
    import torch

    if asked is not None:
        return asked
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def batch_size_here(asked: int | None) -> int:
    """Return the images per forward pass of a scorer: what is asked, else what suits this machine."""
    return asked or BATCH_SIZE[device_here().type]


def workers_here(asked: int | None, *, programs: int = 1) -> int:
    """Return the reading processes: what is asked, else one for each core, shared out where so many programs run on this machine."""
    return max(1, cores() // programs) if asked is None else asked
