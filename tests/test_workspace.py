"""The drivers that tune on captioned images: "Weird image.", the reward-weighted loss, and RAFT."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import record_trajectories as recorded
from finetune import raft, reward_weighted, weird_lora
from preftune import families
from preftune.captioned_inputs import CaptionedInputs
from preftune.cli import parse
from preftune.diffusion_loss import captioned_loss
from preftune.images import load_pixels
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage, read_imagefolder, read_jsonl, write_jsonl
from preftune.resolution import Resolution
from preftune.training import validation
from preftune.training.checkpoint import find_checkpoints, read
from preftune.training.defaults import of_model

pytestmark = pytest.mark.usefixtures("cpu")


def arguments(driver: str, root: Path, output: Path, *flags: str) -> list[str]:
    """The recorded ones, with two validation images only: most of the time goes into them."""
    few = ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "2"]
    return [*recorded.arguments(driver, root, output), *few, *flags]


def weights(output: Path, updates: int) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = read(output / f"step_{updates:06d}")["parameters"]
    return parameters


# ---------------------------------------------------------------- "Weird image."


def test_only_non_preferred_captions_get_the_prefix() -> None:
    samples = [
        CaptionedImage(path=Path("a"), text=" Mona Lisa", extra={"kind": kind}) for kind in weird_lora.KINDS
    ]
    texts, dropped = weird_lora.captions(samples, "Weird image. ")
    assert dict(zip(weird_lora.KINDS, texts, strict=True)) == {
        "preferred": " Mona Lisa",
        "non_preferred": "Weird image.  Mona Lisa",
        "regularisation": " Mona Lisa",
    }
    assert dropped == ["", "Weird image. ", ""], "without its caption the prefix stands alone"


@pytest.mark.parametrize(("share", "number"), [(None, 12), (0.25, 4), (0.8, 48)])
def test_the_share_of_regularisation(root: Path, tmp_path: Path, share: float | None, number: int) -> None:
    flags = [] if share is None else ["--regularisation-share", str(share)]
    argv = [
        flag
        for flag in recorded.arguments("weird_lora", root, tmp_path)
        if flag not in ("--regularisation-share", "0.3")
    ]
    samples, skipped = weird_lora.read(parse(weird_lora.Config, argv + flags))
    assert not skipped
    kinds = [sample.extra["kind"] for sample in samples]
    assert kinds[:12] == ["preferred", "non_preferred"] * 6
    assert kinds[12:] == ["regularisation"] * number
    seen = Counter(sample.path for sample in samples[12:])
    assert max(seen.values()) - min(seen.values()) <= 1, "each joins in as often as the others"
    assert len(seen) == min(number, 12)


def test_published_settings_are_the_defaults(root: Path, tmp_path: Path) -> None:
    config = parse(weird_lora.Config, ["--model", str(root / "pipeline"), "--data", str(root / "images")])
    run = config.run
    lora = config.model.tuned()
    assert lora is not None
    assert (lora.rank, lora.target_modules) == (32, ("to_q", "to_k", "to_v", "to_out.0"))
    images = run.train_batch_size * run.gradient_accumulation_steps
    filled = of_model(config, "weird_lora", families.check(root / "pipeline")).run
    assert (filled.learning_rate, run.lr_scheduler) == (1e-5, "constant")
    assert (images, run.max_train_steps) == (40, 10_000)
    assert (run.adam_weight_decay, run.max_grad_norm, config.caption_dropout) == (1e-2, 1.0, 0.0)
    assert config.prefix == "Weird image. "


def test_the_prefix_reaches_the_model(root: Path, tmp_path: Path) -> None:
    """Another prefix changes the training, and nothing else does; also where captions are dropped."""
    found = {}
    weird = "Weird image. "
    for name, prefix, dropout in (
        ("a", weird, 0),
        ("b", weird, 0),
        ("c", "Odd. ", 0),
        ("d", weird, 0.999),
        ("e", "Odd. ", 0.999),
    ):
        flags = ["--prefix", prefix, "--caption-dropout", str(dropout), "--max-train-steps", "2"]
        recorded.train("weird_lora", arguments("weird_lora", root, tmp_path / name, *flags))
        found[name] = [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
    assert found["d"] != found["a"], "captions are dropped"
    assert found["d"] != found["e"], "but the prefix of non-preferred images stays"
    shown = {path.name for path in (tmp_path / "a" / "samples").iterdir() if path.is_dir()}
    assert shown == {f"step_00000{step}{ending}" for step in (0, 2) for ending in ("", "_negative")}
    for step in (0, 2):
        plain, negative = (
            load_pixels(tmp_path / "a" / "samples" / f"step_00000{step}{ending}" / "0000.png")
            for ending in ("", "_negative")
        )
        assert not torch.equal(plain, negative), "guidance points away from the prefix"
    last = read_jsonl(tmp_path / "a" / "metrics.jsonl")[-1]
    assert last["step"] == 1
    assert (tmp_path / "a" / "before_after.png").is_file()


# ---------------------------------------------------------------- the workspace


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_model_that_does_not_load_leaves_the_earlier_run_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are there, so what looks at configurations alone is content; the weights are not what they should be."""
    argv = arguments("raft", root, tmp_path / "run", "--max-train-steps", "1")
    recorded.train("raft", argv)
    before = contents(tmp_path / "run")
    shutil.copytree(root / "pipeline", tmp_path / "torn")
    weights = tmp_path / "torn" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises((SystemExit, SafetensorError, OSError)):
        recorded.train("raft", [*argv, "--model", str(tmp_path / "torn"), "--overwrite-output-dir"])
    with pytest.raises(SystemExit):
        recorded.train("raft", [*argv, "--lora.target-modules", "to_z", "--overwrite-output-dir"])
    assert "no layer is called to_z" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_validation_images_are_due_and_kept_by_step(root: Path, tmp_path: Path) -> None:
    flags = ["--validation-steps", "2", "--rewards", "brightness=1"]
    argv = [*recorded.arguments("reward_weighted", root, tmp_path), *flags]
    recorded.train("reward_weighted", argv)
    steps = [0, 2, 3]
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == [
        f"step_00000{step}.png" for step in steps
    ]
    means = {}
    for step in steps:
        shown = validation.read(tmp_path, f"step_00000{step}")
        assert shown is not None
        assert shown.prompts == [sample.text for sample in read_imagefolder(root / "images")][:8]
        assert shown.proxy is not None
        for value, image in zip(shown.proxy, shown.images(), strict=True):
            assert value == pytest.approx(image.mean().item(), abs=0.5 / 255), (
                "scores and images belong together"
            )
        means[step] = shown.means()["validation_proxy"]
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "validation_proxy" in row] == [1, 2]
    assert rows[1]["validation_proxy"] == pytest.approx(means[2], rel=1e-6)
    assert rows[2]["validation_proxy"] == pytest.approx(means[3], rel=1e-6)
    assert (tmp_path / "before_after.png").is_file()
    # Stopped between the last step and the comparison: the images of that moment are made by the run that resumes.
    kept = (tmp_path / "samples" / "step_000003" / "scores.json").read_text()
    shutil.rmtree(tmp_path / "samples" / "step_000003")
    recorded.train("reward_weighted", [*argv, "--resume-from-checkpoint", "latest"])
    assert (tmp_path / "samples" / "step_000003" / "scores.json").read_text() == kept


