"""Which images a run will read, and how many worker processes read them ahead."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from preftune import order
from preftune.captioned_inputs import CaptionedInputs, on
from preftune.cli import exit_on_user_error
from preftune.encoded_store import Store
from preftune.families.base import Family
from preftune.images import load_levels
from preftune.resolution import Resolution
from preftune.training.cache_config import CacheConfig
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, cpu_threads
from preftune.worker_processes import WorkerProcesses

Item = TypeVar("Item")

MOST = 4
"""Workers that are enough by default: about 500 images of 512 px a second."""


def workers(config: RunConfig, device: torch.device) -> int:
    """Return the number of worker processes of this process: on a CPU none by default, for its cores are those that train."""
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    return 0 if device.type == "cpu" else max(1, min(MOST, cpu_threads(config) - 1))


def upcoming(run: Run, items: Sequence[Item], steps: range | None = None) -> Iterator[list[Item]]:
    """Yield the items of this process in each pass of the updates that are still to do, or of those steps."""
    for step in range(run.start, run.config.max_train_steps) if steps is None else steps:
        for micro_batch in range(run.config.gradient_accumulation_steps):
            yield order.items_at(items, run.image_indices(step, micro_batch), run.config.seed)


@contextmanager
def images_ahead(
    run: Run, paths: Sequence[Path], resolution: Resolution
) -> Iterator[Callable[[Sequence[Path]], Tensor]]:
    """Yield a function that returns images (B, 3, H, W) in [0, 1] on the run's device, scaled and cropped to the resolution; those
    of the updates that are still to do, one batch a pass, are decoded ahead.
    """
    with WorkerProcesses(
        partial(load_levels, resolution=resolution), workers(run.config, run.device)
    ) as reading:
        reading.expect(upcoming(run, paths))

        def load(chosen: Sequence[Path]) -> Tensor:
            with exit_on_user_error():  # an image that was sound when the run began
                found = reading.take(chosen)
            return on(run.device, [levels for levels, _ in found])

        yield load


def captioned_inputs(family: Family, resolution: Resolution, run: Run, cache: CacheConfig) -> CaptionedInputs:
    """Return the inputs of a run's captioned images, with the workers and stores that its flags ask for."""
    store = Store(cache.folder()) if cache.is_on else None
    return CaptionedInputs(
        family,
        resolution,
        workers=workers(run.config, run.device),
        latents=store if cache.cache_latents else None,
        texts=store if cache.cache_text_encoder_outputs else None,
        batch_size=run.config.train_batch_size,
    )
