"""One ReFL update as finetune/refl.py does it, and what it has in common with the published ones: the setting, the prompts, backward and optimizer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.hardware import fresh
from benchmarks.models import build_sd1, build_thin
from benchmarks.paths import PROMPTS, TINY
from finetune import refl
from preftune.families import Family, Pretrained
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.regional import compile_blocks
from preftune.training.config import ModelConfig, RewardConfig
from preftune.training.defaults import learning_rate
from preftune.training.optimizer import EMA, adamw
from preftune.training.run_config import RunConfig
from preftune.training.workspace import DTYPES, load_model, load_scoring

Precision = Literal["no", "bf16", "fp16"]
Switch = Literal["off", "on"]
Train = Literal["lora", "full"]
LoopName = Literal["ours", "published", "half-base"]
"""ours = finetune/refl.py; published = the released script that trains these weights; half-base = the released LoRA script
with the frozen weights in half precision."""
EMA_DECAY = 0.9999
"""Of the released script, which keeps an average of all weights."""

read_once = functools.cache(read_prompts)
Update = Callable[[int], Tensor]
"""Does update i and returns its loss."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting; `loop` says whose update it is."""

    loop: LoopName
    model: str
    pipeline: Path
    scorer: str
    scorer_files: Path
    resolution: str
    device: str
    precision: Precision
    train: Train
    checkpointing: Switch
    compile: Switch
    graphs: Switch
    train_batch_size: int
    num_inference_steps: int
    late: int
    repeats: int
    threads: int

    def refl(self) -> refl.Config:
        """Return the driver's configuration."""
        checkpointing = self.checkpointing == "on"
        return refl.Config(
            prompts=PROMPTS,
            num_inference_steps=self.num_inference_steps,
            window=(self.late, self.late),
            solver="ddpm",
            reward_scale=1e-3,
            pretraining="off",
            model=ModelConfig(
                pretrained=Pretrained(model=str(self.pipeline)),
                train=self.train,
                resolution=self.resolution,
                gradient_checkpointing=checkpointing,
                vae_checkpointing=checkpointing,
            ),
            reward=RewardConfig(
                rewards=(f"{self.scorer}=1.0",),
                reward_files=(f"{self.scorer}={self.scorer_files}",),
                reward_precision="fp32" if self.precision == "no" else self.precision,
            ),
            run=RunConfig(
                train_batch_size=self.train_batch_size,
                mixed_precision=self.precision,
                compile=self.compile == "on",
                cuda_graphs=self.graphs == "on",
                ema_decay=EMA_DECAY if self.train == "full" else 0.0,
            ),
        )

    def prompts(self, index: int) -> list[str]:
        """Return the prompts of update `index`."""
        first = index * self.train_batch_size
        return items_at(read_once(PROMPTS), range(first, first + self.train_batch_size), seed=0)

    def published(self, loop: LoopName, train: Train) -> "Trial":
        """Return the setting of a released loop on the same batch: fp16 on CUDA, on the CPU this trial's own precision; UNet
        checkpointing in the script of all weights alone.
        """
        precision: Precision = "fp16" if self.device == "cuda" else self.precision
        checkpointing: Switch = "on" if train == "full" else "off"
        return replace(
            self,
            loop=loop,
            train=train,
            precision=precision,
            checkpointing=checkpointing,
            compile="off",
            graphs="off",
        )


def parts_of(model: Literal["tiny", "thin", "sd1"], workdir: Path) -> dict[str, Any]:
    """Return the fields of Trial that a model gives, and build it in `workdir` if it is not there."""
    small = {"model": model, "device": "cpu", "resolution": "64", "scorer": "imagereward-tiny"}
    if model == "tiny":
        return small | {"pipeline": TINY / "pipeline", "scorer_files": TINY / "imagereward"}
    if model == "thin":
        build_thin(workdir / "thin")
        return small | {"pipeline": workdir / "thin", "scorer_files": TINY / "imagereward"}
    if not (workdir / "pipeline").is_dir() or not (workdir / "scorer").is_dir():
        fresh(build_sd1, workdir)  # in a process of its own, whose memory goes
    big = {"model": model, "device": "cuda", "resolution": "512", "scorer": "imagereward"}
    return big | {"pipeline": workdir / "pipeline", "scorer_files": workdir / "scorer"}


def optimised(
    trial: Trial,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Update,
    average: Callable[[], None],
) -> Update:
    """Return `loss` with what follows it: backward, clip, optimizer and `average`; fp16 with loss scaling.

    FloatingPointError where the loss is not a number.
    """
    scaler = torch.amp.GradScaler(trial.device, enabled=trial.precision == "fp16")

    def update(index: int) -> Tensor:
        value = loss(index)
        if not value.isfinite():  # the drivers look as well, and wait for the device
            raise FloatingPointError(f"the loss of update {index} is {value.item()}")
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average()
        return value.detach()

    return update


def autocast(trial: Trial, denoiser: nn.Module) -> None:
    """Let the module compute in the trial's precision, as accelerate's preparation does."""
    if trial.precision != "no":
        cast = torch.autocast(trial.device, DTYPES[trial.precision])
        denoiser.forward = cast(denoiser.forward)


def load(trial: Trial) -> tuple[Family, nn.Module]:
    """Return the driver's model on the device, and its denoiser as a run prepares it."""
    config = trial.refl()
    family, denoiser = load_model(config.model, config.run, torch.device(trial.device))
    if trial.compile == "on":  # as Run.prepare does
        compile_blocks(denoiser)
    autocast(trial, denoiser)
    return family, denoiser


def ours(trial: Trial) -> Update:
    """Return the update of finetune/refl.py: its own functions, without the plumbing."""
    config = trial.refl()
    mix, (family, denoiser) = load_scoring(config.reward, torch.device(trial.device)).mix, load(trial)
    assert mix is not None, "a trial has a scorer"
    resolution = config.model.size(family.defaults)

    def loss(index: int) -> Tensor:
        texts = trial.prompts(index)
        first = index * trial.train_batch_size
        generators = [torch.Generator().manual_seed(first + i) for i in range(trial.train_batch_size)]
        taken = refl.late_step(family, texts, generators, trial.late, resolution, config)
        pixels = family.decode(taken.prediction.x0)
        return refl.reward_loss(
            refl.mean_reward(mix, pixels, texts, generators, config)[0], config.margin, config.reward_scale
        )

    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimizer = adamw(config.run, weights, learning_rate("refl", config.model.check(), config.model.train))
    return optimised(trial, weights, optimizer, loss, EMA(config.run, weights).update)
