"""ReFL: tune a diffusion model by the gradient of a reward at a random late denoising step (ImageReward,
arXiv 2304.05977).

Algorithm 1, with its choices as flags: denoise without gradient from x_T to a random late step, take that
step with gradient, predict x_0, decode it, and minimise eq. 2, lambda phi(r(y, x_0)) with phi = relu(margin
- r). The loss of eq. 3, plain noise prediction on captioned images, keeps the model from drifting:
`--pretraining alternate` does an update with it before each reward update (Algorithm 1), `sum` adds the two
losses (the text's "final loss"), `off` omits it (the released script). Without `--data` it is off.

| | paper | released script | here |
|---|---|---|---|
| T, window, solver | 40, 30..39, - | 40, 30..39, DDPM | the same; a model distilled to few steps: its 4, 2..3, Euler |
| lambda | 1e-3 | 1e-3 | 1e-3; without pre-training loss 1, which AdamW divides out |
| pre-training loss | alternate | off | alternate with --data, else off |
| weights, learning rate | all, 1e-5 | all, 1e-5; SDXL also LoRA, 1e-4 | LoRA, 1e-4; `--train full` 1e-5 |
| images an update, updates | 64, about 312 | 64, 100 | 8 a process, 400 |
| checkpointing | - | UNet | UNet and decoder |

    python finetune/refl.py                                     # the embedded model: three minutes on a laptop
    python finetune/refl.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts my_prompts.txt

Differences from the released code: x_0 and pixels are not clamped (the clamp has no gradient for pixels out
of range), and scorers resize with antialiasing. Left out: image-column checks, random flips, noise offset.
Hardware: Stable Diffusion 1.x at 512 px needs a GPU; the tiny model runs on two CPU cores.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.families import Pretrained, vae_folder
from preftune.image_folders import Columns
from preftune.training.cache_config import CacheConfig
from preftune.training.config import (
    ModelConfig,
    RewardConfig,
    ValidationConfig,
    check_base_distance,
    check_dropout,
    check_guidance,
)
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "refl" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by ReFL. Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    num_inference_steps: int | None = None
    """T, denoising steps of a trajectory; None = 40, for a distilled model 4."""
    window: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="INT INT")] = None
    """First and last index of the step with gradient, both included; indices count denoising steps from 0. None = the last
    quarter, two at least: 30 39 of 40.
    """
    solver: Literal["ddpm", "ddim", "euler"] | None = None
    """Solver of the trajectory; None = ddpm as in the released script, for a distilled model euler."""
    rollout_solver: Literal["dpm++", "ddim", "euler"] | None = None
    """Solver that takes the place of --solver before the step with gradient, in --rollout-steps; None = --solver itself."""
    rollout_steps: int | None = None
    """Steps of --rollout-solver from pure noise to the step with gradient, such as 12 of dpm++ instead of 30 to 39."""
    reward_vae: Path | None = None
    """Folder or hub id of a small autoencoder that decodes what the reward sees in training, as madebyollin/taesd for Stable Diffusion 1.x
    and 2.x or madebyollin/taesdxl for XL; None = the model's own. Validation images are always decoded by the model's own.
    """
    guidance_scale: float = 1.0
    """Guidance scale during training; 1 = no guidance, as published."""
    jitter: int = 0
    """Shift each image at random by up to this many pixels along each axis before it is scored (borders are
    repeated); 0 = published. Reduces reward hacking: a gradient that is valid for all shifts changes
    shapes, not single pixels.
    """
    jitter_copies: int = 1
    """Number of shifted copies of each image; the reward is their mean."""
    flatness: float = 0.0
    """Score each image a step of this length against the gradient of its reward: only what is high all around counts (RSA-FT, which has
    0.01, in image space); 0 = off, as published. Two more passes of the scorers.
    """
    margin: float = 2.0
    """phi(r) = relu(margin - r): images with a reward above the margin give no gradient."""
    reward_scale: float | None = None
    """lambda, the weight of the reward loss; None = 1e-3 beside the pre-training loss, 1 without it."""
    base_distance: float = 0.0
    """Weight of the mean squared difference between the noise that the tuned model and the base (its LoRA off) predict at the step with
    gradient, as in DRaFT+, which has 0.2 to 1; 0 = off, as published. One more call of the denoiser without gradient.
    """
    pretraining: Literal["alternate", "sum", "off"] | None = None
    """How the pre-training loss on --data is combined with the reward loss; None = alternate with --data, else off."""
    data: Path | None = None
    """Folder of captioned images for the pre-training loss: metadata.jsonl, .csv or .parquet, or a .txt or .caption file beside each image."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    caption_dropout: float = 0.0
    """Share of captions left empty in the pre-training loss, in [0, 1)."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ModelConfig(
            pretrained=Pretrained(model=tyro.MISSING), gradient_checkpointing=True, vae_checkpointing=True
        )
    )
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RewardConfig(rewards=("imagereward=1.0",))
    )
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(
            output_dir=Path("runs/refl"), max_train_steps=400, validation_steps=100
        )
    )

    def __post_init__(self) -> None:
        steps = 40 if self.num_inference_steps is None else self.num_inference_steps
        first, last = self.window or (0, 0)
        demands = {
            f"--num-inference-steps must be at least 1, got {steps}": steps >= 1,
            f"--window {first} {last} must lie in 0..{steps - 1}, first no later than last": (
                0 <= first <= last < steps
            ),
            f"--rollout-solver {self.rollout_solver} needs --rollout-steps, such as --rollout-steps 12": (
                self.rollout_solver is None or self.rollout_steps is not None
            ),
            f"--rollout-steps {self.rollout_steps} needs --rollout-solver, which is dpm++, ddim or euler": (
                self.rollout_solver is not None or self.rollout_steps is None
            ),
            f"--jitter must be 0 or more, got {self.jitter}": self.jitter >= 0,
            f"--jitter-copies must be 1, or more with a --jitter, got {self.jitter_copies}": (
                self.jitter_copies == 1 or (self.jitter_copies > 1 and self.jitter > 0)
            ),
            f"--flatness must be 0 or more and finite, got {self.flatness}": 0 <= self.flatness < math.inf,
            f"--reward-scale must be positive, got {self.reward_scale}": self.reward_scale is None
            or self.reward_scale > 0,
            f"--pretraining {self.pretraining} needs --data IMAGEFOLDER; or choose --pretraining off": (
                self.pretraining in (None, "off") or self.data is not None
            ),
            "--rewards is empty; name a scorer whose gradient is followed, as imagereward=1.0": bool(
                self.reward.rewards
            ),
        }
        for message, holds in demands.items():
            if not holds:
                raise ValueError(message)
        if self.window is not None:
            check_rollout_steps(self, self.window)
        if self.reward_vae is not None:
            vae_folder(str(self.reward_vae), "--reward-vae")
        check_base_distance(self.base_distance, self.model.train)
        check_guidance(self.guidance_scale)
        check_dropout(self.caption_dropout)
        if self.cache.is_on and (self.data is None or self.pretraining == "off"):
            raise ValueError(
                "--cache-latents and --cache-text-encoder-outputs keep what is made of --data in the pre-training loss, and there"
                " is none; leave them out, or add --data IMAGEFOLDER"
            )


def check_rollout_steps(config: Config, window: tuple[int, int]) -> None:
    """Raise ValueError for as many --rollout-steps as the trajectory has before the step with gradient, or more, and for none."""
    first, last = window
    if config.rollout_steps is None or 1 <= config.rollout_steps <= first:
        return
    if first == 0:
        raise ValueError(
            f"--rollout-steps {config.rollout_steps} has nothing to shorten: --window {first} {last} begins with step 0; leave it and"
            " --rollout-solver out, or give a later --window"
        )
    raise ValueError(
        f"--rollout-steps {config.rollout_steps} must lie in 1..{first}, no more than --window {first} {last} has before the first step"
        " with gradient; give another number, or leave it and --rollout-solver out"
    )


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import torch
from torch import Generator, Tensor

from preftune import ahead
from preftune.families import Defaults, Family, reward_decoder
from preftune.families.base import Cond
from preftune.few_steps import latents_at
from preftune.files.one_writer import one_writer
from preftune.noise import Prediction
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage, Skipped
from preftune.resolution import Resolution
from preftune.training import data, workspace
from preftune.training import defaults as training_defaults
from preftune.training.mean_reward import mean_reward
from preftune.training.workspace import Workspace
from rewards.mix import Mixed, named
from rewards.on_device import upload


def reward_loss(reward: Tensor, margin: float, scale: float) -> Tensor:
    """Return lambda mean(phi(r)) of rewards (B,), phi(r) = relu(margin - r): ImageReward, eq. 2."""
    return scale * torch.relu(margin - reward).mean()


class Late(NamedTuple):
    """The step with gradient, and what it starts from."""

    prediction: Prediction
    """Guided; the gradient runs through this call of the denoiser alone."""
    x: Tensor
    """(B, C, h, w) noisy latents."""
    t: Tensor
    """(B,) timesteps."""
    cond: Cond


def late_step(
    family: Family,
    prompts: Sequence[str],
    generators: Sequence[Generator],
    late: int,
    resolution: Resolution,
    config: Config,
) -> Late:
    """Return what the model predicts at denoising step `late`: Algorithm 1, lines 9 to 14. Its x0, decoded, is what is scored."""
    assert config.num_inference_steps is not None, "filled"
    assert config.solver is not None, "filled"
    cond = family.encode(prompts)
    grid = family.timesteps(config.num_inference_steps, config.solver, resolution)[: late + 1]
    shape = family.latent_shape(resolution)
    with family.lean():
        if config.rollout_solver is not None and config.rollout_steps is not None:
            few, number = config.rollout_solver, config.rollout_steps
            x = ahead.initial_noise(shape, generators, family.device)
            x = latents_at(family, x, int(grid[late]), cond, config.guidance_scale, few, number)
            t = upload(grid[late:], family.device).expand(len(x))
        else:
            x, levels, steps = ahead.trajectory(family, grid, config.solver, shape, generators)
            for now in steps:
                x = ahead.step(family.predict(x, now.t, cond, config.guidance_scale), now, config.solver)
            t = levels[late]
    return Late(family.predict(x, t, cond, config.guidance_scale), x, t, cond)


@torch.no_grad()
def base_noise(family: Family, late: Late, guidance_scale: float) -> Tensor:
    """Return the noise (B, C, h, w) that the model before tuning predicts at the same step."""
    with family.reference():
        return family.predict(late.x, late.t, late.cond, guidance_scale).eps


def pretraining_loss(
    w: Workspace, samples: Sequence[CaptionedImage], index: int, micro_batch: int, config: Config
) -> Tensor:
    """Return the diffusion loss of eq. 3, the mean over one micro-batch of captioned images."""
    indices = w.run.image_indices(index, micro_batch)
    chosen = items_at(samples, indices, config.run.seed)
    captions = [sample.text for sample in chosen]
    dropout = config.caption_dropout
    return w.losses(chosen, captions, indices, caption_dropout=dropout, stream=1).mean()


def load_decoder(config: Config, name: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the decoder of --reward-vae."""
    with exit_on_user_error():
        folder = reward_decoder.check(config.model.pretrained.source(), name, config.model.vae)
        dtype = workspace.DTYPES[config.run.mixed_precision or "no"]
        return reward_decoder.load(folder, device, dtype, checkpointing=config.model.vae_checkpointing)


