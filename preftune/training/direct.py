"""What the drivers share whose gradient of a reward reaches more than one denoising step: DRaFT, DRTune, FlowBP.

Memory. `checkpoint_calls` lets each call of the denoiser with gradient keep its inputs alone; the backward pass computes the calls again
one after the other, the last first, so that the activations of one exist at a time. It is done inside the module that processes
share the gradients of: what is computed again is not a forward of theirs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from preftune import paths
from preftune.cli import dump
from preftune.families.base import Defaults, Family
from preftune.order import items_at
from preftune.paths import Grid
from preftune.prompts import read_prompts
from preftune.surrogates import Part, pinned
from preftune.training import defaults as training_defaults
from preftune.training import workspace
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.direct_config import DirectConfig
from preftune.training.mean_reward import mean_reward
from preftune.training.run import Run
from preftune.training.run_config import RunConfig
from preftune.training.workspace import Workspace
from rewards.mix import Mixed, named


class _HasGroups(Protocol):
    @property
    def prompts(self) -> Path: ...
    @property
    def direct(self) -> DirectConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def reward(self) -> RewardConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...
    @property
    def run(self) -> RunConfig: ...


C = TypeVar("C", bound=_HasGroups)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Prompts in training and of the validation images, and what is known of the model before it loads."""

    prompts: Sequence[str]
    validation_prompts: Sequence[str]
    defaults: Defaults


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of this process in one backward pass."""

    prompts: Sequence[str]
    noise: Sequence[Generator]
    """One for each image's trajectory."""
    movers: Sequence[Generator]
    """One for each image's jitter."""
    scored: list[Mixed]
    """What the scorers gave in this update so far, to name the one whose scores are not finite."""
    distances: list[Tensor] | None
    """With --base-distance those of the calls with gradient so far, each (B,)."""
    w: Workspace
    config: DirectConfig

    def losses(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and rewards, each (B n,) with gradient, of final latents (B n, C, h, w): n for each image of the batch, one
        batch after the other.
        """
        assert self.w.mix is not None, "the configuration has rewards"
        pixels = decoded(self.w.family, latents, self.config.pixel_clamp)
        number = len(latents) // len(self.prompts)
        texts, movers = [*self.prompts] * number, [*self.movers] * number
        reward, mixed = mean_reward(self.w.mix, pixels, texts, movers, self.config)
        self.scored.append(mixed)
        return losses(reward, self.config.margin), reward

    def surrogate_latents(
        self, grid: Grid, parts: Sequence[Part], share: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `paths.surrogate_latents` of the batch."""
        settings = filled(self.config)
        scale, gradient = settings.guidance_scale, settings.guidance_gradient
        family, size = self.w.family, self.w.resolution
        return paths.surrogate_latents(
            family, self.prompts, self.noise, grid, parts, size, scale, gradient, share, self.distances
        )

    def update(self, loss: Tensor, **scalars: Tensor | float) -> None:
        """Do the backward pass, and in the last of an update the step, after which `check_norm` looks at the gradient's norm.

        The loss is this one and, with --base-distance, the mean distance of the calls with gradient.
        """
        if self.distances is not None:
            scalars["base_distance"] = torch.stack(self.distances).mean()
            loss = loss + self.config.base_distance * scalars["base_distance"]
        with named(self.scored):
            self.w.run.update(loss, phase="", **scalars)


def check(config: C, program: str, *, levels: bool) -> tuple[C, Inputs]:
    """Return the configuration with its defaults, and the inputs; ValueError for whatever is wrong, before weights load.

    levels: the method needs x / alpha, which is infinite at zero terminal SNR.
    """
    prompts = read_prompts(config.prompts)
    validation_prompts = config.validation.prompts(prompts)
    defaults = workspace.check(
        config.model, config.reward, config.validation, config.run, differentiable=True
    )
    if levels and defaults.zero_snr:
        raise ValueError(
            f"{program} does not train a model of zero terminal SNR, whose noise begins at alpha 0; preftune draft does"
        )
    own = training_defaults.direct(program, defaults)
    config = training_defaults.of_model(config, program, defaults, own)
    settings = filled(config.direct)
    defaults.check_solver(settings.solver, settings.num_inference_steps)
    size = config.model.size(defaults)
    if config.direct.jitter >= min(size):
        raise ValueError(
            f"--jitter {config.direct.jitter} must be less than the image's side, {min(size)} pixels"
        )
    return config, Inputs(prompts=prompts, validation_prompts=validation_prompts, defaults=defaults)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags that have no value before the model is known."""

    num_inference_steps: int
    solver: Literal["ddim", "euler"]
    guidance_scale: float
    guidance_gradient: Literal["both", "positive"]


def filled(config: DirectConfig) -> Settings:
    """Return those flags of a configuration with its defaults."""
    assert config.num_inference_steps is not None, "filled"
    assert config.solver is not None, "filled"
    assert config.guidance_scale is not None, "filled"
    assert config.guidance_gradient is not None, "filled"
    return Settings(
        num_inference_steps=config.num_inference_steps,
        solver=config.solver,
        guidance_scale=config.guidance_scale,
        guidance_gradient=config.guidance_gradient,
    )


def check_steps(flag: str, number: int, config: DirectConfig) -> None:
    """Raise ValueError for more steps with gradient than a trajectory has."""
    steps = filled(config).num_inference_steps
    if number > steps:
        raise ValueError(f"{flag} {number} is more than --num-inference-steps {steps}")


@contextmanager
def open(config: _HasGroups, driver: str, inputs: Inputs) -> Iterator[Workspace]:
    """Open the workspace of a checked configuration, each call of its denoiser checkpointed unless a flag says no."""
    groups = config.model, config.reward, config.validation, config.run
    with workspace.open(
        *groups,
        driver=driver,
        config_text=dump(config),
        prompts=inputs.validation_prompts,
        differentiable=True,
    ) as w:
        if config.direct.call_checkpointing:
            checkpoint_calls(w.family.denoiser)
        yield w


def batches(w: Workspace, prompts: Sequence[str], step: int, config: DirectConfig) -> Iterator[Batch]:
    """Yield the passes of an update, each in its context of `accumulate`; then look at the norm of its gradient."""
    scored: list[Mixed] = []
    for micro_batch in w.run.passes():
        indices = w.run.image_indices(step, micro_batch)
        with w.run.accumulate():
            yield Batch(
                prompts=items_at(prompts, indices, w.run.config.seed),
                noise=[w.run.generator(i) for i in indices],
                movers=[w.run.generator(i, stream=2) for i in indices],
                scored=scored,
                distances=[] if config.base_distance else None,
                w=w,
                config=config,
            )
    check_norm(w.run, config.grad_norm_limit)


def checkpoint_calls(denoiser: nn.Module) -> None:
    """From now on compute calls with gradient again in the backward pass instead of keeping their activations."""
    distributed = isinstance(denoiser, nn.parallel.DistributedDataParallel)
    module: Any = denoiser.module if distributed else denoiser
    forward = module.forward

    def call(*args: Any, **rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **rest)
        return _again(forward, *args, **rest)

    module.forward = call


def _again(function: Callable[..., Any], *args: Any, **rest: Any) -> Any:
    """The function's result, computed again in the backward pass; nothing that is tuned draws random numbers, which would be read."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **rest)


def decoded(
    family: Family, latents: Tensor, clamp: Literal["none", "straight-through", "clamp"] = "none"
) -> Tensor:
    """Return pixels (B, 3, H, W) of latents (B, C, h, w), with gradient, in the memory of a single image."""
    if len(latents) == 1:
        pixels = family.decode(latents)
    else:
        pixels = torch.cat([_again(family.decode, one) for one in latents.split(1)])
    if clamp == "none":
        return pixels
    inside = pixels.clamp(0, 1)
    return inside if clamp == "clamp" else pinned(pixels, inside)


def losses(rewards: Tensor, margin: float | None) -> Tensor:
    """Return the losses (B,) of rewards (B,): -r, or relu(margin - r), which is FlowBP's."""
    return -rewards if margin is None else torch.relu(margin - rewards)


def check_norm(run: Run, limit: float) -> None:
    """Raise FloatingPointError, on every process, where the last gradient's norm, before it was clipped, is above the limit."""
    norm = run.row["grad_norm"]
    if norm > limit:
        raise FloatingPointError(
            f"gradient norm at step {run.row['step']:g} is {norm:.3g}, above --grad-norm-limit {limit:g}: lower --learning-rate, or let"
            " fewer steps carry a gradient"
        )
