"""Sampling images: a step function for drivers that write their own loop, and `sample` for those that need images.

Every image has a torch.Generator of its own, so it is a function of (weights, prompt, seed) and of nothing else: not of
the batch it was drawn in, nor of the number of processes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Generator, Tensor
from tqdm import tqdm

from preftune.families.base import Family

SolverName = Literal["ddpm", "ddim", "pndm", "dpm++"]

# ddpm: the released ReFL ran on a diffusers whose DDPM ignored steps_offset, so its 40 timesteps are 975, 950, ..., 0;
# x_0 is never clipped, whatever the folder's configuration says, since latents are not in [-1, 1].
_SCHEDULERS: dict[str, tuple[Any, dict[str, object]]] = {
    "ddpm": (
        DDPMScheduler,
        {"clip_sample": False, "thresholding": False, "steps_offset": 0, "variance_type": "fixed_small"},
    ),
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "thresholding": False}),
}


def make_scheduler(config: Mapping[str, object], name: SolverName, num_steps: int) -> Any:
    """Return a diffusers scheduler with the folder's betas, set to num_steps steps.

    A scheduler holds the state of one trajectory (pndm, dpm++): make a new one for each batch.
    """
    kind, settings = _SCHEDULERS[name]
    scheduler = kind.from_config({**config, **settings})
    scheduler.set_timesteps(num_steps)
    return scheduler


def noise_like_seeds(
    shape: tuple[int, int, int], generators: Sequence[Generator], device: torch.device | str
) -> Tensor:
    """Return x_T (B, C, h, w), float32: one draw from each generator."""
    draws = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(draws).to(device)


def step(scheduler: Any, output: Tensor, t: Tensor, x: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Return the next latents: one denoising step of a diffusers scheduler, its noise drawn from each image's generator."""
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        return scheduler.step(output, t, x, generator=list(generators)).prev_sample
    return scheduler.step(output, t, x).prev_sample


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are generated when they are looked at or judged."""

    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance scale; 1 = none."""
    solver: SolverName = "pndm"
    """Sampler; pndm with 50 steps at 7.5 is what Stable Diffusion's pipeline does."""
    resolution: str = "512"
    """Pixels: the side of a square, or WIDTHxHEIGHT."""
    batch_size: int = 8
    """Images in one pass; changes speed, not images."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--sample.{name.replace('_', '-')} must be a positive number, got {getattr(self, name)}"
                )
        if not self.guidance_scale >= 0:
            raise ValueError(f"--sample.guidance-scale must be at least 0, got {self.guidance_scale}")
        self.size  # noqa: B018 - refuses what is no resolution

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width), pixels."""
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.resolution)
        width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if min(width, height) < 8 or width % 8 or height % 8:
            raise ValueError(
                f"--sample.resolution must be positive multiples of 8, as 512 or 768x512, got {self.resolution}"
            )
        return height, width


@torch.no_grad()
def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    negative: str = "",
    progress: str | None = None,
) -> Tensor:
    """Return pixels (N, 3, H, W) in [0, 1], float32 on the CPU: one image for each (prompt, seed).

    `negative` is the prompt that guidance points away from; `progress` names a progress bar.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    shape = family.latent_shape(*sampling.size)
    images = []
    for start in tqdm(
        range(0, len(prompts), sampling.batch_size), desc=progress, disable=progress is None, leave=False
    ):
        part = slice(start, start + sampling.batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        cond = family.encode(prompts[part], negative=negative)
        scheduler = make_scheduler(family.scheduler_config, sampling.solver, sampling.num_inference_steps)
        x = noise_like_seeds(shape, generators, family.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = family.denoise(
                scheduler.scale_model_input(x, t),
                t.expand(len(x)).to(x.device),
                cond,
                sampling.guidance_scale,
            )
            x = step(scheduler, output, t, x, generators)
        images.append(family.decode(x).float().clamp(0, 1).cpu())
    return torch.cat(images)
