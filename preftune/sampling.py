"""Drawing pictures: a step function for drivers that write their own loop, and `sample` for those that need pictures.

Every picture has a torch.Generator of its own, so it is a function of (weights, prompt, seed) and of nothing else: not of
the batch it was drawn in, nor of the number of processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Generator, Tensor
from tqdm import tqdm

from preftune.families.base import Family

SchedulerName = Literal["ddpm", "ddim", "pndm", "dpm++"]

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


def make_scheduler(config: Mapping[str, object], name: SchedulerName, num_steps: int) -> Any:
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
class Drawing:
    """How pictures are drawn when they are looked at or judged."""

    num_steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale; 1 = none."""
    scheduler: SchedulerName = "pndm"
    """Sampler; pndm with 50 steps at 7.5 is what Stable Diffusion's pipeline does."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    batch: int = 8
    """Pictures in one pass; changes speed, not pictures."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "height", "width", "batch"):
            value = int(self.__dict__[name])
            if value < 1 or (name in ("height", "width") and value % 8):
                raise ValueError(
                    f"--draw.{name.replace('_', '-')} must be a positive {'multiple of 8' if value > 0 else 'number'}, got {value}"
                )
        if not self.guidance >= 0:
            raise ValueError(f"--draw.guidance must be at least 0, got {self.guidance}")


@torch.no_grad()
def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    draw: Drawing,
    *,
    negative: str = "",
    progress: str | None = None,
) -> Tensor:
    """Return pixels (N, 3, height, width) in [0, 1], float32 on the CPU: one picture for each (prompt, seed).

    `negative` is the prompt that guidance points away from; `progress` names a progress bar.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    shape = family.latent_shape(draw.height, draw.width)
    pictures = []
    for start in tqdm(
        range(0, len(prompts), draw.batch), desc=progress, disable=progress is None, leave=False
    ):
        part = slice(start, start + draw.batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        cond = family.encode(prompts[part], negative=negative)
        scheduler = make_scheduler(family.scheduler_config, draw.scheduler, draw.num_steps)
        x = noise_like_seeds(shape, generators, family.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = family.denoise(
                scheduler.scale_model_input(x, t), t.expand(len(x)).to(x.device), cond, draw.guidance
            )
            x = step(scheduler, output, t, x, generators)
        pictures.append(family.decode(x).float().clamp(0, 1).cpu())
    return torch.cat(pictures)
