"""The guard against over-optimisation: its rule by hand, and runs that it watches, with rewards that fall where another rises."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import record_trajectories as recorded
import rewards
from preftune.records import read_jsonl
from preftune.statistics import bootstrap
from preftune.training import validation
from preftune.training.checkpoint import find_checkpoints
from preftune.training.guard import Guard, check_independent
from preftune.training.guard_config import GuardConfig
from preftune.training.guard_rule import Moment, alarm, best_of, standing
from run_contents import contents, differences

pytestmark = pytest.mark.usefixtures("cpu")

OWN = """
def dark(pixels, prompts):
    return 1 - pixels.mean((1, 2, 3))


def light(pixels, prompts):
    return 2 * pixels.mean((1, 2, 3))
"""
ONE = {"a": 1.0}


def at(updates: int, holdout: list[float], proxy: float = 0.0, diversity: float | None = None) -> Moment:
    column = np.array(holdout)
    return Moment(
        updates=updates, proxy=np.full(len(column), proxy), holdout={"a": column}, diversity=diversity
    )


# ---------------------------------------------------------------- the rule


def test_standing_by_hand() -> None:
    """The base's deviation over prompts is 2 for a (0, 2, 4) and 10 for b (10, 20, 30)."""
    base = replace(at(0, [0, 2, 4]), holdout={"a": np.array([0.0, 2, 4]), "b": np.array([10.0, 20, 30])})
    now = replace(base, updates=5, holdout={"a": np.array([1.0, 2, 6]), "b": np.array([10.0, 30, 20])})
    assert standing(base, now, {"a": 1.0}) == pytest.approx([0.5, 0, 1])
    assert standing(base, now, {"a": 1.0, "b": 3.0}) == pytest.approx([0.125, 0.75, -0.5])
    assert standing(base, base, {"a": 1.0, "b": 3.0}) == pytest.approx([0, 0, 0])
    level = replace(base, holdout={"a": np.ones(3), "b": base.holdout["b"]})
    assert standing(level, now, {"a": 1.0, "b": 1.0}) == pytest.approx([0, 1, -1]), "a has no unit"
    assert standing(level, now, {"a": 1.0}) is None


def test_the_best_is_the_highest_mean_and_of_equal_ones_the_first() -> None:
    moments = [at(0, [0, 2, 4]), at(1, [1, 3, 5]), at(2, [3, 3, 3]), at(3, [0, 0, 4])]
    assert best_of(moments, ONE) == 1
    assert best_of([moments[0], moments[3]], ONE) == 0, "the base is one of them"
    assert best_of(moments, {}) is None


def test_alarms_by_hand() -> None:
    base, best = at(0, [0, 2, 4, 6]), at(10, [1, 3, 5, 7])
    worse = at(20, [0.5, 2.5, 4.5, 6.5], proxy=1.0)
    found = alarm([base, best, worse], ONE, 0.25)
    assert found is not None
    assert (found.kind, found.updates, found.best) == ("over-optimisation", 20, 10)
    assert found.change == pytest.approx([-0.5 / np.std([0, 2, 4, 6], ddof=1)] * 3), "all prompts fall alike"
    declined = alarm([base, best, at(20, [0.5, 2.5, 4.5, 6.5], proxy=-1.0)], ONE, 0.25)
    assert declined is not None
    assert declined.kind == "decline"
    assert alarm([base, best], ONE, 0.25) is None, "the last is the best"
    assert alarm([base, worse], ONE, 0.25) is None, "better than the base"


def test_a_fall_within_its_interval_is_none() -> None:
    """Two prompts of four fall by 3, one rises by 2: the mean is -1, its interval reaches above 0."""
    base, now = at(0, [0, 2, 4, 6]), at(10, [-3, 4, 1, 6], proxy=1.0)
    change = bootstrap.mean(np.array([-3.0, 2, -3, 0]))
    assert change[0] < 0 < change[2]
    assert alarm([base, now], ONE, 0.25) is None
    assert alarm([at(0, [1.0]), at(10, [0.0])], ONE, 0.25) is None, "a single prompt has no interval"


