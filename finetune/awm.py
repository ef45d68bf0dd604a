"""AWM: advantage weighted matching, a policy gradient whose likelihood is the denoising error of generated images (Xue et al. 2025,
arXiv 2509.25050).

Each epoch generates several images for each of some prompts and scores them, by any reward. An image's advantage A says how much better
it is than the others of its prompt. Updates add noise to the images anew, and raise a stand-in for the log-likelihood,

    lp = -w(t) mean over elements (output - target)^2,      loss = max(-A r, -A clip(r, 1 - c, 1 + c)),  r = exp(lp - lp_old),

with the policy that generated the images as old, at the same timestep and noise. In an epoch's first update r = 1 and the gradient is A times
that of the weighted training loss: with A = 1 plain training, with A >= 0 `preftune reward-weighted`. Two terms hold the model back:
the squared distance of its output from that of the model before tuning (--kl-weight), and from a slow average of its own (--ema-kl-weight).

| --weighting | lp of the error e | |
|---|---|---|
| 1, t, t2 | -e, -t e, -t^2 e | |
| huber | -t (sqrt(e + 1e-10) - 1e-5) | |
| ghuber (default, published) | -t ((e + 1e-10)^p - 1e-10^p) / p, p = 0.25 | its gradient is e^(p-1): small errors count more |

Published for flow models, whose level of noise is t. For networks that predict noise or v the error is that of their own target, and t is
sigma: that is ours.

    python finetune/awm.py                                      # the embedded model
    python finetune/awm.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts my_prompts.txt --rewards imagereward=1

Differences from the released code: images are generated with the --sample settings, guidance included, where the code has none; timesteps
are those of the family's training, where the code has the 12 middle ones of its 14 steps (`--timesteps sampling`: all but the last); prompts whose images all have one reward
are left out and counted. Left out: gradient through guidance, the sum of several timesteps' lp inside the exponential. Hardware: a GPU for
Stable Diffusion.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.training import scored_config
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.defaults import of_model
from preftune.training.run_config import RunConfig
from preftune.training.scored_config import ScoredConfig, check_weight

TINY = Path(__file__).parent / "configs" / "awm" / "tiny.yaml"
Weighting = Literal["1", "t", "t2", "huber", "ghuber"]
POWER = 0.25


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model by advantage weighted matching (AWM). Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    weighting: Weighting = "ghuber"
    """How the error at a noise level counts; t is sigma for networks that predict noise or v."""
    ghuber_power: float = POWER
    """p of --weighting ghuber, in (0, 1]; 1 = t."""
    clip_range: float = 1.0
    """c: beyond a ratio of 1 - c or 1 + c an image has no gradient that leads further; 1 is published, so that only growth is limited."""
    kl_weight: float = 0.001
    """Weight of the distance from the model before tuning; published are 0.0001 (PickScore), 0.001 (GenEval) and 0.003 (OCR). 0 = none."""
    ema_kl_weight: float = 0.0
    """Weight of the distance from an average of the model, which is renewed after each epoch; 1 is published. 0 = none."""
    scored: Annotated[ScoredConfig, tyro.conf.arg(name="")] = field(default_factory=ScoredConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: scored_config.run("awm")
    )

    def __post_init__(self) -> None:
        if not 0 < self.ghuber_power <= 1:
            raise ValueError(f"--ghuber-power must lie in (0, 1], got {self.ghuber_power:g}")
        if self.ghuber_power != POWER and self.weighting != "ghuber":
            raise ValueError(
                f"--ghuber-power {self.ghuber_power:g} does nothing with --weighting {self.weighting}"
            )
        if not 0 < self.clip_range < math.inf:
            raise ValueError(f"--clip-range must be above 0 and finite, got {self.clip_range:g}")
        check_weight("kl-weight", self.kl_weight)
        check_weight("ema-kl-weight", self.ema_kl_weight)
        scored_config.check_rewards(self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

from torch import Tensor

from preftune.files.one_writer import one_writer
from preftune.prompts import read_prompts
from preftune.training import scored_samples, workspace
from preftune.training.policies import Base, Policy, distance
from preftune.training.policy_gradient import is_clipped, ppo_losses
from preftune.training.scored_samples import Samples


def log_likelihoods(errors: Tensor, t: Tensor, weighting: Weighting, power: float = POWER) -> Tensor:
    """Return lp (B,) of mean squared errors (B,) at noise levels t (B,) in [0, 1]."""
    if weighting == "1":
        return -errors
    if weighting == "t":
        return -t * errors
    if weighting == "t2":
        return -t.square() * errors
    if weighting == "huber":
        return -t * ((errors + 1e-10).sqrt() - 1e-5)
    return -t * ((errors + 1e-10).pow(power) - 1e-10**power) / power


def policy_loss(
    errors: Tensor, before: Tensor | None, t: Tensor, advantages: Tensor, config: Config
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss () of errors (B,) at noise levels t (B,), and what is logged.

    `before` are the errors of the policy that generated the images, None = this very one.
    """
    lp = log_likelihoods(errors, t, config.weighting, config.ghuber_power)
    lp_old = lp if before is None else log_likelihoods(before, t, config.weighting, config.ghuber_power)
    losses, ratios = ppo_losses(lp, lp_old.detach(), advantages, config.clip_range)
    now = ratios.detach()
    noted: dict[str, Any] = {
        "diffusion_loss": errors.mean(),
        "ratio_error": (now - 1).abs().mean(),
        "clip_share": is_clipped(now, advantages, config.clip_range).float().mean(),
    }
    return losses.mean(), noted


