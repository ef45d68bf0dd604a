"""Does the plan hold: peak memory that benchmarks/plan.py counts, beside what a process on this CPU really takes for the same update.

    python benchmarks/plan_check.py --output plan_check.json        # ten minutes on a quiet core, 16 GiB of memory

Each setting runs once in a fresh process with random weights of real size, in float32. Measured is the process' peak of resident memory
during the update (Linux: VmHWM, reset before it), less what it had before the models were made. What a CPU has and a GPU has not is
in the difference, too: buffers of its kernels, and the holes that malloc leaves.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.paths import check_file
from benchmarks.setting import Setting
from preftune.cli import exit_on_user_error, parse

SMALL: dict[str, Any] = {"mixed_precision": "no", "resolution": "256"}
SETTINGS = (
    Setting(method="refl", train_batch_size=1, checkpointing="off", **SMALL),
    Setting(method="refl", train_batch_size=2, **SMALL),
    Setting(method="pretrain", train_batch_size=2, **SMALL),
    Setting(method="pretrain", train_batch_size=1, train="full", **SMALL),
    Setting(method="refl", train_batch_size=1, mixed_precision="no"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare planned and measured memory."""

    settings: tuple[int, ...] = tuple(range(len(SETTINGS)))
    """Which of the settings, by their place; at 256 px refl without and with checkpointing, pretrain, pretrain of all weights; refl at 512 px."""
    output: Path | None = None
    """JSON file."""

    def __post_init__(self) -> None:
        check_file(self.output)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)
    os.environ.setdefault(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # of the processes to come: freed memory goes back

from benchmarks.counter import GIB
from benchmarks.drivers import Trained, build, load, loss_of
from benchmarks.hardware import fresh, peak_mib, write_json
from benchmarks.prediction import count_update


def measure(setting: Setting) -> float:
    """Return the peak of an update's resident memory beyond that before the models were made, GiB."""
    before = resident_gib()
    with TemporaryDirectory() as folder:
        loaded = build(setting)
        load(loaded)
        trained = Trained(loaded)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        trained.update(loss_of(loaded, Path(folder)))
    return peak_mib("cpu") / 1024 - before


def resident_gib() -> float:
    """Return the resident memory of this process, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def main(config: Config) -> int:
    """Compare, print, write JSON."""
    with exit_on_user_error():
        if not Path("/proc/self/clear_refs").exists():
            raise ValueError("memory is read from /proc, which this system does not have; use Linux")
        wrong = [place for place in config.settings if not 0 <= place < len(SETTINGS)]
        if wrong:
            raise ValueError(
                f"--settings {wrong[0]} must lie in 0..{len(SETTINGS) - 1}; leave it out for all"
            )
    rows = list[dict[str, Any]]()
    for setting in (SETTINGS[place] for place in config.settings):
        planned = count_update(setting)[0].peak / GIB
        measured = fresh(measure, setting)
        row = {"setting": asdict(setting), "planned_gib": planned, "measured_gib": measured}
        words = f"{setting.method} {setting.train} {setting.size()} px batch {setting.train_batch_size}"
        if measured is None:
            print(f"{words}: planned {planned:.2f} GiB, the process was killed", flush=True)
        else:
            row["error"] = planned / measured - 1
            print(f"{words}: planned {planned:.2f} GiB, measured {measured:.2f} GiB, error {row['error']:+.1%}", flush=True)  # fmt: skip
        rows.append(row)
        if config.output is not None:
            write_json(config.output, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
