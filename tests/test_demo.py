"""The demo: interrupted and resumed by the command that it prints, started again when complete, extended; and the command itself."""

import errno
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import refl
from preftune.cli import parse, resume_command
from preftune.files import manifest
from preftune.files.one_writer import one_writer
from preftune.training import resume
from preftune.training.checkpoint import find_checkpoints
from preftune.training.run_config import RunConfig

ROOT = Path(__file__).parents[1]
QUICK = [
    *("--num-validation-prompts", "1", "--sample.num-inference-steps", "2", "--train-batch-size", "1"),
    *("--jitter-copies", "1", "--threads", "1", "--mixed-precision", "no"),
]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_again(*argv: str) -> int:
    """The exit code of the demo in this process."""
    try:
        return refl.main(parse(refl.Config, list(argv), default_config=refl.TINY))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_interrupted_demo_goes_on_by_the_command_that_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    flags = [*QUICK, "--max-train-steps=5", "--output-dir", str(output)]
    demo = [sys.executable, "finetune/refl.py", *flags]
    process = start([*demo, "--overwrite-output-dir"])
    while process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.02)
    while process.poll() is None and not (output / "metrics.jsonl").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    *_, sentence, command = said.splitlines()
    done = int(find_checkpoints(output)[-1].name.removeprefix("step_"))
    assert 0 < done < 5
    assert sentence == f"refl.py: stopped after {done} of 5 updates; go on with:"
    assert shlex.split(command) == [*demo, "--resume-from-checkpoint", "latest"]

    process = start(shlex.split(command))
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert "1 validation prompt; change" in out
    assert "go on with" not in said
    assert [json.loads(row)["step"] for row in (output / "metrics.jsonl").open()] == [*range(5)]

    # Run twice, as README prints it: nothing is lost, and what the user can do is said.
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_again(*flags) == 0
    out, said = capsys.readouterr()
    assert f"{output} is complete, with all 5 updates; to run anew, add --overwrite-output-dir" in said
    assert "1 validation prompt; change" in out
    checkpoints = [path for path in files if path.parent.name.startswith("step_")]
    assert len(checkpoints) > 3
    assert all(path.stat().st_mtime_ns == files[path] for path in checkpoints)
    assert files.keys() == {path for path in output.rglob("*") if path.is_file()}

    assert run_again(*flags, "--max-train-steps", "3") == 2
    said = capsys.readouterr().err
    assert "--max-train-steps 3 is less than the 5 updates that" in said
    assert "start anew with --overwrite-output-dir or another --output-dir" in said
    assert run_again(*flags, "--rewards", "brightness=1") == 2
    assert "start anew with --overwrite-output-dir or another --output-dir" in capsys.readouterr().err
    assert run_again(*flags, "--lr-scheduler", "cosine", "--max-train-steps", "6") == 0
    said = capsys.readouterr().err
    assert "--max-train-steps 6 (was 5)" in said
    assert "warning: --lr-scheduler cosine falls to 0 at --max-train-steps" in said
    assert find_checkpoints(output)[-1].name == "step_000006"


