"""Rewards of the user's own: in a file, from Python, mixed with others; what he reads for each mistake; when a file runs."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import record_trajectories as recorded
import rewards
from data_build import score
from eval.models import check_scorers
from eval.view_scores import PromptedImage, score_views
from preftune import cli, scorer_digests
from preftune.images import load_pixels
from preftune.records import read_jsonl
from preftune.resolution import Resolution
from preftune.training import inputs
from rewards import own
from rewards.own import OwnRewardError
from rewards.own_scorer import OwnReward, try_out
from rewards.terms import parse_names, parse_weights, units

pytestmark = pytest.mark.usefixtures("cpu")

CODE = '''"""Rewards."""
import torch

calls = []

def brightness(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3))

def column(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3))[:, None]

def per_channel(pixels, prompts):
    return pixels.mean(dim=(2, 3))

def one_number(pixels, prompts):
    return pixels.mean()

def python_number(pixels, prompts):
    return float(pixels.detach().mean() * 0 + 0.5)

def listed(pixels, prompts):
    return [float(image.mean()) for image in pixels.detach()]

def stacked(pixels, prompts):
    return [image.mean() for image in pixels]

def nothing(pixels, prompts):
    len(prompts)

def nan(pixels, prompts):
    return pixels.mean(dim=(1, 2, 3)) * float("nan")

def helper(pixels):
    return pixels.reshape(len(pixels), 7, -1)

def broken(pixels, prompts):
    return helper(pixels).mean(dim=(1, 2))

def unrelated(pixels, prompts):
    return torch.ones(len(pixels), requires_grad=True)

def steep(pixels, prompts):
    return (pixels * 0).sqrt().mean(dim=(1, 2, 3))

def rounded(pixels, prompts):
    return pixels.round().mean(dim=(1, 2, 3))

def one_argument(pixels):
    return pixels.mean(dim=(1, 2, 3))

def swapped(texts, images):
    return images.mean(dim=(1, 2, 3))

def without_numbers(pixels, prompts):
    return pixels.to("meta").mean(dim=(1, 2, 3))

def nan_later(pixels, prompts):
    calls.append("nan")
    return pixels.mean(dim=(1, 2, 3)) + (float("nan") if calls.count("nan") > 4 else 0)

def steep_later(pixels, prompts):
    calls.append("steep")
    return pixels.mean(dim=(1, 2, 3)) + ((pixels * 0).sqrt().mean() if calls.count("steep") > 4 else 0)

def fails_later(pixels, prompts):
    calls.append("fails")
    if calls.count("fails") > 4:
        raise KeyError("a red circle")
    return pixels.mean(dim=(1, 2, 3))

class Judge(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.dropout = torch.nn.Dropout()

    def forward(self, pixels, prompts):
        return self.layer(self.dropout(pixels.mean(dim=(2, 3))))

class Whole:
    def __call__(self, pixels, prompts):
        return judge(pixels, prompts)[:, 0]

judge = Judge()
whole = Whole()
number = 3
'''


def brightness(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    return pixels.mean(dim=(1, 2, 3))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(CODE)
    return tmp_path / "my_rewards.py"


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(CODE.splitlines(), 1) if text in line)


def quick(driver: str, root: Path, output: Path) -> list[str]:
    """The command line of one update."""
    flags = ["--max-train-steps", "1", "--sample.num-inference-steps", "1", "--num-validation-prompts", "2"]
    flags += ["--pretraining", "off"] if driver == "refl" else []
    return [*recorded.arguments(driver, root, output), *flags]


def tune(driver: str, root: Path, output: Path, *flags: str) -> dict[str, Tensor]:
    """The LoRA of a short run."""
    assert recorded.train(driver, [*quick(driver, root, output), *flags]) == 0
    return load_file(next((output / "lora").glob("*.safetensors")))


def refused(
    capsys: pytest.CaptureFixture[str], driver: str, root: Path, output: Path, *flags: str, code: int = 2
) -> str:
    """What a driver that refuses prints."""
    with pytest.raises(SystemExit) as stop:
        recorded.train(driver, [*recorded.arguments(driver, root, output), *flags])
    assert stop.value.code == code
    return capsys.readouterr().err


# ---------------------------------------------------------------- runs


def test_from_a_file_from_python_and_from_the_table(root: Path, mine: Path, tmp_path: Path) -> None:
    """The same function gives the same weights, bit for bit, whichever way it is named."""
    table = tune("refl", root, tmp_path / "table", "--rewards", "brightness=0.5")
    file = tune("refl", root, tmp_path / "file", "--rewards", f"{mine}:brightness=0.5")
    with own.given({"mine": brightness}):
        python = tune("refl", root, tmp_path / "python", "--rewards", "mine=0.5")
    for name, weight in table.items():
        assert torch.equal(weight, file[name])
        assert torch.equal(weight, python[name])


def test_several_mixed_with_imagereward(root: Path, mine: Path, tmp_path: Path) -> None:
    weights = {f"{mine}:brightness": 3.0, "imagereward-tiny": 1.0, f"{mine}:whole": -2.0}
    terms = [f"{name}={weight}" for name, weight in weights.items()]
    tune("refl", root, tmp_path / "run", "--rewards", *terms)
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    found = json.loads((tmp_path / "run" / "samples" / "step_000000" / "scores.json").read_text())
    files = sorted((tmp_path / "run" / "samples" / "step_000000").glob("*.png"))
    pixels = torch.stack([load_pixels(path) for path in files])
    scores = [weight * rewards.load(name)(pixels, found["prompts"]) for name, weight in weights.items()]
    torch.testing.assert_close(torch.tensor(found["proxy"]), sum(scores), atol=0.02, rtol=0)  # of 8 bits


def test_raft_needs_no_gradient(root: Path, mine: Path, tmp_path: Path) -> None:
    flags = ["--rewards", f"{mine}:listed", "brightness=2"]
    tune("raft", root, tmp_path / "run", *flags)
    (row, *_) = read_jsonl(tmp_path / "run" / "iteration_01" / "metadata.jsonl")
    assert 0 < row["reward"] < 3


# ---------------------------------------------------------------- mistakes


def place(function: str) -> str:
    return f"{{mine}}:{function} ({{mine}}:{line_of(f'def {function}(')})"


GRADIENT = (
    "compute them from the pixels with torch alone, without no_grad(), detach(), item(), numpy and PIL, or use a method without a"
    " reward's gradient, such as preftune raft"
)
MISTAKES = {
    "per_channel": f"{place('per_channel')} returned a tensor of shape (2, 3) for 2 images; return one score for each image, a tensor"
    " of shape (2,)",
    "one_number": f"{place('one_number')} returned a tensor of shape () for 2 images; return one score for each image, a tensor of"
    " shape (2,)",
    "python_number": f"{place('python_number')} returned float 0.5 for 2 images; return one score for each image, a tensor of shape"
    " (2,)",
    "nothing": f"{place('nothing')} returned None for 2 images; return one score for each image, a tensor of shape (2,)",
    "listed": f"{place('listed')} returned scores without a gradient, which this method needs; {GRADIENT}",
    "unrelated": f"{place('unrelated')} returned scores whose gradient does not reach the pixels, which this method needs; compute"
    " them from the pixels with torch alone, or use a method without a reward's gradient, such as preftune raft",
    "nan": f"{place('nan')} returned [nan, nan] for two random images; return finite numbers",
    "steep": f"{place('steep')} has a gradient of NaN or infinity for random images; look for a square root, logarithm or division"
    " at 0",
    "broken": f"{{mine}}:broken failed at {{mine}}:{line_of('pixels.reshape')} (return pixels.reshape(len(pixels), 7, -1)):"
    " RuntimeError: shape '[2, 7, -1]' is invalid for input of size 6144",
    "one_argument": "{mine}:one_argument(pixels) cannot be called as f(pixels, prompts): too many positional arguments; define it as"
    " def f(pixels, prompts)",
    "swapped": "{mine}:swapped(texts, images) takes the prompts first, but is called as f(pixels, prompts); swap the two",
    "without_numbers": f"{place('without_numbers')} returned a tensor on the device meta, without numbers; return one score for each"
    " image, a tensor of shape (2,)",
    "Judge": "{mine}:Judge is a class; make an object of it, as reward = Judge(), and name that",
    "number": "{mine}:number is 3 (int), which cannot be called; name a function of pixels and prompts",
    "brigtness": "{mine} has no function 'brigtness', did you mean brightness?; it has brightness, column,",
    "": "{mine} needs the name of a function behind it, as {mine}:brightness; it has brightness, column,",
}


@pytest.mark.parametrize("function", MISTAKES)
def test_a_mistake_ends_in_one_sentence(
    function: str, root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model loads, and before anything is written."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "kept").write_text("")
    flags = [
        "--rewards",
        "brightness",
        f"{mine}:{function}=0.5" if function else str(mine),
        "--overwrite-output-dir",
    ]
    error = refused(capsys, "refl", root, output, *flags)
    sentence = f": error: {MISTAKES[function].format(mine=mine)}"
    assert sentence in error.splitlines()[-1]
    assert error.count(": error: ") == 1
    assert ("Traceback" in error) == (function == "broken"), "only of an exception in the user's own code"
    assert "own_scorer.py" not in error, "whose lines alone it has"
    assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == ["kept"]


def test_files_that_cannot_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code, words in (
        ("syntax.py", "def f(pixels, prompts)\n    return 1\n", "{path}:1 is not Python: expected ':': def f(pixels, prompts)"),
        (
            "fails.py",
            "import no_such_module\ndef f(pixels, prompts): ...\n",
            "running fails.py failed at {path}:1 (import no_such_module): ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("leaves.py", "def f(pixels, prompts): ...\nexit(3)\n", "running leaves.py failed at {path}:2 (exit(3)): SystemExit: 3"),
        ("stars.py", "from math import *\n", "{path} has no function 'f'; it has acos,"),
        ("empty.py", "", "{path} has no function 'f'; it has none; write def reward(pixels, prompts)"),
        ("gone.py", None, "there is no file {path}; --rewards takes FILE.py:FUNCTION, as in my_rewards.py:brightness=0.5"),
    ):  # fmt: skip
        path = tmp_path / name
        if code is not None:
            path.write_text(code)
        error = refused(capsys, "raft", root, tmp_path / "run", "--rewards", f"{path}:f")
        assert words.format(path=path) in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nan_later", " gave nan for 'a"),
        ("fails_later", ": KeyError: 'a red circle'"),
    ],
)
def test_a_failure_in_the_run_names_the_checkpoint(
    function: str, words: str, root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    error = refused(capsys, "refl", root, run, "--rewards", f"{mine}:{function}", code=1)
    last = error.splitlines()[-1]
    assert last.startswith(f"{Path(sys.argv[0]).name}: error: {mine}:{function}")
    assert words in last
    assert f"{mine}:{line_of(f'def {function}') + (3 if function == 'fails_later' else 0)}" in last
    assert last.endswith(f"; the last complete checkpoint is {run / 'step_000001'}")
    assert ("KeyError" in error) == ("Traceback" in error) == (function == "fails_later")


def test_a_gradient_that_is_not_finite_in_the_run_names_the_reward(
    root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(
        capsys, "refl", root, tmp_path / "run", "--rewards", f"{mine}:steep_later", "brightness", code=1
    )
    last = error.splitlines()[-1]
    assert "gradient norm at step " in last
    assert f", or a square root, logarithm or division at 0 in {mine}:steep_later; the last complete" in last


def test_a_function_does_not_end_the_process() -> None:
    """Silently, with exit code 0, as exit() would."""

    def leaving(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        sys.exit()

    with (
        own.given({"leaving": leaving}),
        pytest.raises(OwnRewardError, match=r"leaving failed at .*SystemExit"),
    ):
        rewards.load("leaving")(torch.rand(1, 3, 4, 4), "")


def test_a_gradient_of_zero_is_said(mine: Path) -> None:
    rounded = loaded(f"{mine}:rounded")
    (warning,) = try_out([rounded], [], (8, 8), gradient=True)
    assert warning.startswith(f"{place('rounded').format(mine=mine)} has a gradient of 0 for random images")
    assert try_out([rounded], [], (8, 8), gradient=False) == []


def test_programs_of_eval_try_it_before_images_are_generated(mine: Path) -> None:
    parse_names([f"{mine}:one_number", f"{mine}:listed"])
    check_scorers([f"{mine}:listed"], {}, ["a cat"], Resolution(64, 32), mine)
    with pytest.raises(OwnRewardError, match=r"returned a tensor of shape \(\) for 2 images"):
        check_scorers([f"{mine}:one_number"], {}, ["a cat"], Resolution(64, 32), mine)


def test_no_units_of_a_card(
    root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rewards", f"{mine}:brightness", "--reward-normalization", "card"]
    error = refused(capsys, "refl", root, tmp_path / "run", *flags)
    assert (
        f"--reward-normalization card needs the mean and deviation of {mine}:brightness, which is your own"
        in error
    )
    assert f"measure them by `preftune score --rewards {mine}:brightness`" in error
    stats = tmp_path / "summary.json"
    stats.write_text(json.dumps({"scores": {f"{mine}:brightness": {"mean": 0.5, "std": 0.25}}}))
    assert units([rewards.find_card(f"{mine}:brightness")], "dataset", stats) == [(0.5, 0.25)]
    error = refused(
        capsys, "refl", root, tmp_path, "--rewards", f"{mine}:column", "--reward-files", f"{mine}:column=x"
    )
    assert f"{mine}:column is a function of your own, which loads its weights itself; leave x out" in error


# ---------------------------------------------------------------- what it is called with, and what it may return


def loaded(name: str, **settings: str) -> OwnReward:
    parse_weights([name])
    scorer = rewards.load(name, **settings)
    assert isinstance(scorer, OwnReward)
    return scorer


def test_what_a_function_may_return(mine: Path) -> None:
    pixels = torch.rand(3, 3, 8, 4)
    for function in ("brightness", "column", "listed", "stacked"):
        scores = loaded(f"{mine}:{function}")(pixels, ["a", "b", "c"])
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, pixels.mean(dim=(1, 2, 3)))
    pixels.requires_grad_()
    assert loaded(f"{mine}:stacked")(pixels, "a").requires_grad
    with pytest.raises(OwnRewardError, match="without a gradient"):
        loaded(f"{mine}:listed")(pixels, "a")


def test_a_function_gets_float32_and_a_list_of_prompts() -> None:
    found: list[object] = []

    def note(pixels: Tensor, prompts: list[str]) -> list[int]:
        found.extend([pixels.dtype, prompts])
        return [1] * len(pixels)

    with own.given({"note": note}):
        assert rewards.load("note")(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), ("a", "b")).tolist() == [
            1,
            1,
        ]
    assert found == [torch.float32, ["a", "b"]]


def test_a_function_may_write_into_its_pixels() -> None:
    """Other scorers see the image as it was, and the gradient is that of what the function did."""

    def clamped(pixels: Tensor, prompts: list[str]) -> Tensor:
        return pixels.clamp_(0, 0.5).mean(dim=(1, 2, 3))

    pixels = torch.tensor([0.25, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4).contiguous().requires_grad_()
    with own.given({"clamped": clamped}):
        rewards.load("clamped")(pixels, "").sum().backward()
    assert pixels.detach().amax(dim=(1, 2, 3)).tolist() == [0.25, 1.0]
    assert pixels.grad is not None
    torch.testing.assert_close(pixels.grad.sum(dim=(1, 2, 3)), torch.tensor([1.0, 0.0]))


def test_a_callable_without_a_line(mine: Path) -> None:
    """An object of functools: the sentence still says where in the user's file it failed."""
    mine.write_text(CODE + "import functools\npartial = functools.partial(broken)\n")
    with pytest.raises(OwnRewardError) as stop:
        loaded(f"{mine}:partial")(torch.rand(2, 3, 4, 4), "")
    assert str(stop.value).startswith(
        f"{mine}:partial failed at {mine}:{line_of('pixels.reshape')} (return pixels"
    )
    assert str(mine) in stop.value.trace


