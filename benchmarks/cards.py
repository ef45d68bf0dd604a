"""Named GPUs for benchmarks/plan.py: memory, bandwidth and dense arithmetic from the vendors' data sheets; needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """What of a GPU bounds time and memory."""

    gib: int
    """Memory, GiB."""
    tb_per_s: float
    """Bandwidth of the memory, 10^12 bytes a second."""
    tflops: float
    """Dense bf16 or fp16 with float32 accumulation, 10^12 operations a second."""
    tflops_float32: float
    """Float32 without TF32."""


CARDS = {
    "RTX 3060": Card(gib=12, tb_per_s=0.360, tflops=25.5, tflops_float32=12.7),
    "RTX 4090": Card(gib=24, tb_per_s=1.008, tflops=165, tflops_float32=82.6),
    "A100 40GB": Card(gib=40, tb_per_s=1.555, tflops=312, tflops_float32=19.5),
    "A100 80GB": Card(gib=80, tb_per_s=2.039, tflops=312, tflops_float32=19.5),
    "H100": Card(gib=80, tb_per_s=3.35, tflops=989, tflops_float32=66.9),
    "H200": Card(gib=141, tb_per_s=4.8, tflops=989, tflops_float32=66.9),
}
"""H100 and H200: the SXM modules; A100 80GB too."""
