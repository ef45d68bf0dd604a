r"""DDPO and GRPO: tune by policy gradients, with any reward (Black et al. 2023, arXiv 2305.13301; GRPO on Stable Diffusion: DanceGRPO, Xue
et al. 2025, arXiv 2505.07818).

Denoising is a decision process whose steps are samples of known normal distributions. In each rollout the present model generates images
by stochastic DDIM, and they are scored; rewards become advantages A. Then come some updates on shuffled (image, step) pairs, each by
PPO's loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), ratio = p_now(x' | x) / p_then(x' | x). The reward needs no gradient.

| `--advantages` | an image is compared with | paper |
|---|---|---|
| `prompt` (default) | the latest images of its prompt, of earlier rollouts too | DDPO |
| `group` | the others of its prompt in this rollout | GRPO |

All else is the same, and so is this file: DanceGRPO's script for Stable Diffusion is DDPO's but for the advantages.

    python finetune/ddpo.py                                    # the embedded model
    python finetune/ddpo.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts animals.txt --rewards aesthetic=1
    python finetune/ddpo.py --config finetune/configs/ddpo/sd15_grpo.yaml --prompts hpd_train.txt

Log-probabilities are means over the elements of an image, as published. An image of --train-batch-size is an (image, step) pair;
--max-train-steps counts updates. A rollout is kept in RUN/rollout_000003 while its updates last: a run that is stopped goes on within
them. Left out: Flow-GRPO and MixGRPO, which are for flow models (in Stable Diffusion the noise is DDIM's, at all steps), and GDPO's
second normalisation over the batch. Hardware: a GPU for Stable Diffusion; tiny models run on a CPU.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.cli.notes import say
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.defaults import of_model
from preftune.training.defaults import policy as policy_defaults
from preftune.training.policy_config import PolicyConfig, plan_of
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "ddpo" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by policy gradients (DDPO, GRPO). Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    policy: Annotated[PolicyConfig, tyro.conf.arg(name="")] = field(default_factory=PolicyConfig)
    clip_range: float = 1e-4
    """c: a pair is left alone once its ratio has left [1 - c, 1 + c] in the direction of its advantage. A figure for one element."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the model before tuning, in the loss; 0 = off, as DDPO. One more call of the denoiser for each pair."""
    kl: Literal["step-exact", "prediction"] = "step-exact"
    """Unit of that divergence: step-exact = nats of a step for each element; prediction = squared difference of predicted noise."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RewardConfig(rewards=("imagereward=1.0",))
    )
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(
            output_dir=Path("runs/ddpo"), max_train_steps=800, train_batch_size=4, gradient_accumulation_steps=800,
            adam_weight_decay=1e-4, checkpointing_steps=20, validation_steps=40,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < 1:
            raise ValueError(f"--clip-range must lie strictly between 0 and 1, got {self.clip_range:g}")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"--kl-weight must be 0 or more and finite, got {self.kl_weight:g}")
        if not self.reward.rewards:
            raise ValueError("--rewards is empty; name a scorer whose score is to rise, as imagereward=1.0")
        self.policy.check(self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import torch
from torch import Tensor

from preftune.families.base import Cond, Family
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.rollout import predicted_step
from preftune.training import policy_rollouts, rollouts, workspace
from preftune.training.before_tuning import BeforeTuning
from preftune.training.policy_gradient import (
    approximate_kl,
    is_clipped,
    ppo_losses,
    prediction_distance,
    step_exact_kl,
)
from preftune.training.policy_rollouts import Experience, Pairs
from preftune.training.run import Run

RATIO_BOUND = 1e-5
"""How far a ratio may be from 1 before the first update of a rollout in float32, where sampling and training compute the same."""


def losses_of(
    family: Family, pairs: Pairs, cond: Cond, config: Config, before: BeforeTuning | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return losses (B,) with gradient, ratios (B,), and means to log, of B (image, step) pairs and their encoded prompts.

    before: the model before tuning, where the divergence to it counts or is measured.
    """
    assert config.policy.guidance_scale is not None, "main fills it"
    step, scale = config.policy.step(), config.policy.guidance_scale
    if before is not None:
        with before():
            base, base_step = predicted_step(family, pairs.x, pairs.t, pairs.t_next, cond, scale, step)
    prediction, transition = predicted_step(family, pairs.x, pairs.t, pairs.t_next, cond, scale, step)
    log_probs = transition.log_prob(pairs.x_next, "mean")
    old = log_probs.detach() if config.policy.old_logprob == "self" else pairs.log_probs
    losses, ratios = ppo_losses(log_probs, old, pairs.advantages, config.clip_range)
    now = ratios.detach()
    noted: dict[str, Any] = {
        "ratio": now.mean(),
        "clip_share": is_clipped(now, pairs.advantages, config.clip_range).float().mean(),
        "approx_kl": approximate_kl(log_probs.detach(), old).mean(),
    }
    if before is not None:
        if config.kl == "step-exact":
            kl = step_exact_kl(transition.mean, base_step.mean, transition.std)
        else:
            kl = prediction_distance(prediction.eps, base.eps)
        noted["kl"] = kl.detach().mean()
        if config.kl_weight:
            losses = losses + config.kl_weight * kl
    return losses, now, noted


