"""Scoring of parts on a Ray cluster, on one machine or on many; the only file that imports Ray.

Ray Data distributes the part numbers. Worker processes, each with its own scorer, return the rows, and the
main process alone writes them, in the order of the parts. The chunks are therefore those of a run without
Ray, byte for byte on equal hardware with equal thread counts. A part is never written twice, although Ray
may score it again when a machine is lost. A killed job continues, with Ray or without, at the first part
that was not written.

When the main process is killed, unwritten parts are scored again: those in progress, and finished parts
that waited for an earlier one.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_build import score_folder


def check_ray_installed() -> None:
    """Raise ValueError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError('--ray needs Ray Data: pip install -c constraints.txt -e ".[ray]"') from error


class Worker:
    """What a process of the cluster does: the number of a part to its rows, as JSON."""

    def __init__(self, make: Callable[[], Callable[[int], list[score_folder.ScoreRow]]]) -> None:
        self.rows_of = make()

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return the part's rows; floats survive JSON."""
        return {"part": task["part"], "rows": json.dumps(self.rows_of(task["part"]), allow_nan=False)}


def score_parts(
    folder: Path,
    parts: range,
    make: Callable[[], Callable[[int], list[score_folder.ScoreRow]]],
    *,
    address: str,
    workers: int,
) -> Iterator[int]:
    """Write the chunks of parts after those that the folder has; yields how many rows are done, part by part.

    make: called once in each process, gives what scores a part. A part without rows has no chunk. ValueError where no
    cluster answers.
    """
    import ray

    local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ValueError(f"--ray {address}: no Ray cluster answers there; local starts one here") from error
    return _written(folder, parts, make, workers)


def _written(
    folder: Path, parts: range, make: Callable[[], Callable[[int], list[score_folder.ScoreRow]]], workers: int
) -> Iterator[int]:
    """Score and write on the cluster that this process is connected to, and leave it."""
    import ray.data

    worker: Any = Worker  # Ray makes one in each process
    done, _ = score_folder.progress(folder)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    tasks = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    answers = tasks.map(
        worker,
        fn_constructor_args=(make,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_gpus=1 if ray.cluster_resources().get("GPU") else None,
    )
    try:
        for answer in answers.iter_rows():
            rows = json.loads(answer["rows"])
            if rows:
                score_folder.write_chunk(folder, done, rows, (answer["part"] + 1, 0))
                done += 1
            yield len(rows)
    finally:
        ray.shutdown()
