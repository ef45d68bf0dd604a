"""The part of a ReFL update without gradient by a solver of few steps."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from finetune import refl
from preftune.cli import parse
from preftune.families.sd import SD
from preftune.families.tiny import SCHEDULER_CONFIG
from preftune.few_steps import FewStepSolver, latents_at, timesteps
from preftune.resolution import Resolution
from preftune.sampling import initial_noise

pytestmark = pytest.mark.usefixtures("cpu")

PROMPTS = ["a red circle", "two blue stars"]


@pytest.fixture
def family(tmp_path: Path) -> SD:
    return SD(
        unet=tiny.unet(),
        vae=tiny.vae(),
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(tmp_path / "tokenizer"),
        scheduler_config=SCHEDULER_CONFIG,
    )


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def latents(family: SD, solver: FewStepSolver, steps: int, t: int = 250) -> Tensor:
    x, cond = initial_noise((4, 8, 8), generators(), "cpu"), family.encode(PROMPTS)
    return latents_at(family, x, t, cond, 1.0, solver, steps)


def test_timesteps_end_at_the_late_step() -> None:
    assert timesteps(250, 3, 1000) == [999, 749, 500, 250]
    assert timesteps(0, 1, 1000) == [999, 0]
    with pytest.raises(ValueError, match=r"num_steps must lie in 1\.\.9 from timestep 999 to 990, got 10"):
        timesteps(990, 10, 1000)


def test_the_solvers_reach_the_same_latents(family: SD) -> None:
    truth = latents(family, "ddim", 400)
    tried: list[tuple[FewStepSolver, int]] = [("dpm++", 12), ("euler", 12), ("dpm++", 48)]
    error = {one: float((latents(family, *one) - truth).abs().max()) for one in tried}
    assert error["dpm++", 12] < 0.5 * error["euler", 12], "the second order is nearer at equal cost"
    assert error["dpm++", 48] < 0.5 * error["dpm++", 12], "it converges to the latents at the late step"
    assert error["dpm++", 48] < 1e-2 * float(truth.abs().max())
    other = latents(family, "dpm++", 48, t=200)
    assert float((other - truth).abs().max()) > 10 * error["dpm++", 48], "another level has other latents"


FLAGS = (
    "--num-inference-steps",
    "8",
    "--window",
    "5",
    "7",
    "--rollout-solver",
    "dpm++",
    "--rollout-steps",
    "3",
)


def config(make: Callable[..., list[str]], *more: str) -> refl.Config:
    return parse(refl.Config, [*make(), *FLAGS, *more])


@pytest.fixture
def flags(root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make() -> list[str]:
        given: dict[str, Any] = {
            "model": root / "pipeline",
            "prompts": root / "prompts.txt",
            "rewards": "brightness=1",
            "output-dir": tmp_path / "run",
            "resolution": 32,
            "max-train-steps": 3,
            "train-batch-size": 2,
            "gradient-accumulation-steps": 1,
            "num-validation-prompts": 1,
            "sample.num-inference-steps": 1,
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    return make


def test_an_update_calls_the_denoiser_so_often(family: SD, flags: Callable[..., list[str]]) -> None:
    settings = config(flags, "--solver", "ddpm")
    calls: list[int] = []
    family.unet.register_forward_pre_hook(lambda _, args: calls.append(int(args[1][0])))
    size = Resolution(64, 64)
    for late in (5, 7):
        calls.clear()
        taken = refl.late_step(family, PROMPTS, generators(), late, size, settings)
        pixels = family.decode(taken.prediction.x0)
        assert len(calls) == 3 + 1, "three steps without gradient and one with it, whatever the late step"
        assert calls[0] == 999
        assert calls[-1] == family.timesteps(8, "ddpm", size)[late], (
            "the step with gradient is the trajectory's"
        )
        assert pixels.requires_grad


def test_a_run_of_few_steps(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    assert refl.main(config(flags)) == 0
    assert (tmp_path / "run" / "lora").is_dir()
    assert "rollout_steps: 3" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rollout-steps", "6"],
            r"--rollout-steps 6 must lie in 1\.\.5, no more than --window 5 7 has before",
        ),
        (["--rollout-steps", "0"], r"--rollout-steps 0 must lie in 1\.\.5"),
        (
            ["--window", "0", "1"],
            r"--rollout-steps 3 has nothing to shorten: --window 0 1 begins with step 0",
        ),
    ],
)
def test_what_saves_nothing_is_refused(
    words: list[str], message: str, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        refl.main(config(flags, *words))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout-steps", "3"], "--rollout-steps 3 needs --rollout-solver, which is dpm++, ddim or euler"),
        (
            ["--rollout-solver", "ddim"],
            "--rollout-solver ddim needs --rollout-steps, such as --rollout-steps 12",
        ),
    ],
)
def test_one_flag_needs_the_other(
    words: list[str], message: str, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(refl.Config, [*flags(), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
