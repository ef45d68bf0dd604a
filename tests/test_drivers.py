"""Every driver: what it says to bad input, and that three updates of it are the recorded ones.

The drivers are the files of finetune/ with a `main`; one that record_trajectories.py does not know fails here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

import record_trajectories as recorded
import tiny
from preftune.training.checkpoint import find_checkpoints, read

pytestmark = pytest.mark.usefixtures("cpu")

ROOT = Path(__file__).parents[1]
DRIVERS = [
    path.stem for path in sorted((ROOT / "finetune").glob("*.py")) if "\ndef main(" in path.read_text()
]

# Relative, or absolute in units of the largest number of its row: sums of float32 are ordered differently by each
# processor and thread count, and three updates multiply that by about a thousand. A changed formula moves numbers by more.
TOLERANCE = 2e-3

EMA = ["--ema-decay", "0.9"]  # changes what is saved, not the updates


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs with a fault each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "empty.txt").write_text("")
    (folder / "prompts.jsonl").write_text('"a red circle"\n{"text": \n')
    for name in ("torn", "nothing", "stray"):
        (folder / name).mkdir()
    (folder / "torn" / "metadata.jsonl").write_text("{\n")
    (folder / "torn" / "rankings.jsonl").write_text(
        '{"prompt": "a", "generations": ["a.png"], "ranking": [1]}\n'
    )
    for name, row in (("kindless", "{}"), ("liked", '{"kind": "preferred"}')):
        (folder / name).mkdir()
        Image.new("RGB", (32, 32)).save(folder / name / "a.png")
        line = {"file_name": "a.png", "text": "a", **json.loads(row)}
        (folder / name / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "stray" / "metadata.jsonl").write_text('{"file_name": "../a.png", "text": "a"}\n')
    for weights in tiny.pipeline_folder(folder / "zero_snr", "v_prediction", zero_snr=True).rglob(
        "*.safetensors"
    ):
        weights.write_bytes(b"")  # what refuses it must come before the weights load
    return folder


EVERY = [
    (["--max-train-steps", "0"], "--max-train-steps is 0"),
    (["--learning-rate", "nan"], "--learning-rate is nan"),
    (["--learning-rate", "fast"], "fast"),
    (["--max-train-setps", "3"], "did you mean --max-train-steps?"),
    (["--mixed-precision", "fp16"], "fp16 needs a GPU"),
    (["--output-dir", "{bad}/empty.txt/run"], "cannot be written"),
    (["--resume-from-checkpoint", "{bad}/nothing"], "is no checkpoint"),
    (["--config", "{bad}/none.yaml"], "none.yaml"),
]
PIPELINE = [
    (["--model", "{bad}/nothing"], "has no model_index.json"),
    (["--model", "{root}/scorer"], "has no model_index.json"),
    (
        ["--model", "{bad}/zero_snr", "--sample.solver", "pndm"],
        "solver pndm cannot start at zero terminal SNR",
    ),
    (
        ["--resolution", "48x30"],
        "--resolution: resolution '48x30': width and height must be positive multiples",
    ),
    (["--resolution", "48by32"], "'48by32' is neither a number, as in 512, nor WIDTHxHEIGHT, as in 768x512"),
    (["--sample.resolution", "30"], "--sample.resolution: resolution '30'"),
    (["--lora.rank", "0"], "--lora.rank is 0; it must be 1 or more; --train full"),
    (["--train", "full", "--lora.rank", "3"], "--lora settings do nothing with --train full"),
    (["--caption-dropout", "1"], "--caption-dropout must lie in [0, 1)"),
    (["--num-validation-prompts", "0"], "--num-validation-prompts must be at least 1, got 0"),
    (["--validation-prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
]
IMAGES = [
    (["--data", "{bad}/absent"], "absent"),
    (["--data", "{bad}/torn"], "metadata.jsonl line 1 is not JSON"),
    (["--data", "{bad}/stray"], "metadata.jsonl line 1: file name '../a.png'"),
]
DIRECT = [
    *(case for case in PIPELINE if "--caption-dropout" not in case[0]),
    (["--rewards", "shapes=1"], "shapes is not differentiable"),
    (["--rewards"], "--rewards is empty"),
    (["--prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
    (["--num-inference-steps", "0"], "--num-inference-steps must be at least 1, got 0"),
    (
        ["--num-inference-steps", "2000"],
        "--num-inference-steps must lie in 1..1000 for solver ddim, got 2000",
    ),
    (["--guidance-scale", "0.5"], "--guidance-scale must be 1 (no guidance) or more"),
    (["--margin", "inf"], "--margin must be finite, got inf"),
    (["--jitter", "-1"], "--jitter must be 0 or more, got -1"),
    (["--jitter", "32"], "--jitter 32 must be less than the image's side"),
    (["--jitter", "0", "--jitter-copies", "2"], "--jitter-copies must be 1, or more with a --jitter, got 2"),
    (["--grad-norm-limit", "0"], "--grad-norm-limit must be above 0, got 0"),
    (["--base-distance", "-1"], "--base-distance must be 0 or more and finite, got -1"),
    (["--base-distance", "1", "--train", "full"], "and --train full has none; use --train lora"),
]
SCORED = [
    *(case for case in PIPELINE if "--caption-dropout" not in case[0]),
    (["--lora.target-modules", "to_z"], "no layer is called to_z"),
    (["--prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
    (["--rewards", "beauty=1"], "unknown scorer 'beauty'; one of brightness, shapes"),
    (["--rewards"], "--rewards is empty; name a scorer to compare images by"),
    (["--prompts-per-epoch", "0"], "--prompts-per-epoch must be at least 1, got 0"),
    (["--images-per-prompt", "1"], "--images-per-prompt must be at least 2, got 1"),
    (["--updates-per-epoch", "0"], "--updates-per-epoch must be at least 1, got 0"),
    (["--timesteps-per-image", "0"], "--timesteps-per-image must be at least 1, got 0"),
    (["--advantage-clip", "0"], "--advantage-clip must be above 0 and finite, got 0"),
    (["--advantage-std", "some"], "some"),
    (["--kl-weight", "-1"], "--kl-weight must be 0 or more and finite, got -1"),
]
ONE: dict[str, list[tuple[list[str], str]]] = {
    "autoencoder": [*IMAGES, (["--resolution", "30"], "--resolution must be")],
    "awm": [
        *SCORED,
        (["--ema-kl-weight", "inf"], "--ema-kl-weight must be 0 or more and finite, got inf"),
        (["--clip-range", "0"], "--clip-range must be above 0 and finite, got 0"),
        (["--ghuber-power", "2"], "--ghuber-power must lie in (0, 1], got 2"),
        (
            ["--weighting", "t", "--ghuber-power", "0.5"],
            "--ghuber-power 0.5 does nothing with --weighting t",
        ),
    ],
    "dpo": [
        *PIPELINE,
        (["--lora.target-modules", "to_z"], "no layer is called to_z"),
        (["--data"], "--data needs at least one folder"),
        (
            ["--data", "{root}/rankings", "{root}/../{root.name}/rankings"],
            "/rankings; its pairs would count twice",
        ),
        (["--raters", "ann", "bob", "ann"], "--raters names ann twice; its pairs would count twice"),
        (
            ["--sample.num-inference-steps", "1000", "--sample.solver", "pndm"],
            "--sample.num-inference-steps must lie in 1..999 for solver pndm, got 1000",
        ),
        (["--data", "{bad}/absent"], "there is no data at"),
        (
            ["--data", "{root}/prompts.txt"],
            "prompts.txt is a file; --data names folders, with rankings.jsonl",
        ),
        (["--data", "{bad}/torn"], "rankings.jsonl line 1"),
        (["--data", "{bad}/nothing"], "nothing"),
        (
            ["--data", "{root}/images"],
            "has no rankings.jsonl; of captioned images --raters names the columns",
        ),
        (
            ["--raters", "ann"],
            "--raters ann is neither a source of rankings nor a column of scores in --data",
        ),
        (["--data", "{root}/images", "--raters", "luck"], "--raters luck is neither a source of rankings"),
        (["--data", "{root}/images", "--raters", "luck"], "there are liking"),
        (["--data", "{root}/images", "--raters", "kind"], "--raters kind is 'preferred', not a number"),
        (["--data", "{root}/images", "--raters", "liking"], "no prompt in --data has two images to compare"),
        (["--beta", "0"], "--beta must be above 0 and finite, got 0"),
        (["--beta", "nan"], "--beta must be above 0 and finite, got nan"),
        (["--poly-alpha", "-2"], "--poly-alpha must be -1 or more and finite, got -2"),
        (["--loss", "ipo", "--poly-alpha", "8"], "--poly-alpha 8 is for --loss dpo, not ipo"),
        (["--fixed-noise", "-1"], "--fixed-noise must be 0 or more, got -1"),
        (["--loss", "mapo", "--fixed-noise", "1"], "--fixed-noise saves passes of the reference"),
        (["--validation-share", "1"], "--validation-share must lie in [0, 1), got 1"),
        (["--validation-share", "0.99"], "all 4 prompts would be held out"),
        (["--reward-files", "imagereward=x"], "imagereward, which --rewards does not use"),
    ],
    "ddpo": [
        *(case for case in PIPELINE if "--caption-dropout" not in case[0]),
        (["--prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
        (["--rewards", "beauty=1"], "unknown scorer 'beauty'; one of brightness, shapes"),
        (["--rewards"], "--rewards is empty"),
        (["--prompts-per-rollout", "0"], "--prompts-per-rollout must be at least 1, got 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt must be at least 1, got 0"),
        (["--inner-epochs", "0"], "--inner-epochs must be at least 1, got 0"),
        (["--num-inference-steps", "0"], "--num-inference-steps must be in 1..500, got 0"),
        (["--num-inference-steps", "501"], "--num-inference-steps must be in 1..500, got 501"),
        (["--guidance-scale", "0.5"], "--guidance-scale must be 1 (no guidance) or more"),
        (["--eta", "0"], "--eta must be in (0, 1]: a step without noise has no probability, got 0"),
        (["--rollout-batch-size", "0"], "--rollout-batch-size must be at least 1, got 0"),
        (["--timestep-fraction", "1.5"], "--timestep-fraction must be in (0, 1], got 1.5"),
        (["--window", "1", "4"], "--window 1 4 must lie in 0..3"),
        (["--window", "2", "1"], "--window 2 1 must lie in 0..3"),
        (["--clip-range", "1"], "--clip-range must lie strictly between 0 and 1, got 1"),
        (["--advantage-clip", "0"], "--advantage-clip must be above 0"),
        (["--kl-weight", "-1"], "--kl-weight must be 0 or more and finite, got -1"),
        (["--prompt-buffer-min-count", "5"], "--prompt-buffer-min-count must be in 1..4"),
        (["--advantages", "group"], "are for --advantages prompt, not group"),
        (
            ["--advantages", "group", "--images-per-prompt", "1"],
            "--advantages group compares the images of a prompt: --images-per-prompt must be 2 or more, got 1",
        ),
        (["--old-logprob", "self", "--inner-epochs", "2"], "--inner-epochs must be 1, got 2"),
        (["--train-batch-size", "3"], "an update has 6 pairs"),
        (
            [
                "--rewards",
                "brightness",
                "shapes",
                "--reward-normalization",
                "card",
                "--reward-combination",
                "min",
                "--normalize-rewards",
                "each",
            ],
            "--normalize-rewards each adds advantages; --reward-combination min does not go with it",
        ),
    ],
    "draft": [
        *DIRECT,
        (["--last-steps", "0"], "--last-steps must be at least 1, got 0"),
        (["--last-steps", "5"], "--last-steps 5 is more than --num-inference-steps 4"),
        (["--truncation", "uniform"], "--last-steps 3 needs --truncation last, got uniform"),
        (["--lv-copies", "-1"], "--lv-copies must be 0 or more, got -1"),
        (["--lv-copies", "2"], "--lv-copies 2 repeats the last step alone"),
        (["--eta", "1.5"], "--eta must lie in [0, 1], got 1.5"),
    ],
    "drtune": [
        *DIRECT,
        (["--active-steps", "0"], "--active-steps must be at least 1, got 0"),
        (["--active-steps", "5"], "--active-steps 5 is more than --num-inference-steps 4"),
        (["--early-stop", "2"], "--early-stop must lie in [0, 1], got 2"),
        (["--model", "{bad}/zero_snr"], "drtune does not train a model of zero terminal SNR"),
    ],
    "flowbp": [
        *DIRECT,
        (
            ["--active-steps", "3"],
            "--active-steps 3 does nothing with --surrogate lagrange; it is for sparse, bridge",
        ),
        (["--surrogate", "sparse", "--tau", "1"], "--tau 1.0 does nothing with --surrogate sparse"),
        (
            ["--surrogate", "bridge", "--active-steps", "1"],
            "--active-steps must lie in [2, 1000] with --surrogate bridge, got 1",
        ),
        (
            ["--surrogate", "sparse", "--active-steps", "5"],
            "--active-steps 5 is more than --num-inference-steps 4",
        ),
        (["--input-share", "2"], "--input-share must lie in [0, 1] with --surrogate lagrange, got 2.0"),
        (["--order", "1"], "--order must lie in [2, 8] with --surrogate lagrange, got 1"),
        (["--num-inference-steps", "1"], "--num-inference-steps must be at least 2 for two parts"),
        (["--model", "{bad}/zero_snr"], "flowbp does not train a model of zero terminal SNR"),
    ],
    "nft": [
        *SCORED,
        (["--beta", "0"], "--beta must lie in (0, 1], got 0"),
        (["--beta", "1.5"], "--beta must lie in (0, 1], got 1.5"),
        (["--decay-type", "3"], "3"),
    ],
    "pretrain": [
        *PIPELINE,
        (["--train", "lora"], "--train-text-encoder goes with --train full, got --train lora"),
        (
            ["--no-train-text-encoder", "--train", "lora", "--lora.target-modules", "to_z"],
            "no layer is called to_z",
        ),
        *IMAGES,
    ],
    "pretrain_scorer": [*IMAGES, (["--vocab", "{bad}/absent.txt"], "absent.txt")],
    "raft": [
        *PIPELINE,
        (["--prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
        (["--rewards", "beauty=1"], "unknown scorer 'beauty'; one of brightness, shapes"),
        (["--rewards"], "--rewards is empty"),
        (["--iterations", "2"], "--max-train-steps 3 must be a multiple of --iterations 2"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--images-per-prompt", "1"], "--images-per-prompt must be at least 2, got 1"),
        (["--keep-share", "0"], "--keep-share must lie in (0, 1], got 0"),
    ],
    "refl": [
        *PIPELINE,
        *IMAGES,
        (["--lora.target-modules", "to_z"], "no layer is called to_z"),
        (["--rewards", "beauty=1"], "unknown scorer 'beauty'; one of brightness, shapes"),
        (["--rewards", "brightness="], "is not NAME or NAME=WEIGHT"),
        (["--rewards", "shapes=1"], "shapes is not differentiable"),
        (["--reward-files", "imagereward=x"], "imagereward, which --rewards does not use"),
        (["--reward-normalization", "dataset"], "normalization dataset with no file of statistics"),
        (["--reward-stats", "{bad}/empty.txt"], "dataset, and dataset alone, needs --reward-stats"),
        (["--reward-normalization", "dataset", "--reward-stats", "{bad}/empty.txt"], "is no summary.json"),
        (["--prompts", "{bad}/absent.txt"], "absent.txt does not exist"),
        (["--prompts", "{bad}/blank.txt"], "blank.txt holds no prompts"),
        (["--prompts", "{bad}/prompts.jsonl"], "prompts.jsonl line 2"),
        (["--prompts", "{bad}/empty.txt"], "empty.txt holds no prompts"),
        (["--window", "1", "4"], "--window 1 4 must lie in 0..3"),
        (["--window", "2", "1"], "--window 2 1 must lie in 0..3"),
        (
            ["--guidance-scale", "0.5"],
            "--guidance-scale must be 1 (no guidance) or more in training, got 0.5",
        ),
        (
            ["--guidance-scale", "nan"],
            "--guidance-scale must be 1 (no guidance) or more in training, got nan",
        ),
        (["--solver", "pndm"], "pndm"),
        (["--rewards"], "--rewards is empty"),
        (["--num-inference-steps", "0"], "--num-inference-steps must be at least 1"),
        (["--jitter", "-1"], "--jitter must be 0 or more, got -1"),
        (["--jitter", "32"], "--jitter 32 must be less than the image's side, 32 pixels"),
        (["--jitter-copies", "0"], "--jitter-copies must be 1, or more with a --jitter, got 0"),
        (["--jitter-copies", "2"], "--jitter-copies must be 1, or more with a --jitter, got 2"),
    ],
    "reward_model": [
        (["--model", "{bad}/nothing"], "lacks config.json"),
        (["--model", "beauty"], "unknown scorer 'beauty'; one of brightness, shapes"),
        (["--model", "shapes"], "shapes cannot be trained here; one of imagereward"),
        (["--frozen-share", "0.5", "--last-layers", "1", "1"], "both say what is frozen"),
        (["--stable.views", "3", "--objective", "soft"], "--stable is about pairs, not --objective soft"),
        (["--head", "mlp"], "head 'mlp' is for a CLIP without one"),
        (["--dropout", "1"], "the dropout of a head must lie in [0, 1), got 1"),
        (
            ["--stable.weighting", "two-stage"],
            "must be below --max-train-steps (3), or the second stage never comes",
        ),
        (["--data", "{bad}/absent"], "absent"),
        (["--data", "{bad}/torn"], "rankings.jsonl line 1"),
        (["--validation-share", "1"], "--validation-share must lie"),
        (["--jitter", "-1"], "--jitter must be 0 or more, got -1"),
    ],
    "reward_weighted": [
        *PIPELINE,
        *IMAGES,
        (
            ["--score", "beauty"],
            "metadata.jsonl line 1: --score beauty is None, not a finite number; numbers there: liking",
        ),
        (["--score", "kind"], "line 1: --score kind is 'preferred', not a finite number"),
        (["--temperature", "0"], "--temperature must be above 0 and finite, got 0"),
        (["--beta", "-1"], "--beta must be 0 or more and finite, got -1"),
        (["--pretraining-data", "None", "--beta", "0.5"], "--beta 0.5 needs --pretraining-data IMAGEFOLDER"),
        (["--reward-files", "imagereward=x"], "imagereward, which --rewards does not use"),
    ],
    "weird_lora": [
        *PIPELINE,
        *IMAGES,
        (["--data", "{bad}/kindless"], "metadata.jsonl line 1: kind is None; it must be one of preferred"),
        (["--data", "{bad}/liked"], "holds no non_preferred image"),
        (["--prefix", " "], "--prefix must hold words"),
        (["--sample.guidance-scale", "1"], "--sample.guidance-scale 1 has no negative prompt"),
        (["--regularisation-share", "1"], "--regularisation-share must lie strictly between 0 and 1, got 1"),
        (["--regularisation", "None"], "--regularisation-share needs --regularisation IMAGEFOLDER"),
    ],
}
CASES = [(driver, flags, words) for driver in DRIVERS for flags, words in EVERY + ONE.get(driver, [])]


@pytest.mark.parametrize(("driver", "flags", "words"), CASES, ids=[f"{d}-{' '.join(f)}" for d, f, _ in CASES])
def test_bad_input_ends_in_one_sentence(
    driver: str,
    flags: list[str],
    words: str,
    root: Path,
    bad: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = recorded.arguments(driver, root, tmp_path) + [flag.format(root=root, bad=bad) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        recorded.train(driver, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    (sentence,) = (line for line in error.splitlines() if ": error: " in line)
    assert words in sentence
    assert error.endswith(f"{sentence}\n"), "it is the last line"
    assert "Traceback" not in error


def test_the_command_itself_fails_so(root: Path, bad: Path, tmp_path: Path) -> None:
    faults = {"refl": ["--rewards", "beauty=1"], "pretrain": ["--model", str(bad / "nothing")]}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "finetune" / f"{driver}.py"),
                *recorded.arguments(driver, root, tmp_path),
                *flags,
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for driver, flags in faults.items()
    ]
    for driver, process in zip(faults, processes, strict=True):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 2, error
        assert error.splitlines()[-1].startswith(f"{driver}.py: error: ")
        assert "Traceback" not in error


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_driver_has_its_cases(driver: str) -> None:
    assert driver in ONE, f"write bad inputs for finetune/{driver}.py"


@pytest.mark.parametrize("driver", DRIVERS)
def test_three_updates_are_the_recorded_ones(
    driver: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = json.loads(recorded.GOLDEN.read_text())["trajectories"]
    assert driver in golden, f"add finetune/{driver}.py to tests/record_trajectories.py and record it"
    found = recorded.trajectory(driver, root, tmp_path, *EMA)
    assert_saved_weights_are_the_ema(tmp_path)
    with pytest.raises(SystemExit) as stop:  # the folder now holds a run of another seed
        recorded.train(
            driver,
            [
                *recorded.arguments(driver, root, tmp_path),
                *EMA,
                "--resume-from-checkpoint",
                "latest",
                "--seed",
                "1",
            ],
        )
    assert stop.value.code == 2
    output, error = capsys.readouterr()
    assert output.splitlines()[-1].endswith(f": {tmp_path}"), "it says where the result is"
    assert "cannot resume from" in error
    assert "seed was 0, is 1" in error
    assert found.keys() == golden[driver].keys()
    for name, values in golden[driver].items():
        assert len(values) == (6 if name in ("weights", "moved") else recorded.UPDATES)
        slack = TOLERANCE * max(map(abs, values))
        np.testing.assert_allclose(found[name], values, rtol=0, atol=slack, err_msg=f"{driver}: {name}")


TUNING = [name for name in DRIVERS if "--sample.resolution" in " ".join(recorded.arguments(name, ROOT, ROOT))]
"""The drivers that tune a text-to-image model."""


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_xl_folder(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.mark.parametrize(
    ("driver", "family"),
    [
        *((driver, "SDXL") for driver in TUNING),
        *(
            pytest.param(driver, "SD", marks=[pytest.mark.slow] * (driver not in ("pretrain", "refl")))
            for driver in TUNING
        ),
    ],
)
def test_one_update_at_a_resolution_that_is_not_square(
    driver: str, family: str, root: Path, sdxl: Path, tmp_path: Path
) -> None:
    """Width 48 and height 32 while training, the other way round in validation images; of each family alike."""
    seen: set[tuple[int, ...]] = set()

    def note(module: torch.nn.Module, args: tuple[object, ...]) -> None:
        if isinstance(module, UNet2DConditionModel) and torch.is_grad_enabled():
            seen.add(tuple(args[0].shape[1:]))

    flags = "--resolution 48x32 --sample.resolution 32x48 --max-train-steps 1 --sample.num-inference-steps 1"
    handle = register_module_forward_pre_hook(note)
    try:
        own = recorded.arguments(driver, root, tmp_path)
        model = ["--model", str(root / "pipeline" if family == "SD" else sdxl)]
        recorded.train(driver, [*own, *flags.split(), *model])
    finally:
        handle.remove()
    assert seen == {(4, 32 // 8, 48 // 8)}, "the latents that are trained on"
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["grad_norm"] > 0
    shown = sorted((tmp_path / "samples" / "step_000001").glob("*.png"))
    assert len(shown) == 8
    assert {Image.open(path).size for path in shown} == {(32, 48)}


def assert_saved_weights_are_the_ema(output: Path) -> None:
    """Every folder of weights that a run saved, its own and those of checkpoints, holds the EMA of one checkpoint."""
    states = {path.name: read(path) for path in find_checkpoints(output)}
    last = states[f"step_{recorded.UPDATES:06d}"]
    pairs = list(zip(last["parameters"].values(), last["average"], strict=True))
    assert any(not torch.equal(weight, average) for weight, average in pairs), "the two can be told apart"
    folders = [
        path for path in output.glob("**/*") if path.name in ("lora", "unet", "pipeline", "scorer", "vae")
    ]
    folders = [path for path in folders if not any(parent in folders for parent in path.parents)]
    assert any(path.parent == output for path in folders), "the run saved its weights"
    for folder in folders:
        saved = [tensor for path in folder.glob("**/*.safetensors") for tensor in load_file(path).values()]
        of_one = folder.parent != output and folder.name != "scorer"  # a scorer is the best until then
        candidates = [states[folder.parent.name]] if of_one else states.values()
        assert any(
            all(any(torch.equal(average, tensor) for tensor in saved) for average in state["average"])
            for state in candidates
        ), f"{folder} does not hold the EMA"


def test_a_digest_sees_one_weight_move() -> None:
    weights = {"a": torch.zeros(10, 10), "b": torch.ones(5)}
    before = recorded.digest(weights)
    assert before[:2] == pytest.approx([5 / 105, (5 / 105 * 100 / 105) ** 0.5])
    weights["a"][3, 3] = 1.0
    assert all(abs(new - old) > 1e-4 for new, old in zip(recorded.digest(weights), before, strict=True))
