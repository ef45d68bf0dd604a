"""The start of the programs: --help and what is wrong with flags come before torch, which takes seconds to import."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune.cli import help_text
from preftune.cli.help_text import commands, in_words
from preftune.cli.leaves import flag_of, leaves_of
from test_layout import ROOT, is_program, short

PROGRAMS = [
    *(
        path
        for folder in ("finetune", "data_build", "eval", "benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))
        if is_program(path)
    ),
    ROOT / "preftune/lora/export_lora.py",
    ROOT / "rewards/__main__.py",
]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "scipy", "matplotlib")

WALK = """
import contextlib, io, json, runpy, sys
heavy, programs, argv = json.loads(sys.argv[1])

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            raise ImportError(name=name)

sys.meta_path.insert(0, Refuse())
found = {}
for program in programs:
    sys.argv = [program, *argv]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
            code = "it went on"
        except SystemExit as stop:
            code = stop.code or 0
        except ImportError as error:
            code = f"it imports {error.name}"
    found[program] = code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""


def walk(programs: list[Path], *argv: str) -> dict[Path, tuple[object, str, str]]:
    """Program -> exit code, stdout and stderr of this command line, where what is heavy cannot be imported."""
    argument = json.dumps([HEAVY, [str(path) for path in programs], argv])
    done = subprocess.run(
        [sys.executable, "-c", WALK, argument],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    return {Path(name): tuple(row) for name, row in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def helps() -> dict[Path, str]:
    """Program -> its --help."""
    rows = walk(PROGRAMS, "--help")
    assert {short(path): code for path, (code, _, _) in rows.items()} == dict.fromkeys(
        map(short, PROGRAMS), 0
    )
    return {path: out for path, (_, out, _) in rows.items()}


def test_help_without_torch(helps: dict[Path, str]) -> None:
    assert len(helps) >= 28
    assert all("--help" in text or "-h" in text for text in helps.values())


def groups(text: str) -> dict[str, list[str]]:
    """Title -> flags of a help."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith((" ", "usage")) and line.endswith(":"):
            found[line[:-1]] = []
        elif flag := re.match(r"  (?:-h, )?(--[\w.-]+)", line):
            found[list(found)[-1]].append(flag[1])
    return found


def test_help_has_every_flag_once_in_its_group(helps: dict[Path, str]) -> None:
    from finetune import refl

    found = groups(helps[ROOT / "finetune/refl.py"])
    assert list(found) == ["examples", "this program", "model", "rewards", "sampling", "training", "output"]
    flags = [flag for group in found.values() for flag in group]
    assert sorted(flags) == sorted(["--help", *map(flag_of, leaves_of(refl.Config))])
    for flag, group in {
        "--prompts": "this program",
        "--image-column": "this program",
        "--lora.rank": "model",
        "--variant": "model",
        "--reward-stats": "rewards",
        "--sample.solver": "sampling",
        "--validation-prompts": "sampling",
        "--seed": "training",
        "--output-dir": "output",
    }.items():
        assert flag in found[group]
    assert list(groups(helps[ROOT / "finetune/reward_model.py"]))[1:3] == ["this program", "stable"]
    assert groups(helps[ROOT / "eval/grid.py"])["model"][0] == "--model"


def test_help_is_readable(helps: dict[Path, str]) -> None:
    """At 80 columns; the help of a flag is whole, and ends in its default."""
    for path, text in helps.items():
        if path.stem != "__main__":  # the table of scorers: argparse's own
            flags = text.partition("\nthis program:")[2]  # a quoted word of an example is not broken
            long = [line for line in flags.splitlines() if len(line) > 80]
            assert flags
            assert not long, f"{short(path)}: {long}"
    text = " ".join(helps[ROOT / "finetune/refl.py"].split())
    assert "--window INT INT First and last index of the step with gradient, both included;" in text
    assert "changes shapes, not single pixels. (default: 0) --jitter-copies INT" in text
    assert "--reward-files [STR [STR ...]] Weights of scorers on disk" in text


def test_help_shows_the_commands_of_the_docstring(helps: dict[Path, str]) -> None:
    for path, text in helps.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
        shown = " ".join(text.replace("\\\n", " ").split())
        lines = [*commands(docstring)]
        assert lines or short(path).startswith(("benchmarks/", "rewards/")), f"{short(path)} has no example"
        examples = text.partition("\nexamples:")[2].partition("\nthis program:")[0]
        assert not re.search(r"\S {2,}\S", examples), f"{short(path)}: {examples}"
        for command, comment in lines:
            assert " ".join(f"{comment and '# '}{comment} {command}".split()) in shown or short(
                path
            ).startswith("rewards/")


def test_a_misspelt_flag_is_refused_without_torch() -> None:
    for path, (code, _, err) in walk(PROGRAMS, "--misspelt", "1").items():
        assert code == 2, f"{short(path)}: {code}"
        assert "--misspelt" in err.splitlines()[-1], f"{short(path)}: {err}"


def test_a_misspelt_scorer_is_refused_without_torch() -> None:
    programs = [
        ROOT / name
        for name in ("finetune/refl.py", "finetune/raft.py", "eval/grid.py", "data_build/score.py")
    ]
    argv = ("--rewards", "imagerewrad", "--model", "x", "--prompts", "p.txt", "--pretraining", "off")
    needed = {
        "refl": argv,
        "raft": argv[:6],
        "grid": argv[:2],
        "score": (*argv[:2], "--data", "x", "--output-dir", "y"),
    }
    for path in programs:
        ((code, _, err),) = walk([path], *needed[path.stem]).values()
        assert code == 2, f"{short(path)}: {code} {err}"
        assert "unknown scorer 'imagerewrad' (did you mean imagereward?)" in err, f"{short(path)}: {err}"


def test_examples_are_started_as_the_help_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command `preftune` is used there may be no file; `python FILE --help` shows files."""
    lines = (
        ("python eval/grid.py --prompts a.txt", "preftune grid --prompts a.txt"),
        ("accelerate launch finetune/refl.py", "accelerate launch -m preftune refl"),
        (
            "accelerate launch --num_processes 2 finetune/raft.py --seed 1",
            "accelerate launch --num_processes 2 -m preftune raft --seed 1",
        ),
        (
            'preftune compare-methods --methods "a=finetune/refl.py"',
            'preftune compare-methods --methods "a=preftune refl"',
        ),
    )
    for line, words in lines:
        monkeypatch.setattr("sys.argv", ["preftune grid"])
        assert help_text._as_started(line) == words
        monkeypatch.setattr("sys.argv", ["eval/grid.py"])
        assert help_text._as_started(line) == line


def test_a_default_in_words() -> None:
    assert (
        in_words("size: 512; None = the model's own. (default: None)")
        == "size: 512. (default: the model's own)"
    )
    several = "It is a place. None = no. It has 0.5. (default: None)"
    assert in_words(several) == "It is a place. It has 0.5. (default: no)"
    assert (
        in_words("a folder. (default: None)")
        == in_words("a folder. (default: )")
        == in_words("a folder. (default: '')")
        == "a folder. (default: none)"
    )
    assert in_words("size; None = all. (default: 3)") == "size; None = all. (default: 3)"


def test_help_says_no_none(helps: dict[Path, str]) -> None:
    for path, text in helps.items():
        assert "(default: None)" not in " ".join(text.split()), short(path)
        assert "(default: '')" not in text, short(path)
        assert "{None" not in text, short(path)


def test_a_bare_start_says_where_the_data_come_from() -> None:
    for name, command in {
        "weird_lora": "`preftune diffusiondb --data",
        "reward_weighted": "`preftune score --data",
        "dpo": "`preftune preferences --layout pickapic",
        "pretrain": "`preftune pretrain --model assets/tiny/pipeline",
    }.items():
        ((code, _, err),) = walk([ROOT / f"finetune/{name}.py"]).values()
        assert code == 2
        assert "and --model are missing; " in err
        assert command in err
        assert err.endswith("; see --help\n")


INTERRUPTED = """
import sys
sys.argv = ["finetune/refl.py"]
from finetune import refl
from preftune.cli import parse
parse(refl.Config, default_config=refl.TINY)
raise {}
"""


def test_ctrl_c_while_libraries_are_imported_is_one_sentence() -> None:
    def end(error: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED.format(error)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        return done.returncode, done.stderr.partition("\n")[2]

    code, said = end("KeyboardInterrupt")
    assert said == "refl.py: stopped; start the same command again to go on\n"
    assert code in (-signal.SIGINT, 128 + signal.SIGINT)
    assert end("RuntimeError")[1].endswith("RuntimeError\n")


SWALLOWED = """
import os, signal, sys
sys.argv = ["finetune/refl.py"]
from finetune import refl
from preftune.cli import end_if_interrupted, parse
parse(refl.Config, default_config=refl.TINY)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
end_if_interrupted()
"""


def test_a_ctrl_c_that_an_import_swallows_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("refl.py: stopped; start the same command again to go on\n")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_that_wait_leave_the_cores_to_others(given: dict[str, str], found: str) -> None:
    """As a program starts, before torch is imported, and unless the user has said otherwise."""
    script = "import os, sys, preftune.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=kept | given, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [found, "False"]
