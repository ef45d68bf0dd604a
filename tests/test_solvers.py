"""Solvers, against numbers in our notes, torch.distributions, exact arithmetic on Gaussian data, and diffusers' schedulers."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.distributions import Normal

from preftune import solvers
from preftune.noise import Prediction, predict_from
from preftune.solver_names import PredictionType, SolverName
from preftune.solvers import SOLVERS, Level, Step, Transition
from test_noise import BETAS, VP

PLAIN = {"clip_sample": False, "thresholding": False}


def schedule(zero_snr: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[Tensor | int], Level]:
    """t -> (alpha, sigma) of Stable Diffusion's betas, -1 being no noise; float64 from float64 betas."""
    if dtype == torch.float64:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=dtype) ** 2
        table = (1 - betas).cumprod(0)
    else:
        table = DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    table = torch.cat([table, torch.ones(1, dtype=dtype)])
    return lambda t: (table[t].sqrt(), (1 - table[t]).sqrt())


def flow(sigma: float) -> Level:
    return 1 - torch.tensor(sigma, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)


def latents(count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x: Tensor, t: Tensor | int) -> Tensor:
    """Some smooth function of latents and timestep, as large as its input."""
    return torch.sin(3 * x.roll(1, -1)) + 0.5 * x * math.cos(float(t) / 300)


def coefficients(step: Step, level: Level, next_level: Level) -> tuple[float, float, float]:
    """A step's factors of x0, eps and noise."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    of_x0 = step(Prediction(one, zero, zero), level, next_level)
    of_eps = step(Prediction(zero, one, zero), level, next_level)
    return of_x0.mean.item(), of_eps.mean.item(), of_eps.std.item()


@pytest.mark.parametrize(
    ("t", "t_next", "variance", "std", "slope"),
    [
        (981, 961, 0.206537, 0.454463, -0.23294),
        (501, 481, 0.086898, 0.294785, -0.11119),
        (21, 1, 0.001559, 0.039480, -0.12929),
        (1, 0, 0.000426, 0.020648, -0.02071),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpo_steps_of_stable_diffusion(
    t: int, t_next: int, variance: float, std: float, slope: float, dtype: torch.dtype
) -> None:
    """Recorded with diffusers: the last step lands on alphas_cumprod[0], so that it still has noise."""
    at = schedule(dtype=dtype)
    x, output = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    transition = solvers.ddpm(predict_from(output, x, *at(t), "epsilon"), at(t), at(t_next))
    assert transition.std.item() == pytest.approx(std, abs=5.1e-7)
    assert transition.std.item() ** 2 == pytest.approx(variance, abs=5.1e-7)
    assert transition.mean.item() == pytest.approx(slope, abs=5.1e-6), "d mean / d eps"


def test_rows_of_flow_samplers() -> None:
    """sigma 0.8 -> 0.6: the flow SDE's noise variance is 0.518 where 0.36 is right; CPS has 0.36."""
    of_x0, c, std = coefficients(solvers.flow_sde, flow(0.8), flow(0.6))
    assert (of_x0, c, std) == pytest.approx((0.4, 0.355, 0.626), abs=5e-4)
    assert c**2 + std**2 == pytest.approx(0.518, abs=5e-4)
    of_x0, c, std = coefficients(solvers.cps, flow(0.8), flow(0.6))
    assert (of_x0, std) == pytest.approx((0.4, 0.6 * math.sin(0.4 * math.pi)))
    assert c**2 + std**2 == pytest.approx(0.36, abs=1e-12)
    _, c, std = coefficients(solvers.dance_sde, flow(0.8), flow(0.6))
    assert (c, std) == pytest.approx((0.6 - 0.09 * 0.2 / 1.6, 0.3 * math.sqrt(0.2)))
    ode = coefficients(partial(solvers.ddim, eta=0.0), flow(0.8), flow(0.6))
    assert ode == pytest.approx((0.4, 0.6, 0.0))


