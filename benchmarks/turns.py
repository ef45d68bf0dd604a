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
    """A warm update and its peak memory; see `start`."""

    trial: Trial
    update: Update
    peak_mib: float


def start(trial: Trial) -> Loop:
    """Load a loop, do its first updates, and read its peak memory: on CUDA beyond what was allocated before, else the process'."""
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
    """Return the keys s_per_update (median of wall time), images_per_s, cpu_s (least CPU time), times, cpu_times; on CUDA peak_mib."""
    walls, cpus = [time.wall for time in times], [time.cpu for time in times]
    seconds = statistics.median(walls)
    row = {
        "s_per_update": seconds,
        "images_per_s": loop.trial.train_batch_size / seconds,
        "cpu_s": min(cpus),
        "times": walls,
        "cpu_times": cpus,
    }
    return row | ({"peak_mib": loop.peak_mib} if loop.trial.device == "cuda" else {})


def against(row: Row, rival: Trial, times: Sequence[Spent]) -> Row:
    """Return how much longer a rival's update takes: of median wall times on CUDA, of least CPU times on a shared CPU."""
    name = name_of(rival)
    walls, cpus = [time.wall for time in times], [time.cpu for time in times]
    wall, cpu = statistics.median(walls) / row["s_per_update"], min(cpus) / row["cpu_s"]
    return {f"over_{name}": wall if rival.device == "cuda" else cpu, f"{name}_times": walls}


def name_of(rival: Trial) -> str:
    """Return the column of a released loop: full, lora, half_base."""
    return "half_base" if rival.loop == "half-base" else rival.train


def compare(loops: Sequence[Loop]) -> list[Row]:
    """Return the figures of loops that take turns: those of the first with over_NAME for each of the others."""
    times = take_turns(loops)
    rows = [figures(loop, column) for loop, column in zip(loops, times, strict=True)]
    for rival, column in zip(loops[1:], times[1:], strict=True):
        rows[0] |= against(rows[0], rival.trial, column)
    return rows


def measure_alone(trial: Trial, rivals: Sequence[Trial]) -> Row:
    """Return the row of one setting, for a process of its own: its peak memory is read before the rivals load.

    `before_mib` is what Python and its libraries took; `error` says why there is nothing.
    """
    if trial.threads:
        torch.set_num_threads(trial.threads)
    row: Row = {"before_mib": peak_mib("cpu")}
    try:
        loops = [start(one) for one in (trial, *rivals)]
        return row | {"peak_mib": loops[0].peak_mib} | compare(loops)[0]
    except FloatingPointError as error:
        return row | {"error": str(error)}


def measure_together(
    trials: Sequence[Trial], rivals: Sequence[Trial], report: Callable[[Trial, Row], None]
) -> None:
    """Report a row for each rival and each setting of one batch, as they come, all in this process.

    The rivals stay loaded and take turns with each setting; what a setting holds is freed before the next. Where the two do
    not fit into memory together, the rivals go, and this and the following rows have no comparison.
    """
    running: list[Loop] = []
    waiting = list(rivals)  # for a row
    for rival in rivals:
        error = _attempt(lambda rival=rival: running.append(start(rival)))  # type: ignore[misc]
        if error is not None:
            report(rival, {"error": error})
    for trial in trials:
        rows = _attempt(functools.partial(_with_rivals, trial, running))
        if rows == OUT_OF_MEMORY and running:
            _report_rivals(running, compare(running), waiting, report)
            running.clear()
            _free()
            rows = _attempt(functools.partial(_with_rivals, trial, running))
        if isinstance(rows, str):
            report(trial, {"error": rows})
        else:
            _report_rivals(running, rows[1:], waiting, report)
            report(trial, rows[0])
        if trial.compile == "on":
            torch.compiler.reset()


def _with_rivals(trial: Trial, rivals: Sequence[Loop]) -> list[Row]:
    return compare([start(trial), *rivals])


def _report_rivals(
    rivals: Sequence[Loop], rows: Sequence[Row], waiting: list[Trial], report: Callable[[Trial, Row], None]
) -> None:
    """Report the rivals that have no row yet."""
    for rival, row in zip(rivals, rows, strict=True):
        if rival.trial in waiting:
            report(rival.trial, row)
            waiting.remove(rival.trial)


def _attempt(action: Callable[[], Any]) -> Any:
    """Return the action's result, or the first line of why there is none, with its memory freed."""
    error = None
    try:
        return action()
    except (RuntimeError, FloatingPointError) as raised:  # of a device or a compiler: the next row may work
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