def check_inputs(
    config: Config,
) -> tuple[Config, list[str], list[str], list[CaptionedImage], list[Skipped]]:
    """Return the configuration with its defaults, prompts, validation prompts, pre-training samples and what of them was set
    aside; ValueError for whatever is wrong, before weights load.
    """
    groups = config.model, config.reward, config.validation, config.run
    prompts = read_prompts(config.prompts)
    validation_prompts = config.validation.prompts(prompts)
    pretraining_data = None if config.pretraining == "off" else config.data
    if pretraining_data is not None:
        data.check(pretraining_data, config.columns)
    defaults = workspace.check(*groups, differentiable=True)
    config = with_defaults(config, defaults)
    assert config.num_inference_steps is not None, "filled"
    assert config.solver is not None, "filled"
    defaults.check_solver(config.solver, config.num_inference_steps)
    check_rollout(config, defaults)
    if config.reward_vae is not None:
        reward_decoder.check(config.model.pretrained.source(), config.reward_vae, config.model.vae)
    size = config.model.size(defaults)
    if config.jitter >= min(size):
        raise ValueError(f"--jitter {config.jitter} must be less than the image's side, {min(size)} pixels")
    if pretraining_data is None:
        return config, prompts, validation_prompts, [], []
    return config, prompts, validation_prompts, *data.read(pretraining_data, config.columns)