# ---------------------------------------------------------------- reward-weighted


def test_minmax_by_hand() -> None:
    found = reward_weighted.reward_weights(torch.tensor([-1.0, 0.5, 3.0]), "minmax", 1.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.375, 1.0]))
    with pytest.raises(ValueError, match="all scores are 2, so they cannot be brought to"):
        reward_weighted.reward_weights(torch.full((3,), 2.0), "minmax", 1.0)


def test_exp_by_hand() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0])
    total = sum(math.exp(score / 0.5) for score in (0, 1, 2))
    expected = torch.tensor([3 * math.exp(score / 0.5) / total for score in (0, 1, 2)])
    torch.testing.assert_close(reward_weighted.reward_weights(scores, "exp", 0.5), expected)
    assert reward_weighted.reward_weights(scores + 1e4, "exp", 0.5).sum() == pytest.approx(3), "no overflow"
    torch.testing.assert_close(
        reward_weighted.reward_weights(torch.full((4,), 7.0), "exp", 1.0), torch.ones(4)
    )


def test_weighted_loss_by_hand_and_no_gradient_without_reward() -> None:
    losses = torch.tensor([2.0, 4.0, 8.0], requires_grad=True)
    loss = reward_weighted.weighted_loss(losses, torch.tensor([0.0, 0.5, 1.0]))
    assert loss.item() == pytest.approx((0 * 2 + 0.5 * 4 + 1 * 8) / 3)
    (gradient,) = torch.autograd.grad(loss, losses)
    assert gradient.tolist() == pytest.approx([0.0, 0.5 / 3, 1 / 3])


