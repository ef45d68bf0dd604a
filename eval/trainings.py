"""Trainings that a comparison starts: drivers as commands, each with each seed in a folder of its own, each once.

A method is NAME=DRIVER FLAGS, a command as one would type it. Programs of eval/ import no driver: they start it by `accelerate
launch`, and read the folder that it leaves.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.columns import write_text

ROOT = Path(__file__).resolve().parents[1]
SET_HERE = ("--seed", "--output", "--overwrite", "--resume")
"""Flags that the comparison gives a driver."""


def split(term: str) -> tuple[str, str]:
    """Return NAME and TEXT of NAME=TEXT; ValueError where one of them is missing, or the name is no plain word."""
    name, equals, text = term.partition("=")
    if not equals or not text.strip() or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{term!r} is not NAME=TEXT with a name of letters, digits, - and _")
    return name, text


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, all different."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds needs different numbers of 0 or more, got {tuple(seeds)}")


def check_commands(commands: Mapping[str, Sequence[str]], taken: Sequence[str] = ()) -> None:
    """Raise ValueError for a command that is no driver, or that has a flag which the comparison sets."""
    for name, command in commands.items():
        if not command[0].endswith(".py") or not Path(command[0]).is_file():
            raise ValueError(
                f"method {name}: {command[0]} is no driver; give a file such as finetune/refl.py"
            )
        if both := {*SET_HERE, *taken} & {flag.partition("=")[0] for flag in command}:
            raise ValueError(f"method {name}: {min(both)} is set by the comparison; leave it out")


def train(name: str, command: Sequence[str], seed: int, output: Path) -> Path:
    """Train a method with a seed unless that is done, and return its run's folder, output/runs/NAME-SEED.

    A training that was stopped goes on. ValueError where the driver fails, or where the folder is another command's.
    """
    folder = output / "runs" / f"{name}-{seed}"
    log, done = (folder.with_name(f"{folder.name}{suffix}") for suffix in (".log", ".done"))
    log.parent.mkdir(parents=True, exist_ok=True)
    told = shlex.join(command)
    if done.is_file():
        if done.read_text() != told:
            raise ValueError(
                f"{folder} was trained by {done.read_text()!r}, not {told!r}; name the method otherwise, or remove {done}"
                " and the folder"
            )
        return folder
    added = ["--no-overwrite", "--seed", str(seed), "--output", str(folder), "--resume", "auto"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", *command, *added]
    print(f"{name}, seed {seed}: {shlex.join(launched[3:])}", flush=True)  # noqa: T201
    with log.open("w") as file:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        code = subprocess.run(
            launched,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        ).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        why = [line for line in lines if ": error: " in line] or lines[-1:]
        raise ValueError(f"method {name}, seed {seed} failed: {' '.join(why)}; see {log}")
    write_text(done, told)
    return folder
