"""Time and memory of one ReFL update: our loop under several settings, and the published loop in the same
process.

    python benchmarks/refl_step.py                                        # the tiny model on the CPU; also SD 1.x with CUDA
    python benchmarks/refl_step.py --models sd1 --cross --output sd1.json # all combinations instead of one change at a time
    python benchmarks/refl_step.py --threads 2 --train-batch-size 16                 # more images per update

The first values of --precision, --train, --checkpointing and --compile are the base setting; by default
every other value is measured alone. Every setting runs in a fresh process, so that peak memory is its own.
Times are medians over updates (trajectory, late step, decoder, scorer, backward, clip, AdamW) at one late
step. `plain` trains the same weights with the loop as released (ImageReward's code): autocast over float32
weights on CUDA, frozen parts and scorer in half precision, UNet checkpointing, set_timesteps in each
update, clamped pixels. The updates of the two loops alternate, so that variations of the machine's speed
affect both. MFU is the floating-point operations of an update, without recomputation, relative to the
card's dense bf16 peak.

Hardware: two CPU cores, a few minutes; for SD 1.x at 512 px a CUDA device and 4 GB of disk. Left out of
both loops: EMA, logs, checkpoints, several processes.
"""

import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from preftune.cli import exit_on_user_error, parse

WARMUP = 2
"""Warm-up updates before timing (kernel selection, compilation, optimizer state)."""
Precision = Literal["no", "bf16", "fp16"]
Switch = Literal["off", "on"]
Train = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure time and peak memory of ReFL updates."""

    models: tuple[Literal["tiny", "sd1"], ...] | None = None
    """tiny on the CPU, sd1 at 512 px on a CUDA device; None = tiny, and sd1 if CUDA is available."""
    precision: tuple[Precision, ...] | None = None
    """Precision of model and scorer, the base first; None = no bf16 on the CPU, bf16 no fp16 on CUDA."""
    train: tuple[Train, ...] = ("lora", "full")
    """LoRA of rank 4, or all weights of the UNet."""
    checkpointing: tuple[Switch, ...] = ("off", "on")
    """Gradient checkpointing of UNet and decoder."""
    compile: tuple[Switch, ...] = ("off", "on")
    """torch.compile of the UNet."""
    train_batch_size: tuple[int, ...] | None = None
    """Images in an update; None = 4 on the CPU, 1 2 4 8 on CUDA."""
    cross: bool = False
    """All combinations instead of one change at a time."""
    num_inference_steps: int = 40
    """T, as in refl.py."""
    late: int = 35
    """The denoising step with gradient, counted from 0."""
    repeats: int = 5
    """Timed updates of each setting, after two that warm up."""
    threads: int = 0
    """CPU threads; 0 = torch's default."""
    peak_tflops: float | None = None
    """Dense bf16 peak of the CUDA device in TFLOP/s; None = looked up by its name."""
    workdir: Path | None = None
    """Keeps the 4 GB of sd1 between calls; None = a temporary folder."""
    output: Path | None = None
    """JSON file with everything measured."""

    def __post_init__(self) -> None:
        if not 0 <= self.late < self.num_inference_steps:
            raise ValueError(
                f"--late {self.late} must lie in 0..{self.num_inference_steps - 1} (--num-inference-steps - 1)"
            )
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")
        if any(batch < 1 for batch in self.train_batch_size or ()):
            raise ValueError(f"--train-batch-size must be at least 1, got {self.train_batch_size}")
        for name in ("models", "precision", "train", "checkpointing", "compile", "train_batch_size"):
            if self.__dict__[name] == ():
                raise ValueError(f"--{name} needs at least one value")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rewards
from benchmarks.hardware import fresh, name_of_machine, peak_mib, peak_tflops, seconds, write_json
from benchmarks.models import build_sd1
from benchmarks.paths import PROMPTS, TINY
from finetune import refl
from preftune import families
from preftune.families import Pretrained
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.training.config import ModelConfig, RewardConfig
from preftune.training.defaults import learning_rate
from preftune.training.optimizer import adamw
from preftune.training.run_config import RunConfig
from preftune.training.workspace import DTYPES, load_mix, load_model

read_once = functools.cache(read_prompts)
Update = Callable[[int], Tensor]
"""Does update i and returns its loss."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting; `loop` says whose update it is."""

    loop: Literal["ours", "plain"]
    model: str
    pipeline: Path
    scorer: str
    scorer_files: Path
    device: str
    precision: Precision
    train: Train
    checkpointing: Switch
    compile: Switch
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
                resolution="64" if self.model == "tiny" else "512",
                gradient_checkpointing=checkpointing,
                vae_checkpointing=checkpointing,
            ),
            reward=RewardConfig(
                rewards=(f"{self.scorer}=1.0",),
                reward_files=(f"{self.scorer}={self.scorer_files}",),
                reward_precision="fp32" if self.precision == "no" else self.precision,
            ),
            run=RunConfig(train_batch_size=self.train_batch_size, mixed_precision=self.precision),
        )

    def prompts(self, index: int) -> list[str]:
        """Return the prompts of update `index`."""
        first = index * self.train_batch_size
        return items_at(read_once(PROMPTS), range(first, first + self.train_batch_size), seed=0)