def check_rollout(config: Config, defaults: Defaults) -> None:
    """Raise ValueError for a --rollout-solver that the model cannot use, and for as many steps as the trajectory has without it."""
    if config.rollout_solver is None or config.rollout_steps is None:
        return
    assert config.window is not None, "filled"
    check_rollout_steps(config, config.window)
    defaults.check_solver(config.rollout_solver, config.rollout_steps, "--rollout-steps")


def with_defaults(config: Config, defaults: Defaults) -> Config:
    """Return the configuration with the defaults of the model in place of None."""
    own = training_defaults.refl(
        defaults,
        num_inference_steps=config.num_inference_steps,
        pretraining=config.pretraining,
        data=config.data is not None,
    )
    return training_defaults.of_model(config, "refl", defaults, own)


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        config, prompts, validation_prompts, samples, skipped = check_inputs(config)
    assert config.window is not None, "filled"
    assert config.reward_scale is not None, "filled"
    groups = config.model, config.reward, config.validation, config.run
    with workspace.open(
        *groups,
        driver="refl",
        config_text=dump(config),
        prompts=validation_prompts,
        differentiable=True,
        skipped=skipped,
        cache=config.cache,
    ) as w:
        run, mix = w.run, w.mix
        if samples:
            w.decode_ahead(samples, stream=1)
        assert mix is not None, "the configuration has rewards"
        decode = None if config.reward_vae is None else load_decoder(config, config.reward_vae, run.device)
        for index in run.steps():
            if config.pretraining == "alternate":  # Algorithm 1, lines 6 and 7
                for micro_batch in run.passes():
                    with run.accumulate():
                        run.update(pretraining_loss(w, samples, index, micro_batch, config), phase="pretrain")

            late = int(run.rng(index).integers(config.window[0], config.window[1] + 1))  # line 8
            scored: list[Mixed] = []
            for micro_batch in run.passes():  # lines 9 to 17
                indices = run.image_indices(index, micro_batch)
                texts = items_at(prompts, indices, config.run.seed)
                with run.accumulate():
                    noise = [run.generator(i) for i in indices]
                    taken = late_step(w.family, texts, noise, late, w.resolution, config)
                    pixels = (decode or w.family.decode)(taken.prediction.x0)
                    movers = [run.generator(i, stream=2) for i in indices]
                    reward, mixed = mean_reward(mix, pixels, texts, movers, config)
                    scored.append(mixed)
                    loss = reward_loss(reward, config.margin, config.reward_scale)
                    scalars: dict[str, Any] = {"reward": reward.mean(), "late_step": float(late)}
                    if config.base_distance:
                        base = base_noise(w.family, taken, config.guidance_scale)
                        scalars["base_distance"] = (taken.prediction.eps - base).square().mean()
                        loss = loss + config.base_distance * scalars["base_distance"]
                    if config.pretraining == "sum":
                        loss = loss + pretraining_loss(w, samples, index, micro_batch, config)
                    with named(scored):
                        run.update(loss, **scalars)
            w.after(index)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))
