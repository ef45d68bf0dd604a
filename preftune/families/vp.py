"""Noise schedule of variance-preserving models: x_t = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1 (arXiv
2006.11239, eq. 4).

Of a folder's scheduler_config.json only the betas, prediction_type, rescale_betas_zero_snr and trailing spacing are read.
Other spacings are defaults of the scheduler that the folder was last saved with; the chosen solver has its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, SchedulerMixin
from torch import Generator, Tensor

from preftune import solvers
from preftune.solver_names import PredictionType, SolverName
from rewards.on_device import upload

_KINDS = ("epsilon", "v_prediction", "sample")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class VP:
    """A noise schedule and what the network predicts under it."""

    betas: Mapping[str, Any]
    """The arguments from which every scheduler of diffusers computes the same betas."""
    prediction_type: PredictionType
    zero_snr: bool
    """The last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891): alpha is 0 there."""
    trailing: bool
    """Timesteps start at the last one, as at zero terminal SNR and in models distilled to a few steps."""
    distilled: bool
    """Made for a few steps without guidance (Sauer et al. 2023, arXiv 2311.17042): published with Euler's solver and
    trailing spacing, as SD-Turbo and SDXL-Turbo.
    """
    alphas_cumprod: Tensor
    """(T + 1,) float32: alpha squared of the T timesteps, then the 1 of t = -1."""


def read(config: Mapping[str, Any], where: object) -> VP:
    """Return the noise schedule of a scheduler's configuration; ValueError, naming `where`, for one that is not of this kind."""
    class_name = str(config.get("_class_name"))
    if class_name.startswith("EDM"):
        raise ValueError(
            f"{where}: {class_name} (the noise of EDM, as in Playground v2.5) is not variance-preserving; expected a model of the"
            " kind of Stable Diffusion, such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in _KINDS:
        raise ValueError(f"{where}: prediction_type {prediction_type!r}; expected {', '.join(_KINDS)}")
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if zero_snr and prediction_type == "epsilon":
        raise ValueError(
            f"{where}: rescale_betas_zero_snr with prediction_type epsilon, but at zero SNR the predicted noise does not"
            " determine the image; expected v_prediction"
        )
    trailing = config.get("timestep_spacing") == "trailing"
    betas = _betas(config, where)
    table = DDPMScheduler(**betas, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    return VP(
        betas=betas,
        prediction_type=cast(PredictionType, prediction_type),
        zero_snr=zero_snr,
        trailing=zero_snr or trailing,
        distilled=trailing and not zero_snr and class_name in _EULER,
        alphas_cumprod=torch.cat([table, torch.ones(1)]),
    )


def _betas(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The configuration of the betas alone."""
    num = config.get("num_train_timesteps", 1000)
    if not isinstance(num, int) or num < 2:
        raise ValueError(f"{where}: num_train_timesteps {num!r}; expected a whole number, as in 1000")
    trained = config.get("trained_betas")
    if trained is not None:
        if (
            not isinstance(trained, list)
            or len(trained) != num
            or not all(0 < _number(b) < 1 for b in trained)
        ):
            raise ValueError(f"{where}: trained_betas is not a list of {num} numbers between 0 and 1")
        return {"num_train_timesteps": num, "trained_betas": trained}
    start, end = _number(config.get("beta_start")), _number(config.get("beta_end"))
    if not 0 < start <= end < 1:
        raise ValueError(
            f"{where} ({config.get('_class_name')}) has beta_start {config.get('beta_start')} and beta_end"
            f" {config.get('beta_end')}; expected 0 < beta_start <= beta_end < 1, or trained_betas, as every scheduler of a"
            " variance-preserving model has"
        )
    schedule = config.get("beta_schedule", "linear")
    if schedule not in _SCHEDULES:
        raise ValueError(f"{where}: beta_schedule {schedule!r}; expected {', '.join(_SCHEDULES)}")
    return {"num_train_timesteps": num, "beta_start": start, "beta_end": end, "beta_schedule": schedule}


def _number(value: object) -> float:
    """The number, or nan, which every comparison refuses."""
    return float(value) if isinstance(value, int | float) else float("nan")


def schedule(vp: VP, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma), float32, in the shape of t."""
    # A tensor () as an index would be read by the CPU.
    index = upload(t, vp.alphas_cumprod.device).long().reshape(-1)
    abar = vp.alphas_cumprod[index].reshape(t.shape)
    return abar.sqrt(), (1 - abar).sqrt()


def timesteps(vp: VP, num_inference_steps: int, solver: SolverName) -> Tensor:
    """Return the solver's timesteps (N + 1,); ValueError where this noise is not for it."""
    num = int(vp.betas["num_train_timesteps"])
    solvers.check(solver, num_inference_steps, vp.prediction_type, vp.zero_snr, num)
    return solvers.timesteps(solver, num_inference_steps, num, vp.trailing)


def training_timesteps(vp: VP, generators: Sequence[Generator]) -> Tensor:
    """Return timesteps (B,), int64 on the CPU, uniform over the training timesteps: one from each generator."""
    num = int(vp.betas["num_train_timesteps"])
    return torch.cat([torch.randint(num, (1,), generator=generator) for generator in generators])


def scheduler(vp: VP, solver: SolverName, num_inference_steps: int) -> Any:
    """Return diffusers' scheduler with these betas; ValueError for a solver that has none or is not for them."""
    return solvers.make_scheduler(
        solver,
        num_inference_steps,
        betas=vp.betas,
        prediction_type=vp.prediction_type,
        zero_snr=vp.zero_snr,
        trailing=vp.trailing,
    )


def own_scheduler(config: Mapping[str, Any]) -> Any:
    """Return the scheduler of a scheduler_config.json, as diffusers loads it with its pipeline; None where it names none of diffusers'."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        return None
    return cast(Any, kind).from_config(dict(config))


def trailing_scheduler(vp: VP) -> Any:
    """Return the scheduler to save with a model of trailing spacing: Euler's for a distilled one, as it was published, else DDIM's."""
    settings = {**vp.betas, "prediction_type": vp.prediction_type, "timestep_spacing": "trailing"}
    if vp.distilled:
        return EulerDiscreteScheduler(**settings)
    return DDIMScheduler(**settings, set_alpha_to_one=False, clip_sample=False)
