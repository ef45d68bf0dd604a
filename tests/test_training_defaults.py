"""Defaults by program, model and what is trained, and the shipped configurations of SD 1.5 and SDXL."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import record_trajectories as recorded
import tiny
from finetune import refl
from preftune import families, sampling
from preftune.cli import parse
from preftune.families.base import Defaults
from preftune.families.known import FAMILIES
from preftune.sampling_config import Sampling
from preftune.training import defaults
from preftune.training.checkpoint import read
from preftune.training.defaults import RATES, Rates

pytestmark = pytest.mark.usefixtures("cpu")

ROOT = Path(__file__).parents[1]
TUNING = (
    "awm",
    "ddpo",
    "dpo",
    "draft",
    "drtune",
    "flowbp",
    "nft",
    "pretrain",
    "raft",
    "refl",
    "reward_weighted",
    "weird_lora",
)
DIRECT = ("draft", "drtune", "flowbp")
SCORED = ("awm", "nft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models: sd15, sdxl, and turbo, whose scheduler is that of SDXL-Turbo."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "sd15": tiny.pipeline_folder(folder / "sd15"),
        "sdxl": tiny.pipeline_xl_folder(folder / "sdxl"),
        "turbo": tiny.pipeline_xl_folder(folder / "turbo"),
    }
    file = found["turbo"] / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "trailing"}))
    return found


def refl_flags(model: Path, root: Path, output: Path, *flags: str) -> list[str]:
    few = "--max-train-steps 1 --train-batch-size 1 --gradient-accumulation-steps 1 --num-validation-prompts 1 --threads 1"
    small = "--resolution 32 --sample.num-inference-steps 2"
    own = ["--model", str(model), "--prompts", str(root / "prompts.txt"), "--output-dir", str(output)]
    return [*own, "--rewards", "brightness=1", *few.split(), *small.split(), *flags]


def written(output: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    return found


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("program", "model", "lora", "full"),
    [
        ("ddpo", "sd15", 3e-4, 1e-5),
        ("ddpo", "sdxl", 3e-4, 1e-5),
        ("awm", "sd15", 3e-4, 1e-5),
        ("nft", "sdxl", 3e-4, 1e-6),
        ("draft", "sd15", 1e-4, 1e-5),
        ("draft", "sdxl", 2.5e-4, 1e-5),
        ("drtune", "sdxl", 1e-4, 1e-5),
        ("flowbp", "sd15", 1e-4, 1e-5),
        ("refl", "sd15", 1e-4, 1e-5),
        ("refl", "sdxl", 1e-4, 1e-5),
        ("refl", "turbo", 1e-4, 1e-5),
        ("dpo", "sd15", 1e-5, 1e-6),
        ("dpo", "sdxl", 1e-5, 1e-6),
        ("pretrain", "sd15", 1e-4, 1e-5),
        ("pretrain", "sdxl", 1e-4, 1e-6),
        ("raft", "sdxl", 1e-4, 1e-6),
        ("reward_weighted", "sd15", 1e-4, 1e-5),
        ("weird_lora", "sd15", 1e-5, 1e-5),
    ],
)
def test_rates(models: dict[str, Path], program: str, model: str, lora: float, full: float) -> None:
    known = families.check(models[model])
    assert defaults.learning_rate(program, known, "lora") == lora
    assert defaults.learning_rate(program, known, "full") == full


def test_each_program_that_tunes_has_a_rate_for_each_family_and_its_configurations() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "finetune").glob("*.py")}
    tuning = {name for name, text in sources.items() if "of_model(" in text or "direct.check(" in text}
    assert tuning == set(TUNING) == set(RATES)
    for program in TUNING:
        assert RATES[program].keys() == set(FAMILIES.values())
        for name in ("tiny", "sd15", "sdxl"):
            assert (ROOT / "finetune" / "configs" / program / f"{name}.yaml").is_file()
    for name, text in sources.items():
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
        assert name == "__init__" or calls & {
            "of_model",
            "filled",
            "training_defaults.of_model",
            "direct.check",
        }, name


def own(model: Defaults, steps: int | None = None, *, data: bool = False) -> tuple[object, ...]:
    found = defaults.refl(model, num_inference_steps=steps, pretraining=None, data=data)
    return tuple(found.values())


def test_the_trajectory_of_refl(models: dict[str, Path]) -> None:
    sd, turbo = families.check(models["sd15"]), families.check(models["turbo"])
    assert own(sd) == (40, (30, 39), "ddpm", "off", 1.0), (
        "ImageReward, section 4.2; without data AdamW divides lambda out"
    )
    assert own(sd, data=True) == (40, (30, 39), "ddpm", "alternate", 1e-3), "Algorithm 1"
    assert own(turbo) == (4, (2, 3), "euler", "off", 1.0)
    windows = {steps: own(sd, steps)[1] for steps in (1, 2, 3, 10, 20, 50)}
    assert windows == {1: (0, 0), 2: (0, 1), 3: (1, 2), 10: (7, 9), 20: (15, 19), 50: (37, 49)}


def test_the_trajectories_of_methods_through_several_steps(models: dict[str, Path]) -> None:
    sd, turbo, sdxl = (families.check(models[name]) for name in ("sd15", "turbo", "sdxl"))

    def found(program: str, model: Defaults) -> tuple[object, ...]:
        return tuple(defaults.direct(program, model).values())

    assert found("draft", sd) == (50, "ddim", 7.5, "both"), "DRaFT, and NeMo-Aligner's draftp_sd.yaml"
    assert found("drtune", sd) == found("flowbp", sd) == (25, "ddim", 7.5, "positive"), "FlowBP's"
    assert found("flowbp", sdxl) == (25, "ddim", 5.0, "positive"), "no more guidance than the model's own"
    assert found("drtune", turbo) == (4, "euler", 1.0, "positive")
    assert defaults.DIRECT.keys() == set(DIRECT)
    policies = [tuple(defaults.policy(model).values()) for model in (sd, sdxl, turbo)]
    assert policies == [(50, 5.0), (50, 5.0), (4, 1.0)], "DDPO's config/base.py"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "no"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_precision(capability: tuple[int, int] | None, expected: str) -> None:
    assert defaults.precision(capability) == expected


def test_the_precision_of_a_launch_without_a_gpu_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert defaults.here() == "no"


# ---------------------------------------------------------------- filled in, said, kept


def test_defaults_are_said_and_written(
    models: dict[str, Path], root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts and a model are all that ReFL needs; a distilled model is trained with its own few steps."""
    assert (
        refl.main(parse(refl.Config, refl_flags(models["turbo"], root, tmp_path, "--adam-beta1", "0.8"))) == 0
    )
    line = (
        "note: defaults of refl for a LoRA of sdxl (distilled): --learning-rate 0.0001 --mixed-precision no"
        " --num-inference-steps 4 --window 2 3 --solver euler --pretraining off --reward-scale 1"
    )
    assert line in capfd.readouterr().err.splitlines()
    config = written(tmp_path)
    assert (config["learning_rate"], config["window"], config["reward_scale"]) == (1e-4, [2, 3], 1.0)
    assert (config["pretraining"], config["mixed_precision"]) == ("off", "no")
    assert config["gradient_checkpointing"] is config["vae_checkpointing"] is True


