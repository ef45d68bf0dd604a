"""A signal that comes while images are sampled, and what is on the disk by then."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import record_trajectories as recorded
from preftune.images import load_pixels
from preftune.records import read_jsonl
from preftune.training.checkpoint import find_checkpoints, read
from preftune.training.run import Run, RunConfig

pytestmark = pytest.mark.usefixtures("cpu")


def signal_when(path: Path, seen: list[bool], also: Path | None = None) -> threading.Thread:
    """Send SIGTERM to this process when a path is there, and note whether another was there before."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.002)
        seen.append(also is None or also.exists())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def argv(driver: str, root: Path, output: Path, *flags: str) -> list[str]:
    """Recorded flags, with sampling that takes long enough to be interrupted."""
    few = ["--sample.num-inference-steps", "16", "--validation-prompts", str(root / "prompts.txt")]
    return [*recorded.arguments(driver, root, output), *few, "--num-validation-prompts", "2", *flags]


def test_a_signal_ends_the_batch_under_way(tmp_path: Path) -> None:
    run = Run(RunConfig(output_dir=tmp_path, max_train_steps=3, threads=1), driver="toy", config_text="")
    run.prepare(nn.Linear(1, 1), learning_rate=1e-5)
    made: list[str] = []

    def batches() -> Iterator[Tensor]:
        yield torch.zeros(1)
        made.append("begun")
        signal.raise_signal(signal.SIGTERM)
        made.append("ended")
        yield torch.ones(1)

    for _ in run.steps():
        assert [batch.item() for batch in run.until_stopped(batches())] == [0]
        assert run.interrupted
        assert not list(run.until_stopped(batches())), "nothing is begun after a signal"
        signal.raise_signal(signal.SIGTERM)  # outside of sampling it raises nothing
    assert made == ["begun"]
    assert run.finish() == 128 + signal.SIGTERM


def test_a_library_may_turn_the_stop_into_an_error_of_its_own(tmp_path: Path) -> None:
    run = Run(RunConfig(output_dir=tmp_path, max_train_steps=1, threads=1), driver="toy", config_text="")
    run.prepare(nn.Linear(1, 1), learning_rate=1e-5)

    def batches(number: int) -> Iterator[Tensor]:
        try:
            if number:
                signal.raise_signal(number)
            yield torch.zeros(1)
            raise KeyError("no signal")
        except BaseException as error:
            raise ValueError("cannot tokenize") from error

    for _ in run.steps():
        with pytest.raises(ValueError, match="cannot tokenize"):
            list(run.until_stopped(batches(0)))
        assert list(run.until_stopped(batches(signal.SIGTERM))) == []
        assert run.interrupted
    assert run.finish() == 128 + signal.SIGTERM


def test_the_result_is_written_before_the_last_images(root: Path, tmp_path: Path) -> None:
    for driver, result in (("pretrain", "pipeline"), ("reward_weighted", "lora")):
        output, before = tmp_path / driver, list[bool]()
        flags = argv(driver, root, output, "--validation-steps", "0")
        watcher = signal_when(output / "samples" / ".step_000003.tmp-shared", before, output / result)
        assert recorded.train(driver, flags) == 128 + signal.SIGTERM
        watcher.join()
        assert before == [True], f"{result} is there when the images begin"
        assert find_checkpoints(output)[-1].name == "step_000003"
        assert not list((output / "samples").glob("*step_000003*")), "half a set of images is removed"
        assert recorded.train(driver, [*flags, "--resume-from-checkpoint", "latest"]) == 0
        assert len(list((output / "samples" / "step_000003").glob("*.png"))) == 2
        assert (output / result).is_dir()


