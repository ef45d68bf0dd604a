"""ReFL: tune a diffusion model by the gradient of a reward at a random late denoising step (ImageReward, paper 002).

Algorithm 1 with its choices as flags: denoise without gradient from x_T to a random late step, take that step with
gradient, predict x_0, decode it, and descend on eq. 2, lambda phi(r(y, x_0)) with phi = relu(margin - r). The loss of
eq. 3, plain noise prediction on captioned images, keeps the model from drifting: `--pretraining alternate` makes an
update of it before each reward update (Algorithm 1), `sum` adds the two (the text's "final loss"), `off` leaves it out (the
released script). Defaults are the paper's (T = 40, steps 30..39, lambda 1e-3, lr 1e-5) where the paper gives them.

    accelerate launch finetune/refl.py                                     # the embedded default: three minutes on a laptop
    accelerate launch finetune/refl.py --model SD_FOLDER --prompts refl_data.json --rewards imagereward=1 --pretraining off

Where paper and released code differ: x_0 and pixels are not clamped here (the script's clamp kills the gradient of every
pixel out of range), and scorers resize with antialias. Left out: image-column checks, random flips, noise offset.
Hardware: Stable Diffusion 1.x at 512 px wants a GPU; the tiny model runs on two CPU cores.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Generator, Tensor, nn

import rewards
from preftune import families
from preftune.augment import shifted
from preftune.cli import dump, exit_on_user_error, parse
from preftune.diffusion_loss import captioned_error
from preftune.families.base import Family
from preftune.lora import LoRA
from preftune.noise import x0_from
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage, read_imagefolder
from preftune.sampling import Sampling, make_scheduler, noise_like_seeds, step
from preftune.training import validation, workspace
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check
from rewards.mix import Mix, parse_files, parse_weights, units
from rewards.shared_towers import load_all

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TINY = Path(__file__).parent / "configs" / "refl" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a diffusion model by ReFL. With no arguments at all: the embedded model and scorer."""

    model: Path
    """Pipeline folder in diffusers' format (Stable Diffusion 1.x or 2.x)."""
    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet."""
    rewards: tuple[str, ...] = ("imagereward=1.0",)
    """Scorers with weights; `python -m rewards` lists them."""
    reward_files: tuple[str, ...] = ()
    """Weights of scorers on disk, as imagereward=PATH; others come from this repository or the hub's cache."""
    reward_normalization: Literal["raw", "card", "sample"] = "raw"
    """raw adds the scores as they are; card and sample first bring each scorer to mean 0 and deviation 1."""
    reward_stats: Path | None = None
    """summary.json of data_build/score.py, whose means and deviations --reward-normalization sample uses."""
    reward_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the scorers."""
    num_inference_steps: int = 40
    """T, denoising steps of a trajectory."""
    window: tuple[int, int] = (30, 39)
    """First and last index of the step with gradient, both included; indices count denoising steps from 0."""
    solver: Literal["ddpm", "ddim"] = "ddpm"
    """Sampler of the trajectory; ddpm is what the released script uses."""
    guidance_scale: float = 1.0
    """Guidance scale while training; 1 = none, as published."""
    jitter: int = 0
    """Scorers see each image moved at random by up to so many pixels along each axis, its border repeated; 0 = published.
    A gradient that must hold wherever the image lies changes shapes, not single pixels: less reward hacking."""
    jitter_copies: int = 1
    """Shifted copies of each image that are scored; the reward is their mean."""
    margin: float = 2.0
    """phi(r) = relu(margin - r): images that score higher give no gradient."""
    reward_scale: float = 1e-3
    """lambda, the weight of the reward loss."""
    pretraining: Literal["alternate", "sum", "off"] = "alternate"
    """How the pre-training loss on --data joins in."""
    data: Path | None = None
    """Imagefolder with metadata.jsonl for the pre-training loss."""
    resolution: int = 512
    """Side of the images, pixels, in training."""
    caption_dropout: float = 0.0
    """Share of captions left empty in the pre-training loss, in [0, 1)."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass."""
    vae_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: at 512 px they are the largest part of the memory."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernel of the denoiser."""
    validation_prompts: Path | None = None
    """Prompt file that is generated and scored before and after; None = the first eight of --prompts."""
    num_validation_prompts: int = 256
    """At most so many prompts of --validation-prompts."""
    lora: LoRA = field(default_factory=LoRA)
    sample: Sampling = field(default_factory=Sampling)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/refl"))
    )

    def __post_init__(self) -> None:
        first, last = self.window
        demands = {
            f"--num-inference-steps must be at least 1, got {self.num_inference_steps}": self.num_inference_steps
            >= 1,
            f"--window {first} {last} must lie in 0..{self.num_inference_steps - 1}, first no later than last": (
                0 <= first <= last < self.num_inference_steps
            ),
            f"--resolution must be a positive multiple of 8, got {self.resolution}": self.resolution >= 8
            and self.resolution % 8 == 0,
            f"--jitter must lie in 0..{self.resolution - 1}, got {self.jitter}": 0
            <= self.jitter
            < self.resolution,
            f"--jitter-copies must be 1, or more with a --jitter, got {self.jitter_copies}": (
                self.jitter_copies == 1 or (self.jitter_copies > 1 and self.jitter > 0)
            ),
            f"--reward-scale must be positive, got {self.reward_scale}": self.reward_scale > 0,
            f"--guidance-scale must be at least 0, got {self.guidance_scale}": self.guidance_scale >= 0,
            f"--caption-dropout must lie in [0, 1), got {self.caption_dropout}": 0
            <= self.caption_dropout
            < 1,
            f"--num-validation-prompts must be at least 1, got {self.num_validation_prompts}": self.num_validation_prompts
            >= 1,
            f"--pretraining {self.pretraining} needs --data IMAGEFOLDER; or choose --pretraining off": (
                self.pretraining == "off" or self.data is not None
            ),
        }
        for message, holds in demands.items():
            if not holds:
                raise ValueError(message)
        parse_weights(self.rewards)

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, parse_weights(self.rewards))