def test_a_run_that_resumes_keeps_what_was_left_out(
    models: dict[str, Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also after the table has changed; and what was typed then need not be typed again."""
    flags = refl_flags(models["sd15"], root, tmp_path, "--num-inference-steps", "4")
    assert refl.main(parse(refl.Config, [*flags, "--reward-scale", "0.5"])) == 0
    other = {"sd": Rates(lora=1.0, full=1.0)}
    monkeypatch.setattr(defaults, "RATES", {"refl": other})
    capfd.readouterr()
    resumed = [*flags, "--max-train-steps", "2", "--resume-from-checkpoint", "latest"]
    assert refl.main(parse(refl.Config, resumed)) == 0
    said = capfd.readouterr().err
    assert "note: as the run that goes on: --learning-rate 0.0001 --mixed-precision no --window 2 3" in said
    assert "defaults of" not in said
    config = written(tmp_path)
    assert (config["learning_rate"], config["reward_scale"], config["max_train_steps"]) == (1e-4, 0.5, 2)
    (tmp_path / "step_000002" / "manifest.json").write_text("{")  # the one before it says the same
    assert defaults.earlier_flags(parse(refl.Config, resumed).run)["reward_scale"] == 0.5


def test_an_explicit_other_precision_is_refused_at_a_resume(
    models: dict[str, Path], root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = refl_flags(models["sd15"], root, tmp_path, "--num-inference-steps", "2")
    assert refl.main(parse(refl.Config, flags)) == 0
    other = [*flags, "--resume-from-checkpoint", "latest", "--mixed-precision", "bf16"]
    with pytest.raises(SystemExit) as stop:
        refl.main(parse(refl.Config, other))
    assert stop.value.code == 2
    assert "--mixed-precision was no, is bf16" in capfd.readouterr().err


# ---------------------------------------------------------------- what they do


def test_a_lora_at_the_default_rate_moves(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """AdamW moves each element of B by lr in the first update, and by lr n in n updates that agree."""
    flags = refl_flags(models["sd15"], root, tmp_path, "--num-inference-steps", "2", "--max-train-steps", "6")
    few = ["--checkpointing-steps", "1", "--checkpoints-total-limit", "0", "--train-batch-size", "2"]
    assert refl.main(parse(refl.Config, [*flags, *few])) == 0
    start, first, last = (read(tmp_path / f"step_{updates:06d}")["parameters"] for updates in (0, 1, 6))
    ups = [name for name in last if "lora_B" in name]
    moved = torch.cat([first[name].flatten() for name in ups]).abs()
    assert torch.cat([start[name].flatten() for name in ups]).abs().max() == 0
    assert moved.max() == pytest.approx(1e-4, rel=1e-3)
    assert moved.median() > 0.9e-4, "the gradient is far above AdamW's epsilon"
    total = torch.cat([last[name].flatten() for name in ups]).abs()
    assert total.max() < 6e-4 * 1.01
    assert total.median() > 1e-4


def test_images_are_decoded_a_few_at_a_time(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.load(models["sdxl"])
    sizes, decode = [], family.decode
    settings = Sampling(num_inference_steps=2, batch_size=5, resolution="64")
    (whole,) = sampling.sample(family, ["a"] * 5, range(5), settings)
    monkeypatch.setattr(sampling, "DECODED_PIXELS", 2 * 64 * 64 + 1)
    monkeypatch.setattr(family, "decode", lambda x: sizes.append(len(x)) or decode(x))
    (parts,) = sampling.sample(family, ["a"] * 5, range(5), settings)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(parts, whole)


# ---------------------------------------------------------------- configurations


SMALL = {
    "ddpo": "--prompts-per-rollout 2 --train-batch-size 2 --gradient-accumulation-steps 2",
    **dict.fromkeys(
        SCORED,
        "--prompts-per-epoch 2 --images-per-prompt 2 --timesteps-per-image 1 --train-batch-size 2 --gradient-accumulation-steps 1",
    ),
    "raft": "--iterations 1 --prompts-per-iteration 2 --images-per-prompt 2",
    "reward_weighted": "--score liking",
    "weird_lora": "--train-batch-size 2 --gradient-accumulation-steps 1",
}


@pytest.mark.parametrize(
    ("program", "name"),
    [
        *((program, "sd15") for program in TUNING),
        *(
            pytest.param(program, "sdxl", marks=[pytest.mark.slow] * (program not in ("dpo", "refl")))
            for program in TUNING
        ),
    ],
)
def test_shipped_configurations_run(
    models: dict[str, Path], root: Path, tmp_path: Path, program: str, name: str
) -> None:
    """Of the model's shape, with the user's own prompts or data in place of the file's, and smaller."""
    argv = ["--config", str(ROOT / "finetune" / "configs" / program / f"{name}.yaml")]
    argv += ["--model", str(models[name]), "--variant", "None", "--output-dir", str(tmp_path / "run")]
    if program in ("ddpo", "raft", "refl", *DIRECT, *SCORED):
        argv += ["--prompts", str(root / "prompts.txt"), "--rewards", "brightness=1"]
    else:
        argv += ["--data", str(root / ("rankings" if program == "dpo" else "images"))]
    if program == "weird_lora":
        argv += ["--regularisation", str(root / "images")]
    argv += [
        "--max-train-steps",
        "2",
        "--resolution",
        "32",
        "--num-validation-prompts",
        "1",
        "--threads",
        "1",
    ]
    argv += ["--sample.num-inference-steps", "2", *SMALL.get(program, "").split()]
    if program in ("ddpo", "refl", *DIRECT):
        argv += ["--num-inference-steps", "4"]
    assert recorded.train(program, argv) == 0
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    config = written(tmp_path / "run")
    others = {
        "ddpo": {"sd15": 3e-4, "sdxl": 3e-4},
        "dpo": {"sd15": 1e-5, "sdxl": 1e-5},
        "weird_lora": {"sd15": 1e-5, "sdxl": 5e-5},
        "draft": {"sd15": 1e-4, "sdxl": 2.5e-4},
        **{name: {"sd15": 3e-4, "sdxl": 3e-4} for name in SCORED},
    }
    assert config["learning_rate"] == others.get(program, {}).get(name, 1e-4)
    shutil.rmtree(tmp_path / "run")