def test_images_that_a_signal_prevented_are_made_by_the_run_that_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again by the next one, where that ends before a checkpoint has their scores."""
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    flags = ["--validation-steps", "1", "--checkpointing-steps", "5", "--rewards", "brightness=1"]
    watcher = signal_when(stopped / "samples" / ".step_000001.tmp-shared", [])
    assert recorded.train("reward_weighted", argv("reward_weighted", root, stopped, *flags)) == 143
    watcher.join()
    assert [path.name for path in find_checkpoints(stopped)] == ["step_000000", "step_000001"]
    again = argv("reward_weighted", root, stopped, *flags, "--resume-from-checkpoint", "latest")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recorded.train("reward_weighted", again)
    assert (stopped / "samples" / "step_000001" / "scores.json").exists()
    assert recorded.train("reward_weighted", again) == 0
    assert recorded.train("reward_weighted", argv("reward_weighted", root, straight, *flags)) == 0
    for step in range(4):
        name = f"step_{step:06d}"
        one, other = (folder / "samples" / name / "scores.json" for folder in (stopped, straight))
        assert one.read_text() == other.read_text()
    found = validations(stopped)
    assert found == validations(straight)
    assert list(found) == [0, 1, 2]
    one, other = (read(folder / "step_000003")["parameters"] for folder in (stopped, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


def validations(folder: Path) -> dict[int, float]:
    """Step -> mean score of the validation images."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return {int(row["step"]): row["validation_proxy"] for row in rows if "validation_proxy" in row}


def test_images_of_an_iteration_that_a_signal_prevented_are_made_too(root: Path, tmp_path: Path) -> None:
    flags = ["--iterations", "3", "--prompts-per-iteration", "4", "--images-per-prompt", "2", "--validation-steps", "0"]  # fmt: skip
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    watcher = signal_when(stopped / "samples" / ".step_000001.tmp-shared", [])
    assert recorded.train("raft", argv("raft", root, stopped, *flags)) == 143
    watcher.join()
    assert find_checkpoints(stopped)[-1].name == "step_000001"
    again = argv("raft", root, stopped, *flags, "--resume-from-checkpoint", "latest")
    assert recorded.train("raft", again) == 0
    assert recorded.train("raft", argv("raft", root, straight, *flags)) == 0
    assert validations(stopped) == validations(straight)
    assert list(validations(stopped)) == [0, 1, 2]
    assert (stopped / "before_after.png").read_bytes() == (straight / "before_after.png").read_bytes()


def test_raft_stops_while_it_generates(root: Path, tmp_path: Path) -> None:
    flags = ["--iterations", "3", "--prompts-per-iteration", "4", "--images-per-prompt", "2"]
    stopped = tmp_path / "stopped"
    watcher = signal_when(stopped / ".iteration_02.tmp-shared" / "000000.png", [])
    few = ["--sample.batch-size", "2", "--validation-steps", "0"]
    assert recorded.train("raft", argv("raft", root, stopped, *flags, *few)) == 143
    watcher.join()
    assert sorted(path.name for path in stopped.glob("*iteration*")) == ["iteration_01"]
    assert find_checkpoints(stopped)[-1].name == "step_000001"
    assert len(read_jsonl(stopped / "metrics.jsonl")) == 1
    again = argv("raft", root, stopped, *flags, *few, "--resume-from-checkpoint", "latest")
    assert recorded.train("raft", again) == 0
    assert recorded.train("raft", argv("raft", root, tmp_path / "straight", *flags, *few)) == 0
    one, other = (read(folder / "step_000003")["parameters"] for folder in (stopped, tmp_path / "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("driver", ["pretrain", "reward_weighted"])
def test_validation_images_have_the_training_resolution(root: Path, tmp_path: Path, driver: str) -> None:
    flags = argv(driver, root, tmp_path / "a", "--max-train-steps", "1", "--resolution", "32")
    at = flags.index("--sample.resolution")
    flags[flags.index("16")] = "1"
    for name, own, size in (("a", [], 32), ("b", ["--sample.resolution", "48"], 48)):
        these = [*flags[:at], *flags[at + 2 :], *own, "--output-dir", str(tmp_path / name)]
        assert recorded.train(driver, these) == 0
        image = load_pixels(tmp_path / name / "samples" / "step_000001" / "0000.png")
        assert image.shape == (3, size, size)
