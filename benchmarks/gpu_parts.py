"""The parts of benchmarks/gpu.sh that no other program measures: the card's own limits, a UNet's forward pass
in several ways, and scorers in half precision beside float32.

    python benchmarks/gpu_parts.py --part forwards --output forwards.json           # one part, on the CUDA device
    python benchmarks/gpu_parts.py --part forwards --output forwards.json --dry     # the same code on the tiny model and the CPU

Each row is printed and written to the file as soon as it is known, so that a part that is cut keeps what it
has. Times are medians; ratios are taken in turns in one process. Models have random weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import parse

Part = Literal["limits", "weights", "forwards", "compile", "parity"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure one part."""

    part: Part
    """limits: matrix product and copy. weights: write those of published size. forwards, compile: a UNet's forward pass.
    parity: scorers.
    """
    output: Path
    """JSON file."""
    workdir: Path = Path("gpu-work")
    """Folder for the 4 GB of Stable Diffusion's size; kept between parts."""
    train_batch_size: tuple[int, ...] = (2, 8)
    """Batch sizes of forwards and updates."""
    repeats: int = 5
    """Timed repetitions."""
    dry: bool = False
    """Run on the CPU with the embedded models: shows that the code works, and measures nothing."""


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import rewards
from benchmarks import models
from benchmarks.hardware import name_of_machine, seconds, write_json
from benchmarks.paths import PROMPTS, TINY
from preftune.images import opened
from preftune.lora.tuning import LoRA, inject
from preftune.order import items_at
from preftune.prompts import read_prompts
from rewards.pixels import from_pil


class Table:
    """Rows of one part: printed, and written to its file, as they come."""

    def __init__(self, config: Config) -> None:
        self.path, self.rows = config.output, list[dict[str, Any]]()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.hardware, self.dry = name_of_machine(not config.dry), config.dry

    def add(self, name: str, **values: Any) -> None:
        """Add a row; of a dry run without shares of a card's arithmetic."""
        if self.dry:
            values.pop("mfu_989", None)
        self.rows.append({"row": name, **values})
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        print(f"  {name}: {', '.join(shown)}", flush=True)
        write_json(self.path, {"hardware": self.hardware, "rows": self.rows})


def median_seconds(action: Callable[[], object], device: str, repeats: int, inner: int = 1) -> float:
    """Return the time of one action, the median of `repeats` runs of `inner` actions each, after two that warm up."""
    for _ in range(2):
        action()
    times = [seconds(lambda _: [action() for _ in range(inner)], 0, device) / inner for _ in range(repeats)]
    return statistics.median(times)


def limits(config: Config, table: Table, device: str) -> None:
    """The card's matrix product and copy: what a share of its arithmetic and bandwidth is measured against."""
    side = 512 if config.dry else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            taken = median_seconds(functools.partial(torch.matmul, a, b), device, config.repeats, 10)
            table.add(f"{side}^3 {str(dtype)[6:]}{' tf32' * tf32}", tflops=2 * side**3 / taken / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(1 << (18 if config.dry else 30), device=device)
    taken = median_seconds(lambda: source.clone(), device, config.repeats, 4)
    table.add("copy", gigabytes_per_s=2 * source.numel() * 4 / taken / 1e9)


def kernels_of(action: Callable[[], object]) -> int:
    """Return the number of CUDA kernels and copies that an action starts, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        action()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def slowest_kernels(action: Callable[[], object]) -> str:
    """Return a table of the kernels that take the most time of an action."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        action()
        torch.cuda.synchronize()
    return str(
        seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70)
    )


def small_unet() -> nn.Module:
    """Return the embedded model's UNet."""
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel.from_pretrained(
        TINY / "pipeline" / "unet", torch_dtype=torch.float32
    )
    return unet


def unets(config: Config, device: str) -> Iterator[tuple[str, nn.Module, torch.dtype | None]]:
    """Yield the ways of a forward pass: name, module, and the dtype that autocast computes in, None without autocast."""
    with torch.device(device):
        base = (small_unet() if config.dry else models.unet()).to(device).requires_grad_(False).eval()
    yield "published: fp16 autocast, fp32 weights", base, torch.bfloat16 if config.dry else torch.float16
    yield "fp32 weights, bf16 autocast", base, torch.bfloat16
    adapted = copy.deepcopy(base).to(torch.bfloat16)
    inject(adapted, LoRA(rank=4), 0)
    adapted.eval()
    yield "LoRA, bf16 base, autocast", adapted, torch.bfloat16
    del adapted
    half = base.to(torch.bfloat16)
    yield "merged, bf16, autocast", half, torch.bfloat16
    yield "merged, bf16", half, None
    half = half.to(memory_format=torch.channels_last)
    yield "merged, bf16, channels_last", half, None