def reward_loss(reward: Tensor, margin: float, scale: float) -> Tensor:
    """Return lambda mean(phi(r)) of rewards (B,), phi(r) = relu(margin - r): paper 002 eq. 2."""
    return scale * torch.relu(margin - reward).mean()


def mean_reward(
    mix: Mix, pixels: Tensor, prompts: Sequence[str], generators: Sequence[Generator], config: Config
) -> Tensor:
    """Return the rewards (B,) of images (B, 3, H, W), each the mean over `views` copies moved by up to `shift` pixels."""
    views = torch.cat([shifted(pixels, generators, config.jitter) for _ in range(config.jitter_copies)])
    return mix(views, list(prompts) * config.jitter_copies).rewards.view(config.jitter_copies, -1).mean(0)


def late_pixels(
    family: Family, prompts: Sequence[str], generators: Sequence[Generator], late: int, config: Config
) -> Tensor:
    """Return pixels (B, 3, H, W) predicted at denoising step `late`; the gradient runs through that step alone.

    Algorithm 1, lines 9 to 15.
    """
    cond = family.encode(prompts)
    scheduler = make_scheduler(family.scheduler_config, config.solver, config.num_inference_steps)
    x = noise_like_seeds(family.latent_shape(config.resolution, config.resolution), generators, family.device)
    with torch.no_grad():
        for t in scheduler.timesteps[:late]:
            output = family.denoise(x, t.expand(len(x)).to(x.device), cond, config.guidance_scale)
            x = step(scheduler, output, t, x, generators)
    t = scheduler.timesteps[late].expand(len(x)).to(x.device)
    output = family.denoise(x, t, cond, config.guidance_scale)
    x0 = x0_from(output, x, family.abar(t), family.prediction)
    return family.decode(x0)


def pretraining_loss(
    family: Family, samples: Sequence[CaptionedImage], run: Run, index: int, micro: int, config: Config
) -> Tensor:
    """Return the noise-prediction error of eq. 3, the mean over one micro batch of captioned images."""
    indices = run.image_indices(index, micro)
    chosen = items_at(samples, indices, config.run.seed)
    paths, captions = [sample.path for sample in chosen], [sample.text for sample in chosen]
    generators = [run.generator(i, stream=1) for i in indices]  # not the noise of the reward update
    dropout = config.caption_dropout
    return captioned_error(
        family, paths, captions, generators, size=config.resolution, caption_dropout=dropout
    ).mean()