@pytest.mark.parametrize(("now", "rings"), [(6.1, False), (5.9, True)])
def test_diversity_beyond_its_share(now: float, rings: bool) -> None:
    found = alarm([at(0, [0, 2], diversity=8.0), at(5, [1, 3], diversity=now)], ONE, 0.25)
    assert (found is not None) == rings
    if found is not None:
        assert (found.kind, found.best) == ("diversity", 5)
        assert found.change == pytest.approx((8.0, 5.9, 1 - 5.9 / 8))


# ---------------------------------------------------------------- flags and weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--holdout-rewards", "brightness"], "brightness is in --rewards as well"),
        (["--holdout-rewards", "shapes=-1"], "--holdout-rewards shapes=-1 must have a positive weight"),
        (["--holdout-rewards", "shapes=x"], "--holdout-rewards 'shapes=x' is not NAME or NAME=WEIGHT"),
        (["--holdout-rewards", "shaps"], "unknown scorer 'shaps'"),
        (["--guard-diversity-drop", "0"], "--guard-diversity-drop must lie in (0, 1], got 0"),
        (["--holdout-rewards", "imagereward"], "imagereward"),
    ],
)
def test_wrong_flags_end_before_a_model_loads(
    flags: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SystemExit) as stop:
        recorded.train("refl", [*recorded.arguments("refl", root, tmp_path / "run"), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_of_held_out_scorers_are_those_of_reward_files() -> None:
    from preftune.training.config import RewardConfig

    config = RewardConfig(
        rewards=("brightness",),
        guard=GuardConfig(holdout_rewards=("imagereward",)),
        reward_files=("imagereward=x.pt",),
    )
    assert config.files() == {"imagereward": Path("x.pt")}


# ---------------------------------------------------------------- runs


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def train(root: Path, output: Path, *flags: str) -> list[dict[str, float]]:
    """ReFL towards brightness, four updates, validated after each, unless the flags say otherwise."""
    few = ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "4"]
    rate = ["--learning-rate", "3e-2", "--pretraining", "off", "--adam-epsilon", "1e-8"]
    argv = recorded.arguments("refl", root, output)
    steps = ["--max-train-steps", "4", "--validation-steps", "1"]
    recorded.train("refl", [*argv, *few, *rate, *steps, *flags])
    return read_jsonl(output / "metrics.jsonl")


def note(output: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((output / "best" / "guard.json").read_text())
    return found


def test_a_reward_that_ruins_another_warns_and_keeps_the_base(
    root: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(root, tmp_path / "run", "--holdout-rewards", f"{own}:dark")
    said = capsys.readouterr().err
    assert said.count("guard: ") == 1, "once a run"
    assert "held-out scores" in said
    assert "while the proxy did not" in said
    assert len(rows) == 4, "it goes on"
    assert note(tmp_path / "run")["updates"] == 0
    assert rows[-1]["validation_holdout"] < 0
    base = validation.read(tmp_path / "run", "step_000000")
    last = validation.read(tmp_path / "run", "step_000004")
    assert base is not None
    assert last is not None
    (name,) = last.holdout
    difference = np.array(last.holdout[name]) - np.array(base.holdout[name])
    expected = difference.mean() / np.std(base.holdout[name], ddof=1)
    assert rows[-1]["validation_holdout"] == pytest.approx(expected)
    assert [1 - p for p in last.holdout[name]] == pytest.approx(last.proxy, abs=1e-6)
    for picture in ("guard.png", "progress.png"):
        assert (tmp_path / "run" / picture).is_file()
    for column in ("saturation", "contrast", "high_frequency_energy"):
        assert f"validation_{column}" in rows[-1]


def test_a_held_out_scorer_that_rises_is_no_alarm(
    root: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(root, tmp_path / "run", "--holdout-rewards", f"{own}:light")
    assert "guard: " not in capsys.readouterr().err
    assert note(tmp_path / "run")["updates"] == 4
    assert not (tmp_path / "run" / "guard.png").exists()
    best, last = (contents(tmp_path / "run" / name) for name in ("best/lora", "lora"))
    assert best == last != {}


def test_stop_ends_the_run_and_keeps_the_best(
    root: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--holdout-rewards", f"{own}:dark", "--guard", "stop", "--export", "kohya"]
    rows = train(root, tmp_path / "run", *flags)
    captured = capsys.readouterr()
    assert len(rows) < 4
    stopped = int(rows[-1]["step"]) + 1
    assert "The run stops here (--guard stop)" in captured.err
    assert "before 0." in captured.out, "before and after are compared"
    names = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert names[-1] == f"step_{stopped:06d}"
    for name in ("lora", "best/lora", "lora_kohya.safetensors", "before_after.png", "guard.png"):
        assert (tmp_path / "run" / name).exists(), name
    assert note(tmp_path / "run")["updates"] == 0
    # The same command again stops at once and changes nothing; with warn it goes on.
    before = contents(tmp_path / "run")
    train(root, tmp_path / "run", *flags, "--resume-from-checkpoint", "latest")
    assert "The run stops here" in capsys.readouterr().err
    assert not differences(before, contents(tmp_path / "run"))
    rows = train(root, tmp_path / "run", *flags[:2], "--guard", "warn", "--resume-from-checkpoint", "latest")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("scorer", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_a_resumed_run_decides_as_one_that_was_never_stopped(
    scorer: str, root: Path, tmp_path: Path, own: Path
) -> None:
    holdout = ["--holdout-rewards", f"{own}:{scorer}"]
    train(root, tmp_path / "whole", *holdout)
    train(root, tmp_path / "parts", *holdout, "--max-train-steps", "2")
    shutil.rmtree(tmp_path / "parts" / "best")  # it is made again of a checkpoint
    train(root, tmp_path / "parts", *holdout, "--resume-from-checkpoint", "latest")
    whole, parts = (contents(tmp_path / name / "best") for name in ("whole", "parts"))
    assert whole == parts
    assert any("lora" in name for name in whole)


def test_off_scores_and_decides_nothing(
    root: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(root, tmp_path / "run", "--holdout-rewards", f"{own}:dark", "--guard", "off")
    assert "guard: " not in capsys.readouterr().err
    assert rows[-1]["validation_holdout"] < 0
    assert not (tmp_path / "run" / "best").exists()


def test_without_the_base_nothing_is_decided(
    root: Path, tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody has removed the first images: a later validation does not take their place."""
    flags = ["--holdout-rewards", f"{own}:dark", "--guard", "stop"]
    train(root, tmp_path / "run", *flags, "--max-train-steps", "1", "--guard", "off")
    shutil.rmtree(tmp_path / "run" / "samples" / "step_000000")
    capsys.readouterr()
    rows = train(root, tmp_path / "run", *flags, "--resume-from-checkpoint", "latest")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert "guard: " not in capsys.readouterr().err
    assert "validation_holdout" not in rows[-1]
    assert not (tmp_path / "run" / "best").exists()


def test_scores_of_before_there_were_held_out_ones_are_read(tmp_path: Path) -> None:
    guard = Guard(GuardConfig(), tmp_path)
    old = validation.Validation(folder=tmp_path, prompts=["a"], proxy=[0.5], gold=None, run="x")
    assert guard.see(0, old, None) == {}
    assert old.means() == {"validation_proxy": 0.5}


def test_short_names_tell_folders_apart(tmp_path: Path) -> None:
    for name in ("a/scorer", "b/scorer", "c/clip"):
        (tmp_path / name).mkdir(parents=True)
    names = [str(tmp_path / name) for name in ("a/scorer", "b/scorer", "c/clip")]
    assert list(validation.short_names([*names, "shapes"]).values()) == [
        "a/scorer",
        "b/scorer",
        "clip",
        "shapes",
    ]


# ---------------------------------------------------------------- independence


def test_weights_and_backbones_in_common() -> None:
    """One CLIP and its copy are refused; the aesthetic head on the same tower and the same published start are warned of."""
    tiny = str(Path(__file__).parents[1] / "assets" / "tiny" / "pretrained" / "clip")
    one, copy = rewards.load(tiny), rewards.load(tiny)
    with pytest.raises(ValueError, match="has the weights of"):
        check_independent([one], [copy])
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name.startswith("text"):
                parameter.add_(0.01)
    (warning,) = check_independent([one], [copy])
    assert "shares weights with" in warning
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.01)
    assert check_independent([one], [copy]) == [], "small ones began from nothing"
    for scorer, name in ((one, "hpsv2"), (copy, "pickscore")):
        scorer.card = rewards.find_card(name)
    (warning,) = check_independent([one], [copy])
    assert "pickscore began as the same CLIP of 32 layers of width 1280 as --rewards hpsv2" in warning
    copy.card = rewards.find_card("imagereward")
    assert check_independent([one], [copy]) == []
