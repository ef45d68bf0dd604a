"""Settings that hold for every test. Python finds `import tiny` because pytest puts this folder on sys.path."""

import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Before any library is imported: no test may reach for the network or for a display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# The tests run in a process more than there are cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# What a shell starts in the background ignores Ctrl-C, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # without xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: each waits for a third of its time, for files, other processes and a browser."""
    from preftune.machine.cores import cores

    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take as long as they need."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub, whatever one before it has left; those with a stub of the hub allow it for themselves."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate trains on the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: None) -> Path:
    """A folder to work in, the present one, from which the repository looks as from its own root."""
    for name in ("assets", "eval", "finetune"):
        (tmp_path / name).symlink_to(Path(__file__).parents[1] / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> Any:
    """Do what `accelerate launch DRIVER FLAGS` does, in this process: no time goes into importing everything again."""
    launcher, driver, flags = command[:3], command[3], command[4:]
    assert launcher == [sys.executable, "-m", "accelerate.commands.launch"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stdout):
        patch.setattr(sys, "argv", [driver, *flags])
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(driver, run_name="__main__")
    return subprocess.CompletedProcess(command, int(stop.value.code or 0))


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch, cpu: None) -> None:
    """Comparisons train in this process; that they launch drivers as commands is tested in test_compare.py."""
    from eval import trainings

    monkeypatch.setattr(trainings, "subprocess", SimpleNamespace(run=run_here, STDOUT=subprocess.STDOUT))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sound inputs for every driver; see `record_trajectories.write_inputs`."""
    from record_trajectories import write_inputs  # not before the settings above

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded CLIPs, and the layers of the aesthetic predictor on one of them."""
    from golden_weights import CLIP_NAMES, write_aesthetic, write_clip

    folder = tmp_path_factory.mktemp("clips")
    for name in CLIP_NAMES:
        write_clip(name, folder)
    write_aesthetic(folder)
    return folder