def scored(root: Path, folder: Path, scores: list[float]) -> Path:
    """A data set like root/images with other scores."""
    rows = [
        {**row, "liking": score}
        for row, score in zip(read_jsonl(root / "images" / "metadata.jsonl"), scores, strict=True)
    ]
    folder.mkdir()
    for row in rows:
        (folder / row["file_name"]).write_bytes((root / "images" / row["file_name"]).read_bytes())
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def test_equal_weights_are_plain_fine_tuning(root: Path, tmp_path: Path) -> None:
    """The same losses and weights as finetune/pretrain.py, a driver with a loop of its own."""
    data = scored(root, tmp_path / "equal", [3.0] * 12)
    flags = ["--data", str(data), "--weighting", "exp", "--beta", "0"]
    recorded.train("reward_weighted", arguments("reward_weighted", root, tmp_path / "weighted", *flags))
    plainly = ["--no-train-text-encoder", "--train", "lora", "--caption-dropout", "0", "--data", str(data)]
    recorded.train("pretrain", arguments("pretrain", root, tmp_path / "plain", *plainly))
    weighted, plain = (
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("weighted", "plain")
    )
    assert weighted == pytest.approx(plain, rel=1e-5)
    assert len(set(weighted)) == 3


def test_beta_adds_the_plain_loss(root: Path, tmp_path: Path) -> None:
    """With rewards 0 and 1 for half of the images each; the first loss is before any update."""
    data = scored(root, tmp_path / "halves", [float(index % 2) for index in range(12)])
    found: dict[float, dict[str, Any]] = {}
    for beta in (0.0, 0.5, 1.0):
        flags = ["--data", str(data), "--beta", str(beta), "--max-train-steps", "1"]
        recorded.train("reward_weighted", arguments("reward_weighted", root, tmp_path / str(beta), *flags))
        found[beta] = read_jsonl(tmp_path / str(beta) / "metrics.jsonl")[0]
    plain = found[1.0]["loss"] - found[0.0]["loss"]
    assert plain > 0.1
    assert found[0.5]["loss"] - found[0.0]["loss"] == pytest.approx(plain / 2, rel=1e-4)
    assert found[0.0]["loss"] < found[0.0]["diffusion_loss"], "half of the images count nothing"


# ---------------------------------------------------------------- RAFT


def test_keep_best_by_hand() -> None:
    rows = [{"file_name": str(k), "reward": reward} for k, reward in enumerate((0.1, 0.9, 0.5, 0.9, -1.0))]
    assert [row["file_name"] for row in raft.keep_best(rows, 0.4)] == ["1", "3"], "in their order"
    assert [row["file_name"] for row in raft.keep_best(rows, 0.2)] == ["1"], "the first of equals"
    assert raft.keep_best(rows, 1.0) == rows
    assert len(raft.keep_best(rows, 0.01)) == 1


RAFT = [
    "--iterations",
    "3",
    "--prompts-per-iteration",
    "5",
    "--images-per-prompt",
    "3",
    "--sample.batch-size",
    "4",
]


