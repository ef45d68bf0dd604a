"""Times of ReFL updates, ours and the released ones in turns in one process, and their peak memory."""

import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hardware import Spent, peak_mib, spent
from benchmarks.published import published
from benchmarks.refl_loops import Trial, Update, ours

WARMUP = 2
"""Updates before timing (kernel selection, compilation, optimizer state)."""
OUT_OF_MEMORY = "out of memory"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A warm update and the peak memory of its own."""

    trial: Trial
    update: Update
    peak_mib: float


def start(trial: Trial) -> Loop:
    """Load a loop, do its first updates, and read its peak memory: on CUDA beyond what was allocated before."""
    before = torch.cuda.memory_allocated() / 2**20 if trial.device == "cuda" else 0.0
    planned = range(WARMUP + trial.repeats)
    update = ours(trial) if trial.loop == "ours" else published(trial, planned)
    if trial.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # loading is not an update
    for index in range(WARMUP):
        update(index)
    return Loop(trial=trial, update=update, peak_mib=peak_mib(trial.device) - before)


def take_turns(loops: Sequence[Loop]) -> list[list[Spent]]:
    """Return what each of the timed updates took of each loop; the loops alternate update by update."""
    trial = loops[0].trial
    turns = range(WARMUP, WARMUP + trial.repeats)
    rounds = [[spent(loop.update, index, trial.device) for loop in loops] for index in turns]
    return [list(column) for column in zip(*rounds, strict=True)]


def figures(loop: Loop, times: Sequence[Spent]) -> Row:
    """Return the keys s_per_update (median of wall time), images_per_s, cpu_s (least CPU time), times, cpu_times, peak_mib."""
    walls, cpus = [time.wall for time in times], [time.cpu for time in times]
    seconds = statistics.median(walls)
    return {
        "s_per_update": seconds,
        "images_per_s": loop.trial.train_batch_size / seconds,
        "cpu_s": min(cpus),
        "peak_mib": loop.peak_mib,
        "times": walls,
        "cpu_times": cpus,
    }


def against(row: Row, rival: Trial, times: Sequence[Spent]) -> Row:
    """Return how much longer a rival's update takes: of median wall times on CUDA, of least CPU times on a shared CPU."""
    name = name_of(rival)
    walls, cpus = [time.wall for time in times], [time.cpu for time in times]
    wall, cpu = statistics.median(walls) / row["s_per_update"], min(cpus) / row["cpu_s"]
    return {f"over_{name}": wall if rival.device == "cuda" else cpu, f"{name}_times": walls}


def name_of(rival: Trial) -> str:
    """Return the column of a released loop: full, lora, half_base."""
    return "half_base" if rival.loop == "half-base" else rival.train


def compare(mine: Loop, rivals: Sequence[Loop]) -> Row:
    """Return the figures of a loop, with over_NAME for each rival that took turns with it."""
    own, *others = take_turns([mine, *rivals])
    row = figures(mine, own)
    for rival, times in zip(rivals, others, strict=True):
        row |= against(row, rival.trial, times)
    return row


def measure_alone(trial: Trial, rivals: Sequence[Trial]) -> Row:
    """Return the row of one setting, for a process of its own: its peak memory is read before the rivals load.

    `before_mib` is what Python and its libraries took; `error` says why there is nothing.
    """
    if trial.threads:
        torch.set_num_threads(trial.threads)
    row: Row = {"before_mib": peak_mib("cpu")}
    try:
        mine = start(trial)
        return row | compare(mine, [start(rival) for rival in rivals])
    except FloatingPointError as error:
        return row | {"error": str(error)}


def measure_together(
    trials: Sequence[Trial], rivals: Sequence[Trial], report: Callable[[Trial, Row], None]
) -> None:
    """Report a row for each rival and each setting of one batch, as they come, all in this process: for a CUDA device.

    The rivals stay loaded and take turns with each setting; what a setting holds is freed before the next. Where the two do
    not fit into memory together, the rivals go, and this and the following rows have no comparison.
    """
    running: list[Loop] = []
    for rival in rivals:
        loop = _attempt(functools.partial(start, rival))
        if isinstance(loop, Loop):
            running.append(loop)
        else:
            report(rival, {"error": loop})
    if running:
        for loop, times in zip(running, take_turns(running), strict=True):
            report(loop.trial, figures(loop, times))
    for trial in trials:
        row = _attempt(functools.partial(_started_and_compared, trial, running))
        if row == OUT_OF_MEMORY and running:
            running.clear()
            loop = None  # the last rival's other name
            _free()
            row = _attempt(functools.partial(_started_and_compared, trial, running))
        report(trial, {"error": row} if isinstance(row, str) else row)
        if trial.compile == "on":
            torch.compiler.reset()


def _started_and_compared(trial: Trial, rivals: Sequence[Loop]) -> Row:
    return compare(start(trial), rivals)


def _attempt(action: Callable[[], Any]) -> Any:
    """Return the action's result, or the first line of why there is none, with its memory freed."""
    error = None
    try:
        return action()
    except (
        RuntimeError,
        FloatingPointError,
    ) as raised:  # of a device, a kernel or a compiler; the next row may work
        lines = str(raised).strip().splitlines() or [type(raised).__name__]
        error = OUT_OF_MEMORY if isinstance(raised, torch.OutOfMemoryError) else lines[0]
    finally:
        _free()  # after an error `raised` is gone, and with it the frames that hold tensors
    return error


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_flops(trial: Trial) -> int | None:
    """Return the floating-point operations of one image's update, forward and backward, without recomputation.

    Of the released loop, whose operations torch's counter sees one by one. None where it does not fit. CUDA only: the
    counter does not know the CPU's attention kernel.
    """
    alone = replace(trial.published("published", trial.train), train_batch_size=1, checkpointing="off")

    def count() -> int:
        update = published(alone, range(1))
        with FlopCounterMode(display=False) as counter:
            update(0)
        return counter.get_total_flops()

    found = _attempt(count)
    return found if isinstance(found, int) else None
