"""FlowBP and LeapAlign: tune by the gradient of a reward through a surrogate of the trajectory (arXiv 2606.11075; arXiv 2604.15311).

The trajectory runs without gradient. Then a few calls are repeated with gradient, and a surrogate joins them into its end, whose value is put
back to the true one, so that the reward sees the very image that was sampled:

| --surrogate | steps with gradient | their inputs |
|---|---|---|
| sparse | K, the later the more likely, of the exact sum over all steps | detached |
| bridge | K, on both sides of a random anchor, which is one of them | detached; at the anchor mixed |
| lagrange | two leaps, each integrated by three directions, of which the first two are active | detached; at the second leap mixed |
| leapalign | two leaps of one direction each; images whose leaps miss the true path count less | detached; at the second leap mixed |

A mixed input lets a share of the gradient through to the steps before (`--input-share`; 0 = detached, 1 = live). The formulas are in
preftune/surrogates.py. They are published for flow models; for Stable Diffusion they are used on x / alpha as a function of sigma / alpha,
where DDIM is Euler's method: that is ours, and nobody has published it.

    python finetune/flowbp.py                                   # the embedded model
    python finetune/flowbp.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts my_prompts.txt --surrogate bridge

Defaults are those of the released configurations for Stable Diffusion 3.5; K = 4 (sparse) and 5 (bridge) of 25 steps. Left out: the filter of
images whose leaps miss most, which is off there. Hardware: a GPU for Stable Diffusion; the tiny model runs on two CPU cores.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.training import direct_config
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.direct_config import DirectConfig, check_groups
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "flowbp" / "tiny.yaml"

Name = Literal["sparse", "bridge", "lagrange", "leapalign"]

PUBLISHED: dict[Name, dict[str, int | float]] = {
    "sparse": {"active_steps": 4, "late_bias": 1.0, "gradient_rescale": 0.5},
    "bridge": {"active_steps": 5, "late_bias": 4.0, "gradient_rescale": 0.0, "input_share": 0.5},
    "lagrange": {"order": 3, "second_gradient": 0.25, "input_share": 0.1, "tau": 0.2},
    "leapalign": {"input_share": 0.3, "tau": 0.1},
}
"""Surrogate -> its flags, and their values in the released configurations for Stable Diffusion 3.5."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by FlowBP or LeapAlign. Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    surrogate: Name = "sparse"
    """How a few calls become the end of the trajectory."""
    active_steps: int | None = None
    """K, steps with gradient of sparse and bridge; None = 4 and 5."""
    late_bias: float | None = None
    """Step i of sparse and bridge is drawn with weight (i + 1)^bias; None = 1 and 4."""
    gradient_rescale: float | None = None
    """gamma of sparse and bridge: 1 = active steps stand in for all others, 0 = each for itself; None = 0.5 and 0."""
    input_share: float | None = None
    """Share of the gradient through the input at the anchor or second leap, in [0, 1]; None = 0.5 bridge, 0.1 lagrange, 0.3 leapalign."""
    order: int | None = None
    """Directions that integrate a leap of lagrange, or all its steps where it has fewer; None = 3."""
    second_gradient: float | None = None
    """Factor of the gradient of a leap's second direction, in [0, 1]; None = 0.25."""
    tau: float | None = None
    """Weight of an image = 1 / (max(tau, miss of leap one) + max(tau, miss of leap two)), mean |difference| of latents; None = 0.2 lagrange,
    0.1 leapalign.
    """
    direct: Annotated[DirectConfig, tyro.conf.arg(name="")] = field(default_factory=DirectConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.model)
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=direct_config.reward)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: direct_config.run("flowbp")
    )

    def __post_init__(self) -> None:
        own = PUBLISHED[self.surrogate]
        least = 2 if self.surrogate == "bridge" else 1  # before the anchor, and the anchor
        limits = {
            "active_steps": (least, 1000),
            "late_bias": (0, 64),
            "gradient_rescale": (0, 1),
            "input_share": (0, 1),
            "order": (2, 8),
            "second_gradient": (0, 1),
            "tau": (1e-6, 1e6),
        }
        for name, (low, high) in limits.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and name not in own:
                users = ", ".join(other for other, names in PUBLISHED.items() if name in names)
                raise ValueError(
                    f"{flag} {value} does nothing with --surrogate {self.surrogate}; it is for {users}"
                )
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{flag} must lie in [{low:g}, {high:g}] with --surrogate {self.surrogate}, got {value}"
                )
        check_groups(self.direct, self.model, self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import numpy as np
import torch

from preftune import active_steps, paths, surrogates
from preftune.files.one_writer import one_writer
from preftune.surrogates import Part
from preftune.training import direct


def with_published(config: Config) -> Config:
    """Return the configuration with the published value of each flag of its surrogate that is left out; K at most all steps."""
    own: dict[str, Any] = {**PUBLISHED[config.surrogate]}
    if "active_steps" in own:
        own["active_steps"] = min(own["active_steps"], direct.filled(config.direct).num_inference_steps)
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})


