"""Rewards' gradients through many steps: the drivers' own functions on numbers worked out by hand, on loops written out here from the
papers' formulas, and against finite differences, all in float64 on tiny networks.
"""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import record_trajectories as recorded
from benchmarks.counter import Counter
from finetune import draft, drtune, flowbp
from preftune import ahead, paths, surrogates
from preftune.ahead import initial_noise
from preftune.families import Family, Pretrained
from preftune.families.base import Cond
from preftune.lora.tuning import LoRA
from preftune.noise import Prediction, predict_from
from preftune.paths import Grid
from preftune.resolution import Resolution
from preftune.training import direct
from preftune.training.checkpoint import read
from preftune.training.config import ModelConfig
from preftune.training.direct_config import DirectConfig
from test_refl import PROMPTS, SIZE, Case

pytestmark = pytest.mark.usefixtures("cpu")

AT = Resolution(SIZE, SIZE)


def settings(num_inference_steps: int, **changes: Any) -> DirectConfig:
    own = {"solver": "ddim", "guidance_scale": 1.0, "guidance_gradient": "both"}
    return DirectConfig(num_inference_steps=num_inference_steps, **{**own, **changes})


def config(program: Any, direct: DirectConfig, **changes: Any) -> Any:
    model = ModelConfig(pretrained=Pretrained(model="none"))
    return program.Config(prompts=Path("none"), model=model, direct=direct, **changes)


def drtuned(family: Any, prompts: Sequence[str], noise: Any, grid: Grid, active: Any, own: Any) -> Tensor:
    parts = surrogates.sparse(grid.levels, active)
    return bypassed(family, prompts, noise, grid, parts, own)[0]


def bypassed(
    family: Any, prompts: Sequence[str], noise: Any, grid: Grid, parts: Any, own: Any
) -> tuple[Tensor, list[Tensor]]:
    settings, share = direct.filled(own.direct), getattr(own, "input_share", None) or 0.0
    scale, gradient = settings.guidance_scale, settings.guidance_gradient
    return paths.surrogate_latents(family, prompts, noise, grid, parts, AT, scale, gradient, share)


# ---------------------------------------------------------------- one number


class Toy:
    """A family of one number whose network is theta times its input; see test_surrogates.py."""

    device = torch.device("cpu")

    def __init__(self, kind: Any) -> None:
        self.prediction_type = kind
        flow = kind == "flow"
        self.theta = torch.full((1, 1, 1, 1), 0.8 if flow else 0.5, dtype=torch.float64, requires_grad=True)
        levels = torch.tensor(
            (1.0, 0.75, 0.5, 0.25, 0.0) if flow else (2.0, 1.0, 0.5, 0.0), dtype=torch.float64
        )
        self.alphas = 1 - levels if flow else 1 / (1 + levels**2).sqrt()
        self.sigmas = levels if flow else levels * self.alphas
        self.x, self.steps = (2.0, 4) if flow else (1.0, 3)
        self.calls: list[tuple[int, bool, bool]] = []

    def encode(self, prompts: Sequence[str]) -> Cond:
        return Cond(positive={"embeds": torch.zeros(len(prompts))}, negative={})

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        return (1, 1, 1)

    def timesteps(self, *_: object) -> Tensor:
        return torch.arange(self.steps, -1, -1)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[self.steps - t], self.sigmas[self.steps - t]

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Prediction:
        self.calls.append((self.steps - int(t[0]), torch.is_grad_enabled(), x.requires_grad))
        return predict_from(self.theta * x.double(), x.double(), *self.schedule(t), self.prediction_type)

    def lean(self) -> AbstractContextManager[None]:
        return torch.no_grad()


def slope(toy: Toy, latents: Tensor) -> float:
    """dr/dtheta as if the sample had begun at the toy's own number: r is in proportion to it."""
    start = float(initial_noise((1, 1, 1), [Generator().manual_seed(0)], "cpu"))
    (gradient,) = torch.autograd.grad(latents.sum(), toy.theta)
    return float(gradient) * toy.x / start