def test_flow_sde_is_that_of_the_paper() -> None:
    """mu = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt, step std s sqrt(-dt), s = a sqrt(sigma / (1 - sigma))."""
    x0, eps = latents(2, dtype=torch.float64)
    sigma, next_sigma, a = 0.7, 0.55, 0.7
    dt, s2 = next_sigma - sigma, a**2 * sigma / (1 - sigma)
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0
    mean = x * (1 + s2 * dt / (2 * sigma)) + v * (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
    transition = solvers.flow_sde(Prediction(x0, eps, v), flow(sigma), flow(next_sigma))
    torch.testing.assert_close(transition.mean, mean, rtol=0, atol=1e-12)
    assert transition.std.item() == pytest.approx(math.sqrt(s2 * -dt))


def test_step_std_on_the_default_schedule_of_sd3() -> None:
    """Ten steps, shift 3 twice; at sigma 1 the next sigma takes its place, so the first std is 0.7."""
    sigmas = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0]
    found = [
        coefficients(solvers.flow_sde, flow(sigma), flow(after))[2]
        for sigma, after in itertools.pairwise(sigmas)
    ]
    expected = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("t", "t_next"), [(981, 961), (501, 481), (21, 1), (999, 0), (1, 0)])
def test_eta_1_is_the_posterior_of_ddpm(t: int, t_next: int) -> None:
    """Ho et al. 2020, eq. 7: sqrt(abar') beta / (1 - abar) x0 + sqrt(1 - beta) (1 - abar') / (1 - abar) x, and its variance."""
    at = schedule(dtype=torch.float64)
    (alpha, sigma), (alpha_next, sigma_next) = at(t), at(t_next)
    x0, eps = latents(2, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    keep = alpha**2 / alpha_next**2  # 1 - beta
    mean = (alpha_next * (1 - keep) * x0 + keep.sqrt() * sigma_next**2 * x) / sigma**2
    transition = solvers.ddpm(Prediction(x0, eps, eps), at(t), at(t_next))
    torch.testing.assert_close(transition.mean, mean, rtol=0, atol=1e-12)
    assert transition.std.item() ** 2 == pytest.approx((sigma_next**2 / sigma**2 * (1 - keep)).item())


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_is_that_of_torch(reduce: str) -> None:
    mean, x = latents(2)
    std = torch.tensor([0.02, 0.7]).view(2, 1, 1, 1)
    log_prob = Normal(mean, std).log_prob(x).flatten(1)
    expected = log_prob.mean(1) if reduce == "mean" else log_prob.sum(1)
    torch.testing.assert_close(Transition(mean, std).log_prob(x, reduce), expected, rtol=1e-6, atol=1e-6)


def test_log_prob_is_float32_and_needs_noise() -> None:
    mean, x = latents(2, dtype=torch.bfloat16)
    log_prob = Transition(mean, torch.ones(1, 1, 1, 1)).log_prob(x, "mean")
    assert log_prob.dtype == torch.float32
    exact = Normal(mean.float(), 1.0).log_prob(x.float()).flatten(1).mean(1)
    torch.testing.assert_close(log_prob, exact, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="std 0"):
        Transition(mean, torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)).log_prob(x, "mean")


