"""Rollouts on disk: the trajectories that a policy gradient is computed from, one folder for each in the run's folder.

A rollout is made by the weights before its first update, so that a run which goes on within its updates cannot make it again: it is
read. RUN/rollout_000003 gets its name in one rename, once all processes have written their part, and has digests. It is kept while it is
in use, or while a checkpoint within its updates is there.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune import files
from preftune.training import checkpoint, generated_folders
from preftune.training.run import Run

PATTERN = "rollout_" + 6 * "[0-9]"
"""Names of the folders."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Trajectories of N images in T steps, all processes' together, on the CPU, in the order of the images."""

    latents: Tensor
    """(N, T + 1, C, h, w) float32."""
    log_probs: Tensor
    """(N, T) float32, means over elements; nan where none was taken."""
    scores: Tensor
    """(N, n) float32, a column for each scorer, in its own units."""
    rewards: Tensor
    """(N,) float32."""


@dataclass
class Clock:
    """Seconds that a rollout and its updates have taken, by what they were taken for."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Context whose time counts as `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Return the share of each in their sum, as `sampling_time`."""
        total = sum(self.seconds.values())
        return {f"{what}_time": seconds / total for what, seconds in self.seconds.items()}


def folder_of(run: Path, number: int) -> Path:
    """Return the folder of a rollout, counted from 0."""
    return run / f"rollout_{number:06d}"


def write(run: Run, number: int, places: list[int], tensors: Mapping[str, Tensor]) -> None:
    """Write this process' images, whose places in the rollout are given; once all have, the folder gets its name."""
    folder = folder_of(run.folder, number)
    partial = generated_folders.partial_folder(folder)
    partial.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**contents, "places": torch.tensor(places)}, partial / f"rank_{run.rank}.safetensors")
    generated_folders.publish(run, folder, rollout=number)


def read(run: Path, number: int) -> Rollout:
    """Return a rollout that is there."""
    parts = [load_file(path) for path in sorted(folder_of(run, number).glob("rank_*.safetensors"))]
    parts = [part for part in parts if len(part["places"])]  # more processes than images
    order = torch.cat([part["places"] for part in parts]).argsort()
    names = ("latents", "log_probs", "scores", "rewards")
    return Rollout(**{name: torch.cat([part[name] for part in parts])[order] for name in names})


def remove_stale(run: Run, updates: int) -> None:
    """Remove the rollouts that are not of the weights from which a run begins, with so many updates each, and parts of one.

    ValueError where it goes on within the updates of a rollout that is gone or damaged.
    """
    generated_folders.remove_stale(
        run, {number_of(folder): folder for folder in run.folder.glob(PATTERN)},
        folder_of(run.folder, run.start // updates), updates,
        f"the rollout cannot be made again with later weights; go on from a checkpoint after a multiple of {updates} updates, or start again"
        " with --overwrite-output-dir",
    )  # fmt: skip
    if run.is_main:
        for partial in run.folder.glob(f".{PATTERN}.tmp-shared"):
            files.remove(partial)
    run.wait()


def number_of(folder: Path) -> int:
    """Return which rollout a folder holds, from its name."""
    return int(folder.name.removeprefix("rollout_"))


def prune(run: Run, updates: int, done: int) -> None:
    """Remove the rollouts that nothing needs after so many updates of the run: neither the next update nor a checkpoint."""
    if not run.is_main:
        return
    known = [checkpoint.updates_of(path) or 0 for path in checkpoint.find_checkpoints(run.folder)]
    needed = {count // updates for count in [*known, done] if count % updates}
    for folder in run.folder.glob(PATTERN):
        if number_of(folder) not in needed:
            gone = folder.with_name(f".{folder.name}.tmp-gone")  # half removed, it must not look complete
            files.remove(gone)
            files.remove(folder.rename(gone))