def seeds(count: int = 1) -> list[Generator]:
    return [Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "last", "expected"),
    [
        ("flow", 4, -1.024), ("flow", 1, -0.256), ("flow", 2, -0.512), ("flow", 3, -0.768),
        ("epsilon", 3, -1.754834), ("epsilon", 1, -0.639145), ("epsilon", 2, -1.115689),
    ],
)  # fmt: skip
def test_draft_on_one_number(kind: str, last: int, expected: float) -> None:
    toy: Any = Toy(kind)
    case = config(draft, settings(toy.steps), last_steps=last)
    latents = draft.final_latents(toy, ["a"], seeds(), toy.steps - last, AT, case)
    assert slope(toy, latents) == pytest.approx(expected, abs=1e-6)
    assert toy.calls == [(i, i >= toy.steps - last, i > toy.steps - last) for i in range(toy.steps)]


@pytest.mark.parametrize(
    ("kind", "active", "expected"),
    [
        ("flow", (0, 1, 2, 3), -1.476), ("flow", (0, 2), -0.82),
        ("epsilon", (0, 1, 2), -2.252938), ("epsilon", (0, 2), -1.639145),
    ],
)  # fmt: skip
def test_drtune_on_one_number(kind: str, active: tuple[int, ...], expected: float) -> None:
    toy: Any = Toy(kind)
    case = config(drtune, settings(toy.steps))
    grid = paths.grid(toy, toy.steps, "ddim", AT).until(toy.steps - 1)
    latents = drtuned(toy, ["a"], seeds(), grid, active, case)
    assert slope(toy, latents) == pytest.approx(expected, abs=1e-6)
    assert toy.calls[toy.steps :] == [(i, True, False) for i in active], "live calls, detached inputs"


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_drtune_stops_early(stop: int) -> None:
    """The chain's gradient also runs through the predicted clean image x_m - sigma_m v_m: weight -sigma_m of its own step."""
    toy: Any = Toy("flow")
    case = config(drtune, settings(4))
    grid = paths.grid(toy, 4, "ddim", AT).until(stop)
    latents = drtuned(toy, ["a"], seeds(), grid, range(stop + 1), case)
    states = [2 * 0.8**i for i in range(stop + 1)]
    sigma = 1 - 0.25 * stop
    expected = sum(-0.25 * x for x in states[:-1]) - sigma * states[-1]
    assert slope(toy, latents) == pytest.approx(expected, abs=1e-6)
    start = float(initial_noise((1, 1, 1), seeds(), "cpu")) / 2
    assert float(latents.detach().sum()) == pytest.approx(start * states[-1] * (1 - sigma * 0.8), rel=1e-6)
    assert len(toy.calls) == 2 * (stop + 1), "nothing runs after the step that is scored"


@pytest.mark.parametrize(
    ("kind", "share", "expected"),
    [
        ("flow", 0.0, -1.64), ("flow", 0.3, -1.52), ("flow", 1.0, -1.24),
        ("epsilon", 0.0, -2.139145), ("epsilon", 0.3, -2.038522), ("epsilon", 1.0, -1.803735),
    ],
)  # fmt: skip
def test_leapalign_on_one_number(kind: str, share: float, expected: float) -> None:
    toy: Any = Toy(kind)
    case = config(flowbp, settings(toy.steps), surrogate="leapalign", input_share=share)
    grid = paths.grid(toy, toy.steps, "ddim", AT)
    parts = surrogates.leaps(grid.levels, 0, 2)
    latents, misses = bypassed(toy, ["a"], seeds(), grid, parts, case)
    assert slope(toy, latents) == pytest.approx(expected, abs=1e-6)
    start = float(initial_noise((1, 1, 1), seeds(), "cpu"))
    if kind == "flow":
        assert float(misses[0]) == pytest.approx(0.08 * abs(start) / 2, rel=1e-6)
    else:  # of latents: alpha_2 |y_2 - (y_0 + (.5 - 2) .5 x_0)|, y_0 = x_0 / alpha_0
        alphas = [1 / math.sqrt(1 + level**2) for level in (2, 1, 0.5)]
        y = [1 / alphas[0]]
        for alpha, width in zip(alphas, (-1, -0.5), strict=False):
            y.append(y[-1] + width * 0.5 * alpha * y[-1])
        assert float(misses[0]) == pytest.approx(abs(start) * alphas[2] * abs(y[2] - (y[0] - 0.75)), rel=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, -1.476), (0.5, -1.386), (1.0, -1.296)])
