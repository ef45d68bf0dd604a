"""Solvers: one step from noise level (alpha, sigma) down to (alpha', sigma'), and the timesteps of the steps.

Each step is x' = alpha' x_0 + c eps + std z with z ~ N(0, 1), where (x_0, eps) is the network's prediction
at x:

    solver      c                                           std
    ddim(eta)   sqrt(sigma'^2 - std^2)                      eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)
    ddpm        ddim with eta 1
    euler       ddim with eta 0: Euler's method on x / alpha as a function of sigma / alpha
    cps         sqrt(sigma'^2 - std^2)                      sigma' sin(a pi / 2)
    flow_sde    sigma' - a^2 h / (2 alpha)                  a sqrt(sigma h / alpha)           h = sigma - sigma'
    dance_sde   sigma' - eta^2 h / (2 sigma)                eta sqrt(h)

ddim and cps keep the noise variance c^2 + std^2 = sigma'^2 exactly and are valid for VP and flow models.
The two SDE steps are for flow models (alpha = 1 - sigma) and keep it to first order in h. Levels are () or
(B,), so each image may be at its own timestep. The steps are functions without state. pndm and dpm++ need
past steps and use diffusers' schedulers.

Only the betas, the prediction type and trailing spacing of a pipeline folder are used. Offset and last
timestep are those of SOLVERS, because the folder's scheduler_config.json describes whatever scheduler was
last saved with it; trailing spacing is no scheduler's default, so somebody meant it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from preftune.noise import Prediction, like
from preftune.solver_names import PredictionType, SolverName

Level = tuple[Tensor, Tensor]
"""(alpha, sigma), each () or (B,)."""
Step = Callable[[Prediction, Level, Level], "Transition"]
"""A step from one level to the next: ddim, cps, ..., with their settings bound."""


class Transition(NamedTuple):
    """The distribution of the next latents: normal, independent elements."""

    mean: Tensor
    """(B, C, h, w)."""
    std: Tensor
    """(B, 1, 1, 1), or (1, 1, 1, 1) for all; 0 = no noise."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return the next latents (B, C, h, w) for standard normal noise of that shape."""
        return self.mean + self.std * noise

    def log_prob(self, x_next: Tensor, reduce: Literal["mean", "sum"]) -> Tensor:
        """Return log p(x_next), (B,) float32: the mean over the elements of an image, or the sum.

        x_next must be the sample as it is stored. Where it is stored in half precision, round it first and take the
        log-probability of what was stored; otherwise the ratio to a later evaluation is not 1 for equal weights (at SD's
        last steps it is off by 3e-3 in bf16, beside a clip range of 1e-4). RuntimeError where std is 0 (an assertion on the
        device, so that no GPU waits for it).
        """
        torch._assert_async((self.std > 0).all(), "a step without noise (std 0) has no log-probability")
        mean, std = self.mean.float(), self.std.float()
        squares = (x_next.float() - mean).square() / (2 * std.square())
        log_prob = (-squares - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1)
        return log_prob.mean(1) if reduce == "mean" else log_prob.sum(1)


def ddim(prediction: Prediction, level: Level, next_level: Level, eta: float = 0.0) -> Transition:
    """Return DDIM's step (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), for VP and flow levels.

    eta 0 is deterministic. eta 1 is DDPM's posterior (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7). alpha may be 0
    (zero terminal SNR), alpha' may be 1 (no noise left). AssertionError for eta outside [0, 1].
    """
    assert 0 <= eta <= 1, f"eta is {eta}, not in [0, 1]"
    alpha, sigma, alpha_next, sigma_next = _levels(prediction.x0, level, next_level)
    ratio = alpha * sigma_next / (alpha_next * sigma)
    fresh = eta**2 * (1 - ratio) * (1 + ratio)  # the share of the next noise variance that is new noise
    mean = alpha_next * prediction.x0 + sigma_next * (1 - fresh).sqrt() * prediction.eps
    return Transition(mean, sigma_next * fresh.sqrt())


def ddpm(prediction: Prediction, level: Level, next_level: Level) -> Transition:
    """Return DDPM's ancestral step with the posterior variance (arXiv 2006.11239, eq. 6 and 7): DDIM with eta 1."""
    return ddim(prediction, level, next_level, eta=1.0)


def euler(prediction: Prediction, level: Level, next_level: Level) -> Transition:
    """Return Euler's step on x / alpha in sigma / alpha (Karras et al. 2022, arXiv 2206.00364, algorithm 1, first order).

    It is DDIM with eta 0: x' / alpha' = x / alpha + (sigma' / alpha' - sigma / alpha) eps is x' = alpha' x_0 + sigma' eps.
    """
    return ddim(prediction, level, next_level, eta=0.0)


def cps(prediction: Prediction, level: Level, next_level: Level, a: float = 0.8) -> Transition:
    """Return the step of coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952), as Flow-GRPO uses it."""
    _, _, alpha_next, sigma_next = _levels(prediction.x0, level, next_level)
    angle = a * math.pi / 2
    mean = alpha_next * prediction.x0 + sigma_next * math.cos(angle) * prediction.eps
    return Transition(mean, sigma_next * math.sin(angle))


def flow_sde(prediction: Prediction, level: Level, next_level: Level, a: float = 0.7) -> Transition:
    """Return the Euler-Maruyama step of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), for flow levels only.

    At alpha = 0 its diffusion is infinite; there alpha' is used instead of alpha, as in the authors' code.
    """
    alpha, sigma, alpha_next, sigma_next = _levels(prediction.x0, level, next_level)
    alpha = torch.where(alpha == 0, alpha_next, alpha)
    h = sigma - sigma_next
    mean = alpha_next * prediction.x0 + (sigma_next - a**2 * h / (2 * alpha)) * prediction.eps
    return Transition(mean, a * (sigma * h / alpha).sqrt())