def optimised(trial: Trial, denoiser: nn.Module, loss: Update) -> Update:
    """Return `loss` with what follows it: backward, clip and AdamW as in refl.Config; fp16 with loss scaling.

    FloatingPointError where the loss is not a number.
    """
    config, model = trial.refl().run, trial.refl().model
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimizer = adamw(config, weights, learning_rate("refl", model.check(), model.train))
    scaler = torch.amp.GradScaler(trial.device, enabled=trial.precision == "fp16")

    def update(index: int) -> Tensor:
        value = loss(index)
        if not value.isfinite():  # the driver looks as well, and waits for the device
            raise FloatingPointError(f"the loss of update {index} is {value.item()}")
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return value.detach()

    return update


def autocast(trial: Trial, denoiser: nn.Module) -> None:
    """Let the module compute in the trial's precision, as accelerate's preparation does."""
    if trial.precision != "no":
        cast = torch.autocast(trial.device, DTYPES[trial.precision])
        denoiser.forward = cast(denoiser.forward)


def ours(trial: Trial) -> Update:
    """Return the update of finetune/refl.py: its own functions, without the plumbing."""
    config = trial.refl()
    device = torch.device(trial.device)
    mix, (family, denoiser) = load_mix(config.reward, device), load_model(config.model, config.run, device)
    assert mix is not None, "a trial has a scorer"
    resolution = config.model.size(family.defaults)
    if trial.compile == "on":
        denoiser.compile()
    autocast(trial, denoiser)

    def loss(index: int) -> Tensor:
        texts = trial.prompts(index)
        first = index * trial.train_batch_size
        generators = [torch.Generator().manual_seed(first + i) for i in range(trial.train_batch_size)]
        pixels = refl.late_pixels(family, texts, generators, trial.late, resolution, config)
        return refl.reward_loss(mix(pixels, texts).rewards, config.margin, config.reward_scale)

    return optimised(trial, denoiser, loss)


def plain(trial: Trial) -> Update:
    """Return the update of the released loop, written out; only the trained weights are the trial's."""
    config, device = trial.refl(), torch.device(trial.device)
    half = DTYPES[trial.precision]
    parts = families.load(trial.pipeline)
    unet, vae, text_encoder, tokenizer = parts.unet, parts.vae, parts.text_encoder, parts.tokenizer
    parts.trainable(config.model.tuned(), seed=0)
    unet.enable_gradient_checkpointing()
    unet.to(device)  # float32, also what is frozen: autocast converts it in every pass
    vae.to(device, half)
    text_encoder.to(device, half)
    scorer = rewards.load(trial.scorer, weights=trial.scorer_files, device=device, dtype=half)
    folder = trial.pipeline / "scheduler"
    scheduler = DDPMScheduler.from_pretrained(folder, steps_offset=0, clip_sample=False)
    autocast(trial, unet)
    side, length = config.model.size(parts.defaults).height // 8, tokenizer.model_max_length

    def loss(index: int) -> Tensor:
        texts = trial.prompts(index)
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        states = text_encoder(tokens.input_ids.to(device))[0]
        scheduler.set_timesteps(trial.num_inference_steps, device=device)
        x = torch.randn(trial.train_batch_size, 4, side, side, device=device)
        with torch.no_grad():
            for t in scheduler.timesteps[: trial.late]:
                x = scheduler.step(unet(x, t, states).sample.float(), t, x).prev_sample
        t = scheduler.timesteps[trial.late]
        x0 = scheduler.step(unet(x, t, states).sample.float(), t, x).pred_original_sample
        image = vae.decode(x0.to(half) / vae.config.scaling_factor).sample
        pixels = (image / 2 + 0.5).clamp(0, 1)
        return config.reward_scale * torch.relu(2 - scorer(pixels, texts)).mean()

    return optimised(trial, unet, loss)


def as_published(trial: Trial) -> Trial:
    """Return the setting of the released loop that trains the same weights on the same batch."""
    precision: Precision = "fp16" if trial.device == "cuda" else "no"
    return replace(trial, loop="plain", precision=precision, checkpointing="on", compile="off")


def measure(trial: Trial, compare: bool) -> dict[str, Any]:
    """Return time and peak memory of a setting, in this process; `compare` lets the plain loop take turns with it.

    Keys: s_per_update, images_per_s, times, peak_mib (on the CPU the process' own, of which before_mib were there before
    the model), and with `compare` plain_s_per_update and speed_up. `error` says why there is nothing.
    """
    if trial.threads:
        torch.set_num_threads(trial.threads)
    row: dict[str, Any] = {"before_mib": peak_mib("cpu")}
    try:
        loops = [_warm(trial)]
        row["peak_mib"] = peak_mib(trial.device)  # with AdamW's moments, and before there is a rival
        if compare:
            loops.append(_warm(as_published(trial)))
        turns = range(WARMUP, WARMUP + trial.repeats)
        row["times"] = [[seconds(loop, index, trial.device) for loop in loops] for index in turns]
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory" + " beside the plain loop" * ("peak_mib" in row)}
    except FloatingPointError as error:
        return row | {"error": str(error)}
    medians = [statistics.median(column) for column in zip(*row["times"], strict=True)]
    row |= {"s_per_update": medians[0], "images_per_s": trial.train_batch_size / medians[0]}
    if compare:
        row |= {"plain_s_per_update": medians[1], "speed_up": medians[1] / medians[0]}
    return row


