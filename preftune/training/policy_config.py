"""Flags of policy gradients: how a rollout is sampled and compared, and which of its steps are trained. Needs no torch."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from preftune.families.base import Defaults
from preftune.training.config import RewardConfig, check_guidance
from preftune.training.run_config import RunConfig

if TYPE_CHECKING:
    from preftune.solvers import Step

MOST_STEPS = 500
"""Denoising steps whose last one still has noise, whatever the spacing of the model's timesteps."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The rollout, its advantages, and the pairs of images and steps that are trained on."""

    advantages: Literal["prompt", "group"] = "prompt"
    """What a reward is compared with: prompt = the latest rewards of its prompt, those of earlier rollouts too (DDPO); group = the rewards of
    its prompt in this rollout (GRPO).
    """
    prompts_per_rollout: int = 256
    """Prompts of a rollout, of all processes together; where there are fewer, they come again."""
    images_per_prompt: int = 1
    """Images generated for each of them; group needs 2 or more, DanceGRPO has 16."""
    inner_epochs: int = 1
    """How often each pair of a rollout is trained on."""
    num_inference_steps: int | None = None
    """Denoising steps of a rollout; None = 50, for a distilled model its own few."""
    guidance_scale: float | None = None
    """Guidance scale of rollout and training, with gradient through both predictions; 1 = no guidance. None = 5, for a distilled model 1."""
    eta: float = 1.0
    """DDIM's noise in each step, in (0, 1]; 1 = that of DDPM, as published."""
    rollout_batch_size: int | None = None
    """Images that are sampled at once; None = --train-batch-size: then sampling and training compute the same to the last bit."""
    timestep_fraction: float = 1.0
    """Share of its steps that an image is trained on in an inner epoch, chosen at random; in (0, 1]."""
    window: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="INT INT")] = None
    """First and last step that are trained, both included, counted from 0; None = all."""
    old_logprob: Literal["rollout", "replay", "self"] = "rollout"
    """Log-probabilities that ratios are to: rollout = noted while sampling; replay = computed again before the first update, as training
    does, so that sampling may be faster; self = the present ones, ratio 1, which a single inner epoch allows.
    """
    advantage_clip: float = 5.0
    """Advantages are cut to plus and minus this."""
    normalize_rewards: Literal["sum", "each"] = "sum"
    """Of several --rewards: sum = advantages of their weighted sum; each = advantages of each scorer by itself, then weighted and added
    (MixGRPO, GDPO), so that none decides by its spread.
    """
    prompt_buffer_size: int = 16
    """Rewards of a prompt that --advantages prompt remembers; DDPO has 16, of a slow reward 32."""
    prompt_buffer_min_count: int = 16
    """Rewards from which on they are compared with; with fewer it is the whole rollout."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_rollout", "images_per_prompt", "inner_epochs"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        steps, batch = self.num_inference_steps, self.rollout_batch_size
        _demand(
            steps is None or 1 <= steps <= MOST_STEPS, "num_inference_steps", steps, f"in 1..{MOST_STEPS}"
        )
        _demand(batch is None or batch >= 1, "rollout_batch_size", batch, "at least 1")
        _demand(0 < self.eta <= 1, "eta", self.eta, "in (0, 1]: a step without noise has no probability")
        _demand(0 < self.timestep_fraction <= 1, "timestep_fraction", self.timestep_fraction, "in (0, 1]")
        _demand(self.advantage_clip > 0, "advantage_clip", self.advantage_clip, "above 0; inf never cuts")
        if self.guidance_scale is not None:
            check_guidance(self.guidance_scale)
        buffer = self.prompt_buffer_size, self.prompt_buffer_min_count
        _demand(
            1 <= buffer[1] <= buffer[0],
            "prompt_buffer_min_count",
            buffer[1],
            f"in 1..{buffer[0]}, which is --prompt-buffer-size",
        )
        if self.advantages == "group" and self.images_per_prompt < 2:
            raise ValueError(
                f"--advantages group compares the images of a prompt: --images-per-prompt must be 2 or more, got {self.images_per_prompt}"
            )
        if self.advantages == "group" and buffer != (16, 16):
            raise ValueError(
                "--prompt-buffer-size and --prompt-buffer-min-count are for --advantages prompt, not group"
            )
        if self.old_logprob == "self" and self.inner_epochs > 1:
            raise ValueError(
                f"--old-logprob self has no ratio to what was sampled: --inner-epochs must be 1, got {self.inner_epochs}"
            )

    def check(self, reward: RewardConfig) -> None:
        """Raise ValueError for rewards that cannot be compared so."""
        if self.normalize_rewards == "each" and reward.reward_combination == "min":
            raise ValueError(
                "--normalize-rewards each adds advantages; --reward-combination min does not go with it"
            )

    def step(self) -> "Step":
        """Return the denoising step of rollouts."""
        from functools import partial

        from preftune.solvers import ddim  # imports torch, which the flags do not need

        return partial(ddim, eta=self.eta)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a rollout has in numbers."""

    images: int
    window: range
    """The steps that are trained."""
    steps: int
    """Of these, in an inner epoch of an image."""
    updates: int

    @property
    def pairs(self) -> int:
        """Return the (image, step) pairs of an inner epoch."""
        return self.images * self.steps


def plan_of(policy: PolicyConfig, run: RunConfig, defaults: Defaults) -> Plan:
    """Return the plan of a configuration with its defaults; ValueError where updates do not divide a rollout."""
    count = policy.num_inference_steps
    assert count is not None, "filled"
    defaults.check_solver("ddim", count)
    first, last = policy.window or (0, count - 1)
    if not 0 <= first <= last < count:
        raise ValueError(f"--window {first} {last} must lie in 0..{count - 1}, first no later than last")
    window = range(first, last + 1)
    images = policy.prompts_per_rollout * policy.images_per_prompt
    steps = max(1, int(len(window) * policy.timestep_fraction))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each = run.train_batch_size * run.gradient_accumulation_steps * processes
    total = images * steps * policy.inner_epochs
    if total % each:
        raise ValueError(
            f"an update has {each} pairs (--train-batch-size x --gradient-accumulation-steps x processes), which do not divide the"
            f" {total} of a rollout ({images} images x {steps} steps x {policy.inner_epochs} inner epochs)"
        )
    return Plan(images=images, window=window, steps=steps, updates=total // each)


def _demand(holds: bool, name: str, value: object, legal: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {legal}, got {value}")
