"""Rollouts of a policy gradient: images that the present model samples, their scores and advantages, and the pairs to train on."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from preftune import seeds
from preftune.families.base import Cond
from preftune.order import items_at
from preftune.rollout import Trajectory, replay, rollout
from preftune.sampling import decoded_parts, initial_noise, sharded
from preftune.seeds import Stream
from preftune.training import policy_gradient, rollouts
from preftune.training.policy_config import Plan, PolicyConfig
from preftune.training.policy_gradient import Advantages
from preftune.training.rollouts import Clock, Rollout
from preftune.training.workspace import Workspace
from rewards.distinct import distinct
from rewards.on_device import upload

Histories = list[dict[str, list[float]]]
"""Of each column of rewards: prompt -> its latest ones. Empty before the first rollout."""
ENCODED = 64
"""Prompts that are encoded at once."""


class Pairs(NamedTuple):
    """B steps of images, on the model's device."""

    x: Tensor
    """(B, C, h, w) latents before the step."""
    x_next: Tensor
    """(B, C, h, w) and after it."""
    t: Tensor
    """(B,) timesteps before."""
    t_next: Tensor
    """(B,) and after."""
    log_probs: Tensor
    """(B,) of the rollout."""
    advantages: Tensor
    """(B,)"""


@dataclass(kw_only=True)
class Experience:
    """A rollout with what is learnt from it."""

    w: Workspace
    plan: Plan
    rollout: Rollout
    texts: Sequence[str]
    """(N,) the images' prompts."""
    cond: Cond
    """Those that differ, encoded, in the order of their first image."""
    timesteps: Tensor
    """(T + 1,) on the model's device."""
    advantages: Tensor
    """(N,) float32, on the CPU."""
    history: Histories
    """With this rollout."""
    noted: dict[str, float]
    """To log with each update."""
    clock: Clock
    sampled: bool
    """Whether this process has sampled it, and not read what an earlier one had."""
    _steps: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> list[int]:
        """The row of each image's prompt in cond."""
        return distinct(self.texts)[1]

    def pairs(self, indices: Sequence[int], numbers: Sequence[int]) -> tuple[Pairs, Cond]:
        """Return the pairs of these numbers, 0 to N x steps - 1, and their prompts; indices count the pairs of the run.

        A number stands for an image and one of its steps, which is another one in each inner epoch where not all are trained.
        """
        images = [number // self.plan.steps for number in numbers]
        steps = [
            int(self._chosen(index // self.plan.pairs)[image, number % self.plan.steps])
            for index, image, number in zip(indices, images, numbers, strict=True)
        ]
        rows, at, made = torch.tensor(images), torch.tensor(steps), self.rollout
        device = self.w.run.device
        columns = (
            made.latents[rows, at],
            made.latents[rows, at + 1],
            made.log_probs[rows, at],
            self.advantages[rows],
        )
        x, x_next, log_probs, advantages = (upload(column, device) for column in columns)
        here = upload(at, device)
        t, t_next = self.timesteps[here], self.timesteps[here + 1]
        return Pairs(x, x_next, t, t_next, log_probs, advantages), self.cond.rows(
            [self._rows[image] for image in images]
        )

    def _chosen(self, epoch: int) -> Any:
        """The trained steps (N, steps) of each image in an inner epoch of the run."""
        if epoch not in self._steps:
            self._steps = {epoch: chosen_steps(self.w.run.config.seed, epoch, self.plan)}
        return self._steps[epoch]

    def times(self) -> dict[str, float]:
        """Return the shares of time of sampling, scoring and updates; nothing where they were not all spent by this process."""
        return self.clock.shares() if self.sampled else {}


def chosen_steps(seed: int, epoch: int, plan: Plan) -> Any:
    """Return the steps (N, steps) that each image is trained on in an inner epoch of the run: some of the window, at random."""
    rng = seeds.rng(seed, Stream.CHOICE, 1, epoch)
    every = np.tile(np.array(plan.window), (plan.images, 1))
    return rng.permuted(every, axis=1)[:, : plan.steps]


def obtain(
    w: Workspace, policy: PolicyConfig, plan: Plan, prompts: Sequence[str], number: int, before: Histories
) -> Experience | None:
    """Return a rollout, sampled with the weights as they are unless it is there already, with its advantages.

    before: the histories of prompts before it. None where a signal came: what was sampled by then is dropped.
    """
    run, clock = w.run, Clock()
    first = number * policy.prompts_per_rollout
    chosen = items_at(prompts, range(first, first + policy.prompts_per_rollout), run.config.seed)
    texts = [text for text in chosen for _ in range(policy.images_per_prompt)]
    unique, _ = distinct(texts)
    with torch.no_grad():
        parts = [unique[start : start + ENCODED] for start in range(0, len(unique), ENCODED)]
        cond = Cond.cat([w.family.encode(part) for part in parts])
    fresh = not rollouts.folder_of(run.folder, number).is_dir()
    if fresh and not _sample(w, policy, plan, texts, cond, number, clock):
        return None
    made = rollouts.read(run.folder, number)
    run.wait()  # for all to have read it: the main process removes what is not needed any more
    advantages, history = advantages_of(policy, w, made, texts, before)
    assert policy.num_inference_steps is not None
    timesteps = w.family.timesteps(policy.num_inference_steps, "ddim", w.resolution)
    return Experience(
        w=w,
        plan=plan,
        rollout=made,
        texts=texts,
        cond=cond,
        timesteps=upload(timesteps, run.device),
        advantages=advantages.values,
        history=history,
        noted={
            "reward": float(made.rewards.mean()),
            "reward_std": float(made.rewards.std(correction=0)),
            "zero_variance_share": float(advantages.flat.float().mean()),
        },
        clock=clock,
        sampled=fresh,
    )


def advantages_of(
    policy: PolicyConfig, w: Workspace, made: Rollout, texts: Sequence[str], before: Histories
) -> tuple[Advantages, Histories]:
    """Return the advantages of the images, and the histories of their prompts with them."""
    assert w.mix is not None, "the configuration has rewards"
    each = policy.normalize_rewards == "each"
    columns = list(made.scores.T) if each else [made.rewards]
    weights = w.mix.weights if each else (1.0,)
    if policy.advantages == "group":
        found = [policy_gradient.group_advantages(column, texts) for column in columns]
        return policy_gradient.combined(found, weights, policy.advantage_clip), []
    size, least = policy.prompt_buffer_size, policy.prompt_buffer_min_count
    pairs = [
        policy_gradient.prompt_advantages(column, texts, history, size, least)
        for column, history in zip(columns, before or [{} for _ in columns], strict=True)
    ]
    combined = policy_gradient.combined([one for one, _ in pairs], weights, policy.advantage_clip)
    return combined, [history for _, history in pairs]


def _sample(
    w: Workspace,
    policy: PolicyConfig,
    plan: Plan,
    texts: Sequence[str],
    cond: Cond,
    number: int,
    clock: Clock,
) -> bool:
    """Sample and score this process' share of a rollout, and write it; False where a signal came."""
    run = w.run
    mine = [place for place, _ in sharded(texts, run.rank, run.world)]
    done = list(run.until_stopped(_batches(w, policy, plan, texts, mine, cond, number, clock)))
    if run.interrupted:
        return False
    shape = w.family.latent_shape(w.resolution)
    assert w.mix is not None
    assert policy.num_inference_steps is not None
    steps = policy.num_inference_steps
    empty = {
        "latents": torch.zeros(0, steps + 1, *shape),
        "log_probs": torch.zeros(0, steps),
        "scores": torch.zeros(0, len(w.mix.names)),
        "rewards": torch.zeros(0),
    }
    tensors = {name: torch.cat([none, *(batch[name] for batch in done)]) for name, none in empty.items()}
    rollouts.write(run, number, mine, tensors)
    return True


def _batches(
    w: Workspace,
    policy: PolicyConfig,
    plan: Plan,
    texts: Sequence[str],
    mine: Sequence[int],
    cond: Cond,
    number: int,
    clock: Clock,
) -> Iterator[dict[str, Tensor]]:
    """Yield the images at these places of a rollout, some at a time, on the CPU."""
    size = policy.rollout_batch_size or w.run.config.train_batch_size
    _, rows = distinct(texts)
    starts = range(0, len(mine), size)
    for start in tqdm(starts, desc=f"rollout {number}", disable=not w.run.is_main, leave=False):
        places = mine[start : start + size]
        prompts = [texts[place] for place in places]
        own = cond.rows([rows[place] for place in places])
        yield _batch(w, policy, plan, prompts, own, [number * plan.images + place for place in places], clock)


@torch.no_grad()
def _batch(
    w: Workspace,
    policy: PolicyConfig,
    plan: Plan,
    prompts: Sequence[str],
    cond: Cond,
    indices: Sequence[int],
    clock: Clock,
) -> dict[str, Tensor]:
    """Return trajectories, log-probabilities, scores and rewards of images, each a function of its index in the run."""
    family, run, mix = w.family, w.run, w.mix
    assert mix is not None
    assert policy.num_inference_steps is not None
    assert policy.guidance_scale is not None
    with clock("sampling"):
        generators = [run.generator(index) for index in indices]
        x_t = initial_noise(family.latent_shape(w.resolution), generators, family.device)
        # the fast way rounds in its own way, so that nothing may be compared with what it gives
        with nullcontext() if policy.old_logprob == "rollout" else family.lean():
            made = rollout(
                family, cond, x_t, "ddim", policy.num_inference_steps, policy.guidance_scale, generators,
                resolution=w.resolution, step=policy.step(),
            )  # fmt: skip
        log_probs = replayed(w, made, cond, plan) if policy.old_logprob == "replay" else made.log_probs
        latents = made.latents.transpose(0, 1).cpu()
    with clock("scoring"):
        parts = list(decoded_parts(family, made.latents[-1], w.resolution))
        mixed = mix(torch.cat(parts), prompts)
        scored = {"scores": mixed.scores.cpu(), "rewards": mixed.rewards.cpu()}
    return {"latents": latents, "log_probs": log_probs.T.cpu(), **scored}


def replayed(w: Workspace, made: Trajectory, cond: Cond, plan: Plan) -> Tensor:
    """Return the log-probabilities (T, B) of the window's steps as training computes them; nan elsewhere."""
    found = torch.full_like(made.log_probs, torch.nan)
    for index in plan.window:
        found[index] = replay(w.family, made, cond, index).log_prob(made.latents[index + 1], made.reduce)
    return found


def save_before(w: Workspace, step: int, state: dict[str, Any]) -> None:
    """Save the checkpoint of the updates before this step, which a signal ended before it had begun, unless it is there."""
    w.run.row = {}
    if step > w.run.start and not w.run.scheduled("checkpointing_steps", step - 1):
        w.run.save(step - 1, write=w.write, state=state)
