"""Training runs that a comparison starts: each method with each seed in its own folder, each once.

A method is NAME=DRIVER FLAGS, as typed on the command line: `finetune/refl.py --config a.yaml`, also from where there is no
finetune/, or `preftune refl --config a.yaml`. Programs of eval/ do not import drivers: they start them with
`accelerate launch`, and read the folder of the run.

Next to the folder NAME-SEED are NAME-SEED.log, NAME-SEED.command (the record of its command, written before
it starts) and NAME-SEED.done (written when it has finished). A folder is never used for another command
than the recorded one.
"""

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from preftune.cli.printable import show
from preftune.files import write_text
from preftune.machine.cores import cores
from preftune.programs import PROGRAMS
from rewards import embedded

ROOT = Path(__file__).resolve().parents[1]
SET_HERE = ("--seed", "--output-dir", "--overwrite-output-dir", "--resume-from-checkpoint")
"""Flags that the comparison gives a driver."""


def split_named(term: str) -> tuple[str, str]:
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
    """Raise ValueError for a command that is no driver, that has a flag which the comparison sets, or no readable
    --config.
    """
    for name, command in commands.items():
        try:
            launch_words(command)
        except ValueError as error:
            raise ValueError(f"method {name}: {error}") from error
        if both := {*SET_HERE, *taken} & {flag.partition("=")[0] for flag in command}:
            raise ValueError(f"method {name}: {min(both)} is set by the comparison; leave it out")
        try:
            command_record(command)
        except ValueError as error:
            raise ValueError(f"method {name}: {error}") from error


def launch_words(command: Sequence[str]) -> list[str]:
    """Return the words that start a driver after `accelerate launch`; ValueError for what is no driver.

    A file is started as it is. `preftune NAME`, and the file of a driver that is not in the working directory, become the
    command of the installed package.
    """
    drivers = {name: module for name, module in PROGRAMS.items() if module.startswith("finetune.")}
    first, *others = command
    if first == "preftune":
        if not others or others[0] not in drivers:
            raise ValueError(
                f"{shlex.join(command[:2])} is no driver; give preftune and one of {', '.join(drivers)}"
            )
        return ["-m", "preftune", *others]
    if first.endswith(".py") and Path(first).is_file():
        return list(command)
    names = [name for name, module in drivers.items() if first == f"{module.replace('.', '/')}.py"]
    if not names:
        raise ValueError(
            f"{first} is no driver; give a file such as finetune/refl.py, or a command such as `preftune refl`"
        )
    return ["-m", "preftune", *names, *others]


def command_record(command: Sequence[str]) -> str:
    """Return the record of a training: the command, and the SHA-256 of the content of each --config file, which may be
    edited.

    Not looked into are data, prompts and models that it names. ValueError for a --config file that cannot be read.
    """
    parts, tokens = [shlex.join(command)], iter(command)
    for token in tokens:
        flag, equals, file = token.partition("=")
        if flag != "--config":
            continue
        file = file if equals else next(tokens, "")
        try:
            content = embedded.find(file).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the config file {file}: {error.strerror}") from error
        parts.append(f"{file} with SHA-256 {hashlib.sha256(content).hexdigest()}")
    return "; ".join(parts)


def train_all(
    commands: Mapping[str, Sequence[str]], seeds: Sequence[int], output: Path, concurrency: int
) -> dict[tuple[str, int], Path]:
    """Return (method, seed) -> its run's folder, trained as `train` says, so many at a time.

    All methods are trained with the first seed before any is with the second, so that a wrong command is found early. After a
    failure, a ValueError, those that run are waited for, and nothing more is started.
    """
    jobs = [(name, command, seed) for seed in seeds for name, command in commands.items()]
    if concurrency == 1:
        return {(name, seed): train(name, command, seed, output) for name, command, seed in jobs}
    threads = max(1, cores() // concurrency)
    with ThreadPoolExecutor(concurrency) as pool:
        begun = {
            (name, seed): pool.submit(train, name, command, seed, output, threads)
            for name, command, seed in jobs
        }
        try:
            for one in as_completed(begun.values()):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {key: one.result() for key, one in begun.items()}


def train(name: str, command: Sequence[str], seed: int, output: Path, threads: int = 0) -> Path:
    """Train a method with a seed unless that is done, and return its run's folder, output/runs/NAME-SEED.

    With so many CPU threads, unless the command has --threads; 0 = as many as the driver takes.

    A training that was stopped goes on. ValueError where the driver fails, or where the folder is another command's.
    """
    folder = output / "runs" / f"{name}-{seed}"
    log, begun, done = (folder.with_name(f"{folder.name}.{end}") for end in ("log", "command", "done"))
    log.parent.mkdir(parents=True, exist_ok=True)
    now = command_record(command)
    check_same_command(now, folder, begun, done)
    if done.is_file() and folder.is_dir():
        return folder
    done.unlink(missing_ok=True)
    write_text(begun, now)
    added = [
        "--no-overwrite-output-dir",
        "--seed",
        str(seed),
        "--output-dir",
        str(folder),
        "--resume-from-checkpoint",
        "latest",
    ]
    if threads and "--threads" not in (word.partition("=")[0] for word in command):
        added += ["--threads", str(threads)]
    launched = [sys.executable, "-m", "accelerate.commands.launch", *launch_words(command), *added]
    show(f"{name}, seed {seed}: {shlex.join(launched[3:])}")
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
        if not holds_work(folder):  # a flag was wrong, say: nothing to remember
            begun.unlink()
        lines = log.read_text(errors="replace").strip().splitlines()
        why = [line for line in lines if ": error: " in line] or lines[-1:]
        raise ValueError(f"method {name}, seed {seed} failed: {' '.join(why)}; see {log}")
    write_text(done, "")
    return folder


def check_same_command(now: str, folder: Path, begun: Path, done: Path) -> None:
    """Raise ValueError where the folder was begun by another command than `now`, or by one that is not known."""
    if begun.is_file():
        before = begun.read_text(encoding="utf-8")
        if before == now:
            return
        why = f"{folder} was begun by {before!r}, not {now!r}; name the method otherwise"
    elif done.exists() or holds_work(folder):
        why = f"there is no {begun} that says by which command {folder} was begun; name the method otherwise"
    else:
        return
    there = [str(path) for path in (folder, begun, done) if path.exists()]
    raise ValueError(f"{why}, or remove {', '.join(there)}")


def holds_work(folder: Path) -> bool:
    """Return whether a driver has written anything into its folder; it makes the folder before it checks the rest."""
    return folder.is_dir() and any(folder.iterdir())