def _warm(trial: Trial) -> Update:
    """Return the trial's update after it has been done a few times."""
    update = {"ours": ours, "plain": plain}[trial.loop](trial)
    if trial.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # loading is not an update
    for index in range(WARMUP):
        update(index)
    return update


def count_flops(trial: Trial) -> int | None:
    """Return the floating-point operations of one image's update, forward and backward, without recomputation.

    None where it does not fit. CUDA only: torch's counter does not know the CPU's attention kernel.
    """
    try:
        update = ours(replace(trial, train_batch_size=1, checkpointing="off", compile="off"))
        with FlopCounterMode(display=False) as counter:
            update(0)
    except torch.OutOfMemoryError:
        return None
    return counter.get_total_flops()


def trials(config: Config, model: str, pipeline: Path, scorer: str, scorer_files: Path) -> list[Trial]:
    """Return the settings to measure of one model: for each batch the plain loops, then ours from the base on."""
    cuda = model == "sd1"
    axes: dict[str, tuple[Any, ...]] = {
        "precision": config.precision or (("bf16", "no", "fp16") if cuda else ("no", "bf16")),
        "train": config.train,
        "checkpointing": config.checkpointing,
        "compile": config.compile,
    }
    base = {name: values[0] for name, values in axes.items()}
    if config.cross:
        settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        settings = [base] + [base | {name: value} for name, values in axes.items() for value in values[1:]]
    found = []
    for batch in config.train_batch_size or ((1, 2, 4, 8) if cuda else (4,)):
        mine = [
            Trial(
                loop="ours",
                model=model,
                pipeline=pipeline,
                scorer=scorer,
                scorer_files=scorer_files,
                device="cuda" if cuda else "cpu",
                train_batch_size=batch,
                **{
                    name: config.__dict__[name]
                    for name in ("num_inference_steps", "late", "repeats", "threads")
                },
                **setting,
            )
            for setting in settings
        ]
        found += list(dict.fromkeys(as_published(trial) for trial in mine)) + mine
    return found


HEADER = "model loop  prec train ckpt compile batch  s/update images/s  peak MiB before MiB  plain s speed-up    MFU"


def line(trial: Trial, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    name = f"{trial.model:5s} {trial.loop:5s} {trial.precision:4s} {trial.train:5s} {trial.checkpointing:4s} {trial.compile:7s} {trial.train_batch_size:5d}"
    if "error" in row:
        return f"{name}  {row['error']}"
    formats = {
        "s_per_update": "9.3f",
        "images_per_s": "8.2f",
        "peak_mib": "9.0f",
        "before_mib": "10.0f",
        "plain_s_per_update": "8.3f",
        "speed_up": "8.2f",
        "mfu": "6.1%",
    }
    return " ".join([name, *(format(row[key], style) for key, style in formats.items() if key in row)])


def run(config: Config, model: str, workdir: Path) -> list[dict[str, Any]]:
    """Measure one model and print its rows as they come."""
    if model == "tiny":
        parts = TINY / "pipeline", "imagereward-tiny", TINY / "imagereward"
    else:
        peak = config.peak_tflops or peak_tflops()
        fresh(build_sd1, workdir)
        parts = workdir / "pipeline", "imagereward", workdir / "scorer"
    flops: dict[str, int | None] = {}
    rows = []
    for trial in trials(config, model, *parts):
        row = fresh(measure, trial, trial.loop == "ours") or {"error": "the process was killed"}
        if trial.device == "cuda" and "error" not in row:
            if trial.train not in flops:
                flops[trial.train] = fresh(count_flops, trial)
            if (count := flops[trial.train]) is not None:
                row |= {"flops_per_image": count, "mfu": count * row["images_per_s"] / (peak * 1e12)}
        print(line(trial, row), flush=True)
        rows.append(asdict(trial) | row)
    return rows


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    cuda = torch.cuda.is_available()
    models = config.models or (("tiny", "sd1") if cuda else ("tiny",))
    with exit_on_user_error():
        if "sd1" in models and not cuda:
            raise ValueError("--models sd1 needs a CUDA device; benchmarks/full_size.py runs it on the CPU")
        if "fp16" in (config.precision or ()) and "tiny" in models:
            raise ValueError("--precision fp16 needs a CUDA device, and tiny runs on the CPU: --models sd1")
        if "sd1" in models and config.peak_tflops is None:
            peak_tflops()
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    machine = name_of_machine("sd1" in models)
    print(f"{machine}; late step {config.late} of {config.num_inference_steps}; medians of {config.repeats}")
    print(HEADER, flush=True)
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            rows += run(config, model, config.workdir if model == "sd1" and config.workdir else Path(scratch))
    if config.output is not None:
        write_json(config.output, {"hardware": machine, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
