"""The trackers of --report-to beside tensorboard: accelerate's classes, each in a thread of its own.

A tracker may be on the other side of a network, and metrics.jsonl has all that it is told. So it neither ends nor delays a
run: its thread takes rows from a queue, an error is said once, and at the end it is waited for a limited time. Which run of
the tracker this is stands in RUN/trackers.json, so that a resumed run goes on in the same one.
"""

import atexit
import contextlib
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm import tqdm

from preftune import files
from preftune.cli.printable import printable
from preftune.training.report_to import chosen
from preftune.training.run_config import RunConfig
from preftune.training.tracker_images import log_images
from rewards.input_files import read_text

FILE = "trackers.json"
_START, _FINISH = 120.0, 120.0  # seconds
HURRY = 20.0  # after a signal: clusters kill half a minute later
_WAITING = (
    10_000  # rows that wait for a tracker which does not answer; what comes then is in metrics.jsonl only
)
_PROJECT = {
    "aim": "AIM_EXPERIMENT",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "wandb": "WANDB_PROJECT",
}  # accelerate itself reads those of the others
_RUN = {
    "aim": "hash",
    "clearml": "id",
    "comet_ml": "id",
    "dvclive": "dir",
    "mlflow": "info.run_id",
    "swanlab": "id",
    "trackio": "name",
    "wandb": "id",
}
"""Where a tracker's own object says which run it is."""


class Tracker:
    """One tracker. Raises ValueError where it does not start."""

    def __init__(
        self,
        name: str,
        *,
        project: str,
        folder: Path,
        flags: Mapping[str, Any],
        run: str | None,
        first: int,
    ) -> None:
        """Start it. `run` is the tracker's run to go on with, which has the rows before `first`; None = a new one."""
        self.name, self.run, self._first = name, run, first if run else 0
        self._jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_WAITING)
        self._warned = False
        started: queue.Queue[BaseException | None] = queue.Queue()
        work = (started, project, folder, flags)
        self._thread = threading.Thread(target=self._work, args=work, name=name, daemon=True)
        self._thread.start()
        try:
            error = started.get(timeout=_START)
        except queue.Empty:
            error = TimeoutError(f"no answer in {_START:.0f} s")
        if error is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"--report-to {name} did not start ({reason}); repair that, or go without it by another --report-to,"
                " such as tensorboard or none"
            ) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Give it the numbers of a step, unless it has them."""
        if step >= self._first:
            self._put(lambda tracker: tracker.log(dict(values), step=step))

    def images(self, key: str, images: Mapping[Path, str], step: int) -> None:
        """Give it image files with captions, unless it has those of the step."""
        if step >= self._first:
            self._put(lambda tracker: log_images(self.name, tracker, key, images, step))

    def close(self, end: float) -> None:
        """Finish by that time of `time.monotonic`, or give up."""
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it has not finished in time")

    def _put(self, job: Callable[[Any], None]) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._warn("it does not answer")

    def _warn(self, reason: object) -> None:
        if not self._warned:
            self._warned = True
            text = printable(" ".join(str(reason).split()))[:300]
            tqdm.write(
                f"warning: {self.name} lacks some of the metrics ({text}); metrics.jsonl has all",
                file=sys.stderr,
            )

    def _work(
        self,
        started: "queue.Queue[BaseException | None]",
        project: str,
        folder: Path,
        flags: Mapping[str, Any],
    ) -> None:
        """What the thread does: all of it here, because mlflow and trackio know the run of a thread only."""
        try:
            made = LOGGER_TYPE_TO_CLASS[self.name]
            where = (str(folder),) if made.requires_logging_directory else ()
            tracker = made(project, *where, **_arguments(self.name, folder, self.run, _plain(flags)))
            tracker.start()
            if self.run is None:
                tracker.store_init_configuration(_plain(flags))
            elif begins := getattr(tracker.tracker, "starting_step", 0):  # wandb's server knows it best
                self._first = begins
            self.run = str(attrgetter(_RUN.get(self.name, "name"))(tracker.tracker))
        except BaseException as error:
            started.put(error)
            return
        started.put(None)
        while (job := self._jobs.get()) is not None:
            try:
                job(tracker)
            except Exception as error:
                self._warn(f"{type(error).__name__}: {error}")
        try:
            tracker.finish()
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")


class Trackers:
    """The trackers of a run, on its main process."""

    def __init__(self, config: RunConfig, flags: Mapping[str, Any], *, first: int | None) -> None:
        """Start them: with the runs that RUN/trackers.json names, which have the steps before `first`; None = with new ones.

        ValueError where one of a new run does not start; a run that goes on goes on without it.
        """
        self._folder = folder = config.output_dir
        self._known = {} if first is None else _read(folder)
        self._trackers: list[Tracker] = []
        atexit.register(self.close)  # also of a run that an error ends
        for name in chosen(config.report_to):
            if name == "tensorboard":
                continue
            project = config.tracker_project_name or os.environ.get(_PROJECT.get(name, "")) or "preftune"
            run = self._known.get(name)
            try:
                self._trackers.append(
                    Tracker(name, project=project, folder=folder, flags=flags, run=run, first=first or 0)
                )
            except ValueError as error:
                if run is None:
                    raise
                sys.stderr.write(f"warning: {printable(str(error))}; metrics.jsonl has all\n")

    def remember(self) -> None:
        """Note in the folder which runs these are."""
        runs = self._known | {tracker.name: tracker.run for tracker in self._trackers}
        if runs:
            files.write_text(self._folder / FILE, json.dumps(runs, indent=1) + "\n", durable=True)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Give them the numbers of a step."""
        for tracker in self._trackers:
            tracker.write(values, step)

    def images(self, key: str, images: Mapping[Path, str], step: int) -> None:
        """Give them image files with captions, up to 512 pixels a side; those before training are of step 0."""
        for tracker in self._trackers:
            tracker.images(key, images, max(step, 0))

    def close(self, seconds: float = _FINISH) -> None:
        """Finish them, within these seconds."""
        atexit.unregister(self.close)
        end = time.monotonic() + seconds
        for tracker in self._trackers:
            tracker.close(end)
        self._trackers = []


