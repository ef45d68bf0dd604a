"""One writer for an output folder, and what is said when it cannot be written."""

import errno
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import record_trajectories as recorded
from data_build import shapes
from preftune import files
from preftune.cli import parse
from preftune.files import disk, lock
from preftune.training import checkpoint

ROOT = Path(__file__).parents[1]
HOLD = """
import os, sys, time
from pathlib import Path
from preftune.files import lock
from preftune.cli import parse
lock.acquire(Path(sys.argv[1]))
if len(sys.argv) > 2:  # a forked worker, as of a data loader, which outlives its parent
    if os.fork():
        sys.stdin.read()
    print("held", flush=True)
    time.sleep(30)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the folder."""
    command = [sys.executable, "-c", HOLD, str(folder), *more]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted([folder, *folder.rglob("*")])
    }


# One writer


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with holder(run) as process:
        before = state_of(run)
        (tmp_path / "link").symlink_to(run)
        for name in ("run", "link", "run/../run"):
            with pytest.raises(
                ValueError, match=f"is being written by process {process.pid} on .*--output-dir"
            ):
                lock.acquire(tmp_path / name)
        assert state_of(run) == before
        lock.acquire(tmp_path / "other")
        lock.release(tmp_path / "other")
    lock.acquire(run)
    lock.acquire(run)
    lock.release(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"], "no lock is left"
    with holder(run) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    assert not (tmp_path / ".run.lock").exists(), "released at the end of the process"


def test_a_killed_writer_does_not_block_although_its_workers_live(tmp_path: Path) -> None:
    with holder(tmp_path / "run", "fork") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".run.lock").is_file()
        lock.acquire(tmp_path / "run")
        lock.release(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_the_lock_is_inside_where_the_parent_cannot_be_written(tmp_path: Path) -> None:
    run = tmp_path / "mounted" / "run"
    run.mkdir(parents=True)
    run.parent.chmod(0o555)
    try:
        with holder(run), pytest.raises(ValueError, match="is being written by"):
            lock.acquire(run)
        with pytest.raises(ValueError, match="cannot be written"):
            lock.acquire(run.parent / "new")
    finally:
        run.parent.chmod(0o755)


def test_every_program_that_writes_a_folder_is_its_only_writer() -> None:
    for folder in ("finetune", "data_build", "eval"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "\ndef main(config" in text:
                before = text.split("\ndef main(config")[0].splitlines()[-2:]
                assert "@one_writer" in before, f"{path} writes without a lock"


PROGRAMS = {
    "finetune.pretrain_scorer": "--data nowhere --vocab nowhere --resume-from-checkpoint latest --seed 99",
    "data_build.shapes": "--count 1",
    "data_build.score": "--data nowhere --rewards brightness",
    "eval.preference_accuracy": "--data {0}",
}


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_refused_before_they_touch_a_byte(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    (run / ".metrics.jsonl.tmp-5").write_text("half")
    module = importlib.import_module(program)
    argv = [*PROGRAMS[program].format(tmp_path).split(), "--output-dir", str(run)]
    with holder(run):
        before = state_of(tmp_path)
        with pytest.raises(SystemExit) as stop:
            module.main(parse(module.Config, argv))
        assert state_of(tmp_path) == before
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run} is being written by process" in line


# Writes that fail


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may have more bytes, as on a full disk, though with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.usefixtures("cpu")
def test_a_run_that_cannot_write_says_so_and_goes_on_later(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def argv(name: str, steps: int = 2) -> list[str]:
        flags = recorded.arguments("pretrain_scorer", root, tmp_path / name)
        return [*flags, "--max-train-steps", str(steps)]

    recorded.train("pretrain_scorer", argv("straight"))
    recorded.train("pretrain_scorer", argv("begun", 1))
    one = checkpoint.read(tmp_path / "straight" / "step_000002")["parameters"]
    for most in (600, 10_000, 150_000):  # the configuration; the state; the scorer
        name = f"full_{most}"
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        before = names(tmp_path / name)
        capsys.readouterr()
        resume = [*argv(name), "--resume-from-checkpoint", "latest"]
        with small_files(most), pytest.raises(SystemExit) as stop:
            recorded.train("pretrain_scorer", resume)
        assert stop.value.code == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.endswith("make room there or repair it, then go on with --resume-from-checkpoint latest")
        assert "error: a file would be larger than the system allows" in said
        assert f"the last complete checkpoint is {tmp_path / name / 'step_000001'}" in said
        new = names(tmp_path / name) - before
        assert all("/." not in f"/{path}" for path in new), f"half written: {new}"
        recorded.train("pretrain_scorer", resume)
        other = checkpoint.read(tmp_path / name / "step_000002")["parameters"]
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_builder_that_cannot_write_says_so_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(shapes.Config, ["--output-dir", str(tmp_path / "data"), "--count", "2"])
    with small_files(100), pytest.raises(SystemExit) as stop:
        shapes.main(config)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"allows: {tmp_path}" in line or f"{tmp_path / 'data'}; make room" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("cpu")
def test_a_loss_that_is_not_finite_ends_in_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*recorded.arguments("autoencoder", root, tmp_path / "run"), "--max-train-steps", "40"]
    with pytest.raises(SystemExit) as stop:
        recorded.train("autoencoder", [*argv, "--learning-rate", "1e30", "--checkpointing-steps", "1"])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r": error: (loss|gradient norm) at step \d+, rank 0, .*: lower --learning-rate", said)
    assert re.search(rf"; the last complete checkpoint is {tmp_path}/run/step_00000\d$", said)


@pytest.mark.parametrize("at", ["run", "deep/er/run"])
def test_a_refused_command_leaves_no_folder(
    at: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the data or a column is wrong; a folder that was there is left as it was."""
    (tmp_path / "mine").mkdir()
    for driver, flags in (
        ("weird_lora", ["--data", str(tmp_path / "none")]),
        ("pretrain", ["--caption-column", "captn"]),
        ("autoencoder", ["--data", str(tmp_path / "mine")]),
    ):
        for folder in (tmp_path / at, tmp_path / "mine"):
            with pytest.raises(SystemExit) as stop:
                recorded.train(driver, [*recorded.arguments(driver, root, folder), *flags])
            assert stop.value.code == 2
            assert capsys.readouterr().err
    assert not (tmp_path / at).exists()
    assert not list((tmp_path / "mine").iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(
            ValueError, match=rf"^--output-dir {folder} cannot be written: Not a directory; choose"
        ):
            files.check_writable(folder)
    files.check_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x", "a.png"), "no space left on a.png"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up on runs"),
        (OSError(errno.EROFS, "x", "b"), "the file system is read-only: b"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on runs"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
            "a file cannot be written in runs",
        ),
        (RuntimeError("CUDA out of memory"), None),
        (FileNotFoundError(errno.ENOENT, "x", "c"), None),
    ],
)
def test_errors_of_writing_in_words(error: Exception, words: str | None) -> None:
    assert disk.reason(error, Path("runs")) == words


def test_the_cause_of_torchs_error_is_found(tmp_path: Path) -> None:
    def save() -> None:
        with small_files(2000), (tmp_path / "state.pt").open("wb") as file:
            torch.save({"a": torch.zeros(10_000)}, file)

    with pytest.raises(RuntimeError) as caught:
        save()
    assert disk.reason(caught.value, tmp_path) == f"a file would be larger than the system allows: {tmp_path}"
