"""Memory and work of an update of DRaFT, DRTune and FlowBP at the size of Stable Diffusion 1.x, counted on fake tensors.

    python benchmarks/direct_memory.py                       # 512 px, LoRA, one image: a quarter of an hour on one core, no GPU

The drivers' own functions run on tensors without content (torch's FakeTensorMode) under CUDA's rules of autocast, with ImageReward as
the scorer. `peak` is of an update, models included; `beyond` is what the update adds to them. `work` is the operations of an update
relative to ReFL's published one (40 steps without guidance, a late step in 30..39): TFLOP are counted, so that what is computed again
counts. Nothing is measured.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paths import check_file
from benchmarks.setting import Setting
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

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counter import GIB, Counter, cuda_autocast, totals
from benchmarks.drivers import PROMPT, Loaded, Trained, build, load, refl_loss
from benchmarks.hardware import write_json
from finetune import draft, drtune, flowbp
from preftune import paths, surrogates
from preftune.families import Pretrained
from preftune.paths import Grid
from preftune.surrogates import Part
from preftune.training import direct
from preftune.training.config import ModelConfig
from preftune.training.direct_config import DirectConfig


def latents_of(method: str, loaded: Loaded, grid: Grid, settings: DirectConfig) -> Tensor:
    """Return the final latents of an update; the active steps are those of the first seed."""
    name, _, count = method.partition("-")
    texts, noise = loaded.prompts(loaded.setting.train_batch_size)
    size, rng = loaded.setting.size(), np.random.default_rng(0)
    common: dict[str, Any] = {
        "prompts": Path("-"),
        "model": ModelConfig(pretrained=Pretrained(model="-")),
        "direct": settings,
    }

    def surrogate_latents(grid: Grid, parts: Sequence[Part], share: float) -> Tensor:
        known = direct.filled(settings)
        scale, gradient = known.guidance_scale, known.guidance_gradient
        return paths.surrogate_latents(
            loaded.family, texts, noise, grid, parts, size, scale, gradient, share
        )[0]

    if name == "draft":
        own = draft.Config(last_steps=int(count), **common)
        return draft.final_latents(loaded.family, texts, noise, STEPS - int(count), size, own)
    if name == "drtune":
        steps = drtune.Config(active_steps=int(count), early_stop=0.0, **common)
        cut, active = drtune.choose(rng, grid, steps)
        return surrogate_latents(cut, surrogates.sparse(cut.levels, active), 0.0)
    chosen = flowbp.with_published(flowbp.Config(surrogate=name, **common))  # type: ignore[arg-type]
    parts = flowbp.CHOOSE[chosen.surrogate](rng, grid.levels, flowbp.values_of(chosen))
    return surrogate_latents(grid, parts, chosen.input_share or 0.0)


def count(method: str, gradient: Any, config: Config) -> dict[str, float]:
    """Return peak and beyond in GiB, and TFLOP, of an update of one image."""
    setting = Setting(train_batch_size=1, checkpointing="on" if config.checkpointing else "off")
    loaded, counter = build(setting), Counter()
    steps = STEPS if method.startswith("draft") else STEPS // 2
    grid = paths.grid(loaded.family, steps, "ddim", setting.size())  # while the noise schedule has numbers
    settings = DirectConfig(
        num_inference_steps=steps, solver="ddim", guidance_scale=7.5, guidance_gradient=gradient
    )

    def loss() -> Tensor:
        assert loaded.scorer is not None
        if method == "refl":
            return refl_loss(loaded)
        pixels = direct.decoded(loaded.family, latents_of(method, loaded, grid, settings))
        return direct.losses(loaded.scorer(pixels, loaded.prompts(1)[0]), None).mean()

    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), counter:
        load(loaded)
        if config.call_checkpointing and method != "refl":
            direct.checkpoint_calls(loaded.family.denoiser)
        trained = Trained(loaded)
        held = counter.now
        counter.restart()
        trained.update(loss)
        peak, gflop = counter.peak, totals(counter.kernels)["gflop"]
        if (
            method == "refl"
        ):  # its late step above is the second; published are 34.5 steps before it on average
            gflop += (setting.late - 1) * lean_call(loaded, counter)
    return {
        "peak_gib": peak / GIB,
        "beyond_gib": (peak - held) / GIB,
        "tflop": gflop / 1e3,
    }


def lean_call(loaded: Loaded, counter: Counter) -> float:
    """Return the GFLOP of a call of the denoiser without gradient and guidance."""
    family = loaded.family
    cond = family.encode([PROMPT])
    x, t = torch.empty(1, *family.latent_shape(loaded.setting.size())), torch.ones(1, dtype=torch.int64)
    with family.lean():
        counter.restart()
        family.predict(x, t, cond)
        return totals(counter.kernels)["gflop"]


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
