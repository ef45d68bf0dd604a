"""Several processes that share the work of a program that does not train: accelerate launch or torchrun starts them.

A training run has its own, preftune/training/run.py. Here every process does a part of a list of work and writes its own
files; all that they say to each other is that they have come to a point, over gloo on the CPU. A process that fails is seen by
the launcher, which then ends the others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from preftune.cli.precision import device_here

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: as long as their share of the work may take."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that a launcher started; the only one where there was no launcher."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Context in which the processes of a launcher know each other, by the environment variables that it sets."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank=distributed.get_rank(), count=count)
    finally:
        distributed.destroy_process_group()


def own_device() -> "torch.device":
    """Return the device of this process: of several, each has a GPU of its own, by its number on this machine."""
    import torch

    here = device_here()
    if here.type != "cuda" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