def forwards(config: Config, table: Table, device: str) -> None:
    """One UNet forward pass without gradient at Stable Diffusion's size, in each way; then as a CUDA graph and compiled."""
    flops = 0.803e12  # counted: /docs/plan.md; of one image at 512 px
    for name, unet, autocast in unets(config, device):
        for batch in dict.fromkeys((1, *config.train_batch_size)):
            call = forward_call(config, unet, autocast, batch, device)
            taken = median_seconds(call, device, config.repeats, 3)
            row: dict[str, Any] = {
                "batch": batch,
                "ms": taken * 1e3,
                "mfu_989": flops * batch / taken / 989e12,
            }
            began = time.perf_counter()
            call()
            row["host_ms"] = (time.perf_counter() - began) * 1e3
            if not config.dry:
                torch.cuda.synchronize()
                row["kernels"] = kernels_of(call)
            table.add(name, **row)
            if name.endswith("channels_last") and batch == max(config.train_batch_size) and not config.dry:
                print(slowest_kernels(call), flush=True)
            if name.endswith("channels_last") and not config.dry:
                graphed = graph_of(call)
                taken = median_seconds(graphed, device, config.repeats, 3)
                table.add(
                    f"{name}, CUDA graph", batch=batch, ms=taken * 1e3, mfu_989=flops * batch / taken / 989e12
                )


def compiled(config: Config, table: Table, device: str) -> None:
    """The forward pass with its repeated blocks compiled; CUDA alone."""
    with torch.device(device):
        unet = (
            models.unet().requires_grad_(False).eval().to(torch.bfloat16, memory_format=torch.channels_last)
        )
    flops = 0.803e12
    began = time.perf_counter()
    unet.compile_repeated_blocks(fullgraph=True)
    for batch in config.train_batch_size:
        call = forward_call(config, unet, None, batch, "cuda")
        call()
        torch.cuda.synchronize()
        started = time.perf_counter() - began
        taken = median_seconds(call, "cuda", config.repeats, 3)
        table.add(
            "merged, bf16, channels_last, blocks compiled", batch=batch, ms=taken * 1e3,
            mfu_989=flops * batch / taken / 989e12, compile_s=started,
        )  # fmt: skip
        graphed = graph_of(call)
        taken = median_seconds(graphed, "cuda", config.repeats, 3)
        table.add(
            "merged, bf16, channels_last, blocks compiled, CUDA graph", batch=batch, ms=taken * 1e3,
            mfu_989=flops * batch / taken / 989e12,
        )  # fmt: skip
        began = time.perf_counter()


def forward_call(
    config: Config, unet: nn.Module, autocast: torch.dtype | None, batch: int, device: str
) -> Callable[[], object]:
    """Return a call of the UNet on random latents of its size."""
    shape: Any = unet.config
    side, width = (8, shape["cross_attention_dim"]) if config.dry else (64, 768)
    dtype = next(unet.parameters()).dtype
    x = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
    if autocast is None and device == "cuda":
        x = x.to(memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=device)
    states = torch.randn(batch, 77, width, device=device, dtype=dtype)

    def call() -> object:
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            return unet(x, t, states)

    return call


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Return a replay of a call, captured as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def weights(config: Config, table: Table, device: str) -> None:
    """Write the weights that other parts read, made on the device: a slow processor takes a minute for them."""
    if config.dry:
        table.add("embedded models", seconds=0.0)
        return
    for name, build in (
        ("Stable Diffusion 1.x and ImageReward", lambda: models.build_sd1(config.workdir)),
        ("hpsv2.1", lambda: models.write_scorer("hpsv2.1", config.workdir)),
    ):
        began = time.perf_counter()
        with torch.device(device):
            build()
        table.add(name, seconds=time.perf_counter() - began)


def parity(config: Config, table: Table, device: str) -> None:
    """Scores and gradients of scorers in each precision beside float32 on the CPU."""
    found: dict[str, Path] = {"imagereward-tiny": TINY / "imagereward"}
    if not config.dry and (config.workdir / "scorer").is_dir():
        found["imagereward"] = config.workdir / "scorer"
    prompts = items_at(read_prompts(PROMPTS), range(16), seed=0)
    files = sorted((TINY / "images").rglob("*.png"))[:16]
    for name, weights in found.items():
        exact = scores_of(rewards.load(name, weights=weights), files, prompts, "cpu")
        for dtype, tf32 in (
            (torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False),
        ):  # fmt: skip
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            scorer = rewards.load(name, weights=weights, device=torch.device(device), dtype=dtype)
            scores, gradient = scores_of(scorer, files, prompts, device)
            order = (scores[:, None] > scores) == (exact[0][:, None] > exact[0])
            table.add(
                f"{name} {str(dtype)[6:]}{' tf32' * tf32}",
                score_difference=float((scores - exact[0]).abs().max()), score_std=float(exact[0].std()),
                same_order=float(order.float().mean()),
                gradient_difference=float((gradient - exact[1]).norm() / exact[1].norm()),
            )  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def scores_of(scorer: Any, files: list[Path], prompts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Return scores (B,) and their gradient to the pixels, float32 on the CPU."""
    images = []
    for file in files:
        with opened(file) as image:
            images.append(from_pil(image, scorer.card.preprocess))
    pixels = torch.stack(images).to(device).requires_grad_(True)
    scores = scorer(pixels, prompts)
    scores.sum().backward()
    assert pixels.grad is not None, "scores depend on the pixels"
    return scores.detach().float().cpu(), pixels.grad.float().cpu()


PARTS: dict[str, Callable[[Config, Table, str], None]] = {
    "limits": limits,
    "weights": weights,
    "forwards": forwards,
    "compile": compiled,
    "parity": parity,
}


def main(config: Config) -> int:
    """Measure the part."""
    device = "cpu" if config.dry else "cuda"
    torch.manual_seed(0)
    PARTS[config.part](config, Table(config), device)
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
