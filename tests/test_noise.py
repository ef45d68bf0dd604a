"""The algebra of the noise process, against hand arithmetic and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from preftune.families.tiny import SCHEDULER_CONFIG
from preftune.noise import Prediction, add_noise, eps_from, target, velocity, x0_from

KINDS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
T = torch.tensor([1, 500, 990])


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x0 and eps (3, 4, 8, 8), one image for each of T."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=dtype)
    return draws[0], draws[1]


def abars() -> Tensor:
    return DDPMScheduler.from_config(SCHEDULER_CONFIG).alphas_cumprod


def test_by_hand() -> None:
    """abar = 0.64: x_t = 0.8 x0 + 0.6 eps and v = 0.8 eps - 0.6 x0."""
    x0, eps, abar = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor(0.64)
    assert add_noise(x0, eps, abar).item() == pytest.approx(1.0)
    assert velocity(x0, eps, abar).item() == pytest.approx(-2.0)
    x_t = torch.tensor([[1.0]])
    assert x0_from(eps, x_t, abar, "epsilon").item() == pytest.approx(2.0)
    assert x0_from(torch.tensor([[-2.0]]), x_t, abar, "v_prediction").item() == pytest.approx(2.0)
    assert eps_from(torch.tensor([[-2.0]]), x_t, abar, "v_prediction").item() == pytest.approx(-1.0)
    assert eps_from(x0, x_t, abar, "sample").item() == pytest.approx(-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_gives_back_what_was_mixed(kind: Prediction) -> None:
    x0, eps = tensors()
    abar = abars()[T]
    x_t = add_noise(x0, eps, abar)
    output = target(x0, eps, abar, kind)
    # add_noise rounds abar to float32; at t = 990 epsilon divides by 0.07 what float64 keeps to 1e-16
    torch.testing.assert_close(x0_from(output, x_t, abar, kind), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_from(output, x_t, abar, kind), eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_any_output_means_an_x0_and_an_eps_that_mix_to_x_t(kind: Prediction) -> None:
    """Also for a network that is wrong, the two readings of one output are consistent."""
    output, x_t = tensors()
    abar = abars()[T]
    mixed = add_noise(x0_from(output, x_t, abar, kind), eps_from(output, x_t, abar, kind), abar)
    torch.testing.assert_close(mixed, x_t, rtol=0, atol=1e-10)


def test_one_abar_for_all_or_one_for_each() -> None:
    x0, eps = tensors()
    abar = abars()[T]
    each = add_noise(x0, eps, abar)
    for i in range(3):
        torch.testing.assert_close(each[i : i + 1], add_noise(x0[i : i + 1], eps[i : i + 1], abar[i]))


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    x0, eps = tensors(torch.float32)
    scheduler = DDPMScheduler.from_config(SCHEDULER_CONFIG)
    abar = abars()[T]
    torch.testing.assert_close(add_noise(x0, eps, abar), scheduler.add_noise(x0, eps, T))
    torch.testing.assert_close(velocity(x0, eps, abar), scheduler.get_velocity(x0, eps, T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [981, 501, 1])
def test_x0_is_that_of_a_ddim_step(kind: Prediction, t: int) -> None:
    output, x_t = tensors(torch.float32)
    scheduler = DDIMScheduler.from_config({**SCHEDULER_CONFIG, "prediction_type": kind})
    scheduler.set_timesteps(50)
    expected = scheduler.step(output, t, x_t).pred_original_sample
    abar = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(x0_from(output, x_t, abar, kind), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_coefficients() -> None:
    """ReFL lives on d x0 / d output: -sqrt(1 - abar) / sqrt(abar) for epsilon, -sqrt(1 - abar) for v."""
    abar = torch.tensor(0.64)
    for kind, slope in (("epsilon", -0.75), ("v_prediction", -0.6), ("sample", 1.0)):
        output = torch.ones(1, 1, requires_grad=True)
        x0_from(output, torch.ones(1, 1), abar, kind).sum().backward()
        assert output.grad.item() == pytest.approx(slope)


def test_x0_is_not_clipped_and_keeps_its_dtype() -> None:
    x_t = torch.full((1, 4, 8, 8), 50.0)
    x0 = x0_from(torch.zeros_like(x_t), x_t, torch.tensor(0.25), "epsilon")
    assert torch.equal(x0, torch.full_like(x_t, 100.0))
    half = add_noise(x_t.half(), x_t.half(), torch.tensor([0.5]))
    assert half.dtype == torch.float16
