"""DRTune: tune by the gradient of a reward to a few steps all over the trajectory, whose inputs are constants (Wu et al. 2024,
arXiv 2405.00760).

In each update a late step is drawn, whose predicted clean image is scored (early stop), and K equally spaced steps before it are
active. The network's inputs are detached everywhere, so that

    dr/dtheta = sum over the active steps of (l' - l) dr/dx dd/dtheta

has no products of Jacobians, in the coordinates of preftune/surrogates.py, and early steps, which decide layout and number of objects, can be
trained without gradients that explode. The trajectory runs without gradient first; then each active call is repeated with it, one
at a time, and is what the memory of an update holds.

    python finetune/drtune.py                                   # the embedded model
    python finetune/drtune.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts my_prompts.txt --rewards hpsv2.1=20

Defaults are those of the reference implementation in FlowBP: K = 3 of 25 steps, early stop in the last 40 %. The authors' own code is not
published. Hardware: a GPU for Stable Diffusion; the tiny model runs on two CPU cores.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.training import direct_config
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.direct_config import DirectConfig, check_groups
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "drtune" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by DRTune. Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    active_steps: int = 3
    """K, steps with gradient in an update: equally spaced, the first drawn."""
    early_stop: float = 0.4
    """Share of the steps, the last ones, of which one is drawn whose predicted clean image is scored; 0 = always the last step."""
    direct: Annotated[DirectConfig, tyro.conf.arg(name="")] = field(default_factory=DirectConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.model)
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.reward)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: direct_config.run("drtune")
    )

    def __post_init__(self) -> None:
        if self.active_steps < 1:
            raise ValueError(f"--active-steps must be at least 1, got {self.active_steps}")
        if not 0 <= self.early_stop <= 1:
            raise ValueError(f"--early-stop must lie in [0, 1], got {self.early_stop:g}")
        check_groups(self.direct, self.model, self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import numpy as np

from preftune import paths, surrogates
from preftune.active_steps import early_stop, spaced
from preftune.files.one_writer import one_writer
from preftune.paths import Grid
from preftune.training import direct


def choose(rng: np.random.Generator, grid: Grid, config: Config) -> tuple[Grid, list[int]]:
    """Return the grid up to the step that is scored, and the active steps, of which that may be one."""
    stop = early_stop(rng, len(grid.scales) - 1, config.early_stop)
    return grid.until(stop), spaced(rng, stop + 1, config.active_steps)


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        config, inputs = direct.check(config, "drtune", levels=True)
        direct.check_steps("--active-steps", config.active_steps, config.direct)
    with direct.open(config, "drtune", inputs) as w:
        settings = direct.filled(config.direct)
        whole = paths.grid(w.family, settings.num_inference_steps, settings.solver, w.resolution)
        for index in w.run.steps():
            grid, active = choose(w.run.rng(index), whole, config)
            parts = surrogates.sparse(grid.levels, active)  # constant inputs, the exact sum
            stop = float(len(grid.scales) - 2)
            for batch in direct.batches(w, inputs.prompts, index, config.direct):
                latents, _ = batch.surrogate_latents(grid, parts)
                losses, reward = batch.losses(latents)
                batch.update(losses.mean(), reward=reward.mean(), stop_step=stop, first_step=float(active[0]))
            w.after(index)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
