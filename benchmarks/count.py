"""Kernels, casts, bytes and operations of one forward pass of a UNet on a CUDA device, counted without one.

    python benchmarks/count.py                                            # Stable Diffusion 1.x at 512 px; a minute on one core
    python benchmarks/count.py --model sdxl --train-batch-size 1 --kinds 10 --output count.json

Runs on fake tensors (torch's FakeTensorMode) under CUDA's rules of autocast. `published` is the released loop: float32 weights under
fp16 autocast. `step` is the pass that ReFL differentiates (here without gradient, too): the driver's module under bf16 autocast, with a LoRA or with all weights in float32.
`lean` is the same model in a block of `family.lean()`; `lean, entered` is what the block does once, when it begins. A kernel is an
operation that is no view: nothing is fused, and a library may start more than one for it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import check_file
from benchmarks.setting import Model, Setting, Train
from preftune.cli import exit_on_user_error, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count a UNet's forward pass."""

    model: Model = "sd1"
    """Stable Diffusion 1.x or XL."""
    resolution: str | None = None
    """Pixels: 512, or WIDTHxHEIGHT as 768x512; None = 512 for sd1, 1024 for sdxl."""
    train_batch_size: tuple[int, ...] = (1, 2, 8)
    """Images in a pass."""
    kinds: int = 0
    """Show so many kinds of kernels of each row, those that move most bytes."""
    output: Path | None = None
    """JSON file."""

    def __post_init__(self) -> None:
        check_file(self.output)

    def settings(self) -> list[Setting]:
        """Return one setting a batch size; ValueError for a value that is out of range."""
        if self.kinds < 0:
            raise ValueError(f"--kinds must be 0 or more, got {self.kinds}; leave it out for none")
        if not self.train_batch_size:
            raise ValueError("--train-batch-size is empty; give one value, or leave it out")
        return [
            Setting(model=self.model, method="pretrain", resolution=self.resolution, train_batch_size=batch)
            for batch in self.train_batch_size
        ]


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counter import Counter, Kernel, cuda_autocast, largest, totals
from benchmarks.drivers import build, load
from benchmarks.hardware import write_json

HEADER = f"{'pass':26s} {'batch':>5s} {'kernels':>8s} {'casts':>6s} {'GB':>7s} {'GFLOP':>8s}"


def passes(setting: Setting) -> Iterator[tuple[str, list[Kernel]]]:
    """Yield the name and the kernels of each way to call the UNet."""
    yield "published", one_call(replace(setting, train="full", mixed_precision="fp16"), "step")
    for train, words in _TRAIN.items():
        yield f"step, {words}", one_call(replace(setting, train=train), "step")
        for place in ("lean", "lean, entered"):
            yield f"{place}, {words}", one_call(replace(setting, train=train), place)


_TRAIN: dict[Train, str] = {"lora": "LoRA", "full": "all weights"}


def one_call(setting: Setting, place: str) -> list[Kernel]:
    """Return the kernels of a call of the denoiser without gradient."""
    loaded, counter = build(setting), Counter()
    family, batch = loaded.family, setting.train_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), counter, torch.no_grad():
        load(loaded)
        texts, _ = loaded.prompts(batch)
        cond = family.encode(texts)
        x = torch.empty(batch, *family.latent_shape(setting.size()))
        t = torch.ones(batch, dtype=torch.int64)
        block: Callable[[], AbstractContextManager[Any]] = nullcontext if place == "step" else family.lean
        with block():  # makes what is made once
            pass
        counter.restart()
        with block():
            if place == "lean, entered":
                return counter.kernels
            counter.restart()
            family.predict(x, t, cond)
            return counter.kernels


def main(config: Config) -> int:
    """Count, print, write JSON."""
    with exit_on_user_error():
        settings = config.settings()
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    rows = list[dict[str, Any]]()
    for setting in settings:
        for name, kernels in passes(setting):
            row = {"pass": name, "batch": setting.train_batch_size, **totals(kernels)}
            print("{pass:26s} {batch:5d} {kernels:8d} {casts:6d} {gb:7.2f} {gflop:8.0f}".format(**row), flush=True)  # fmt: skip
            for kind, number, gb, gflop in largest(kernels, config.kinds):
                print(f"    {kind:50s} {number:5d} {gb:7.2f} GB {gflop:8.1f} GFLOP")
            rows.append(row)
    if config.output is not None:
        write_json(config.output, {"model": config.model, "resolution": str(settings[0].size()), "rows": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
