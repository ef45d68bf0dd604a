"""Train a text-to-image model on a captioned image folder: plain fine-tuning of a LoRA or of all weights.

Loss: the noise-prediction error of Ho et al. 2020 (arXiv 2006.11239, eq. 14; ImageReward, arXiv 2304.05977,
eq. 3). A share of the captions is replaced by the empty one, as classifier-free guidance needs (Ho and
Salimans 2022, arXiv 2207.12598).

    python finetune/pretrain.py --model PIPELINE_FOLDER --data IMAGEFOLDER --output-dir runs/mine
    python finetune/pretrain.py --config finetune/configs/pretrain/tiny.yaml     # trains the embedded model

Hardware: the tiny configuration takes more than an hour on two CPU cores; LoRA on Stable Diffusion 1.x needs
a GPU. Left out: aspect-ratio buckets, random crops and flips (a flip makes "left of" wrong), offset noise.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.image_folders import Columns
from preftune.training.cache_config import CacheConfig
from preftune.training.config import ModelConfig, ValidationConfig, check_dropout
from preftune.training.defaults import learning_rate, of_model
from preftune.training.noise_levels import NoiseLevels
from preftune.training.run_config import RunConfig, check


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a text-to-image model on a captioned image folder."""

    data: Path
    """Folder of captioned images: metadata.jsonl, .csv or .parquet (file_name, text), or a .txt or .caption file beside each image."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    train_text_encoder: bool = False
    """Also train all weights of the text encoders; only with --train full."""
    caption_dropout: float = 0.1
    """Share of captions left empty, in [0, 1)."""
    noise_levels: Annotated[NoiseLevels, tyro.conf.arg(name="")] = field(default_factory=NoiseLevels)
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/pretrain"))
    )

    def __post_init__(self) -> None:
        check_dropout(self.caption_dropout)
        if self.train_text_encoder and self.cache.cache_text_encoder_outputs:
            raise ValueError(
                "--cache-text-encoder-outputs keeps what a text encoder says, which --train-text-encoder changes; give one of them"
            )
        if self.train_text_encoder and self.model.train != "full":
            raise ValueError(f"--train-text-encoder goes with --train full, got --train {self.model.train}")
        if self.train_text_encoder and self.model.offload:
            raise ValueError(
                "--offload keeps frozen text encoders in the CPU's memory, and --train-text-encoder trains them; leave out one"
            )


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(
        Config,
        needs="`preftune pretrain --model assets/tiny/pipeline --data assets/tiny/images --max-train-steps 200` runs here",
    )

import torch
from torch import Generator, Tensor, nn

from preftune import files
from preftune.cli.printable import show
from preftune.diffusion_loss import diffusion_loss
from preftune.families import Family
from preftune.families.base import Cond
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.records import CaptionedImage
from preftune.resolution import Framing
from preftune.sampling_config import Sampling
from preftune.training import data
from preftune.training.decoding import captioned_inputs, upcoming
from preftune.training.run import Run
from preftune.training.validation import Scoring, missed, validate
from preftune.training.workspace import export, load_model


class TextToImage(nn.Module):
    """Prompts and noisy latents to the network's output, as one forward, so that processes share its gradients."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.denoiser = family.denoiser
        self.text_encoders = nn.ModuleList(family.text_encoders)
        self._family = [family]  # in a list, so that its parts are not registered a second time

    def forward(
        self, x: Tensor, t: Tensor, prompts: list[str], framings: Sequence[Framing], cond: Cond | None
    ) -> Tensor:
        """Return the output (B, C, h, w) at latents x (B, C, h, w) and timesteps t (B,); cond are the prompts, where they are encoded."""
        family = self._family[0]
        cond = family.encode(prompts, framings=framings) if cond is None else cond
        return family.predict(x, t, cond).output


