"""TF32: float32 products on the tensor cores of a CUDA GPU since Ampere, with 10 bits of mantissa in place of 23."""

import torch

from preftune.cli.notes import say


def set_tf32(asked: bool, *, convolutions: bool) -> None:
    """Let float32 matrix products in this process use TF32, as --allow-tf32 asks, and convolutions by themselves.

    Says so where the flag changes nothing, for want of a GPU that has TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = asked
    torch.backends.cudnn.allow_tf32 = convolutions
    has_tf32 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if asked and not has_tf32:
        say("--allow-tf32 changes nothing here: TF32 needs a CUDA GPU of the Ampere generation or newer")