def check_ratios(run: Run, errors: Sequence[Tensor]) -> float:
    """Return the largest |ratio - 1|, of each pass and process, of an update whose weights are those of the rollout.

    FloatingPointError, on every process and before the weights change, where it is above RATIO_BOUND in a run in float32.
    """
    error = float(run.gather(torch.stack([*errors]).max()[None]).max())
    if error > RATIO_BOUND and run.config.mixed_precision == "no":
        raise FloatingPointError(
            f"the ratio before the first update of a rollout, step {run.row['step']:g}, is off 1 by {error:.2g}, above {RATIO_BOUND:g}:"
            " sampling and training do not compute the same; --old-logprob replay takes the log-probabilities as training does"
        )
    return error


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        prompts = read_prompts(config.prompts)
        validation_prompts = config.validation.prompts(prompts)
        defaults = workspace.check(config.model, config.reward, config.validation, config.run)
        own = policy_defaults(defaults)
        config = of_model(config, "ddpo", defaults, own)
        plan = plan_of(config.policy, config.run, defaults)
    with workspace.open(
        config.model, config.reward, config.validation, config.run, driver="ddpo", config_text=dump(config),
        prompts=validation_prompts, driver_files=(rollouts.PATTERN,),
    ) as w:  # fmt: skip
        run, updates = w.run, plan.updates
        with exit_on_user_error():
            rollouts.remove_stale(run, updates)
        lora, weighted = config.model.train == "lora", config.kl_weight > 0
        before = BeforeTuning(w) if lora or weighted else None
        experience: Experience | None = None
        history = run.resumed_state.get("history", [])  # of the rollouts before the one in use
        for step in run.steps():
            number, inner = divmod(step, updates)
            if experience is None or inner == 0:
                experience = policy_rollouts.obtain(w, config.policy, plan, prompts, number, history)
                if experience is None:  # a signal came while images were sampled
                    policy_rollouts.save_before(w, step, {"history": history})
                    break
            run.row |= experience.noted
            useless = bool((experience.advantages == 0).all()) and not weighted
            if useless and inner == 0:
                say(f"rollout {number}: all rewards that are compared are equal; its updates are left out")
            errors: list[Tensor] = []
            for micro_batch in run.passes(0 if useless else None):
                indices = run.image_indices(step, micro_batch)
                pairs, cond = experience.pairs(indices, items_at(range(plan.pairs), indices, run.config.seed))
                first, last = inner == 0, micro_batch == run.config.gradient_accumulation_steps - 1
                measured = before if weighted or (first and micro_batch == 0) else None
                with run.accumulate(), experience.clock("update"):
                    losses, ratios, noted = losses_of(w.family, pairs, cond, config, measured)
                    if first:
                        errors.append((ratios - 1).abs().max())
                        if last:
                            run.row["first_ratio_error"] = check_ratios(run, errors)
                    if not weighted and "kl" in noted:  # of this pass alone
                        run.row["kl"] = float(run.gather(noted.pop("kl")[None]).mean())
                    run.update(losses.mean(), **noted)
            if inner == updates - 1:
                history = experience.history
                run.row |= experience.times()
            w.after(step, state={"history": history})
            rollouts.prune(run, updates, step + 1)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