def test_bridge_on_one_number(share: float, expected: float) -> None:
    toy: Any = Toy("flow")
    case = config(flowbp, settings(4), surrogate="bridge", input_share=share)
    grid = paths.grid(toy, 4, "ddim", AT)
    parts = surrogates.bridge(grid.levels, 2, range(4))
    latents, _ = bypassed(toy, ["a"], seeds(), grid, parts, case)
    assert slope(toy, latents) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- tiny networks


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family returns float32 whatever its parts hold; differences need all of it in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def loop(
    case: Case,
    steps: int,
    first: int,
    *,
    guidance: float,
    eta: float,
    live_negative: bool = True,
    detach_inputs: bool = False,
    active: Sequence[int] | None = None,
    stop: int | None = None,
) -> list[Tensor]:
    """Final latents by DDIM (arXiv 2010.02502, eq. 12 and 16) from the formulas: no shared code but the networks.

    With detach_inputs, eps is a function of constants, and of the weights in the active steps alone; `stop` gives x_0 there.
    """
    family, generators = case.family, case.generators()
    given, without = (family.encode(texts).positive["embeds"] for texts in (PROMPTS, [""] * len(PROMPTS)))
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    stride = 1000 // steps
    x = torch.cat([torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=g) for g in generators]).double()
    seen = [x]
    for index in range(steps):
        t = stride * (steps - 1 - index) + 1
        a, b = abar[t], abar[max(0, t - stride)]
        inner = x.detach() if detach_inputs else x

        def call(inner: Tensor = inner, t: int = t, a: Tensor = a) -> Tensor:
            given_out = family.unet(inner, t, given).sample
            with torch.set_grad_enabled(live_negative and torch.is_grad_enabled()):
                plain = family.unet(inner, t, without).sample
            out = plain + guidance * (given_out - plain) if guidance != 1 else given_out
            if family.prediction_type == "epsilon":
                return out
            return a.sqrt() * out + (1 - a).sqrt() * inner

        eps = call() if active is None or index in active else call().detach()
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if index == stop:
            return [*seen, x0]
        std = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        x = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
        if eta:
            noise = torch.cat([torch.randn(1, *x.shape[1:], generator=g) for g in generators]).double()
            x = x + std * noise
        if index < first:
            x = x.detach()
        seen.append(x)
    return seen


def case_loss(case: Case, latents: Tensor) -> Tensor:
    return case.loss(case.family.decode(latents))


def moved(case: Case, amount: float, loss: Any) -> float:
    with torch.no_grad():
        for weight, way in zip(case.weights, case.direction, strict=True):
            weight += amount * way
        found = float(loss())
        for weight, way in zip(case.weights, case.direction, strict=True):
            weight -= amount * way
    return found


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_draft_through_all_steps_is_the_whole_gradient(
    prediction: str, guidance: float, eta: float, tmp_path: Path, in_float64: None
) -> None:
    """Plain autograd through the loop, and finite differences."""
    case = Case(tmp_path, prediction, LoRA(rank=2))
    own = config(draft, settings(3, guidance_scale=guidance), last_steps=3, eta=eta)

    def loss() -> Tensor:
        return case_loss(case, draft.final_latents(case.family, PROMPTS, case.generators(), 0, AT, own))

    found, plain = loss(), case_loss(case, loop(case, 3, 0, guidance=guidance, eta=eta)[-1])
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    assert case.slope(found) == pytest.approx(case.slope(plain), rel=1e-4)
    h = 1e-5
    finite = (moved(case, h, loss) - moved(case, -h, loss)) / (2 * h)
    assert case.slope(loss()) == pytest.approx(finite, rel=1e-5)


@pytest.mark.parametrize("gradient", ["both", "positive"])
@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_draft_through_the_last_steps(
    prediction: str, last: int, gradient: Any, tmp_path: Path, in_float64: None
) -> None:
    case = Case(tmp_path, prediction, LoRA(rank=2))
    own = config(draft, settings(4, guidance_scale=3.0, guidance_gradient=gradient), last_steps=last)
    found = case_loss(case, draft.final_latents(case.family, PROMPTS, case.generators(), 4 - last, AT, own))
    live = gradient == "both"
    plain, less, other = (
        case_loss(case, loop(case, 4, first, guidance=3.0, eta=0.0, live_negative=negative)[-1])
        for first, negative in ((4 - last, live), (5 - last, live), (4 - last, not live))
    )
    want = case.slope(plain)
    assert case.slope(found) == pytest.approx(want, rel=1e-4)
    if last > 1:
        assert abs(case.slope(less) - want) > 1e-3 * abs(want), "one step less would be seen"
    assert abs(case.slope(other) - want) > 1e-3 * abs(want), "the other gradient of guidance would be seen"