def values_of(config: Config) -> Mapping[str, float]:
    """Return the values of its surrogate's flags."""
    return {name: getattr(config, name) for name in PUBLISHED[config.surrogate]}


def choose_sparse(
    rng: np.random.Generator, levels: Sequence[float], values: Mapping[str, float]
) -> list[Part]:
    """Return the parts of FlowBP-Sparse for one update."""
    count, bias = int(values["active_steps"]), values["late_bias"]
    active = active_steps.late_biased(rng, 0, len(levels) - 1, count, bias)
    return surrogates.sparse(levels, active, values["gradient_rescale"])


def choose_bridge(
    rng: np.random.Generator, levels: Sequence[float], values: Mapping[str, float]
) -> list[Part]:
    """Return the parts of FlowBP-Bridge for one update: the anchor is the later of a random pair of steps."""
    count, bias = int(values["active_steps"]), values["late_bias"]
    _, anchor = active_steps.pair(rng, len(levels) - 1)
    active = active_steps.around_anchor(rng, len(levels) - 1, anchor, count, bias)
    return surrogates.bridge(levels, anchor, active, values["gradient_rescale"])


def choose_lagrange(
    rng: np.random.Generator, levels: Sequence[float], values: Mapping[str, float]
) -> list[Part]:
    """Return the leaps of FlowBP-Lagrange for one update."""
    steps = active_steps.dirichlet_pair(rng, len(levels) - 1)
    return surrogates.leaps(levels, *steps, int(values["order"]), values["second_gradient"])


def choose_leapalign(
    rng: np.random.Generator, levels: Sequence[float], values: Mapping[str, float]
) -> list[Part]:
    """Return the leaps of LeapAlign for one update, between two random steps."""
    return surrogates.leaps(levels, *active_steps.pair(rng, len(levels) - 1))


CHOOSE = {
    "sparse": choose_sparse,
    "bridge": choose_bridge,
    "lagrange": choose_lagrange,
    "leapalign": choose_leapalign,
}
"""Surrogate -> the function that draws its steps."""


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        config, inputs = direct.check(config, "flowbp", levels=True)
        config, settings = with_published(config), direct.filled(config.direct)
        if settings.num_inference_steps < 2:
            raise ValueError("--num-inference-steps must be at least 2 for two parts of a trajectory, got 1")
        direct.check_steps("--active-steps", config.active_steps or 1, config.direct)
    values = values_of(config)
    with direct.open(config, "flowbp", inputs) as w:
        grid = paths.grid(w.family, settings.num_inference_steps, settings.solver, w.resolution)
        for index in w.run.steps():
            parts = CHOOSE[config.surrogate](w.run.rng(index), grid.levels, values)
            for batch in direct.batches(w, inputs.prompts, index, config.direct):
                latents, misses = batch.surrogate_latents(grid, parts, values.get("input_share", 0.0))
                losses, reward = batch.losses(latents)
                if "tau" in values:
                    losses = surrogates.closeness(misses, values["tau"]) * losses
                batch.update(losses.mean(), reward=reward.mean(), miss=torch.stack(misses).sum(0).mean())
            w.after(index)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