def check_inputs(config: Config) -> tuple[list[str], list[str], list[CaptionedImage]]:
    """Return prompts, held-out prompts and pre-training samples; ValueError for whatever is wrong, before weights load."""
    check(config.run)
    families.check(config.model)
    files, names = config.files(), list(parse_weights(config.rewards))
    units([rewards.find_card(name) for name in names], config.reward_normalization, config.reward_stats)
    for name in names:
        rewards.check(name, files.get(name))
        if not rewards.find_card(name).differentiable:
            usable = ", ".join(card.name for card in rewards.CARDS.values() if card.differentiable)
            raise ValueError(
                f"--rewards {name} is not differentiable, and ReFL needs its gradient; one of {usable}"
            )
    prompts = read_prompts(config.prompts)
    validation_prompts = (
        read_prompts(config.validation_prompts)[: config.num_validation_prompts]
        if config.validation_prompts
        else prompts[:8]
    )
    return (
        prompts,
        validation_prompts,
        read_imagefolder(config.data) if config.data and config.pretraining != "off" else [],
    )


def load(config: Config, device: torch.device) -> tuple[Family, Mix, nn.Module]:
    """Return the model, the reward, and the module to train, all on the device; ValueError for weights that do not fit."""
    weights, precision = parse_weights(config.rewards), DTYPES[config.reward_precision]
    scorers = load_all(list(weights), files=config.files(), device=device, dtype=precision)
    family = families.load(config.model, device)
    denoiser = family.trainable(config.lora, config.run.seed)
    family.set_speed(
        config.attention,
        checkpointing=config.gradient_checkpointing,
        vae_checkpointing=config.vae_checkpointing,
    )
    family.to(device, DTYPES[config.run.mixed_precision])
    return family, Mix(scorers, weights, config.reward_normalization, config.reward_stats), denoiser


def main(config: Config) -> int:  # noqa: C901 - the loop stays in one piece
    """Tune, show and save."""
    with exit_on_user_error():
        prompts, validation_prompts, samples = check_inputs(config)
        run = Run(config.run, driver="refl", config_text=dump(config))
        family, mix, denoiser = load(config, run.device)
        family.denoiser = run.prepare(denoiser)
    window = config.window[0], config.window[1] + 1

    def write(folder: Path) -> None:
        workspace.write(family, run, config.lora, folder)

    def show(step: int) -> validation.Shown:
        return workspace.show(family, mix, validation_prompts, config.sample, run, f"step_{step:06d}")

    if not run.resumed:  # samples, scores and saves once before training: whatever cannot work fails here
        if run.is_main:
            show(0)
        run.save(-1, write=write)

    for index in run.steps():
        if config.pretraining == "alternate":  # Algorithm 1, lines 6 and 7
            for micro in range(run.gradient_accumulation_steps):
                with run.accumulate():
                    run.update(pretraining_loss(family, samples, run, index, micro, config), phase="pretrain")

        late = int(run.rng(index).integers(*window))  # line 8
        for micro in range(run.gradient_accumulation_steps):  # lines 9 to 17
            indices = run.image_indices(index, micro)
            texts = items_at(prompts, indices, config.run.seed)
            with run.accumulate():
                pixels = late_pixels(family, texts, [run.generator(i) for i in indices], late, config)
                movers = [run.generator(i, stream=2) for i in indices]
                reward = mean_reward(mix, pixels, texts, movers, config)
                loss = reward_loss(reward, config.margin, config.reward_scale)
                if config.pretraining == "sum":
                    loss = loss + pretraining_loss(family, samples, run, index, micro, config)
                run.update(loss, reward=reward.mean(), late_step=float(late))

        if run.due("validation_steps", index) and run.is_main and index + 1 < config.run.max_train_steps:
            run.log(index, **show(index + 1).means())
        if run.due("checkpointing_steps", index):
            run.save(index, write=write)

    if run.is_main and not run.interrupted:
        write(run.folder)
        show(config.run.max_train_steps)
        validation.conclude(
            run.folder, {"before": "step_000000", "after": f"step_{config.run.max_train_steps:06d}"}
        )
    return run.finish()


if __name__ == "__main__":
    sys.exit(main(parse(Config, default_config=TINY)))