def test_low_variance_repeats_the_last_step(tmp_path: Path, in_float64: None) -> None:
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    own = config(draft, settings(4), lv_copies=2)
    generators = case.generators()
    found = draft.final_latents(case.family, PROMPTS, generators, 3, AT, own)
    once = config(draft, settings(4))
    alone, again = (
        draft.final_latents(case.family, PROMPTS, case.generators(), 3, AT, once) for _ in range(2)
    )
    assert torch.equal(found[: len(PROMPTS)], alone), "without copies it is DRaFT-1"
    family = case.family
    a, b = (family.noise.alphas_cumprod[t].double() for t in (1, 0))
    given = family.encode(PROMPTS).positive["embeds"]
    copies = case.generators()
    for g in copies:
        torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=g)
    expected = [alone]
    for _ in range(2):
        noise = torch.cat([torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=g) for g in copies]).double()
        x = a.sqrt() * alone.detach() + (1 - a).sqrt() * noise
        eps = family.unet(x, 1, given).sample
        expected.append(b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=1e-6)
    want = case.slope(case_loss(case, torch.cat(expected)))
    assert case.slope(case_loss(case, found)) == pytest.approx(want, rel=1e-4)
    assert abs(case.slope(case_loss(case, again)) - want) > 1e-3 * abs(want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("active", "stop"), [((0, 1, 2, 3), 3), ((0, 2), 2), ((1,), 3)])
def test_drtune_is_the_chain_of_constants(
    active: tuple[int, ...], stop: int, prediction: str, tmp_path: Path, in_float64: None
) -> None:
    """The chain x <- step(x, eps(sg x)) keeps its gradient through steps that are not active; the network's inputs have none."""
    case = Case(tmp_path, prediction, LoRA(rank=2))
    own = config(drtune, settings(4, guidance_scale=3.0, guidance_gradient="positive"))
    grid = paths.grid(case.family, 4, "ddim", AT).until(stop)
    latents = drtuned(case.family, PROMPTS, case.generators(), grid, active, own)
    with torch.no_grad():
        path = paths.roll_out(case.family, case.family.encode(PROMPTS), grid, case.generators(), AT, 3.0)
    assert torch.equal(latents, path.latents), "the value is the trajectory's, bit for bit"
    plain = loop(
        case, 4, 0, guidance=3.0, eta=0.0, live_negative=False, detach_inputs=True, active=active, stop=stop
    )[-1]
    torch.testing.assert_close(latents, plain, rtol=1e-5, atol=1e-5)
    want = case.slope(case_loss(case, plain))
    assert case.slope(case_loss(case, latents)) == pytest.approx(want, rel=1e-4)
    live = loop(case, 4, 0, guidance=3.0, eta=0.0, live_negative=False, active=active, stop=stop)[-1]
    if len(active) > 1:
        assert abs(case.slope(case_loss(case, live)) - want) > 1e-3 * abs(want), "live inputs would be seen"


@pytest.mark.parametrize("name", list(flowbp.PUBLISHED))
def test_flowbp_gives_what_sampling_gives(name: Any, root: Path, in_float64: None, tmp_path: Path) -> None:
    """Bit for bit the final latents of the trajectory, which are those of the solver's own steps."""
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    family = case.family
    own = flowbp.with_published(config(flowbp, settings(6), surrogate=name))
    grid = paths.grid(family, 6, "ddim", AT)
    parts = flowbp.CHOOSE[name](np.random.default_rng(0), grid.levels, flowbp.values_of(own))
    latents, misses = bypassed(family, PROMPTS, case.generators(), grid, parts, own)
    shape = family.latent_shape(AT)
    x, _, steps = ahead.trajectory(family, grid.timesteps, "ddim", shape, case.generators())
    cond = family.encode(PROMPTS)
    with family.lean():
        for now in steps:
            x = ahead.step(family.predict(x, now.t, cond), now, "ddim")
    assert torch.equal(latents, x)
    assert all(miss.shape == (len(PROMPTS),) and not miss.requires_grad for miss in misses)
    assert case.slope(case_loss(case, latents)) != 0