def ema_decay(updates: int) -> float:
    """Return how much of the average stays when it is renewed after so many updates: the released code's `linear` with 0.3."""
    return min(0.3, 0.001 * updates)


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        prompts = read_prompts(config.prompts)
        validation_prompts = config.validation.prompts(prompts)
        defaults = workspace.check(config.model, config.reward, config.validation, config.run)
        config = of_model(config, "awm", defaults)
    with workspace.open(
        config.model, config.reward, config.validation, config.run, driver="awm", config_text=dump(config),
        prompts=validation_prompts, driver_files=(scored_samples.FOLDERS,),
    ) as w:  # fmt: skip
        run, own = w.run, config.scored
        number = scored_samples.updates_per_epoch(own, len(prompts), run)
        scored_samples.go_on(run, number)
        old = Policy(w, run.resumed_state.get("old"))
        average = Policy(w, run.resumed_state.get("average")) if config.ema_kl_weight else None
        weights = {"kl": config.kl_weight, "ema_kl": config.ema_kl_weight}
        held: dict[str, Base | Policy] = {"kl": Base(w)} if config.kl_weight else {}
        held |= {"ema_kl": average} if average is not None else {}
        samples: Samples | None = None
        for step in run.steps():
            if samples is None:
                samples = scored_samples.samples_of(w, prompts, step // number, own, old.swapped_in())
            if samples is None:
                break
            for batch in scored_samples.batches(w, samples, step, number, own):
                at, inputs = batch.at, (batch.at.x, batch.at.t, batch.cond)
                before = at.errors(old.output(*inputs)) if step % number else None
                others = {name: policy.output(*inputs) for name, policy in held.items()}
                output = w.family.predict(*inputs).output
                loss, noted = policy_loss(at.errors(output), before, at.sigma, batch.advantages, config)
                for name, other in others.items():
                    noted[name] = distance(output, other)
                    loss = loss + weights[name] * noted[name]
                run.update(loss, **noted, **samples.metrics())
            if (step + 1) % number == 0:
                old.follow(0.0)
                if average is not None:
                    average.follow(ema_decay(step + 1))
                if step + 1 < run.config.max_train_steps:
                    epoch = (step + 1) // number
                    samples = scored_samples.samples_of(w, prompts, epoch, own, old.swapped_in())
            more = {"average": average.weights} if average is not None else {}
            w.after(step, state={"old": old.weights} | more)
            scored_samples.prune(run, step, number)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
