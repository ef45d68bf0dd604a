"""Scores along the denoising steps: those of the very images that sampling and ReFL make, and the window by hand."""

import csv
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import rewards
import tiny
from eval import step_scores, steps
from finetune import refl
from preftune import cli, families
from preftune.families.base import Family
from preftune.resolution import Resolution
from preftune.sampling import Resolved, sample

PROMPTS = ["a red circle", "a blue cross", "a red circle"]
SAMPLING = Resolved(
    num_inference_steps=4, guidance_scale=1.0, solver="ddpm", resolution=Resolution(64, 64), batch_size=3
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny.pipeline_folder(folder)
    return folder


@pytest.fixture(scope="module")
def family(model: Path) -> Family:
    return families.load(model)


def test_the_last_score_is_that_of_the_sampled_image(family: Family) -> None:
    scorer = rewards.load("brightness")
    scores, kept = step_scores.score_steps(family, [scorer], PROMPTS, [3, 4, 5], SAMPLING, keep=[1])
    images = torch.cat(list(sample(family, PROMPTS, [3, 4, 5], SAMPLING)))
    assert scores.shape == (5, 3, 1)
    assert scores[-1, :, 0] == pytest.approx(scorer(images, PROMPTS).numpy(), abs=1e-6)
    assert torch.equal(kept[0][-1], images[1])
    assert scores[-2] == pytest.approx(scores[-1], abs=1e-5), "the last step predicts the image"
    assert np.abs(scores[0] - scores[-1]).max() > 1e-4


@pytest.mark.parametrize("late", [0, 2])
def test_a_steps_image_is_the_one_that_refl_scores(family: Family, model: Path, late: int) -> None:
    flags = [
        "--model",
        str(model),
        "--prompts",
        "a red circle",
        "--num-inference-steps",
        "4",
        "--solver",
        "ddpm",
    ]
    config = cli.parse(refl.Config, [*flags, "--window", "2", "3"])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    with torch.no_grad():
        taken = refl.late_step(family, PROMPTS, generators, late, SAMPLING.resolution, config)
        pixels = family.decode(taken.prediction.x0)
    scorer = rewards.load("brightness")
    _, kept = step_scores.score_steps(family, [scorer], PROMPTS, [3, 4, 5], SAMPLING, keep=[0, 1, 2])
    found = torch.stack([images[late] for images in kept])
    assert torch.allclose(found, pixels.clamp(0, 1), atol=1e-5)


def test_correlation_is_spearmans_within_prompts() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 5, 6, 2)) + 10 * rng.normal(size=(1, 5, 1, 2))
    scores[1] = scores[2] + 0.3 * rng.normal(size=scores[2].shape)
    found = step_scores.correlations(scores)
    for step, scorer in itertools.product(range(2), range(2)):
        each = [
            scipy.stats.spearmanr(scores[step, p, :, scorer], scores[2, p, :, scorer])[0] for p in range(5)
        ]
        assert found[step, scorer, 0] == pytest.approx(np.mean(each))
        assert found[step, scorer, 1] <= found[step, scorer, 0] <= found[step, scorer, 2]
    assert (found[0, :, 2] - found[0, :, 1] > 0.2).all()


def test_a_prompt_whose_images_tie_counts_nothing() -> None:
    """Two prompts, three seeds: one in the same order, one whose final scores are alike."""
    scores = np.array([[[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], [[1.0, 5.0, 9.0], [7.0, 7.0, 7.0]]])[..., None]
    assert step_scores.correlations(scores)[0, 0, 0] == pytest.approx(1)
    assert np.isnan(step_scores.correlations(scores[:, 1:])).all()
    assert np.isnan(step_scores.correlations(scores[:, :1])[0, 0, 1:]).all(), "one prompt has no interval"


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([0.1, 0.95, 0.5, 0.92, 0.99, 1.0], 3),
        ([0.95, 0.95, 0.95, 1.0], 0),
        ([0.1, 0.2, 0.3, 1.0], None),
        ([0.1, 0.2, 0.9, 1.0], None),
        ([0.95, np.nan, 0.95, 1.0], 2),
    ],
)
def test_first_step_by_hand(values: list[float], first: int | None) -> None:
    """From it on all are above .9; the last step says nothing, and .9 is not above .9."""
    assert step_scores.first_step(np.array(values), 0.9) == first


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the program as from the command line; returns its folder."""

    def start(*words: str) -> Path:
        argv = ["--model", str(model), "--prompts", *PROMPTS[:2], "--rewards", "brightness"]
        argv += ["--num-images-per-prompt", "3", "--num-inference-steps", "4", "--resolution", "64"]
        folder = tmp_path / "out"
        argv += ["--output-dir", str(folder), *words]
        assert steps.main(cli.parse(steps.Config, argv)) == 0
        return folder

    return start


def test_the_program_prints_a_window_that_refl_takes(
    run: Callable[..., Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("--threshold", "0.01", "--solver", "ddim", "--guidance-scale", "2")
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("brightness: ")]
    flags = line.removeprefix("brightness: ").split()
    config = cli.parse(refl.Config, ["--model", str(model), "--prompts", "a red circle", *flags])
    assert config.window is not None
    assert (config.window[1], config.num_inference_steps, config.solver, config.guidance_scale) == (
        3,
        4,
        "ddim",
        2,
    )
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["seed"], row["step"]) for row in rows[4:7]] == [
        ("a red circle", "0", "4"), ("a red circle", "1", "0"), ("a red circle", "1", "1"),
    ]  # fmt: skip
    assert {row["seed"] for row in rows if row["prompt"] == "a blue cross"} == {"3", "4", "5"}
    assert {"steps.csv", "steps.png", "predictions.png", "steps.json"} <= {
        path.name for path in folder.iterdir()
    }


def test_another_report_is_not_replaced(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run()
    with pytest.raises(SystemExit) as stop:
        run("--seed", "7")
    assert stop.value.code == 2
    assert "other seed" in capsys.readouterr().err
    run("--seed", "7", "--overwrite-output-dir")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-images-per-prompt", "1"], "--num-images-per-prompt must be at least 2, got 1"),
        (["--threshold", "1.5"], "--threshold must lie between 0 and 1, got 1.5"),
        (["--solver", "pndm"], "--sample.solver pndm is no solver of `preftune refl`"),
        (["--rewards"], "--rewards is empty"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(steps.Config, words)
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_settings_left_out_are_those_of_refl(model: Path) -> None:
    config = cli.parse(steps.Config, ["--model", str(model)])
    settings = steps.as_refl_samples(config.sample, families.check(config.model.source()))
    assert (settings.num_inference_steps, settings.solver, settings.guidance_scale) == (40, "ddpm", 1.0)


def test_a_score_that_is_no_number_is_named() -> None:
    scores = np.zeros((3, 2, 1))
    scores[1, 1, 0] = np.nan
    scorer = rewards.load("brightness")
    with pytest.raises(
        FloatingPointError, match="brightness gave nan at step 1 of 2 for the prompt 'b' with seed 9"
    ):
        step_scores.check_finite(scores, [scorer], ["a", "b"], [8, 9])
