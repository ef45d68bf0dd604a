"""What a run has tuned, as a pipeline of diffusers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from preftune import families
from preftune.families.source import Source


def tuned(
    source: Source,
    run: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    vae: Path | None = None,
) -> Any:
    """Return the pipeline of a model with what the folder of a run holds: pipeline/, lora/ or unet/.

    It gives the images that diffusers' own pipeline gives once `pipe.load_lora_weights(run/lora)` was called, or with
    the UNet of run/unet in place of its own. `source` and `vae` are those of the run.
    """
    if (run / "pipeline").is_dir():
        return families.load(run / "pipeline", device, dtype).pipeline()
    family = families.load(source, device, dtype, vae)
    if (run / "unet").is_dir():
        family.load_tuned(run / "unet")
    pipe = family.pipeline()
    if (run / "lora").is_dir():
        with _quiet():  # diffusers warns of a LoRA that leaves the text encoders as they are
            pipe.load_lora_weights(str(run / "lora"))
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors of diffusers alone are said."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