@one_writer
def main(config: Config) -> int:
    """Train, save and sample."""
    with exit_on_user_error():
        check(config.run)
        data.check(config.data, config.columns)
        named = config.validation.named()
        defaults = config.model.check()
        config.validation.check(defaults)
        config.noise_levels.check(defaults)
        config = of_model(config, "pretrain", defaults)
        samples, skipped = data.read(config.data, config.columns)
        prompts = named or config.validation.first([sample.text for sample in samples])
        settings = config.model.lora_settings() | data.as_setting(skipped)
        run = Run(config.run, driver="pretrain", config_text=dump(config), settings=settings)
        family, _ = load_model(
            config.model, config.run, run.device, train_text_encoders=config.train_text_encoder
        )
        module = run.prepare(
            TextToImage(family), learning_rate=learning_rate("pretrain", defaults, config.model.train)
        )
    if run.is_main:
        data.write_report(run.folder, skipped)
    resolution, levels = config.model.size(defaults), config.noise_levels
    inputs = captioned_inputs(family, resolution, run, config.cache)
    inputs.expect([sample.path for sample in batch] for batch in upcoming(run, samples))
    sample_at = partial(validate_at, family, prompts, config.validation.sample.at(resolution), run)
    write = partial(save, family, config, run)
    if missed(run, [f"step_{run.start:06d}"]):
        sample_at(run.start - 1)
    for step in run.steps():
        for micro_batch in run.passes():
            indices = run.image_indices(step, micro_batch)
            generators = list(map(run.generator, indices))
            chosen = items_at(samples, indices, config.run.seed)
            texts = captions(chosen, generators, config.caption_dropout)
            with run.accumulate():
                x0, framings = inputs.latents([sample.path for sample in chosen], generators)
                with run.autocast():  # as in the prepared module
                    cond = inputs.cond(texts, framings) if config.cache.cache_text_encoder_outputs else None
                predict = partial(module, prompts=texts, framings=framings, cond=cond)
                timesteps = levels.draw(defaults.num_train_timesteps, generators)
                loss = diffusion_loss(family, predict, x0, generators, timesteps, levels.snr_gamma)
                run.update(loss.mean())
        if step + 1 == config.run.max_train_steps and run.is_main:
            write_result(family, config, run)  # before its images
        if run.due("validation_steps", step):
            sample_at(step)
        if run.due("checkpointing_steps", step):
            run.save(step, write=write)
    if run.is_main and run.start >= config.run.max_train_steps:
        write_result(family, config, run)
    if run.is_main and not run.interrupted:
        show(f"tuned weights, metrics and images: {run.folder}")
    inputs.close()
    return run.finish()


def write_result(family: Family, config: Config, run: Run) -> None:
    """Write what was trained into the run's folder, also in the layout of --export."""
    save(family, config, run, run.folder)
    export(config.model, family, run.folder)


def validate_at(family: Family, prompts: Sequence[str], sampling: Sampling, run: Run, step: int) -> None:
    """Sample the validation images after the update of a step, and log their scores."""
    with run.ema_weights(), run.autocast():  # the denoiser is not the prepared module here
        found = validate(family, Scoring(), prompts, sampling, run, f"step_{step + 1:06d}")
    if found is not None:
        run.log_images(step, "validation", found.captions())
        if means := found.means():
            run.log(step, **means)


def captions(chosen: Sequence[CaptionedImage], generators: Sequence[Generator], dropout: float) -> list[str]:
    """Return the captions of images, each empty where its generator's next number, in [0, 1), is below dropout."""
    kept = [float(torch.rand((), generator=generator)) >= dropout for generator in generators]
    return [sample.text if keep else "" for sample, keep in zip(chosen, kept, strict=True)]


def save(family: Family, config: Config, run: Run, folder: Path) -> None:
    """Write `folder/lora`, or where all weights are trained the whole pipeline as `folder/pipeline`."""
    lora = config.model.tuned()
    with run.ema_weights(), files.replacing(folder / ("pipeline" if lora is None else "lora")) as place:
        if lora is None:
            family.save_pipeline(place)
        else:
            family.save_tuned(place, lora)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
