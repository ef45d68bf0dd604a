"""Speed of the pre-training loss on image files: decoded in the process or by workers ahead of time, encoded or read from disk.

    python benchmarks/captioned.py --output captioned.json                        # the embedded model on any CPU
    python benchmarks/captioned.py --workdir /tmp/models --resolution 512         # Stable Diffusion 1.x; a CUDA device

An update decodes --train-batch-size images, encodes them and their captions, and trains a LoRA on the diffusion loss. All rows run in
one process, in turns, on the same samples; `losses` says whether they are those of the first row, bit for bit. `images/s` is from the
fastest update of all turns but the first, which fills the store; `main CPU ms` is the processor time of the training process in
its cheapest update, and `all CPU ms` with its workers, both of an update. Images are 768 x 640 px of smooth noise, which compress as photographs do.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.paths import check_file
from preftune.cli import parse

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny" / "pipeline"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure updates of the pre-training loss on image files."""

    workdir: Path | None = None
    """Folder for Stable Diffusion 1.x with random weights, 4 GB; None = the embedded model."""
    resolution: int = 64
    """Side of the training images in pixels."""
    files: Literal["png", "jpeg", "webp"] = "png"
    """Format of the image files."""
    images: int = 64
    """Number of image files."""
    train_batch_size: int = 8
    """Images of an update."""
    workers: int = 1
    """Worker processes of the rows that have them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the frozen weights."""
    updates: int = 6
    """Updates of a turn."""
    turns: int = 4
    """Turns of each row."""
    threads: int = 0
    """CPU threads; 0 = torch's own choice."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name in ("images", "train_batch_size", "workers", "updates", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.turns < 2:
            raise ValueError(f"--turns must be at least 2, the first fills the store, got {self.turns}")
        if self.resolution < 64 or self.resolution % 64:
            raise ValueError(f"--resolution must be a positive multiple of 64, got {self.resolution}")


if __name__ == "__main__":
    CONFIG = parse(Config)

import numpy as np
import torch
from PIL import Image

from benchmarks.hardware import name_of_machine, write_json
from benchmarks.models import build_sd1
from preftune import families
from preftune.captioned_inputs import CaptionedInputs
from preftune.diffusion_loss import captioned_loss
from preftune.encoded_store import Store
from preftune.families.base import Family
from preftune.lora.config import LoRA
from preftune.order import items_at
from preftune.resolution import Resolution

ROWS = {
    "in the process": (False, False, False),
    "workers": (True, False, False),
    "latents kept": (False, True, False),
    "latents and captions kept": (False, True, True),
    "all three": (True, True, True),
}
"""Name -> workers, latents kept on disk, captions kept on disk."""


@dataclass
class Row:
    """What was measured of one way."""

    name: str
    images_per_s: float = 0.0
    main_cpu_ms: float = float("inf")
    all_cpu_ms: float = float("inf")
    losses_same: bool = True


def write_images(folder: Path, config: Config) -> list[Path]:
    """Write the image files."""
    rng, paths = np.random.default_rng(0), list[Path]()
    for number in range(config.images):
        small = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        paths.append(folder / f"{number:04d}.{config.files}")
        small.resize((768, 640), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def updates(
    family: Family, inputs: CaptionedInputs, paths: list[Path], config: Config
) -> Iterator[torch.Tensor]:
    """Train, and yield the loss of each update."""
    number = config.train_batch_size
    batches = [items_at(paths, range(i * number, (i + 1) * number), 0) for i in range(config.updates)]
    trained = [weight for weight in family.denoiser.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    inputs.expect(batches)
    for index, batch in enumerate(batches):
        generators = [torch.Generator().manual_seed(index * number + i) for i in range(number)]
        texts = [f"a photograph of {path.stem}" for path in batch]
        loss = captioned_loss(inputs, batch, texts, generators, caption_dropout=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
    inputs.close()


def turn(family: Family, paths: list[Path], row: Row, store: Path, config: Config) -> list[float]:
    """Do the updates of one turn, note the fastest, and return the losses."""
    workers, latents, texts = ROWS[row.name]
    kept = Store(store)
    inputs = CaptionedInputs(
        family,
        Resolution(config.resolution, config.resolution),
        workers=config.workers if workers else 0,
        latents=kept if latents else None,
        texts=kept if texts else None,
        batch_size=config.train_batch_size,
    )
    begun, cpu = time.perf_counter(), time.process_time()
    all_begun, losses = _cpu(), list[float]()
    for loss in updates(family, inputs, paths, config):
        losses.append(float(loss))  # waits for the device
        row.images_per_s = max(row.images_per_s, config.train_batch_size / (time.perf_counter() - begun))
        row.main_cpu_ms = min(row.main_cpu_ms, (time.process_time() - cpu) * 1e3)
        begun, cpu = time.perf_counter(), time.process_time()
    for child in multiprocessing.active_children():
        child.join()
    row.all_cpu_ms = min(row.all_cpu_ms, (_cpu() - all_begun) * 1e3 / config.updates)
    return losses


def _cpu() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(config: Config) -> list[Row]:
    """Return the rows."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.workdir is not None:
        build_sd1(config.workdir)
    folder = EMBEDDED if config.workdir is None else config.workdir / "pipeline"
    family = families.load(folder, "cpu")
    family.trainable(LoRA(), 0)
    family.to(device or "cpu", torch.bfloat16 if config.precision == "bf16" else torch.float32)
    rows = [Row(name) for name in ROWS]
    with tempfile.TemporaryDirectory() as place:
        paths = write_images(Path(place), config)
        first: list[float] = []
        for number in range(config.turns):
            for row in rows:
                losses = turn(family, paths, row, Path(place) / "encoded", config)
                first = first or losses
                row.losses_same = row.losses_same and losses == first
                if number == 0:
                    row.images_per_s, row.main_cpu_ms, row.all_cpu_ms = 0.0, float("inf"), float("inf")
    return rows


def main(config: Config) -> int:
    """Measure and print."""
    rows = measure(config)
    print(name_of_machine(torch.cuda.is_available()))
    print(f"{'':28}{'images/s':>10}{'main CPU ms':>13}{'all CPU ms':>12}  losses")
    for row in rows:
        same = "the same" if row.losses_same else "OTHERS"
        print(f"{row.name:28}{row.images_per_s:10.1f}{row.main_cpu_ms:13.1f}{row.all_cpu_ms:12.1f}  {same}")
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "rows": [asdict(row) for row in rows]})
    return 0 if all(row.losses_same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(CONFIG))
