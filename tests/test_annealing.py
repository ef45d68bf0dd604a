"""Annealed importance guidance: base and tuned predictions mixed step by step, against a loop written out and its two ends."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from eval.models import parse_column
from preftune import ahead, families
from preftune.families.base import Family
from preftune.lora.config import LoRA
from preftune.noise import Prediction
from preftune.sampling import Sampling, mixed, sample
from preftune.solvers import SOLVERS

PROMPTS, SEEDS, SCALE = ["a red circle", "two cats"], [3, 4], 3.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in it, and a LoRA that changes images much."""
    folder = tmp_path_factory.mktemp("run")
    tiny.pipeline_folder(folder / "pipeline", "v_prediction")
    family = families.load(folder / "pipeline")
    denoiser = family.trainable(LoRA(rank=2), 0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.ones_like(parameter))
    family.save_tuned(folder / "lora", LoRA(rank=2))
    return folder


@pytest.fixture(scope="module")
def family(run: Path) -> Family:
    found = families.load(run / "pipeline")
    found.load_tuned(run / "lora")
    return found


def images(family: Family, steps: int, annealing: float | None, solver: str = "ddim") -> Tensor:
    settings = Sampling(
        num_inference_steps=steps, guidance_scale=SCALE, solver=solver, resolution=str(tiny.PIXELS)
    )  # type: ignore[arg-type]
    return torch.cat(list(sample(family, PROMPTS, SEEDS, settings, annealing=annealing)))


def test_a_mixture_by_hand() -> None:
    one, two = (
        Prediction(*(torch.full((1, 1, 1, 1), float(v)) for v in values)) for values in ((0, 2, 4), (4, 2, 8))
    )
    assert [float(part) for part in mixed(one, two, 0.25)] == [1, 2, 5]
    assert [float(part) for part in mixed(one, two, 0.0)] == [0, 2, 4]
    assert [float(part) for part in mixed(one, two, 1.0)] == [4, 2, 8]


@torch.no_grad()
def test_the_loop_written_out(family: Family) -> None:
    """Weights 0, 1/16, 1/4, 9/16 of the tuned model at four steps with power 2."""
    settings = Sampling(
        num_inference_steps=4, guidance_scale=SCALE, solver="ddim", resolution=str(tiny.PIXELS)
    )
    size = settings.resolved(family.defaults).resolution
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    cond, grid = family.encode(PROMPTS), family.timesteps(4, "ddim", size)
    x, _, steps = ahead.trajectory(family, grid, "ddim", family.latent_shape(size), generators)
    for now, weight in zip(steps, (0, 1 / 16, 1 / 4, 9 / 16), strict=True):
        tuned = family.predict(x, now.t, cond, SCALE)
        with family.reference():
            base = family.predict(x, now.t, cond, SCALE)
        parts = [(1 - weight) * old + weight * new for old, new in zip(base, tuned, strict=True)]
        x = ahead.step(Prediction(*parts), now, "ddim")
    expected = family.decode(x).float().clamp(0, 1)
    torch.testing.assert_close(images(family, 4, 2.0), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("solver", [*SOLVERS, "pndm", "dpm++"])
def test_its_two_ends(family: Family, solver: str) -> None:
    """A power near 0 leaves the tuned model from the second step on, a large one the base, in every solver."""
    tuned = images(family, 3, None, solver)
    with family.reference():
        base = images(family, 3, None, solver)
    apart = float((tuned - base).abs().mean())
    assert apart > 1e-3, "the LoRA changes images"
    torch.testing.assert_close(images(family, 3, 1000.0, solver), base, atol=1e-5, rtol=0)
    between = images(family, 3, 1.0, solver)
    assert float((between - base).abs().mean()) > 0
    assert float((between - tuned).abs().mean()) > 1e-4


def test_columns_name_it(run: Path) -> None:
    source = families.locate(str(run / "pipeline"))
    annealed, plain, half = (parse_column(f"x={run}{end}", source) for end in ("@anneal2", "", "@0.5"))
    assert (annealed.annealing, annealed.weight) == (2.0, 1.0)
    assert (half.annealing, half.weight) == (None, 0.5)
    assert len({column.digest() for column in (annealed, plain, half)}) == 3
    for wrong in ("@anneal", "@anneal0", "@anneal-1", "@annealx"):
        with pytest.raises(ValueError, match="as in runs/refl@anneal2"):
            parse_column(f"x={run}{wrong}", source)
