"""The algebra of the noise process, against hand arithmetic and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from preftune.noise import add_noise, predict_from, target
from preftune.solver_names import PredictionType

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
VP: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
T = torch.tensor([1, 500, 990])


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x0 and eps (3, 4, 8, 8), one image for each of T."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=dtype)
    return x0, eps


def level(t: Tensor | int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of Stable Diffusion's betas, in the shape of t."""
    alphas_cumprod = DDPMScheduler(**BETAS).alphas_cumprod.to(dtype)[t]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def flow_level(*sigmas: float) -> tuple[Tensor, Tensor]:
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return 1 - sigma, sigma


def test_by_hand() -> None:
    """alpha 0.8 and sigma 0.6: x = 0.8 x0 + 0.6 eps and v = 0.8 eps - 0.6 x0; in a flow at sigma 0.25, v = eps - x0."""
    x0, eps, alpha, sigma = (torch.tensor([[value]]) for value in (2.0, -1.0, 0.8, 0.6))
    assert add_noise(x0, eps, alpha, sigma).item() == pytest.approx(1.0)
    assert target(x0, eps, alpha, sigma, "v_prediction").item() == pytest.approx(-2.0)
    x, v = torch.tensor([[1.0]]), torch.tensor([[-2.0]])
    for kind, output in (("epsilon", eps), ("v_prediction", v), ("sample", x0)):
        prediction = predict_from(output, x, alpha, sigma, kind)
        assert prediction.x0.item() == pytest.approx(2.0)
        assert prediction.eps.item() == pytest.approx(-1.0)
        assert prediction.output is output
    assert target(x0, eps, torch.tensor(0.75), torch.tensor(0.25), "flow").item() == -3.0
    flow = predict_from(
        torch.tensor([[-3.0]]), torch.tensor([[1.25]]), torch.tensor(0.75), torch.tensor(0.25), "flow"
    )
    assert (flow.x0.item(), flow.eps.item()) == (2.0, -1.0)


@pytest.mark.parametrize("kind", [*VP, "flow"])
def test_a_perfect_network_gives_back_what_was_mixed(kind: PredictionType) -> None:
    x0, eps = tensors()
    alpha, sigma = flow_level(0.1, 0.5, 0.99) if kind == "flow" else level(T, torch.float64)
    output = target(x0, eps, alpha, sigma, kind)
    prediction = predict_from(output, add_noise(x0, eps, alpha, sigma), alpha, sigma, kind)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*VP, "flow"])
def test_any_output_means_an_x0_and_an_eps_that_mix_to_x(kind: PredictionType) -> None:
    """Also for a network that is wrong, the two readings of one output are consistent."""
    output, x = tensors()
    alpha, sigma = flow_level(0.1, 0.5, 0.99) if kind == "flow" else level(T, torch.float64)
    prediction = predict_from(output, x, alpha, sigma, kind)
    torch.testing.assert_close(add_noise(prediction.x0, prediction.eps, alpha, sigma), x, rtol=0, atol=1e-12)


def test_one_level_for_all_or_one_for_each() -> None:
    output, x = tensors(torch.float32)
    for kind in VP:
        each = predict_from(output, x, *level(T), kind)
        for i, t in enumerate(T.tolist()):
            alone = predict_from(output[i : i + 1], x[i : i + 1], *level(t), kind)
            assert torch.equal(alone.x0, each.x0[i : i + 1])
            assert torch.equal(alone.eps, each.eps[i : i + 1])


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    x0, eps = tensors(torch.float32)
    scheduler = DDPMScheduler(**BETAS)
    assert torch.equal(add_noise(x0, eps, *level(T)), scheduler.add_noise(x0, eps, T))
    assert torch.equal(target(x0, eps, *level(T), "v_prediction"), scheduler.get_velocity(x0, eps, T))


@pytest.mark.parametrize("kind", VP)
@pytest.mark.parametrize("t", [981, 501, 1])
def test_x0_is_that_of_a_ddim_step_bit_for_bit(kind: PredictionType, t: int) -> None:
    output, x = tensors(torch.float32)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, prediction_type=kind)
    scheduler.set_timesteps(50)
    expected = scheduler.step(output, t, x).pred_original_sample
    assert torch.equal(predict_from(output, x, *level(t), kind).x0, expected)


@pytest.mark.parametrize("kind", [*VP, "flow"])
def test_zero_terminal_snr(kind: PredictionType) -> None:
    """At alpha 0 the latents are noise alone: v = -x0, and a noise prediction tells nothing of the image."""
    x0, eps = tensors(torch.float32)
    alpha, sigma = torch.tensor([0.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 1.0])
    output = target(x0, eps, alpha, sigma, kind)
    x = add_noise(x0, eps, alpha, sigma)
    if kind == "epsilon":
        with pytest.raises(RuntimeError, match="epsilon says nothing about x_0 at alpha 0"):
            predict_from(output, x, alpha, sigma, kind)
        return
    prediction = predict_from(output, x, alpha, sigma, kind)
    last = slice(0, 3, 2)  # in the middle, alpha^2 + sigma^2 is not 1
    torch.testing.assert_close(prediction.x0[last], x0[last], rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.eps[last], eps[last], rtol=0, atol=1e-6)
    assert prediction.x0.isfinite().all()


def test_gradients_are_the_coefficients() -> None:
    """ReFL lives on d x0 / d output: -sigma / alpha for epsilon, -sigma for v and for flow."""
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    slopes = {"epsilon": -0.75, "v_prediction": -0.6, "sample": 1.0, "flow": -0.6}
    for kind, slope in slopes.items():
        output = torch.ones(1, 1, requires_grad=True)
        predict_from(output, torch.ones(1, 1), alpha, sigma, kind).x0.sum().backward()
        assert output.grad.item() == pytest.approx(slope)


def test_x0_is_not_clipped_and_keeps_its_dtype() -> None:
    x = torch.full((1, 4, 8, 8), 50.0)
    prediction = predict_from(torch.zeros_like(x), x, torch.tensor(0.5), torch.tensor(0.75).sqrt(), "epsilon")
    assert torch.equal(prediction.x0, torch.full_like(x, 100.0))
    half = add_noise(x.half(), x.half(), torch.tensor([0.5]), torch.tensor([0.5]))
    assert half.dtype == torch.float16