def test_sample_and_log_prob_belong_together() -> None:
    noise = latents()[0]
    transition = Transition(torch.full_like(noise, 3.0), torch.tensor(0.5).view(1, 1, 1, 1))
    x = transition.sample(noise)
    torch.testing.assert_close(x, 3 + 0.5 * noise)
    expected = (-0.5 * noise.square() + math.log(2) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
    torch.testing.assert_close(transition.log_prob(x, "mean"), expected)


@pytest.mark.parametrize(
    ("step", "keeps"),
    [(solvers.ddpm, True), (solvers.cps, True), (solvers.flow_sde, False), (solvers.dance_sde, False)],
)
def test_variance_of_gaussian_data(step: Step, keeps: bool) -> None:
    """From the true x0 and eps, both N(0, 1), a step must land on variance alpha'^2 + sigma'^2: not all solvers do."""
    for sigma, after in itertools.pairwise([0.95, 0.8, 0.6, 0.3, 0.05]):
        of_x0, c, std = coefficients(step, flow(sigma), flow(after))
        wanted = (1 - after) ** 2 + after**2
        assert (of_x0**2 + c**2 + std**2 == pytest.approx(wanted, abs=1e-12)) is keeps


def final_variance(step: Step, levels: list[Level]) -> float:
    """Of samples of N(0, 1) data with the exact score: x0 = alpha x / V and eps = sigma x / V at V = alpha^2 + sigma^2."""
    variance = sum(value.item() ** 2 for value in levels[0])
    for level, next_level in itertools.pairwise(levels):
        of_x0, c, std = coefficients(step, level, next_level)
        alpha, sigma = (value.item() for value in level)
        variance = ((of_x0 * alpha + c * sigma) / (alpha**2 + sigma**2)) ** 2 * variance + std**2
    return variance


@pytest.mark.parametrize("step", [solvers.ddpm, solvers.euler])
def test_vp_solvers_converge_to_the_variance_of_gaussian_data(step: Step) -> None:
    """Each is of first order: ten times the steps, a tenth of the error."""
    at = schedule(dtype=torch.float64)
    errors = [
        1 - final_variance(step, [at(int(t)) for t in solvers.timesteps("ddpm", count)])
        for count in (10, 100, 1000)
    ]
    assert 0.05 < errors[0] < 0.5
    assert 5 < errors[0] / errors[1] < 15
    assert 5 < errors[1] / errors[2] < 15


@pytest.mark.parametrize("step", [solvers.flow_sde, solvers.dance_sde, solvers.euler])
def test_flow_solvers_converge_to_the_variance_of_gaussian_data(step: Step) -> None:
    grids = ([0.8 - 0.75 * k / count for k in range(count + 1)] for count in (20, 200, 2000))
    wanted = 0.95**2 + 0.05**2
    errors = [wanted - final_variance(step, [flow(sigma) for sigma in grid]) for grid in grids]
    assert 0.02 < errors[0] < 0.1
    assert 8 < errors[0] / errors[1] < 12
    assert 8 < errors[1] / errors[2] < 12


@pytest.mark.parametrize(
    "step", [solvers.ddpm, solvers.cps, solvers.flow_sde, solvers.dance_sde, solvers.euler]
)
def test_a_vector_of_levels_is_each_level_alone(step: Step) -> None:
    x0, eps = latents(2)
    at = schedule()
    now, then = torch.tensor([981, 501]), torch.tensor([961, 0])
    both = step(Prediction(x0, eps, eps), at(now), at(then))
    for i in range(2):
        alone = step(
            Prediction(x0[i : i + 1], eps[i : i + 1], eps[i : i + 1]), at(int(now[i])), at(int(then[i]))
        )
        assert torch.equal(both.mean[i : i + 1], alone.mean)
        assert torch.equal(both.std.expand(2, 1, 1, 1)[i], alone.std[0])


def test_timesteps_of_each_solver() -> None:
    """ddpm's are the published ones of ImageReward's ReFL; ddim and euler have Stable Diffusion's offset."""
    assert solvers.timesteps("ddpm", 40).tolist() == [*range(975, -1, -25), -1]
    assert solvers.timesteps("ddim", 10).tolist() == [*range(901, 0, -100), 0]
    assert solvers.timesteps("euler", 10).tolist() == [*range(901, 0, -100), -1]
    assert solvers.timesteps("ddim", 50).tolist() == [*range(981, 0, -20), 0]
    assert solvers.timesteps("ddim", 7).tolist() == [853, 711, 569, 427, 285, 143, 1, 0]
    assert solvers.timesteps("ddim", 50, trailing=True).tolist() == [*range(999, 0, -20), 0]
    assert solvers.timesteps("euler", 3, trailing=True).tolist() == [999, 666, 332, -1]
    assert solvers.timesteps("ddim", 4, num_train_timesteps=100).tolist() == [76, 51, 26, 1, 0]


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_any_number_of_steps_falls_and_stays_in_range(name: SolverName, zero_snr: bool) -> None:
    for count in (1, 2, 3, 37, 499, 500, 501, 999, 1000):
        grid = solvers.timesteps(name, count, trailing=zero_snr)
        assert grid.shape == (count + 1,)
        assert grid.dtype == torch.int64
        assert (grid.diff() < 0).all()
        assert grid[0] <= 999
        assert grid[-1] >= -1
        assert grid[-2] >= 0
        assert not zero_snr or grid[0] == 999, "zero terminal SNR starts at pure noise"


def test_what_is_refused() -> None:
    for count in (0, -1, 1001):
        with pytest.raises(ValueError, match=rf"num_inference_steps must lie in 1..1000, got {count}"):
            solvers.timesteps("ddim", count)
    with pytest.raises(ValueError, match=r"pndm has no step of its own here; one of ddpm, ddim, euler has"):
        solvers.timesteps("pndm", 10)
    for name in ("pndm", "dpm++"):
        with pytest.raises(ValueError, match=r"zero terminal SNR; one of ddpm, ddim, euler can"):
            solvers.make_scheduler(name, 10, betas=BETAS, prediction_type="v_prediction", zero_snr=True)
        with pytest.raises(ValueError, match=r"must lie in 1..999 for solver .*, got 1000"):
            solvers.make_scheduler(name, 1000, betas=BETAS, prediction_type="epsilon")
        last = solvers.make_scheduler(name, 999, betas=BETAS, prediction_type="epsilon")
        assert 0 <= last.timesteps.min() <= last.timesteps.max() <= 999
    with pytest.raises(ValueError, match="pndm does not know prediction type sample"):
        solvers.make_scheduler("pndm", 10, betas=BETAS, prediction_type="sample")
    with pytest.raises(ValueError, match=r"unknown solver heun; one of ddpm, ddim, euler, pndm, dpm\+\+"):
        solvers.check("heun", 10, "epsilon", False)
    with pytest.raises(ValueError, match=r"must lie in 1..1000 for solver ddim, got 1001"):
        solvers.check("ddim", 1001, "epsilon", False)
    with pytest.raises(ValueError, match=r"^--rollout-steps must lie in"):
        solvers.check("ddim", 1001, "epsilon", False, flag="--rollout-steps")
    solvers.check("ddim", 1000, "v_prediction", True)
    with pytest.raises(AssertionError, match="eta is 2"):
        solvers.ddim(Prediction(*latents(3)), flow(0.8), flow(0.6), eta=2)


def kinds(zero_snr: bool) -> tuple[PredictionType, ...]:
    return VP[1:] if zero_snr else VP


LOOPS = [(zero_snr, kind) for zero_snr in (False, True) for kind in kinds(zero_snr)]


@pytest.mark.parametrize(("zero_snr", "kind"), LOOPS)
def test_ddim_without_noise_is_diffusers_bit_for_bit(kind: PredictionType, zero_snr: bool) -> None:
    spacing = {"timestep_spacing": "trailing" if zero_snr else "leading", "steps_offset": 1}
    scheduler = DDIMScheduler(
        **BETAS,
        **PLAIN,
        **spacing,
        set_alpha_to_one=False,
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(50)
    at, x = schedule(zero_snr), latents()[0]
    theirs, grid = x, solvers.timesteps("ddim", 50, trailing=zero_snr)
    # trailing spacing counts down to 19 -> -1, where set_alpha_to_one=False means 0: the same level
    assert torch.equal(grid[:-1], scheduler.timesteps)
    for t, t_next in itertools.pairwise(grid):
        theirs = scheduler.step(network(theirs, t), int(t), theirs).prev_sample
        x = solvers.ddim(predict_from(network(x, t), x, *at(t), kind), at(t), at(t_next)).mean
        assert torch.equal(x, theirs)


@pytest.mark.parametrize(("zero_snr", "kind"), LOOPS)
def test_one_step_of_ddim_with_noise_is_diffusers(kind: PredictionType, zero_snr: bool) -> None:
    """Up to rounding: diffusers takes 1 - alphas_cumprod, which cancels; worst where the exact coefficient is 0."""
    spacing = {"timestep_spacing": "trailing" if zero_snr else "leading", "steps_offset": 1}
    scheduler = DDIMScheduler(
        **BETAS,
        **PLAIN,
        **spacing,
        set_alpha_to_one=False,
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(50)
    at = schedule(zero_snr)
    grid = solvers.timesteps("ddim", 50, trailing=zero_snr)
    for number, (t, t_next) in enumerate(itertools.pairwise(grid)):
        x, output, noise = latents(3, seed=number)
        for eta in (0.5, 1.0):
            theirs = scheduler.step(output, int(t), x, eta=eta, variance_noise=noise).prev_sample
            ours = solvers.ddim(predict_from(output, x, *at(t), kind), at(t), at(t_next), eta).sample(noise)
            largest = theirs.abs().max().item()
            exact_zero = zero_snr and number == 0 and eta == 1
            atol = (3e-4 if exact_zero else 1e-5) * largest
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("zero_snr", "kind"), LOOPS)
def test_ddpm_is_diffusers(kind: PredictionType, zero_snr: bool) -> None:
    """A whole loop with each image's noise. Not bit for bit: diffusers mixes x0 with x, we mix x0 with eps."""
    scheduler = DDPMScheduler(
        **BETAS,
        **PLAIN,
        variance_type="fixed_small",
        timestep_spacing="trailing" if zero_snr else "leading",
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(40)
    at, x = schedule(zero_snr), latents()[0]
    theirs, grid = x, solvers.timesteps("ddpm", 40, trailing=zero_snr)
    assert torch.equal(grid[:-1], scheduler.timesteps)
    for number, (t, t_next) in enumerate(itertools.pairwise(grid)):
        generator, again = (torch.Generator().manual_seed(number) for _ in range(2))
        output = network(theirs, t) / 3  # gentle, so that the loop does not amplify rounding
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
        output = network(x, t) / 3
        transition = solvers.ddpm(predict_from(output, x, *at(t), kind), at(t), at(t_next))
        x = transition.sample(torch.randn(x.shape, generator=again))
    torch.testing.assert_close(x, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize(("zero_snr", "kind"), LOOPS)
def test_euler_is_diffusers(kind: PredictionType, zero_snr: bool) -> None:
    """Its latents are ours divided by alpha. diffusers starts zero-SNR models at alphas_cumprod 2^-24 instead of 0."""
    scheduler = EulerDiscreteScheduler(
        **BETAS,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(20)
    at, x = schedule(zero_snr), latents()[0]
    theirs, grid = x * scheduler.init_noise_sigma, solvers.timesteps("euler", 20, trailing=zero_snr)
    assert torch.equal(grid[:-1].float(), scheduler.timesteps)
    for t, t_next in itertools.pairwise(grid):
        output = network(scheduler.scale_model_input(theirs, t.float()), t) / 3
        theirs = scheduler.step(output, t.float(), theirs).prev_sample
        x = solvers.euler(predict_from(network(x, t) / 3, x, *at(t), kind), at(t), at(t_next)).mean
    atol = (2e-3 if zero_snr else 1e-5) * theirs.abs().max().item()
    torch.testing.assert_close(x, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["pndm", "dpm++"])
def test_schedulers_that_stay_diffusers(name: SolverName) -> None:
    """Their settings are written down here: those of Stable Diffusion 1.5's pipeline, whatever a folder says."""
    config = {**BETAS, "_class_name": "PNDMScheduler", "steps_offset": 1, "set_alpha_to_one": False}
    config |= {"skip_prk_steps": True, "clip_sample": False, "prediction_type": "v_prediction"}
    kind = PNDMScheduler if name == "pndm" else DPMSolverMultistepScheduler
    theirs = kind.from_config(config)
    theirs.set_timesteps(15)
    ours = solvers.make_scheduler(name, 15, betas=BETAS, prediction_type="v_prediction")
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = expected = latents()[0]
    for t in ours.timesteps:
        x = ours.step(network(x, t), t, x).prev_sample
        expected = theirs.step(network(expected, t), t, expected).prev_sample
        assert torch.equal(x, expected)


def test_only_betas_reach_a_scheduler() -> None:
    with pytest.raises(AssertionError, match="timestep_spacing"):
        solvers.make_scheduler(
            "pndm", 5, betas={**BETAS, "timestep_spacing": "linspace"}, prediction_type="epsilon"
        )
    trained = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]}
    scheduler = solvers.make_scheduler("dpm++", 2, betas=trained, prediction_type="epsilon")
    assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])


def test_each_solver_has_the_step_of_its_row() -> None:
    at = schedule()
    prediction = Prediction(*latents(3))
    for name, step in (("ddpm", solvers.ddpm), ("ddim", solvers.ddim), ("euler", solvers.euler)):
        expected = step(prediction, at(501), at(481))
        found = solvers.stepper(name)(prediction, at(501), at(481))
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.std, expected.std)