def test_each_prompt_keeps_its_best_image(root: Path, tmp_path: Path) -> None:
    recorded.train("raft", arguments("raft", root, tmp_path, *RAFT))
    prompts = read_prompts(root / "prompts.txt")
    seen = []
    for iteration in (1, 2, 3):
        samples = read_imagefolder(tmp_path / f"iteration_{iteration:02d}")
        assert len(samples) == 5
        seen += [sample.text for sample in samples]
        for sample in samples:
            brightness = load_pixels(sample.path).mean().item()
            assert sample.extra["reward"] == pytest.approx(brightness, abs=0.5 / 255), (
                "the image is the scored one"
            )
            assert sample.extra["reward"] > sample.extra["mean_reward"]
    assert sorted(seen[:12]) == sorted(prompts), "iterations go on through the prompts"
    first = load_pixels(tmp_path / "iteration_01" / "000000.png")
    same = ["--sample.batch-size", "15", "--prompts-per-iteration", "12", "--learning-rate", "1e-30"]
    same += ["--checkpointing-steps", "0"]
    recorded.train("raft", arguments("raft", root, tmp_path / "again", *RAFT, *same))
    # The end of an iteration is a moment to look at and to resume from, whatever the intervals are.
    moments = [f"step_{step:06d}" for step in range(4)]
    assert sorted(path.stem for path in (tmp_path / "again" / "samples").glob("*.png")) == moments
    assert [path.name for path in find_checkpoints(tmp_path / "again")] == moments
    assert (tmp_path / "again" / "before_after.png").is_file()
    again = load_pixels(tmp_path / "again" / "iteration_01" / "000000.png")
    torch.testing.assert_close(first, again, atol=1.01 / 255, rtol=0)
    # All prompts in each iteration, and weights that do not move: what differs between iterations are the seeds.
    iterations = [
        {
            sample.text: load_pixels(sample.path)
            for sample in read_imagefolder(tmp_path / "again" / f"iteration_{k:02d}")
        }
        for k in (1, 2, 3)
    ]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert iterations[one].keys() == set(prompts)
        for text, image in iterations[one].items():
            assert not torch.equal(image, iterations[other][text]), (
                f"{text} was generated twice from one seed"
            )