def test_modules_are_moved_frozen_and_in_eval_mode(mine: Path) -> None:
    """The one that is named, and those that the file holds."""
    for name in (f"{mine}:judge", f"{mine}:whole"):
        scorer = loaded(name)
        judge = own.namespace_of(name)["judge"]
        assert not judge.training
        assert not any(parameter.requires_grad for parameter in judge.parameters())
        pixels = torch.rand(2, 3, 4, 4)
        torch.testing.assert_close(scorer(pixels, ""), judge.layer(pixels.mean(dim=(2, 3)))[:, 0])
        loaded(name, device="meta")
        assert {parameter.device.type for parameter in judge.parameters()} == {"meta"}
        judge.to_empty(device="cpu")
        nn.init.ones_(judge.layer.weight)
        nn.init.ones_(judge.layer.bias)


def test_a_trial_leaves_random_numbers_alone() -> None:
    def noisy(pixels: Tensor, prompts: list[str]) -> Tensor:
        return pixels.mean(dim=(1, 2, 3)) + torch.rand(len(pixels))

    before = torch.get_rng_state()
    with own.given({"noisy": noisy}):
        assert try_out([rewards.load("noisy"), rewards.load("brightness")], [], (8, 8), gradient=True) == []
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- names


def test_names_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("my_rewards.py", "a=b/c d/my.rewards.py", "C:\\mine\\my_rewards.py"):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CODE)
        for suffix, weight in (("", 1.0), ("=0.5", 0.5), ("=-2e-1", -0.2)):
            assert parse_weights([f"{file}:brightness{suffix}"]) == {f"{file}:brightness": weight}
    both = parse_weights(["my_rewards.py:brightness=1", "my_rewards.py:column=2", "brightness"])
    assert list(both.values()) == [1, 2, 1]
    for term, words in (
        ("my_rewards.py=0.5", "my_rewards.py needs the name of a function behind it"),
        ("my_rewards.py:=0.5", "my_rewards.py needs the name of a function behind it"),
        ("my_rewards.py:brightness=0", "finite weight other than 0"),
        ("my_rewards.py:brightness:0.5", "unknown scorer .*FILE.py:FUNCTION"),
        ("my_rewards.py:helper.x", "has no function 'helper.x', did you mean helper"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_weights([term])


def test_a_folder_may_be_called_like_a_file_of_python(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").mkdir()
    with pytest.raises(ValueError, match=r"lacks config\.json; the folder of a trained scorer has it"):
        parse_weights([str(tmp_path / "scorer.py")])


def test_given_names() -> None:
    with pytest.raises(ValueError, match="unknown scorer 'mine'"):
        rewards.find_card("mine")
    with own.given({"mine": brightness}):
        with own.given({"yours": brightness}):
            assert parse_weights(["mine=0.5", "yours"]) == {"mine": 0.5, "yours": 1.0}
        with pytest.raises(ValueError, match="unknown scorer 'yours'"):
            rewards.find_card("yours")
        assert rewards.check("mine") == ()
    with pytest.raises(ValueError, match="unknown scorer 'mine'"):
        rewards.load("mine")
    with (
        own.given({"clipscore": brightness}),
        pytest.raises(ValueError, match="clipscore is a scorer of the table"),
    ):
        parse_weights(["clipscore"])
    bad: dict[str, Callable[..., object]] = {
        "a=b": brightness,
        "a/b": brightness,
        "": brightness,
        "b.py": brightness,
    }
    for name, function in bad.items():
        with pytest.raises(ValueError, match="cannot name a reward"), own.given({name: function}):
            pass
    with pytest.raises(ValueError, match="mine is 3"), own.given({"mine": 3}):  # type: ignore[dict-item]
        pass


# ---------------------------------------------------------------- content


def test_an_edited_file_is_another_run(
    root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rewards", f"{mine}:brightness"]
    tune("refl", root, tmp_path / "run", *flags)
    flags = [*quick("refl", root, tmp_path / "run"), *flags]
    again = ["--resume-from-checkpoint", "latest", "--max-train-steps", "2"]
    mine.write_text(CODE.replace("dim=(1, 2, 3))\n", "dim=(1, 2, 3)) * 2\n", 1))
    error = refused(capsys, "refl", root, tmp_path / "run", *flags, *again)
    assert f"scorer {mine}:brightness is not what it was: its content has changed" in error
    saved = tmp_path / "run" / "step_000001"
    assert error.endswith(
        f"; to go on from these weights with {mine}:brightness as it is now, begin another run with --lora-start {saved}\n"
    )
    tune("refl", root, tmp_path / "fixed", "--rewards", f"{mine}:brightness", "--lora-start", str(saved))
    error = refused(capsys, "refl", root, tmp_path / "run", *flags, *again, "--seed", "5")
    assert "--lora-start" not in error, "not where more than the reward is another"
    mine.write_text(CODE)
    tune("refl", root, tmp_path / "run", *flags, *again)
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


def test_an_edited_file_runs_again(mine: Path) -> None:
    pixels = torch.full((1, 3, 4, 4), 0.25)
    assert loaded(f"{mine}:brightness")(pixels, "").item() == 0.25
    mine.write_text(CODE.replace("dim=(1, 2, 3))\n", "dim=(1, 2, 3)) * 2\n", 1))
    assert loaded(f"{mine}:brightness")(pixels, "").item() == 0.5


def test_score_reads_it_and_knows_its_content(
    root: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(function: str, folder: str) -> None:
        argv = [
            "--data",
            str(root / "images"),
            "--rewards",
            f"{mine}:{function}",
            "brightness",
            "--workers",
            "0",
        ]
        score.main(cli.parse(score.Config, [*argv, "--output-dir", str(tmp_path / folder)]))

    run("listed", "scored")
    summary = json.loads((tmp_path / "scored" / "summary.json").read_text())["scores"]
    assert summary[f"{mine}:listed"]["mean"] == pytest.approx(summary["brightness"]["mean"])
    mine.write_text(CODE + "# edited\n")
    with pytest.raises(SystemExit):
        run("listed", "scored")
    assert "was begun with weights" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:  # at the first image
        run("broken", "other")
    assert stop.value.code == 1
    assert "pixels.reshape(len(pixels), 7, -1)): RuntimeError" in capsys.readouterr().err.splitlines()[-1]
    run("column", "other")  # nothing was scored, so that the folder may become this job's


def test_files_of_several_sizes_are_scored_by_size(tmp_path: Path) -> None:
    """In batches, each score with its image; the views of an image are its own."""
    seen: list[tuple[int, ...]] = []

    def width(pixels: Tensor, prompts: list[str]) -> list[float]:
        seen.append(tuple(pixels.shape))
        return [pixels.shape[3] + len(prompt) / 10 for prompt in prompts]

    sizes = [(8, 8), (12, 8), (8, 8), (8, 8)]
    for index, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    images = [PromptedImage(path=tmp_path / f"{index}.png", prompt="x" * index) for index in range(4)]
    with own.given({"width": width}):
        scorers = [rewards.load("width"), rewards.load("brightness")]
        scores, rejected = score_views(images, scorers, (0.5,), torch.device("cpu"), batch_size=4, workers=0)
    assert not rejected
    expected = [[8.0, 12.1, 8.2, 8.3], [4.0, 6.1, 4.2, 4.3]]
    np.testing.assert_allclose(scores["width"], expected, rtol=1e-6)
    assert scores["brightness"].tolist() == [[0.0] * 4] * 2
    assert sorted(seen) == [(1, 3, 4, 6), (1, 3, 8, 12), (3, 3, 4, 4), (3, 3, 8, 8)]


def test_the_source_of_a_given_callable_counts() -> None:
    def darkness(pixels: Tensor, prompts: list[str]) -> Tensor:
        return 1 - pixels.mean(dim=(1, 2, 3))

    runs, jobs = set(), set()
    for function in (brightness, darkness, brightness):
        with own.given({"mine": function}):
            runs.add(inputs.digests({"rewards": ["mine=2"]})["scorer mine"])
            jobs.add(scorer_digests.digests(["mine"], {})["mine"]["source"])
    assert len(runs) == len(jobs) == 2


def test_no_torch_for_the_names() -> None:
    code = (
        "import sys, rewards, rewards.own; rewards.find_card('brightness'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
