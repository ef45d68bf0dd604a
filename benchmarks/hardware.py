"""Measuring in fresh processes: time, peak memory, and the name and peak performance of the hardware."""

import json
import math
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PEAK_TFLOPS = {  # dense bf16 with float32 accumulation, from the vendor's data sheets; the first pattern that fits
    r"H200 NVL": 835.0,
    r"H200": 989.0,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H100": 989.0,
    r"B200": 2250.0,
    r"A100": 312.0,
    r"A10\b": 125.0,
    r"L40S": 362.0,
    r"L4\b": 121.0,
    r"RTX 4090$": 165.0,
    r"RTX 3090$": 71.0,
    r"RTX A6000": 155.0,
}


def fresh(function: Callable[..., Any], *arguments: object) -> Any:
    """Return the function's result from a new process; None where the process was killed, as for want of memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def seconds(action: Callable[[int], object], index: int, device: str) -> float:
    """Return the time of action(index), begun and ended with an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action(index)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What an action took, seconds: by the clock, and of all cores of this process."""

    wall: float
    cpu: float


def spent(action: Callable[[int], object], index: int, device: str) -> Spent:
    """Return the time of action(index), begun and ended with an idle device; CPU time is steadier where cores are shared."""
    began = time.process_time()
    wall = seconds(action, index, device)
    return Spent(wall=wall, cpu=time.process_time() - began)


def matmul_tflops(dtype: torch.dtype, size: int = 8192, calls: int = 30) -> float:
    """Return the TFLOP/s of a product of two square matrices on the CUDA device: what the card reaches at best in practice."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=dtype).unbind()

    def multiply(_: int) -> None:
        for _ in range(calls):
            torch.mm(a, b)

    multiply(0)
    least = min(seconds(multiply, index, "cuda") for index in range(3))
    return 2 * size**3 * calls / least / 1e12


def peak_mib(device: str) -> float:
    """Return the peak of this process: allocated on the CUDA device, or resident in memory (Linux; elsewhere not known)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    # Unlike ru_maxrss it does not begin with the parent's.
    return int(match[1]) / 2**10 if match else math.nan


def peak_tflops() -> float:
    """Return the dense bf16 peak of the CUDA device; ValueError when its name is not in the table."""
    name = torch.cuda.get_device_name()
    for pattern, peak in PEAK_TFLOPS.items():
        if "MIG" not in name and re.search(rf"\b{pattern}", name):
            return peak
    raise ValueError(f"the peak of {name} is not known; give --peak-tflops, its dense bf16 TFLOP/s")


def name_of_machine(cuda: bool) -> str:
    """Return the name of what the figures were measured on."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    gpu = f", {torch.cuda.get_device_name()}" if cuda else ""
    return f"{match[1] if match else platform.processor()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a table's figures, whole or not at all; values without a JSON type, such as paths, as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
