"""Under a launcher, whose traceback follows the sentence of a program, the sentence comes once more, last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_ddp import TWO

ROOT = Path(__file__).parents[1]
REFUSED = ["finetune/refl.py", "--misspelt", "1"]
SENTENCE = "refl.py: error: unknown flag --misspelt; see --help"

LAUNCHER = """
import subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("-q")]
code = subprocess.call([sys.executable, *words])
print("Traceback of the launcher", file=sys.stderr)
sys.exit(code and 1)
"""
FAILING = """
import dataclasses, pathlib, sys
from preftune.files.one_writer import one_writer

@dataclasses.dataclass
class Config:
    output_dir: pathlib.Path = pathlib.Path("out")

@one_writer
def main(config):
    raise FloatingPointError("the loss is not finite")

main(Config())
"""


def run(*command: str, folder: Path = ROOT) -> tuple[int, list[str]]:
    """Exit code, and the lines of stderr, until nobody has it open."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True, text=True, check=False, timeout=200, cwd=folder, env=environment,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["-m", "accelerate.commands.launch", "--num_processes", "1"], id="one"),
        pytest.param(TWO.split(), id="two"),
    ],
)
def test_the_sentence_is_last_after_the_launchers_traceback(launcher: list[str]) -> None:
    code, lines = run(*launcher, *REFUSED)
    assert code == 1
    assert lines[-1] == SENTENCE
    assert lines[-2].endswith("refl.py ended with exit code 2.")
    traceback = max(at for at, line in enumerate(lines) if line.startswith("Traceback"))
    assert lines.index(SENTENCE) < traceback < len(lines) - 1
    assert lines[traceback:].count(SENTENCE) == 1, "of several processes one has the last word"


def test_once_without_a_launcher() -> None:
    assert run(*REFUSED) == (2, [SENTENCE])


def test_a_launcher_with_quiet_has_no_traceback(tmp_path: Path) -> None:
    """Whatever starts a program is a launcher by its name; a stand-in for it starts in no time."""
    launcher = tmp_path / "accelerate"
    launcher.write_text(LAUNCHER, encoding="utf-8")
    program = [str(ROOT / REFUSED[0]), *REFUSED[1:]]
    assert run(str(launcher), *program, folder=tmp_path)[1].count(SENTENCE) == 2
    assert run(str(launcher), "-q", *program, folder=tmp_path)[1].count(SENTENCE) == 1


def test_what_ends_the_work_is_said_last_too(tmp_path: Path) -> None:
    (tmp_path / "accelerate").write_text(LAUNCHER, encoding="utf-8")
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    code, lines = run("accelerate", "failing.py", folder=tmp_path)
    assert code == 1
    assert lines[-1] == "failing.py: error: the loss is not finite"
    assert lines[-2].endswith("failing.py ended with exit code 1.")
    assert lines.count(lines[-1]) == 2