def test_leaps_and_bridges_are_steps_of_ddim(tmp_path: Path, in_float64: None) -> None:
    """LeapAlign and FlowBP-Bridge written out on latents x: a leap is one step of DDIM, ended by the true state's value."""
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    family, share = case.family, 0.3
    with torch.no_grad():
        states = loop(case, 4, 0, guidance=1.0, eta=0.0)
    given = family.encode(PROMPTS).positive["embeds"]
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    times = [751, 501, 251, 1, 0]

    def eps(x: Tensor, i: int) -> Tensor:
        return family.unet(x, times[i], given).sample

    def step(x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
        a, b = abar[times[i]], abar[times[j]]
        return b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise

    def through(x: Tensor, i: int, j: int, active: Sequence[int], inner: Tensor | None = None) -> Tensor:
        for k in range(i, j):
            noise = eps(inner if k == i and inner is not None else states[k], k)
            x = step(x, noise if k in active else noise.detach(), k, k + 1)
        return x

    def connected(first: Tensor, j: int) -> tuple[Tensor, Tensor]:
        x = first + (states[j] - first).detach()
        return x, share * x + (1 - share) * x.detach()

    x, inner = connected(step(states[1], eps(states[1], 1), 1, 2), 2)
    leapt = step(x, eps(inner, 2), 2, 4)
    x, inner = connected(through(states[0], 0, 2, (1,)), 2)
    bridged = through(x, 2, 4, (2, 3), inner)
    summed = through(states[0], 0, 4, (0, 3))

    grid = paths.grid(family, 4, "ddim", AT)
    for surrogate, parts, written in (
        ("leapalign", surrogates.leaps(grid.levels, 1, 2), leapt),
        ("bridge", surrogates.bridge(grid.levels, 2, (1, 2, 3)), bridged),
        ("sparse", surrogates.sparse(grid.levels, (0, 3)), summed),
    ):
        more = {} if surrogate == "sparse" else {"input_share": share}
        own = config(flowbp, settings(4), surrogate=surrogate, **more)
        latents, _ = bypassed(family, PROMPTS, case.generators(), grid, parts, own)
        value = written + (latents - written).detach()  # the surrogate's value is the true end
        want = case.slope(case_loss(case, value))
        assert case.slope(case_loss(case, latents)) == pytest.approx(want, rel=1e-4), surrogate


def test_the_grid_ends_where_sampling_ends(root: Path, tmp_path: Path) -> None:
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    grid = paths.grid(case.family, 4, "ddim", AT)
    alphas_cumprod = case.family.noise.alphas_cumprod[[751, 501, 251, 1, 0]].double()
    assert grid.scales == pytest.approx(alphas_cumprod.sqrt().tolist(), rel=1e-6)
    assert grid.levels == pytest.approx((1 / alphas_cumprod - 1).sqrt().tolist(), rel=1e-4)
    cut = grid.until(2)
    assert cut.timesteps.tolist() == [751, 501, 251, 1]
    assert cut.scales == (*grid.scales[:3], 1.0)
    assert cut.levels == (*grid.levels[:3], 0.0)
    assert isinstance(cut, Grid)


def test_the_published_number_of_active_steps_is_at_most_all_steps() -> None:
    """A distilled model has four; replayed from its config.yaml, the run is not refused."""
    few, many = (flowbp.with_published(config(flowbp, settings(n), surrogate="bridge")) for n in (4, 25))
    assert (few.active_steps, many.active_steps) == (4, 5)


# ---------------------------------------------------------------- the base model


@pytest.mark.parametrize("gradient", ["both", "positive"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_distance_to_the_base_is_that_of_guided_noise_at_the_live_steps(
    prediction: str, gradient: Any, tmp_path: Path, in_float64: None
) -> None:
    """Written out for the last two of four steps, at latents that are constants; the sample and its gradient are as without it."""
    case, plain = (Case(tmp_path, prediction, LoRA(rank=2)) for _ in range(2))
    with torch.no_grad():
        for weight in plain.weights:
            weight.zero_()
        states = loop(case, 4, 0, guidance=3.0, eta=0.0)
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)

    def noise(of: Case, i: int) -> Tensor:
        t, x = 250 * (3 - i) + 1, states[i]
        given, without = (of.family.encode(texts).positive["embeds"] for texts in (PROMPTS, [""] * 2))
        out, empty = (of.family.unet(x, t, embeds).sample for embeds in (given, without))
        empty = empty.detach() if gradient == "positive" else empty
        out = empty + 3 * (out - empty)
        return out if prediction == "epsilon" else abar[t].sqrt() * out + (1 - abar[t]).sqrt() * x

    own = config(draft, settings(4, guidance_scale=3.0, guidance_gradient=gradient), last_steps=2)
    found: list[Tensor] = []
    latents = draft.final_latents(case.family, PROMPTS, case.generators(), 2, AT, own, found)
    expected = [(noise(case, i) - noise(plain, i).detach()).square().mean((1, 2, 3)) for i in (2, 3)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-9)
    without = draft.final_latents(case.family, PROMPTS, case.generators(), 2, AT, own)
    assert torch.equal(latents, without)
    distance, reward = case.slope(torch.stack(expected).mean()), case.slope(case_loss(case, without))
    weight = reward / distance  # both parts count
    both = case_loss(case, latents) + weight * torch.stack(found).mean()
    assert case.slope(both) == pytest.approx(2 * reward, rel=1e-4)


def run_with_distance(
    driver: str, weight: float, root: Path, output: Path, *flags: str
) -> list[dict[str, float]]:
    argv = [*recorded.arguments(driver, root, output), "--base-distance", str(weight), *flags]
    assert recorded.train(driver, argv) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


_BRIEF = ("--max-train-steps", "2", "--num-validation-prompts", "1", "--checkpointing-steps", "0", "--gradient-accumulation-steps", "1")  # fmt: skip


_ONE_AT_ONCE = [
    pytest.param("draft", marks=pytest.mark.slow),
    "drtune",
    pytest.param("flowbp", marks=pytest.mark.slow),
]
"""All three share the loop's parts; trainings of one are enough where not all tests are run."""


@pytest.mark.parametrize("driver", _ONE_AT_ONCE)
def test_the_distance_is_part_of_the_loss(driver: str, root: Path, tmp_path: Path) -> None:
    """0 before the first update; in the second the loss is that of a run without it, and the weighted distance."""
    light, heavy = (
        run_with_distance(driver, weight, root, tmp_path / f"{weight:g}", *_BRIEF) for weight in (1e-9, 1e2)
    )
    assert [rows[0]["base_distance"] for rows in (light, heavy)] == pytest.approx([0, 0], abs=1e-12)
    distance = heavy[1]["base_distance"]
    assert distance == pytest.approx(light[1]["base_distance"], rel=0.05), "it had no gradient before"
    assert heavy[1]["loss"] - light[1]["loss"] == pytest.approx(1e2 * distance, rel=0.05)
    assert distance > 1e-8


@pytest.mark.slow
def test_the_distance_to_the_base_holds_the_model_back(root: Path, tmp_path: Path) -> None:
    flags = (
        *_BRIEF,
        "--adam-epsilon",
        "1e-8",
        "--jitter",
        "0",
        "--jitter-copies",
        "1",
        "--max-train-steps",
        "6",
    )
    free, held = (
        run_with_distance("draft", weight, root, tmp_path / f"{weight:g}", *flags)[-1]["base_distance"]
        for weight in (1e-9, 1e3)
    )
    assert held < 0.5 * free


@pytest.mark.parametrize("program", [draft, drtune, flowbp])
def test_wrong_distances(program: Any) -> None:
    with pytest.raises(ValueError, match="--base-distance must be 0 or more and finite, got nan"):
        config(program, settings(4, base_distance=math.nan))
    full = ModelConfig(pretrained=Pretrained(model="none"), train="full")
    with pytest.raises(ValueError, match="and --train full has none"):
        program.Config(prompts=Path("none"), model=full, direct=settings(4, base_distance=1.0))


# ---------------------------------------------------------------- memory


def gradients(case: Case, latents: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(case_loss(case, latents), case.weights))


PROGRAMS = {
    "draft": lambda family, own: draft.final_latents(family, PROMPTS, seeds(2), 1, AT, own),
    "drtune": lambda family, own: drtuned(
        family, PROMPTS, seeds(2), paths.grid(family, 4, "ddim", AT).until(3), (0, 1, 3), own
    ),
    "flowbp": lambda family, own: bypassed(
        family,
        PROMPTS,
        seeds(2),
        grid := paths.grid(family, 4, "ddim", AT),
        surrogates.leaps(grid.levels, 0, 2),
        own,
    )[0],
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "draft": (draft, {"last_steps": 3}),
    "drtune": (drtune, {}),
    "flowbp": (flowbp, {"surrogate": "leapalign", "input_share": 0.3}),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("gradient", ["both", "positive"])
def test_checkpointed_calls_have_the_same_gradient_bit_for_bit(
    gradient: Any, program: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    case.family.to("cpu", torch.float32)
    for weight in case.weights:
        weight.data = weight.data.float()
    case.filters = case.filters.float()
    module, changes = CONFIGS[program]
    own = config(module, settings(4, guidance_scale=3.0, guidance_gradient=gradient), **changes)
    counts, kept = [0, 0], [0, 0]

    def run(which: int) -> list[Tensor]:
        def count(*_: object) -> None:
            counts[which] += 1

        def keep(tensor: Tensor) -> Tensor:
            kept[which] += tensor.numel()
            return tensor

        handle = case.family.unet.conv_in.register_forward_pre_hook(count)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            latents = PROGRAMS[program](case.family, own)
        found = gradients(case, latents)
        handle.remove()
        return found

    plain = run(0)
    direct.checkpoint_calls(case.family.denoiser)
    checkpointed = run(1)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    live = 2 if program == "flowbp" else 3
    assert counts[1] == counts[0] + live, "each live call again, those without gradient not"
    assert kept[1] < 0.1 * kept[0], "activations are not kept"


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_live_steps(train: str, tmp_path: Path) -> None:
    """The peak of what is alive beyond the model, one call's activations at a time; without checkpoints it grows."""

    def peak(last: int, *, checkpointed: bool) -> float:
        case = Case(
            tmp_path / f"{train}{last}{checkpointed}", "epsilon", LoRA(rank=2) if train == "lora" else None
        )
        case.family.to("cpu", torch.float32)
        for weight in case.weights:
            weight.data = weight.data.float()
        case.filters = case.filters.float()
        own = config(draft, settings(8, guidance_scale=3.0), last_steps=last)
        if checkpointed:
            direct.checkpoint_calls(case.family.denoiser)
        with Counter() as counter:
            gradients(case, draft.final_latents(case.family, PROMPTS, seeds(2), 8 - last, AT, own))
        return counter.peak

    flat = [peak(last, checkpointed=True) for last in (2, 8)]
    grown = [peak(last, checkpointed=False) for last in (2, 8)]
    assert flat[1] < 1.15 * flat[0]
    assert grown[1] > 1.5 * grown[0]


def test_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    case.family.to("cpu", torch.float32)
    latents = torch.randn(3, 4, 4, 4, requires_grad=True)
    seen: list[int] = []
    case.family.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pixels = direct.decoded(case.family, latents)
    whole = case.family.decode(latents)
    torch.testing.assert_close(pixels, whole, rtol=1e-4, atol=1e-5)
    gradient, want = (torch.autograd.grad(x.square().sum(), latents)[0] for x in (pixels, whole))
    torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-4)
    assert seen == [1, 1, 1, 3, 1, 1, 1]


# ---------------------------------------------------------------- losses and guards


def test_losses_by_hand() -> None:
    rewards = torch.tensor([-0.5, 0.3, 0.55, 2.0])
    assert direct.losses(rewards, None).tolist() == pytest.approx([0.5, -0.3, -0.55, -2.0])
    assert direct.losses(rewards, 0.55).tolist() == pytest.approx([1.05, 0.25, 0, 0])


@pytest.mark.parametrize(
    ("clamp", "values", "slopes"),
    [
        ("none", [-0.5, 0.3, 1.7], [1, 1, 1]),
        ("straight-through", [0, 0.3, 1], [1, 1, 1]),
        ("clamp", [0, 0.3, 1], [0, 1, 0]),
    ],
)
def test_the_clamps(clamp: Any, values: list[float], slopes: list[float]) -> None:
    class Decoder:
        def decode(self, x: Tensor) -> Tensor:
            return x

    family: Any = Decoder()
    latents = torch.tensor([[-0.5, 0.3, 1.7]], requires_grad=True)
    pixels = direct.decoded(family, latents, clamp)
    assert pixels[0].tolist() == pytest.approx(values)
    assert torch.autograd.grad(pixels.sum(), latents)[0][0].tolist() == slopes


def test_a_gradient_above_the_limit_ends_the_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*recorded.arguments("drtune", root, tmp_path), "--grad-norm-limit", "1e-9"]
    with pytest.raises(SystemExit) as stop:
        recorded.train("drtune", argv)
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "gradient norm at step 0 is" in said
    assert f"checkpoint is {tmp_path / 'step_000000'}" in said


# ---------------------------------------------------------------- the released AlignProp


class Unfamiliar(nn.Module):
    """A reward of pixels for the comparison: smooth, of all pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, pixels[0].numel(), dtype=pixels.dtype).view(pixels.shape[1:])
        return torch.tanh(pixels * ramp).mean((1, 2, 3))


@pytest.mark.parametrize("truncation_step", [1, 3])
def test_alignprop_as_released(truncation_step: int, tmp_path: Path, in_float64: None) -> None:
    """Its loop, written out as its code behaves (sd_pipeline.py, alignprop_trainer.py at b22918a): DDIM with eta 1, each prediction before
    the truncation detached, both branches of guidance live, each image normalised twice and clamped.

    Latents and their gradient agree. The reward's gradient differs by two facts alone: the second normalisation maps [0, 1] to [0.5, 1]
    and halves the slope, and the clamp removes pixels outside [0, 1].
    """
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    family, steps, guidance = case.family, 4, 5.0
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    generators = case.generators()
    embeds = torch.cat([family.encode(texts).positive["embeds"] for texts in ([""] * len(PROMPTS), PROMPTS)])
    latents = torch.cat([torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=g) for g in generators]).double()
    for i in range(steps):
        t = 250 * (steps - 1 - i) + 1
        noise_pred = family.unet(torch.cat([latents] * 2), t, embeds).sample
        if i < truncation_step:
            noise_pred = noise_pred.detach()
        uncond, text = noise_pred.chunk(2)
        noise_pred = uncond + guidance * (text - uncond)
        a, b = abar[t], abar[max(0, t - 250)]
        x0 = (latents - (1 - a).sqrt() * noise_pred) / a.sqrt()
        variance = (1 - b) / (1 - a) * (1 - a / b)
        latents = b.sqrt() * x0 + (1 - b - variance).sqrt() * noise_pred
        noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=g) for g in generators]).double()
        latents = latents + variance.sqrt() * noise
    image = family.vae.decode(latents / 0.18215).sample
    once = image / 2 + 0.5  # what the pipeline's postprocessing returns, clamped to [0, 1]
    twice = (once.clamp(0, 1) / 2 + 0.5).clamp(0, 1)  # what the scorer of the released losses is given

    own = config(draft, settings(steps, guidance_scale=guidance), truncation="uniform", eta=1.0, last_steps=1)
    ours = draft.final_latents(family, PROMPTS, case.generators(), truncation_step, AT, own)
    torch.testing.assert_close(ours, latents, rtol=1e-5, atol=1e-5)
    pixels = direct.decoded(family, ours)
    torch.testing.assert_close(pixels, once, rtol=1e-4, atol=1e-4)
    reward = Unfamiliar()

    def along(loss: Tensor) -> float:
        gradient = torch.autograd.grad(loss, case.weights, retain_graph=True)
        return sum(float((g * d).sum()) for g, d in zip(gradient, case.direction, strict=True))

    assert along(reward(pixels).mean()) == pytest.approx(along(reward(once).mean()), rel=1e-4)
    # The same two facts put into ours give the released gradient, which is another one.
    inside = direct.decoded(family, ours, "clamp")
    released = along(reward(twice).mean())
    assert along(reward(inside / 2 + 0.5).mean()) == pytest.approx(released, rel=1e-4)
    assert abs(along(reward(pixels).mean()) - released) > 1e-2 * abs(released)
    # For a reward in proportion to the pixels the second normalisation is a factor of one half.
    assert along(twice.mean()) == pytest.approx(along(inside.mean()) / 2, rel=1e-4)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("driver", _ONE_AT_ONCE)
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(
    driver: str, root: Path, tmp_path: Path
) -> None:
    flags = [*recorded.arguments(driver, root, tmp_path / "straight"), "--ema-decay", "0.9"]
    assert recorded.train(driver, flags) == 0
    checkpoint = tmp_path / "straight" / "step_000001"
    again = [*flags, "--resume-from-checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "again")]
    assert recorded.train(driver, again) == 0
    one, other = (read(tmp_path / name / "step_000003") for name in ("straight", "again"))
    for name, weight in one["parameters"].items():
        assert torch.equal(weight, other["parameters"][name])
    assert all(torch.equal(a, b) for a, b in zip(one["average"], other["average"], strict=True))


def test_the_family_protocol_is_what_the_toy_has() -> None:
    """What the drivers use of a family: no name that its protocol lacks."""
    own = {name for name in vars(Toy) if not name.startswith("_")} | {"prediction_type"}
    assert own - {"schedule"} <= {*dir(Family), *Family.__annotations__}
