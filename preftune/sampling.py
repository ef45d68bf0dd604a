"""Sampling of images from prompts in batches.

Every image has its own torch.Generator, so it is a function of (weights, prompt, seed) alone: it does not
depend on the batch or on the number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from preftune import ahead
from preftune.ahead import initial_noise
from preftune.families.base import Family
from preftune.noise import Prediction
from preftune.resolution import Resolution
from preftune.sampling_config import Resolved, Sampling
from preftune.solvers import SOLVERS
from rewards.on_device import upload

__all__ = ["Resolved", "Sampling", "initial_noise", "sample", "sample_latents", "sharded"]

_T = TypeVar("_T")
_Predict = Callable[[Tensor, Tensor, float], Prediction]
"""Noisy latents (B, C, h, w), timesteps (B,) and i / T of the i-th of T steps -> the guided prediction."""

DECODED_PIXELS = 8 * 512 * 512
"""Pixels that are decoded at once. The decoder takes far more memory than the denoiser without gradient: for SDXL at 1024 px in
bf16 about 1.5 GiB an image (counted), twice that in float32.
"""


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | Resolved,
    *,
    negative: str = "",
    annealing: float | None = None,
    progress: str | None = None,
) -> Iterator[Tensor]:
    """Yield pixels (b, 3, height, width) in [0, 1], float32 on the CPU, batch by batch: an image for each (prompt, seed).

    `negative` is the negative prompt; `annealing` the power of annealed importance guidance, None = off (`mixed`); `progress` names
    a progress bar. The caller's grad mode is left alone between batches. ValueError, at the call, for lengths that differ.
    """
    settings = sampling if isinstance(sampling, Resolved) else sampling.resolved(family.defaults)
    batches = sample_latents(
        family, prompts, seeds, settings, negative=negative, annealing=annealing, progress=progress
    )
    return (_pixels(family, x, settings.resolution) for x in batches)


def sample_latents(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | Resolved,
    *,
    negative: str = "",
    annealing: float | None = None,
    progress: str | None = None,
) -> Iterator[Tensor]:
    """Yield the final latents (b, C, h, w), on the model's device, of the images of `sample`, batch by batch."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    settings = sampling if isinstance(sampling, Resolved) else sampling.resolved(family.defaults)
    starts = range(0, len(prompts), settings.batch_size)
    parts = (slice(start, start + settings.batch_size) for start in starts)
    return (
        _sample_batch(family, prompts[part], seeds[part], settings, negative, annealing)
        for part in tqdm(parts, desc=progress, total=len(starts), disable=progress is None, leave=False)
    )


@torch.no_grad()
def _pixels(family: Family, latents: Tensor, resolution: Resolution) -> Tensor:
    """Pixels on the CPU."""
    return torch.cat([part.cpu() for part in decoded_parts(family, latents, resolution)])


@torch.no_grad()  # on a function that returns: on a generator it would leak into the caller between two batches
def _sample_batch(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Resolved,
    negative: str,
    annealing: float | None,
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    predict = _predictor(family, prompts, negative, settings, annealing)
    shape = family.latent_shape(settings.resolution)
    with family.lean() if annealing is None else nullcontext():  # lean passes have the LoRA merged
        if settings.solver in SOLVERS:
            grid = family.timesteps(settings.num_inference_steps, settings.solver, settings.resolution)
            x, _, steps = ahead.trajectory(family, grid, settings.solver, shape, generators)
            for index, now in enumerate(steps):
                x = ahead.step(predict(x, now.t, index / (len(grid) - 1)), now, settings.solver)
        else:
            x = _scheduler_loop(family, initial_noise(shape, generators, family.device), predict, settings)
    return x


def _predictor(
    family: Family, prompts: Sequence[str], negative: str, settings: Resolved, annealing: float | None
) -> _Predict:
    """Return what predicts these prompts at each step, with their texts encoded once."""
    cond, scale = family.encode(prompts, negative=negative), settings.guidance_scale
    if annealing is None:
        return lambda x, t, share: family.predict(x, t, cond, scale)
    with family.reference():  # a LoRA may be in the text encoders, too
        base_cond = family.encode(prompts, negative=negative)
    power = annealing

    def predict(x: Tensor, t: Tensor, share: float) -> Prediction:
        with family.reference():
            base = family.predict(x, t, base_cond, scale)
        return mixed(base, family.predict(x, t, cond, scale), share**power)

    return predict


def mixed(base: Prediction, tuned: Prediction, weight: float) -> Prediction:
    """Return (1 - weight) base + weight tuned of two predictions at the same x.

    Annealed importance guidance (AIG, arXiv 2409.06493) has the weight (i / T)^power at step i = 0..T-1 of T: the base decides
    what early steps lay out, the tuned model what late ones draw. A prediction is affine in the network's output, so that all of it mixes alike.
    """
    return Prediction(*(torch.lerp(old, new, weight) for old, new in zip(base, tuned, strict=True)))


def decoded_parts(family: Family, latents: Tensor, resolution: Resolution) -> Iterator[Tensor]:
    """Yield the pixels (b, 3, H, W) in [0, 1] float32 of latents (B, C, h, w), as many at a time as the decoder may hold."""
    for part in latents.split(max(1, DECODED_PIXELS // (resolution.width * resolution.height))):
        yield family.decode(part).float().clamp(0, 1)


def _scheduler_loop(family: Family, x: Tensor, predict: _Predict, settings: Resolved) -> Tensor:
    """Return the last latents of pndm or dpm++: diffusers' scheduler on the network's own (guided) output."""
    scheduler = family.scheduler(settings.solver, settings.num_inference_steps)
    x = x * scheduler.init_noise_sigma
    levels = upload(scheduler.timesteps, x.device)[:, None].expand(-1, len(x))
    for index, (t, level) in enumerate(
        zip(scheduler.timesteps, levels, strict=True)
    ):  # the scheduler's own stay on the CPU
        x_in = scheduler.scale_model_input(x, t)
        output = predict(x_in, level, index / len(levels)).output
        x = scheduler.step(output, t, x).prev_sample
    return x


def sharded(items: Sequence[_T], rank: int, world_size: int) -> list[tuple[int, _T]]:
    """Return this process's items with their indices: rank, rank + world_size, ...; all processes have all items once."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    return list(enumerate(items))[rank::world_size]