def test_ctrl_c_before_a_checkpoint_ends_in_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "finetune/raft.py", "--seed", "1"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main(config: object) -> int:
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / ".half.tmp-1").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # a call from Python
        one_writer(main)(SimpleNamespace(output_dir=tmp_path / "x"))
    program = type("Config", (SimpleNamespace,), {"__module__": "__main__"})
    for config, said in (
        (program(run=RunConfig(output_dir=tmp_path / "x")), "stopped before the first update; go on with:\npython finetune/raft.py --seed 1 --resume-from-checkpoint latest\n"),
        (program(output_dir=tmp_path / "x"), "stopped; start the same command again to go on\n"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            one_writer(main)(config)
        assert stop.value.code == 128 + signal.SIGINT
        assert capsys.readouterr().err.endswith(f": {said}")
        assert not list((tmp_path / "x").iterdir())


def test_a_full_disk_ends_in_the_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "finetune/raft.py", "--overwrite-output-dir"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "config.yaml").touch()
    program = type("Config", (SimpleNamespace,), {"__module__": "__main__"})

    def main(config: object) -> int:
        raise OSError(errno.ENOSPC, "full", str(tmp_path))

    with pytest.raises(SystemExit) as stop:
        one_writer(main)(program(run=RunConfig(output_dir=tmp_path)))
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(
        f": error: no space left on {tmp_path}; there is no complete checkpoint yet: make room there or repair it, then go on with:\n"
        "python finetune/raft.py --resume-from-checkpoint latest\n"
    )


def test_a_run_of_an_earlier_version_is_refused_with_a_way_on(tmp_path: Path) -> None:
    """Also where it is the demo's, whose command resumes by itself."""
    old = tmp_path / "step_000085"
    old.mkdir()
    for write in (lambda: None, lambda: manifest.write(old, updates=85)):
        write()
        config = RunConfig(output_dir=tmp_path, resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match=r"earlier version.*; start anew with --overwrite-output-dir or"):
            resume.find_start(config, {})


PYTHON, SCRIPT = ["python", "finetune/refl.py", "--seed", "1"], ["finetune/refl.py", "--seed", "1"]


@pytest.mark.parametrize(
    ("words", "parent", "processes", "command"),
    [
        (PYTHON, ["bash"], 1, PYTHON),
        (["python3", "-u", *SCRIPT], ["bash", "-c", "python3 -u finetune/refl.py"], 1, ["python3", "-u", *SCRIPT]),
        (PYTHON, ["timeout", "60", *PYTHON], 1, PYTHON),
        (["/v/bin/python", "/v/bin/preftune", "refl"], [], 1, ["preftune", "refl"]),
        (
            ["/v/bin/python", "-u", *SCRIPT],
            ["/v/bin/python", "/v/bin/accelerate", "launch", "--num_processes", "2", *SCRIPT],
            2,
            ["accelerate", "launch", "--num_processes", "2", *SCRIPT],
        ),
        (
            ["/v/bin/python", "-m", "preftune", "refl"],
            ["python", "-m", "accelerate.commands.launch", "-m", "preftune", "refl"],
            1,
            ["python", "-m", "accelerate.commands.launch", "-m", "preftune", "refl"],
        ),
        (
            ["/v/bin/python", "-u", *SCRIPT],
            ["/v/bin/python", "/v/bin/torchrun", "--nproc_per_node", "2", *SCRIPT],
            2,
            ["torchrun", "--nproc_per_node", "2", *SCRIPT],
        ),
        (["python", "-m", "finetune.refl"], ["unknown"], 4, shlex.split("accelerate launch --num_processes 4 -m finetune.refl")),
    ],
)  # fmt: skip
def test_the_command_is_the_one_that_was_typed(
    words: list[str], parent: list[str], processes: int, command: list[str]
) -> None:
    assert resume_command.typed(words, parent, processes) == command


@pytest.mark.parametrize(
    "flags",
    [
        ["--resume-from-checkpoint", "runs/x/step_000050"],
        ["--resume_from_checkpoint=latest"],
        ["--overwrite_output_dir"],
        ["--no-overwrite-output-dir"],
        [],
    ],
)
def test_flags_that_start_anew_are_left_out(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["python", "finetune/raft.py", "--prompts", "my prompts.txt", *flags, "--seed", "1"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    kept = "python finetune/raft.py --prompts 'my prompts.txt' --seed 1 --resume-from-checkpoint latest"
    assert resume_command.resume_command(by_itself=False) == kept
    assert resume_command.resume_command(by_itself=True) == shlex.join(typed)


def test_raft_starts_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from finetune import raft

    config = parse(raft.Config, ["--iterations", "2"], default_config=raft.TINY)
    assert (config.iterations, config.prompts_per_iteration) == (2, 256)
    assert str(config.model.pretrained.model) == "assets/tiny/pipeline"
    assert config.run.output_dir == Path("runs/raft-tiny")
    assert "without --model the embedded model is tuned" in capsys.readouterr().err
