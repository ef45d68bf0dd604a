"""DRaFT and AlignProp: tune by the gradient of a reward through the last steps of sampling (Clark et al. 2023, arXiv
2309.17400; Prabhudesai et al. 2023, arXiv 2310.03739).

An image is sampled as at inference, without gradient up to some step; from there on every step keeps its gradient, to the weights and
to the latents before, and the reward of the final image is maximised. `--truncation` says where the gradient begins:

| | step | flags |
|---|---|---|
| DRaFT-K | the last K | `--truncation last --last-steps K`; 1, the default, is the paper's recommendation |
| DRaFT-LV | the last one, and n more with fresh noise on the final image | `--lv-copies 2` |
| AlignProp, paper and TRL's former port | uniform | `--truncation uniform --eta 1` |
| AlignProp, released code | about 0.84 N, Gaussian | `--truncation gaussian --eta 1` |

    python finetune/draft.py                                    # the embedded model
    python finetune/draft.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts my_prompts.txt --last-steps 5

Differences from AlignProp's released code: pixels are normalised once (its losses do it twice, so that scorers see [0.5, 1] and half
of the gradient) and not clamped; steps before the truncation run without gradient instead of being computed twice. `--base-distance` is
DRaFT+'s. Gradients through many live steps contain products of Jacobians, which can explode:
`--grad-norm-limit` ends such a run; `preftune drtune` has no such products. Hardware: a GPU for Stable Diffusion.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.training import direct_config
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.direct_config import DirectConfig, Truncation, check_groups
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "draft" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by DRaFT or AlignProp. Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    truncation: Truncation = "last"
    """First step with gradient: last = the last --last-steps (DRaFT-K); uniform, gaussian = drawn for each update (AlignProp)."""
    last_steps: int = 1
    """K of --truncation last, at most all steps."""
    lv_copies: int = 0
    """n of DRaFT-LV: the final image is noised again to the last step's level, this many times, and each step counts as the last one.
    Needs --last-steps 1.
    """
    eta: float = 0.0
    """DDIM's noise in each step, in [0, 1]: 0 = none, as DRaFT; 1 = all, as AlignProp."""
    direct: Annotated[DirectConfig, tyro.conf.arg(name="")] = field(default_factory=DirectConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.model)
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.reward)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: direct_config.run("draft", max_grad_norm=0.1)
    )

    def __post_init__(self) -> None:
        if self.last_steps < 1:
            raise ValueError(f"--last-steps must be at least 1, got {self.last_steps}")
        if self.truncation != "last" and self.last_steps != 1:
            raise ValueError(
                f"--last-steps {self.last_steps} needs --truncation last, got {self.truncation}, which draws the number"
            )
        if self.lv_copies < 0:
            raise ValueError(f"--lv-copies must be 0 or more, got {self.lv_copies}")
        if self.lv_copies and (self.truncation != "last" or self.last_steps != 1):
            raise ValueError(
                f"--lv-copies {self.lv_copies} repeats the last step alone: it needs --truncation last --last-steps 1"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta must lie in [0, 1], got {self.eta:g}")
        check_groups(self.direct, self.model, self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import torch
from torch import Generator, Tensor

from preftune import ahead, paths
from preftune.active_steps import first_live_step
from preftune.ahead import Ahead
from preftune.families import Family
from preftune.files.one_writer import one_writer
from preftune.noise import add_noise
from preftune.resolution import Resolution
from preftune.solvers import ddim
from preftune.training import direct


def final_latents(
    family: Family,
    prompts: Sequence[str],
    generators: Sequence[Generator],
    first: int,
    resolution: Resolution,
    config: Config,
    distances: list[Tensor] | None = None,
) -> Tensor:
    """Return the final latents (B, C, h, w) of DDIM with `eta`, with gradient through step `first` and all after it.

    With lv_copies n they are (B (n + 1), C, h, w): first those of the sample, then of each copy. `distances` as in `paths.predict`.
    """
    settings = direct.filled(config.direct)
    cond, shape = family.encode(prompts), family.latent_shape(resolution)
    grid = family.timesteps(settings.num_inference_steps, settings.solver, resolution)
    draws = [config.eta > 0 and t_next >= 0 for t_next in grid[1:].tolist()]
    drawn = ahead.noise(1 + sum(draws) + (1 + draws[-1]) * config.lv_copies, shape, generators, family.device)
    x = next(drawn)
    _, steps = ahead.steps(family, grid, draws, drawn, len(x))
    scale = settings.guidance_scale
    gradient = settings.guidance_gradient

    def step(x: Tensor, now: Ahead) -> Tensor:
        prediction = paths.predict(family, x, now.t, cond, scale, gradient, distances)
        transition = ddim(prediction, now.level, now.next_level, config.eta)
        return transition.mean if now.noise is None else transition.sample(now.noise)

    with family.lean():
        for now in islice(steps, first):
            transition = ddim(family.predict(x, now.t, cond, scale), now.level, now.next_level, config.eta)
            x = transition.mean if now.noise is None else transition.sample(now.noise)
    for now in steps:
        x = step(x, now)
    finals = [x]
    for _ in range(config.lv_copies):
        again = add_noise(x.detach(), next(drawn), *now.level)
        finals.append(step(again, now if now.noise is None else now._replace(noise=next(drawn))))
    return torch.cat(finals)


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        config, inputs = direct.check(config, "draft", levels=False)
        direct.check_steps("--last-steps", config.last_steps, config.direct)
    steps = direct.filled(config.direct).num_inference_steps
    with direct.open(config, "draft", inputs) as w:
        for index in w.run.steps():
            first = first_live_step(w.run.rng(index), steps, config.truncation, config.last_steps)
            for batch in direct.batches(w, inputs.prompts, index, config.direct):
                latents = final_latents(
                    w.family, batch.prompts, batch.noise, first, w.resolution, config, batch.distances
                )
                losses, reward = batch.losses(latents)
                batch.update(losses.mean(), reward=reward.mean(), first_step=float(first))
            w.after(index)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
