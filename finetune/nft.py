"""DiffusionNFT: negative-aware fine-tuning, which learns from good and from bad images by the forward process alone (Zheng et al. 2025,
arXiv 2509.16117).

Each epoch an old policy generates several images for each of some prompts, and any reward scores them. With advantage A in [-1, 1] an image
is good with probability rho = clip(A / 2 + 1/2, 0, 1). Updates add noise to the images anew. From the network's output v and that of the
old policy two more are made, of which one is drawn to the good images and the other to the bad ones:

    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v,   loss = c (rho L(v+) + (1 - rho) L(v-)) / b + k mean (v - v_base)^2

L is the squared error of the clean image that an output means, divided by its own mean absolute error, which counts as a constant; c is
--advantage-clip. Where v = v_old the gradient is 2 rho - 1 times that of c L(v), whatever b: good images attract, bad ones repel, and average
ones do nothing. After each epoch the old policy follows the trained one (--decay-type).

Published for flow models and their velocity. For networks that predict noise or v (of Salimans and Ho) the same formulas hold with the
network's own output, which is ours. An error in predicted noise is sigma / alpha times as large in the clean image, 14 times at Stable
Diffusion's highest noise: these levels count most.

    python finetune/nft.py                                      # the embedded model
    python finetune/nft.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts my_prompts.txt --rewards imagereward=1

Differences from the released code: images are generated with the --sample settings, guidance included, where the code has none: without it
images of Stable Diffusion are grey. Only the prediction for the prompt is trained. Timesteps are those of the family's training, where the code
has those of its 10 steps, which `--timesteps sampling` takes but for the last; prompts whose images all have one reward are left out and counted. Left out: several adv_mode other than `all`.
Hardware: a GPU for Stable Diffusion.
"""

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
from preftune.training.scored_config import ScoredConfig

TINY = Path(__file__).parent / "configs" / "nft" / "tiny.yaml"
DecayType = Literal["0", "1", "2"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on good and bad images by DiffusionNFT. Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    beta: float = 1.0
    """b: how far the good and the bad output are from the old one; published are 1, and 0.1 for OCR and for several rewards. The smaller, the
    further the model goes for an image."""
    decay_type: DecayType = "1"
    """How much of the old policy stays after an epoch, by the updates u so far. 0: nothing, it is the trained one. 1: min(u / 1000, 0.5).
    2: nothing up to 75 updates, then 0.0075 (u - 75) up to 0.999."""
    kl_weight: float = 1e-4
    """k, the weight of the distance from the model before tuning; 0 = none."""
    scored: Annotated[ScoredConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ScoredConfig(timesteps_per_image=10)
    )
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: scored_config.run("nft")
    )

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"--beta must lie in (0, 1], got {self.beta:g}")
        scored_config.check_weight("kl-weight", self.kl_weight)
        scored_config.check_rewards(self.reward)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

from torch import Tensor

from preftune.diffusion_loss import Noised
from preftune.files.one_writer import one_writer
from preftune.noise import predict_from
from preftune.prompts import read_prompts
from preftune.solver_names import PredictionType
from preftune.training import policies, scored_samples, workspace
from preftune.training.scored_samples import Samples


def probabilities(advantages: Tensor) -> Tensor:
    """Return rho (B,), the probability that an image is good, of advantages (B,) in [-1, 1]."""
    return (advantages / 2 + 0.5).clamp(0, 1)


def clean_errors(output: Tensor, at: Noised, x0: Tensor, kind: PredictionType) -> Tensor:
    """Return L (B,) of a network's output (B, C, h, w): mean (x0hat - x0)^2 over the constant mean |x0hat - x0|, which is 1e-5 at least."""
    missed = predict_from(output, at.x, at.alpha, at.sigma, kind).x0 - x0
    size = missed.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return missed.square().flatten(1).mean(1) / size


def nft_losses(
    output: Tensor, old: Tensor, at: Noised, x0: Tensor, kind: PredictionType, rho: Tensor, beta: float
) -> Tensor:
    """Return (rho L(v+) + (1 - rho) L(v-)) / beta, (B,): the paper's Algorithm 1 with the weights of its released code."""
    good = beta * output + (1 - beta) * old
    bad = (1 + beta) * old - beta * output
    attracted, repelled = (clean_errors(v, at, x0, kind) for v in (good, bad))
    return (rho * attracted + (1 - rho) * repelled) / beta


def old_decay(updates: int, kind: DecayType) -> float:
    """Return how much of the old policy stays after so many updates, at the end of an epoch."""
    if kind == "0":
        return 0.0
    if kind == "1":
        return min(0.001 * updates, 0.5)
    return min(0.0075 * max(0, updates - 75), 0.999)


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    groups = config.model, config.reward, config.validation, config.run
    with exit_on_user_error():
        prompts = read_prompts(config.prompts)
        shown = config.validation.prompts(prompts)
        config = of_model(config, "nft", workspace.check(*groups))
        groups = config.model, config.reward, config.validation, config.run
    names = (scored_samples.FOLDERS,)
    with workspace.open(
        *groups, driver="nft", config_text=dump(config), prompts=shown, driver_files=names
    ) as w:
        run, family, settings = w.run, w.family, config.scored
        per_epoch = scored_samples.updates_per_epoch(settings, len(prompts), run)
        scored_samples.go_on(run, per_epoch)
        old = policies.Policy(w, run.resumed_state.get("old"))
        base = policies.Base(w) if config.kl_weight else None

        def samples_for(update: int) -> Samples | None:
            return scored_samples.samples_of(w, prompts, update // per_epoch, settings, old.swapped_in())

        samples: Samples | None = None
        for step in run.steps():
            if samples is None and (samples := samples_for(step)) is None:
                break  # a signal came
            for batch in scored_samples.batches(w, samples, step, per_epoch, settings):
                where = batch.at.x, batch.at.t, batch.cond
                v_old = old.output(*where)
                v_base = None if base is None else base.output(*where)
                v, kind = family.predict(*where).output, family.prediction_type
                rho = probabilities(batch.advantages)
                losses = nft_losses(v, v_old, batch.at, batch.x0, kind, rho, config.beta)
                loss = settings.advantage_clip * losses.mean()
                noted: dict[str, Any] = {"old_distance": policies.distance(v, v_old)}
                if v_base is not None:
                    noted["kl"] = policies.distance(v, v_base)
                    loss = loss + config.kl_weight * noted["kl"]
                run.update(loss, diffusion_loss=batch.at.errors(v).mean(), **noted, **samples.metrics())
            if (step + 1) % per_epoch == 0:
                old.follow(old_decay(step + 1, config.decay_type))
                if step + 1 < run.config.max_train_steps:
                    samples = samples_for(step + 1)
            w.after(step, state={"old": old.weights})
            scored_samples.prune(run, step, per_epoch)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
