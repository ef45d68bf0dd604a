"""A driver in miniature for the tests of preftune/training/run.py: a small network fits a noisy target.

Which images a step sees, and the noise in each, come from their global indices, so the trajectory must not depend on how a batch
is divided over micro batches and processes.
"""

import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from preftune.training.run import Run, RunConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the toy driver."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    width: int = 4
    """Width of the hidden layer."""
    nan_at: int = -1
    """Step whose loss is not a number."""
    inf_gradient_at: int = -1
    """Step whose gradient is infinite while its loss is finite."""
    two_phases: bool = False
    """Make two optimizer updates per step."""
    local_noise: bool = False
    """Add noise from the step's global generators and from run.rng."""
    signal_at: int = -1
    """Step in which one process gets SIGTERM."""
    signal_rank: int = 0
    """Rank of that process."""
    sleep: float = 0.0
    """Seconds per micro batch."""
    passes: tuple[int, ...] = ()
    """Backward passes of each update in turn, over and over; empty = --gradient-accumulation-steps."""
    remembers: bool = False
    """Add to the losses what the driver remembers of the updates before."""


def images_of(run: Run, config: Config, step: int, micro: int) -> range:
    """Global indices of this process' images: the run's own, or with --passes the same images cut into other passes."""
    if not config.passes:
        return run.image_indices(step, micro)
    mine = run.images_per_update // run.world
    each = mine // config.passes[step % len(config.passes)]
    first = step * run.images_per_update + run.rank * mine + micro * each
    return range(first, first + each)


def loss_of(run: Run, config: Config, model: nn.Module, step: int, micro: int) -> torch.Tensor:
    """Mean squared error of one micro batch."""
    indices = images_of(run, config, step, micro)
    x = torch.stack([torch.randn(3, generator=run.generator(index)) for index in indices])
    with run.autocast():
        loss = (model(x.to(run.device)).float() - x.sum(1, keepdim=True).to(run.device)).square().mean()
    if config.local_noise:
        loss = loss * (1 + 0.1 * torch.rand(()) + 0.1 * run.rng(step, micro).random())
    if step == config.nan_at:
        loss = loss * torch.nan
    if step == config.inf_gradient_at:
        loss = loss + 0 * torch.sqrt(0 * loss)
    return loss


def main(config: Config) -> int:
    """Train; return the exit code."""
    text = "".join(f"{f.name}: {getattr(config.run, f.name)}\n" for f in fields(config.run))
    run = Run(config.run, driver="toy", config_text=text)
    torch.manual_seed(0)
    model = run.prepare(
        nn.Sequential(nn.Linear(3, config.width), nn.Tanh(), nn.Linear(config.width, 1)), learning_rate=1e-5
    )
    memory = float(run.resumed_state.get("memory", 0.0))
    for step in run.steps():
        for phase in ("first", "second") if config.two_phases else ("",):
            for micro in run.passes(config.passes[step % len(config.passes)] if config.passes else None):
                time.sleep(config.sleep)
                if (step, micro, run.rank) == (config.signal_at, 0, config.signal_rank):
                    signal.raise_signal(signal.SIGTERM)
                with run.accumulate():
                    loss = loss_of(run, config, model, step, micro) * (1 + memory)
                    run.update(loss, phase=phase, position=float(step * 10 + micro))
        if config.remembers:
            memory = 0.5 * memory + 0.1 * step
        if run.due("validation_steps", step):
            run.log(step, sampled=1.0)
        if run.due("checkpointing_steps", step):
            run.save(step, write=lambda folder: write_extra(folder, run, model), state={"memory": memory})
    torch.save(model.state_dict(), run.folder / f"rank{run.rank}.pt")
    return run.finish()


def write_extra(folder: Path, run: Run, model: nn.Module) -> None:
    """The driver's own file of a checkpoint: the averaged weights."""
    with run.ema_weights():
        torch.save({name: value.clone() for name, value in model.state_dict().items()}, folder / "extra.pt")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
