"""The check of --precision that the programs for scoring and showing share."""


def check_precision(precision: str) -> None:
    """Raise ValueError for fp16 without a GPU. Torch is imported for fp16 alone."""
    if precision != "fp16":
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a GPU; use fp32 or bf16")