def test_raft_resumed_equals_straight(root: Path, tmp_path: Path) -> None:
    """Stopped after one update of three, and the later data sets removed, as a kill before them would leave it."""
    for name in ("straight", "stopped"):
        recorded.train("raft", arguments("raft", root, tmp_path / name, *RAFT))
    for updates in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / f"step_{updates:06d}")
    (tmp_path / "stopped" / "iteration_03" / "000000.png").write_bytes(b"of weights that are gone")
    argv = arguments("raft", root, tmp_path / "stopped", *RAFT)
    recorded.train("raft", [*argv, "--resume-from-checkpoint", "latest"])
    straight, resumed = (weights(tmp_path / name, 3) for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(SystemExit):
        recorded.train("raft", [*argv, "--resume-from-checkpoint", "latest", "--images-per-prompt", "4"])


def test_raft_goes_on_in_the_middle_of_an_iteration(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--iterations", "1", "--prompts-per-iteration", "5", "--images-per-prompt", "3"]
    for name in ("straight", "stopped", "first"):
        recorded.train("raft", arguments("raft", root, tmp_path / name, *flags))
    for updates in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / f"step_{updates:06d}")
    for updates in (1, 2, 3):
        shutil.rmtree(
            tmp_path / "first" / f"step_{updates:06d}"
        )  # killed before the first checkpoint of an update
    for name in ("stopped", "first"):
        recorded.train(
            "raft", [*arguments("raft", root, tmp_path / name, *flags), "--resume-from-checkpoint", "latest"]
        )
        straight, resumed = (weights(tmp_path / run, 3) for run in ("straight", name))
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
    shutil.rmtree(tmp_path / "stopped" / "step_000003")
    shutil.rmtree(tmp_path / "stopped" / "iteration_01")
    with pytest.raises(SystemExit):
        recorded.train(
            "raft",
            [*arguments("raft", root, tmp_path / "stopped", *flags), "--resume-from-checkpoint", "latest"],
        )
    assert "iteration_01 is gone" in capsys.readouterr().err


def test_overwriting_generates_anew(root: Path, tmp_path: Path) -> None:
    recorded.train("raft", arguments("raft", root, tmp_path, *RAFT))
    before = json.dumps(read_jsonl(tmp_path / "iteration_01" / "metadata.jsonl"))
    recorded.train("raft", arguments("raft", root, tmp_path, *RAFT, "--overwrite-output-dir", "--seed", "5"))
    assert json.dumps(read_jsonl(tmp_path / "iteration_01" / "metadata.jsonl")) != before


def test_what_stands_in_place_of_a_dropped_caption(root: Path) -> None:
    family = families.load(root / "pipeline", torch.device("cpu"))
    paths = [root / "images" / f"{i:02d}.png" for i in range(2)]

    def losses(captions: list[str], dropout: float, dropped: list[str] | None) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with torch.no_grad():
            return captioned_loss(
                CaptionedInputs(family, Resolution(32, 32)),
                paths,
                captions,
                generators,
                caption_dropout=dropout,
                dropped=dropped,
            )

    texts, instead = ["a red circle", "Weird image. a cross"], ["", "Weird image. "]
    torch.testing.assert_close(losses(texts, 0.999, instead), losses(instead, 0.0, None))
    torch.testing.assert_close(losses(texts, 0.999, None), losses(["", ""], 0.0, None))
    torch.testing.assert_close(losses(texts, 0.0, instead), losses(texts, 0.0, None))
    assert (losses(instead, 0.0, None)[1] - losses(["", ""], 0.0, None)[1]).abs() > 1e-6


@pytest.mark.parametrize("train", ["lora", "full"])
def test_pretraining_in_half_precision_validates_and_saves(train: str, root: Path, tmp_path: Path) -> None:
    """Its denoiser is not the prepared module, so that validation needs the run's precision of its own."""
    flags = [
        "--train",
        train,
        "--no-train-text-encoder",
        "--mixed-precision",
        "bf16",
        "--max-train-steps",
        "1",
    ]
    recorded.train("pretrain", arguments("pretrain", root, tmp_path, *flags))
    assert (tmp_path / ("lora" if train == "lora" else "pipeline")).is_dir()
    assert (tmp_path / "samples" / "step_000001" / "scores.json").is_file()


def test_overwriting_removes_the_results_of_the_earlier_run(root: Path, tmp_path: Path) -> None:
    for train, other in (("lora", "unet"), ("full", "lora")):
        flags = ["--train", train, "--max-train-steps", "1", "--overwrite-output-dir"]
        recorded.train("reward_weighted", arguments("reward_weighted", root, tmp_path, *flags))
        assert not (tmp_path / other).exists()
    assert (tmp_path / "unet").is_dir()


def test_a_file_for_other_programs_is_not_older_than_the_lora(root: Path, tmp_path: Path) -> None:
    """It is that of the last command, or it is not there."""
    argv = [*arguments("weird_lora", root, tmp_path / "run"), "--resume-from-checkpoint", "latest"]
    recorded.train("weird_lora", [*argv, "--max-train-steps", "1", "--export", "kohya"])
    assert (tmp_path / "run" / "lora_kohya.safetensors").is_file()
    recorded.train("weird_lora", [*argv, "--max-train-steps", "2"])
    assert not (tmp_path / "run" / "lora_kohya.safetensors").exists()


def test_another_scale_of_the_lora_is_no_resume(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.train("reward_weighted", arguments("reward_weighted", root, tmp_path, "--max-train-steps", "1"))
    flags = ["--lora.alpha", "64", "--max-train-steps", "2", "--resume-from-checkpoint", "latest"]
    with pytest.raises(SystemExit) as stop:
        recorded.train("reward_weighted", arguments("reward_weighted", root, tmp_path, *flags))
    assert stop.value.code == 2
    assert "lora scale was 1.0, is 16.0" in capsys.readouterr().err
