"""Memory and work of an update of DRaFT, DRTune and FlowBP at the size of Stable Diffusion 1.x, counted on fake tensors.

    python benchmarks/direct_memory.py                       # 512 px, LoRA, one image: a quarter of an hour on a quiet core, no GPU

The drivers' own functions run on tensors without content (torch's FakeTensorMode) under CUDA's rules of autocast, with ImageReward as
the scorer. `peak` is of an update, models included; `beyond` is what the update adds to them. `work` is the operations of an update
relative to ReFL's published one (40 steps without guidance, a late step in 30..39): TFLOP are counted, so that what is computed again
counts. Of the steps without gradient one is counted, and taken as often as there are. Nothing is measured.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paths import check_file
from benchmarks.setting import Method, Setting
from preftune.cli import exit_on_user_error, parse

STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count memory and work."""

    methods: tuple[str, ...] = (
        "refl",
        "draft-1",
        "draft-10",
        "draft-50",
        "drtune-3",
        "sparse",
        "bridge",
        "lagrange",
        "leapalign",
    )
    """refl, draft-K of 50 steps, drtune-K, or a surrogate of flowbp, both of 25 steps."""
    guidance_gradient: tuple[str, ...] = ("both", "positive")
    """Gradient of both predictions of guidance, or of the prompt's alone."""
    call_checkpointing: bool = True
    """Compute each call again in the backward pass."""
    checkpointing: bool = True
    """Compute the blocks of the denoiser and the decoder again."""
    output: Path | None = None
    """JSON file."""

    def __post_init__(self) -> None:
        check_file(self.output)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counter import GIB, Counter, cuda_autocast
from benchmarks.drivers import Trained, build, direct_latents, direct_settings, load, refl_loss
from benchmarks.hardware import write_json
from benchmarks.prediction import phase
from finetune import flowbp
from preftune.training import direct


def count(method: str, gradient: Any, config: Config) -> dict[str, float]:
    """Return peak and beyond in GiB, and TFLOP, of an update of one image."""
    program: Method = (
        "refl"
        if method == "refl"
        else "draft"
        if method.startswith("draft")
        else "drtune"
        if method.startswith("drtune")
        else "flowbp"
    )
    setting = Setting(
        method=program, train_batch_size=1, checkpointing="on" if config.checkpointing else "off"
    )
    loaded, counter = build(setting), Counter()

    def loss() -> Tensor:
        assert loaded.scorer is not None
        if method == "refl":
            return refl_loss(loaded)
        settings = replace(direct_settings(loaded), guidance_gradient=gradient)
        pixels = direct.decoded(loaded.family, direct_latents(loaded, method, settings))
        return direct.losses(loaded.scorer(pixels, loaded.prompts(1)[0]), None).mean()

    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), counter:
        load(loaded, call_checkpointing=config.call_checkpointing)
        trained = Trained(loaded)
        held = counter.now
        found = phase(
            counter, loaded.family, lambda: trained.update(loss), 1, setting.late if method == "refl" else 1
        )
    return {
        "peak_gib": found.peak / GIB,
        "beyond_gib": (found.peak - held) / GIB,
        "tflop": found.per_image()["tflop_per_image"],
    }


def main(config: Config) -> int:
    """Count, print, write JSON."""
    with exit_on_user_error():
        known = {"refl", *flowbp.PUBLISHED}
        for method in config.methods:
            name, _, number = method.partition("-")
            if method not in known and not (
                name in ("draft", "drtune") and number.isdecimal() and 0 < int(number) <= STEPS
            ):
                raise ValueError(
                    f"--methods {method} is none of refl, draft-K, drtune-K, {', '.join(flowbp.PUBLISHED)}, K in 1..{STEPS}"
                )
    print(f"{'method':10s} {'gradient':8s} {'peak GiB':>8s} {'beyond':>7s} {'TFLOP':>7s}", flush=True)
    rows = list[dict[str, Any]]()
    for method in config.methods:
        for gradient in ("-",) if method == "refl" else config.guidance_gradient:
            row: dict[str, Any] = {
                "method": method,
                "guidance_gradient": gradient,
                **count(method, gradient, config),
            }
            print("{method:10s} {guidance_gradient:8s} {peak_gib:8.2f} {beyond_gib:7.2f} {tflop:7.1f}".format(**row), flush=True)  # fmt: skip
            rows.append(row)
            if config.output is not None:
                write_json(config.output, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
