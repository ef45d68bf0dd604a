"""Train a text-to-image model on a captioned image folder: plain fine-tuning, by LoRA or of all weights.

Loss: the noise-prediction error of Ho et al. 2020 (eq. 14), paper 002 eq. 3, with a share of captions left empty so that
classifier-free guidance has an unconditional model to point away from (Ho and Salimans 2022, arXiv 2207.12598).

    accelerate launch finetune/pretrain.py --model PIPELINE_FOLDER --data IMAGEFOLDER --output-dir runs/mine
    accelerate launch finetune/pretrain.py --config finetune/configs/pretrain/tiny.yaml     # how the embedded model was made

Hardware: the tiny configuration takes about 20 minutes on two CPU cores; LoRA on Stable Diffusion 1.x wants one GPU.
Left out: aspect-ratio buckets, random crops and flips (a flip makes "left of" wrong), offset noise, min-SNR weights.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from preftune import families
from preftune.cli import dump, exit_on_user_error, parse
from preftune.diffusion_loss import denoising_error
from preftune.families.sd import SD
from preftune.images import captioned_grid, load_pixels, save_image
from preftune.lora import LoRA
from preftune.order import items_at
from preftune.records import CaptionedImage, read_imagefolder
from preftune.sampling import Sampling, sample
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a text-to-image model on a captioned image folder."""

    model: Path
    """Pipeline folder in diffusers' format to start from."""
    data: Path
    """Imagefolder with metadata.jsonl (file_name, text)."""
    resolution: int = 512
    """Side of the square that images are scaled and cropped to, pixels."""
    train_text_encoder: bool = False
    """Also train all weights of the text encoder; only with --lora.rank 0."""
    caption_dropout: float = 0.1
    """Share of captions left empty, in [0, 1)."""
    cache_latents: bool = False
    """Encode every image once and keep the latents in memory; they are then the posterior's mean, not draws of it."""
    lora: LoRA = field(default_factory=LoRA)
    sample: Sampling = field(default_factory=Sampling)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/pretrain"))
    )

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"--resolution must be a positive multiple of 8, got {self.resolution}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"--caption-dropout must lie in [0, 1), got {self.caption_dropout}")
        if self.train_text_encoder and self.lora.rank:
            raise ValueError(f"--train-text-encoder goes with --lora.rank 0, got rank {self.lora.rank}")


class TextToImage(nn.Module):
    """Prompts and noisy latents to the network's output, as one forward, so that processes share its gradients."""

    def __init__(self, family: SD) -> None:
        super().__init__()
        self.unet, self.text_encoder, self._family = family.unet, family.text_encoder, [family]

    def forward(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """Return the output (B, C, h, w) at latents x (B, C, h, w) and timesteps t (B,)."""
        family = self._family[0]
        return family.denoise(x, t, family.encode(prompts))


def main(config: Config) -> int:
    """Train, save and sample."""
    with exit_on_user_error():
        check(config.run)
        families.check(config.model)
        samples = read_imagefolder(config.data)
        run = Run(config.run, driver="pretrain", config_text=dump(config))
        family = families.load(config.model, run.device)
        family.trainable(config.lora, config.run.seed).train()
        if config.train_text_encoder:
            family.text_encoder.requires_grad_(True).train()
        module = run.prepare(TextToImage(family))
    cache = encode_all(family, samples, config.resolution) if config.cache_latents else None

    def write(folder: Path) -> None:
        with run.ema_weights():
            save(family, config, folder)

    for step in run.steps():
        for micro in range(run.gradient_accumulation_steps):
            indices = run.image_indices(step, micro)
            generators = [run.generator(i) for i in indices]
            rows = items_at(range(len(samples)), indices, config.run.seed)
            kept = [
                float(torch.rand((), generator=generator)) >= config.caption_dropout
                for generator in generators
            ]
            prompts = [samples[row].text if keep else "" for row, keep in zip(rows, kept, strict=True)]
            with run.accumulate():
                with torch.no_grad():
                    if cache is None:
                        x0 = family.encode_pixels(load(samples, rows, config.resolution), generators)
                    else:
                        x0 = cache[rows].to(run.device)
                predict = partial(module, prompts=prompts)
                error = denoising_error(family, predict, x0, generators)
                run.update(error.mean())
        if run.due("checkpointing_steps", step):
            run.save(step, write=write)
        if run.due("validation_steps", step) and run.is_main:
            with run.ema_weights():
                sample_grid(family, samples, config, run.folder / "samples" / f"step_{step + 1:06d}.png")
    if run.is_main and not run.interrupted:
        write(run.folder)
    return run.finish()


def load(samples: list[CaptionedImage], rows: list[int], size: int) -> Tensor:
    """Return the images of these rows, (B, 3, size, size) in [0, 1]."""
    return torch.stack([load_pixels(samples[row].path, size) for row in rows])


@torch.no_grad()
def encode_all(family: SD, samples: list[CaptionedImage], size: int) -> Tensor:
    """Return the latents of every image, (N, C, h, w) on the CPU: the posterior's mean."""
    starts = tqdm(range(0, len(samples), 64), desc="encoding images", mininterval=5)
    chunks = (list(range(start, min(start + 64, len(samples)))) for start in starts)
    return torch.cat([family.encode_pixels(load(samples, rows, size)).cpu() for rows in chunks])


def save(family: SD, config: Config, folder: Path) -> None:
    """Write `folder/lora`, or at rank 0 the whole pipeline as `folder/pipeline`."""
    if config.lora.rank:
        family.save_tuned(folder / "lora", config.lora)
    else:
        family.save_pipeline(folder / "pipeline")


def sample_grid(family: SD, samples: list[CaptionedImage], config: Config, path: Path) -> None:
    """CaptionedImage the first captions of the data with fixed seeds, into one image."""
    prompts = [row.text for row in samples[:16]]
    family.unet.eval(), family.text_encoder.eval()
    images = sample(family, prompts, range(len(prompts)), config.sample)
    family.unet.train(), family.text_encoder.train(config.train_text_encoder)
    path.parent.mkdir(exist_ok=True)
    rows = range(0, len(prompts), 4)
    captions = [prompts[row : row + 4] for row in rows]
    save_image(captioned_grid([list(images[row : row + 4]) for row in rows], cell_captions=captions), path)


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
