"""Memory, work and time of a method, from the driver's own functions on fake tensors.

Counted: peak memory, operations, kernels, bytes. Modelled from them: times, by `seconds`. Of a trajectory's steps without gradient
one is counted, and then taken as often as there are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cards import CARDS, Card
from benchmarks.counter import GIB, Counter, Kernel, cuda_autocast, lean_steps, totals
from benchmarks.drivers import VALIDATION_STEPS, Trained, build, load, loss_of, validate
from benchmarks.setting import Setting
from preftune.families import Family

CONTEXT_GIB = 1.0
"""What a process takes on a GPU besides its tensors: CUDA's context, kernels, workspaces of the libraries."""
FRAGMENTATION = 0.05
"""Share of the peak that the allocator may hold in holes."""
MATMUL, ATTENTION, BANDWIDTH = 0.56, 0.36, 0.8
"""Shares of the nominal peak and bandwidth that the model of time assumes: large products reach 0.8 of the peak, those of these
models 0.7 of that, attention 0.45.
"""
LAUNCH, SHORTEST = 30e-6, 3e-6
"""Seconds that the host needs to start a kernel, Python included (measured: 23 to 36 us on a virtual machine with an H100; a step without
gradient is one CUDA graph, which costs it nothing), and that the shortest kernel takes.
"""
UNCOUNTED = 1.7
"""Time on the device over that of the counted kernels: libraries add some, such as changes of layout around group norm. Measured: the
UNet of Stable Diffusion 1.x as a CUDA graph on an H100, batch 8, 29.5 ms for 17.9.
"""
ASSUMPTIONS = {
    "context_gib": CONTEXT_GIB, "fragmentation": FRAGMENTATION, "matmul": MATMUL, "attention": ATTENTION, "bandwidth": BANDWIDTH,
    "launch_s": LAUNCH, "shortest_s": SHORTEST, "uncounted": UNCOUNTED,
}  # fmt: skip
"""Of what is modelled, for JSON."""


@contextmanager
def counting(setting: Setting) -> Iterator[tuple[Counter, Trained, int]]:
    """Yield a counter, what the driver has after its first update, on fake tensors, and the peak in bytes while that loads."""
    counter, loaded = Counter(), build(setting)
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), counter:
        load(loaded)
        loading = counter.peak
        yield counter, Trained(loaded), loading


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run: its peak, the kernels of a denoising step without gradient, and all others."""

    peak: int
    images: int
    steps: float
    """How many such steps it has."""
    step: list[Kernel]
    rest: list[Kernel]

    def per_image(self) -> dict[str, float]:
        """Return the totals, of one image, and how often a kernel is started for all."""
        one, other = totals(self.step), totals(self.rest)
        both = {name: value + self.steps * one[name] for name, value in other.items()}
        return {
            "tflop_per_image": both["gflop"] / 1e3 / self.images,
            "gb_per_image": both["gb"] / self.images,
            "kernels": both["kernels"],
            "casts": both["casts"],
            "kernels_of_a_step": one["kernels"],
        }

    def images_per_s(self, card: Card) -> dict[str, float]:
        """Return images/s: the limit (every kernel at the full peak or bandwidth), and as modelled."""
        step, rest = seconds(self.step, card, replayed=True), seconds(self.rest, card)
        limits, modelled = zip(step, rest, strict=True)
        weights = self.steps, 1.0
        return {
            name: self.images / sum(weight * time for weight, time in zip(weights, times, strict=True))
            for name, times in (("roofline", limits), ("modelled", modelled))
        }


def seconds(kernels: Sequence[Kernel], card: Card, replayed: bool = False) -> tuple[float, float]:
    """Return how long the kernels take, one after another: at best, and with the shares and the host's time as assumed above,
    of which a replayed CUDA graph takes none.
    """
    best = device = 0.0
    for kernel in kernels:
        peak = 1e12 * (card.tflops_float32 if kernel.dtype == torch.float32 else card.tflops)
        share = ATTENTION if "attention" in kernel.name else MATMUL
        moving = (kernel.read + kernel.written) / (1e12 * card.tb_per_s)
        best += max(kernel.flop / peak, moving)
        device += max(kernel.flop / (share * peak), moving / BANDWIDTH, SHORTEST)
    device *= UNCOUNTED
    return best, device if replayed else max(device, LAUNCH * len(kernels))


def phase(
    counter: Counter,
    family: Family,
    what: Callable[[], object],
    images: int,
    times: float = 1.0,
) -> Phase:
    """Count `what`; for each step without gradient that it has, the run has `times` of them."""
    counter.restart()
    with lean_steps(family, counter) as lean:
        what()
    return Phase(
        peak=counter.peak,
        images=images,
        steps=lean.number * times,
        step=lean.kernels,
        rest=counter.kernels,
    )


def count_update(setting: Setting) -> tuple[Phase, dict[str, int]]:
    """Count an update. Return it, and the bytes of the weights at rest (with moments and EMA) and while they load."""
    with counting(setting) as (counter, trained, loading), TemporaryDirectory() as folder:
        loaded = trained.loaded
        loss = loss_of(loaded, Path(folder))
        at_rest = counter.now
        batch = setting.train_batch_size
        times = setting.late if setting.method == "refl" else 1.0
        found = phase(counter, loaded.family, lambda: trained.update(loss), batch, times)
        return found, {"weights": at_rest, "loading": loading}


def count_images(setting: Setting) -> Phase:
    """Count a batch of validation images: the model family's number of steps, with guidance."""
    with counting(setting) as (counter, trained, _):
        family, number = trained.loaded.family, setting.sample_batch_size
        times = family.defaults.num_inference_steps / VALIDATION_STEPS
        return phase(counter, family, lambda: validate(trained.loaded), number, times)


def predict(setting: Setting) -> dict[str, Any]:
    """Return all that is known of a setting, as JSON takes it; GiB are 2^30 bytes."""
    updates, weights = count_update(setting)
    images = count_images(setting)
    peaks = {"loading": weights["loading"], "update": updates.peak, "images": images.peak}
    peak = max(peaks.values()) / GIB
    return {
        "setting": asdict(setting) | {"resolution": str(setting.size())},
        "flags": " ".join(setting.flags()),
        "weights_gib": weights["weights"] / GIB,
        "peak_gib": peak,
        "peaks_gib": {name: value / GIB for name, value in peaks.items()},
        "needed_gib": needed(peak),
        "update": updates.per_image(),
        "images": images.per_image(),
        "cards": {
            name: {
                "fits": fits(peak, card.gib),
                "update": updates.images_per_s(card),
                "images": images.images_per_s(card),
            }
            for name, card in CARDS.items()
        },
    }


def needed(peak_gib: float) -> float:
    """Return the memory, GiB, that a GPU must have for a peak of live tensors."""
    return peak_gib * (1 + FRAGMENTATION) + CONTEXT_GIB


def fits(peak_gib: float, gib: float) -> bool:
    """Whether a GPU of so many GiB is large enough for a peak of live tensors."""
    return needed(peak_gib) <= gib