def dance_sde(prediction: Prediction, level: Level, next_level: Level, eta: float = 0.3) -> Transition:
    """Return the Euler-Maruyama step of DanceGRPO (Xue et al. 2025, arXiv 2505.07818) for flow levels only."""
    _, sigma, alpha_next, sigma_next = _levels(prediction.x0, level, next_level)
    h = sigma - sigma_next
    mean = alpha_next * prediction.x0 + (sigma_next - eta**2 * h / (2 * sigma)) * prediction.eps
    return Transition(mean, eta * h.sqrt())


def _levels(x: Tensor, level: Level, next_level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, sigma, alpha_next, sigma_next = (like(value, x) for value in (*level, *next_level))
    return alpha, sigma, alpha_next, sigma_next


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A row of SOLVERS: a step function and the timesteps that it visits, with leading spacing."""

    step: Step
    stochastic: bool
    """Whether its steps add noise."""
    offset: int
    """Added to all timesteps; 1 is Stable Diffusion's."""
    end: int
    """Timestep at which the last step lands: 0 is the smallest noise level of training, -1 is none."""


SOLVERS: dict[SolverName, Solver] = {
    # The released ImageReward script ran on a diffusers whose DDPM ignored the offset: 40 steps are 975, 950, ..., 0.
    "ddpm": Solver(step=ddpm, stochastic=True, offset=0, end=-1),
    "ddim": Solver(step=ddim, stochastic=False, offset=1, end=0),
    "euler": Solver(step=euler, stochastic=False, offset=1, end=-1),
}
_DIFFUSERS: dict[SolverName, tuple[Any, dict[str, object]]] = {
    "pndm": (
        PNDMScheduler,
        {
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    ),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "timestep_spacing": "linspace",
            "final_sigmas_type": "zero",
            "thresholding": False,
        },
    ),
}

_BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}


def stepper(name: SolverName) -> Step:
    """Return the step function of a solver in SOLVERS."""
    return _row(name).step


def timesteps(
    name: SolverName, num_inference_steps: int, num_train_timesteps: int = 1000, trailing: bool = False
) -> Tensor:
    """Return the timesteps (num_inference_steps + 1,), int64, falling: where each step starts, then where the last lands.

    Leading spacing with the solver's offset, or trailing spacing, which starts at the last timestep (Lin et al. 2023,
    arXiv 2305.08891, table 2). -1 stands for no noise at all. ValueError for a number of steps outside
    1..num_train_timesteps, or a solver that has no timesteps here (pndm, dpm++).
    """
    row = _row(name)
    _check_steps(num_inference_steps, num_train_timesteps, "num_inference_steps")
    if trailing:
        ratio = num_train_timesteps / num_inference_steps
        starts = [round(num_train_timesteps - k * ratio) - 1 for k in range(num_inference_steps)]
    else:
        spacing = num_train_timesteps // num_inference_steps
        first = (num_inference_steps - 1) * spacing
        # as many steps as there are training timesteps leave no room for an offset
        offset = min(row.offset, num_train_timesteps - 1 - first)
        starts = list(range(first + offset, offset - 1, -spacing))
    return torch.tensor([*starts, min(row.end, starts[-1] - 1)])


def check(
    name: SolverName,
    num_inference_steps: int,
    prediction_type: PredictionType,
    zero_snr: bool,
    num_train_timesteps: int = 1000,
    flag: str = "num_inference_steps",
) -> None:
    """Raise ValueError, before any weight loads, for a solver that cannot take these steps, of this flag, or such a model."""
    if name not in get_args(SolverName):
        raise ValueError(f"unknown solver {name}; one of {', '.join(get_args(SolverName))}")
    # pndm adds 1 to every timestep, dpm++ also counts the end: neither has room for num_train_timesteps steps.
    _check_steps(num_inference_steps, num_train_timesteps - (name in _DIFFUSERS), flag, f" for solver {name}")
    usable = ", ".join(SOLVERS)
    if name in _DIFFUSERS and zero_snr:
        raise ValueError(f"solver {name} cannot start at zero terminal SNR; one of {usable} can")
    if name == "pndm" and prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"solver pndm does not know prediction type {prediction_type}; one of {usable} does")


def make_scheduler(
    name: SolverName,
    num_inference_steps: int,
    *,
    betas: Mapping[str, Any],
    prediction_type: PredictionType,
    zero_snr: bool = False,
    trailing: bool = False,
) -> Any:
    """Return diffusers' own scheduler for pndm or dpm++, set to so many steps.

    `betas` are the arguments that every scheduler of diffusers makes its betas of: num_train_timesteps and beta_start,
    beta_end, beta_schedule, or trained_betas. A scheduler holds the state of one trajectory: make a new one for each batch.
    pndm calls the network once more than it has steps. ValueError for what `check` refuses.
    """
    assert name in _DIFFUSERS, f"{name} is a function of preftune.solvers, not a scheduler"
    assert set(betas) <= _BETAS, f"{sorted(set(betas) - _BETAS)} are not about betas"
    check(name, num_inference_steps, prediction_type, zero_snr, betas["num_train_timesteps"])
    kind, settings = _DIFFUSERS[name]
    if trailing:
        settings = {**settings, "timestep_spacing": "trailing"}
    scheduler = kind(**betas, **settings, prediction_type=prediction_type)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def _row(name: SolverName) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"solver {name} has no step of its own here; one of {', '.join(SOLVERS)} has")
    return SOLVERS[name]


def _check_steps(number: int, limit: int, name: str, where: str = "") -> None:
    if not 1 <= number <= limit:
        raise ValueError(f"{name} must lie in 1..{limit}{where}, got {number}")
