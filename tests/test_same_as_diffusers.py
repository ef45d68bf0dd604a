"""The loop over family.predict with our solvers ends at the latents of diffusers' own pipeline, on tiny real weights.

The largest differences after 5 steps, of latents up to 4: 0.0 for ddim, pndm and dpm++, whose operations are the same, but
4e-5 for SDXL with a negative prompt, which the pipeline encodes once for each image and we once, so that matrix products
round otherwise; 1.4e-5 for ddpm and 2.1e-5 for euler, where diffusers orders the operations otherwise. At zero terminal SNR 7e-6,
and 4e-4 for euler: diffusers replaces the signal of 0 by 2^-24 and computes with noise 4096 times the image.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

import tiny
from preftune import ahead, families
from preftune.families import Family
from preftune.resolution import Resolution
from preftune.solver_names import SolverName
from preftune.solvers import SOLVERS

PROMPTS = ["a red circle", "two cats"]
STEPS = 5
SIZES = [Resolution(64, 64), Resolution(height=64, width=96)]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[SolverName, tuple[Any, dict[str, object]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False, "steps_offset": 0}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {"steps_offset": 1, "timestep_spacing": "leading"}),
    "pndm": (PNDMScheduler, {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.pipeline_folder,
    "sd v": lambda path: tiny.pipeline_folder(path, "v_prediction"),
    "sdxl": tiny.pipeline_xl_folder,
    "sd v zero": lambda path: tiny.pipeline_folder(path, "v_prediction", zero_snr=True),
    "sdxl v zero": lambda path: tiny.pipeline_xl_folder(path, "v_prediction", zero_snr=True),
}
SAME_OPERATIONS = ("ddim", "pndm", "dpm++")
Pair = tuple[Family, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Our family and diffusers' pipeline of one folder, loaded once each."""
    known: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in known:
            folder = FOLDERS[name](tmp_path_factory.mktemp("pipeline"))
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
            pipe.set_progress_bar_config(disable=True)
            known[name] = families.load(folder), pipe
        return known[name]

    return pair


def start(family: Family, resolution: Resolution) -> tuple[Tensor, list[torch.Generator]]:
    """The first latents, and a generator of each image for the noise of a step."""
    x = torch.randn(2, *family.latent_shape(resolution), generator=torch.Generator().manual_seed(3))
    return x, [torch.Generator().manual_seed(seed) for seed in (5, 6)]


@torch.no_grad()
def ours(family: Family, solver: SolverName, scale: float, resolution: Resolution, negative: str) -> Tensor:
    x, generators = start(family, resolution)
    cond = family.encode(PROMPTS, negative)
    if solver in SOLVERS:
        grid = family.timesteps(STEPS, solver, resolution)
        draws = ahead.noisy(grid, solver)
        drawn = ahead.noise(sum(draws), x.shape[1:], generators, family.device)
        for now in ahead.steps(family, grid, draws, drawn, len(x))[1]:
            x = ahead.step(family.predict(x, now.t, cond, scale), now, solver)
        return x
    scheduler = family.scheduler(solver, STEPS)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = family.predict(scheduler.scale_model_input(x, t), t.expand(len(x)), cond, scale).output
        x = scheduler.step(output, t, x).prev_sample
    return x


def theirs(pipe: Any, family: Family, scale: float, resolution: Resolution, negative: str) -> Tensor:
    x, generators = start(family, resolution)
    latents: Tensor = pipe(
        PROMPTS,
        negative_prompt=[negative] * 2 if negative else None,
        latents=x,
        generator=generators,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        height=resolution.height,
        width=resolution.width,
        output_type="latent",
    ).images
    return latents


def differences(pair: Pair, solver: SolverName, scale: float) -> tuple[float, float]:
    """Return the largest difference of a square image, and of a wide one that has a negative prompt."""
    family, pipe = pair
    kind, settings = SCHEDULERS[solver]
    if pipe.scheduler.config.get("rescale_betas_zero_snr"):
        settings = {**settings, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = kind(**BETAS, **settings, prediction_type=family.prediction_type)
    found = []
    for resolution, negative in zip(SIZES, ("", "ugly"), strict=True):
        mine = ours(family, solver, scale, resolution, negative)
        other = theirs(pipe, family, scale, resolution, negative)
        assert mine.shape == other.shape == (2, 4, resolution.height // 8, resolution.width // 8)
        assert mine.std() > 0.3
        found.append((mine - other).abs().max().item())
    return found[0], found[1]


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("solver", get_args(SolverName))
@pytest.mark.parametrize("name", ["sd", "sd v", "sdxl"])
def test_loop_equals_pipeline(
    pairs: Callable[[str], Pair], name: str, solver: SolverName, scale: float
) -> None:
    square, wide = differences(pairs(name), solver, scale)
    assert square <= (0 if solver in SAME_OPERATIONS else 5e-5)
    assert wide <= (0 if solver in SAME_OPERATIONS and (scale == 1 or name != "sdxl") else 5e-5)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("name", ["sd v zero", "sdxl v zero"])
def test_loop_equals_pipeline_from_pure_noise(
    pairs: Callable[[str], Pair], name: str, solver: SolverName, scale: float
) -> None:
    bound = 5e-4 if solver == "euler" else 1e-5
    assert max(differences(pairs(name), solver, scale)) <= bound


def test_stateful_solvers_refuse_pure_noise(pairs: Callable[[str], Pair]) -> None:
    for name in ("sd v zero", "sdxl v zero"):
        for solver in ("pndm", "dpm++"):
            with pytest.raises(ValueError, match=rf"{re.escape(solver)} cannot start at zero terminal SNR"):
                pairs(name)[0].scheduler(solver, STEPS)