def _read(folder: Path) -> dict[str, str]:
    """Tracker -> its run, as a run noted it; nothing where it did not."""
    try:
        runs = json.loads(read_text(folder / FILE, 1 << 16))
    except (OSError, ValueError):
        return {}
    return {name: run for name, run in runs.items() if isinstance(run, str)} if isinstance(runs, dict) else {}


def _plain(flags: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flags in what every tracker takes."""
    return {
        name: value if isinstance(value, bool | int | float) else _text(value)
        for name, value in flags.items()
    }


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(name: str, folder: Path, run: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker needs to begin a run with the name of the folder, or to go on with one."""
    title = folder.resolve().name or "run"
    again: dict[str, Any]
    match name:
        case "wandb":
            own = {} if "WANDB_NAME" in os.environ else {"name": title}
            again = {"id": run, "resume": "allow"} if run else {}
            place = os.environ.get("WANDB_DIR", str(folder))
            return {"dir": place, "reinit": "finish_previous", **own, **again}
        case "trackio":  # it knows runs by their names, and takes flags at the start only
            new = {"name": f"{title}-{secrets.token_hex(3)}", "resume": "never"}
            again = {"name": run, "resume": "allow"} if run else new
            return {"config": dict(flags), **again}
        case "mlflow":
            return {"run_id": run} if run else {"run_name": title}
        case "dvclive":
            return {"dir": str(folder / "dvclive"), "resume": run is not None}
        case "swanlab":
            again = {"id": run, "resume": "allow"} if run else {}
            return {"name": title, "log_dir": str(folder / "swanlog"), "reinit": True, **again}
        case "aim":
            return {"run_hash": run} if run else {}
        case "comet_ml":
            return {"experiment_key": run} if run else {}
        case "clearml":
            again = {"continue_last_task": run} if run else {"reuse_last_task_id": False}
            return {"task_name": title, **again}
    return {}
