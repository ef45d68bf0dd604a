"""A trace of scoring: what the main process, the GPU and the worker processes did when, for chrome://tracing or ui.perfetto.dev.

The main process marks its steps (preftune/score_files.py: receive, copy, score, wait; data_build/scoring.py: write), torch's
profiler adds kernels and copies of a GPU, and workers note here when they prepared an image.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from data_build.decode import Entry
from data_build.scoring import PrepareEntry
from preftune.prepared_images import Recipe, View

STEPS = ("receive", "copy", "score", "wait", "write")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
PREPARE = "prepare"

Span = tuple[float, float]
"""Begin and end, microseconds."""


@dataclass(frozen=True, kw_only=True)
class NotingPrepare(PrepareEntry):
    """What worker processes do with an entry, and a line in a file for each, with the time."""

    notes: Path

    def __call__(self, entry: Entry, recipe: Recipe) -> tuple[Entry, list[View]]:
        """Return what PrepareEntry does."""
        began = time.time_ns()
        prepared = super().__call__(entry, recipe)
        line = json.dumps([os.getpid(), began, time.time_ns()]) + "\n"
        with self.notes.open("a", encoding="ascii") as file:
            file.write(line)  # less than a block, which is appended as one
        return prepared


def traced(action: Callable[[], object], notes: Path, path: Path, *, cuda: bool) -> dict[str, float]:
    """Run an action whose workers write notes; writes its trace, and returns seconds: of all, of each step, and of how much happened
    at once.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        action()
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text(encoding="utf-8"))
    base = trace.get("baseTimeNanoseconds", 0)
    events = [event for event in trace["traceEvents"] if _is_kept(event)]
    for line in notes.read_text(encoding="ascii").splitlines():
        pid, began, ended = json.loads(line)
        place = {"ph": "X", "name": PREPARE, "cat": "worker", "pid": pid, "tid": pid}
        events.append(place | {"ts": (began - base) / 1e3, "dur": (ended - began) / 1e3})
    path.write_text(json.dumps(trace | {"traceEvents": events}), encoding="utf-8")
    return summary([event for event in events if event["ph"] == "X"])


def summary(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return seconds: of each step, of the GPU and the workers, and in which scoring and preparing, or a copy and a kernel, went on at
    once. On a GPU scoring is what its kernels do.
    """
    spans = {name: merged(span(event) for event in events if event["name"] == name) for name in STEPS}
    spans["prepare"] = merged(span(event) for event in events if event["name"] == PREPARE)
    spans["kernels"] = merged(span(event) for event in events if event.get("cat") == "kernel")
    spans["copies"] = merged(span(event) for event in events if event.get("cat") == "gpu_memcpy")
    seconds = {name: length(some) for name, some in spans.items() if some}
    scoring = spans["kernels"] or spans["score"]
    seconds["prepare while scoring"] = length(common(spans["prepare"], scoring))
    if spans["kernels"]:
        seconds["copies while kernels"] = length(common(spans["copies"], spans["kernels"]))
        seconds["write while kernels"] = length(common(spans["write"], spans["kernels"]))
    every = merged(span(event) for event in events)
    seconds["all"] = (every[-1][1] - every[0][0]) / 1e6 if every else 0.0
    return seconds


def span(event: dict[str, Any]) -> Span:
    """Return when an event of a trace began and ended."""
    return event["ts"], event["ts"] + event["dur"]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans in order, those that touch as one."""
    found: list[Span] = []
    for began, ended in sorted(spans):
        if found and began <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], ended)
        else:
            found.append((began, ended))
    return found


def common(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """Return when spans of both went on, each merged."""
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second if a < d and c < b)
    return merged(pairs)


def length(spans: Iterable[Span]) -> float:
    """Return seconds."""
    return sum(ended - began for began, ended in spans) / 1e6


def _is_kept(event: dict[str, Any]) -> bool:
    """Whether an event is a step, work of the GPU, or a name of a process."""
    if event.get("ph") == "M":
        return True
    named = event.get("cat") == "user_annotation" and event.get("name") in STEPS
    return event.get("ph") == "X" and (named or event.get("cat") in ON_GPU)
