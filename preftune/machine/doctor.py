"""Say what this machine has for the programs, and what is missing: versions, devices, caches, weights of scorers.

    preftune doctor

For a first look and for bug reports. Nothing is downloaded, and no token is printed. The exit code is 0 where the demo,
`preftune refl`, can run, else 1, with a line for each thing that is missing.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preftune.cli.printable import show
from preftune.machine.cores import cores
from preftune.machine.embedded_check import damaged
from preftune.programs import hidden
from rewards import embedded

_WIDTH = 110
_PACKAGES = ("rewards", "preftune", "finetune", "data_build", "eval")
_OPTIONAL = ("ray", "xformers", "bitsandbytes", "wandb", "trackio", "torchvision")
"""Libraries that some flags need."""
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "PYTHONPATH")  # fmt: skip
_SECONDS = 2.0
"""For counting a cache."""
_PATIENCE = 300.0
"""Seconds for importing the libraries from a slow disk."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; argv defaults to that of the process, and takes nothing."""
    argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=str(__doc__), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)  # fmt: skip
    missing: list[str] = []
    for name, texts in report(missing):
        for index, text in enumerate(texts):
            lines = textwrap.wrap(text, _WIDTH - 14, break_long_words=False, break_on_hyphens=False) or [""]
            heads = [name if index == 0 else "", *[""] * (len(lines) - 1)]
            show("\n".join(f"{head:13} {line}" for head, line in zip(heads, lines, strict=True)))
    if not missing:
        show("\nThe demo can run: preftune refl")
        return 0
    show("\nMissing for the demo:")
    for fault in missing:
        show(f"- {fault}")
    return 1


def report(missing: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of each topic; what the demo lacks is added to `missing`."""
    missing += [fault for name in _PACKAGES if (fault := hidden(name)) is not None]
    yield "preftune", [f"{_version('preftune') or 'not installed'} in {embedded.ROOT}"]
    yield "python", [f"{platform.python_version()} in {sys.executable}, {platform.platform()}"]
    yield "libraries", [_required(missing)]
    there = [f"{name} {version}" for name in _OPTIONAL if (version := _version(name))]
    others = [name for name in _OPTIONAL if not _version(name)]
    yield "optional", [f"{', '.join(there) or 'none'}; not here: {', '.join(others) or 'none'}"]
    probe = _probe(missing)
    yield "devices", probe["devices"]
    yield "cores, memory", [f"{cores()} cores, {_memory()}"]
    yield "hub", list(_hub())
    yield "accelerate", [_accelerate()]
    yield "disk", list(_disk(missing))
    if given := [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]:
        yield "environment", [" ".join(given)]
    yield "scorers", [f"weights here: {', '.join(probe['here']) or 'none'}; not here: {', '.join(probe['absent']) or 'none'}"]  # fmt: skip
    faults = damaged()
    missing += faults
    yield (
        "embedded",
        ["assets/tiny is complete" if not faults else f"{len(faults)} files are missing or damaged"],
    )


def _version(name: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, OSError, KeyError):
        return None


def _required(missing: list[str]) -> str:
    """Return the versions of what preftune needs, compared with the ranges that it was installed with."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        missing.append("packaging is not installed, so versions cannot be compared: pip install packaging")
        return ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("torch", "diffusers"))
    try:
        lines = importlib.metadata.requires("preftune") or []
    except importlib.metadata.PackageNotFoundError:
        missing.append("preftune is not installed: pip install -e . in the repository, or its wheel")
        return "not known"
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted, version = requirement.name, requirement.specifier, _version(requirement.name)
        found.append(f"{name} {version or 'MISSING'}")
        if version is None:
            missing.append(f"{name} is not installed: pip install '{name}{wanted}'")
        elif not wanted.contains(version, prereleases=True):
            found[-1] += f" (not {wanted})"
            missing.append(f"{name} {version} is not {wanted}: pip install '{name}{wanted}'")
    return ", ".join(found)


def _probe(missing: list[str]) -> dict[str, list[str]]:
    """Return what only the libraries know, asked in a process of its own: a broken one may take its process with it."""
    answer: dict[str, list[str]] = {"devices": ["not known"], "here": [], "absent": []}
    command = [sys.executable, "-P", "-m", "preftune.machine.library_probe"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(embedded.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=environment, timeout=_PATIENCE
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        missing.append(f"the libraries cannot be imported in {_PATIENCE:g} s")
        return answer
    last = ""
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        row: dict[str, Any] = json.loads(line)
        last = row.pop("next", last)
        missing += row.pop("faults", [])
        answer |= row
    if done.returncode:
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        missing.append(f"{last or 'python'} ends the process when it is used ({why}); install it again")
    return answer


def _memory() -> str:
    """Return the machine's memory, and the limit of the container where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "memory not known"
    text = f"{_size(total)} memory"
    with contextlib.suppress(OSError, ValueError, KeyError):  # Linux alone says it
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        text += f", {_size(int(rows['MemAvailable'].split()[0]) * 1024)} of it free"
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
        text += f"; this container may use {_size(limit)}"
    return text


def _hub() -> Iterator[str]:
    """Yield where the hub's cache is, what it holds, and what of the hub is allowed."""
    try:
        from huggingface_hub import constants
    except Exception as error:
        yield f"huggingface_hub cannot be imported: {error}"
        return
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    yield f"cache {cache}: {_content(cache)}"
    token = (
        "HF_TOKEN is set" if os.environ.get("HF_TOKEN")
        else "stored by `hf auth login`" if Path(constants.HF_TOKEN_PATH).expanduser().is_file()
        else "none"
    )  # fmt: skip
    offline = "forbidden (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "allowed"
    yield f"downloads {offline}; token: {token}"


def _content(cache: Path) -> str:
    """Return how many repositories a cache holds and their size, counted for at most two seconds."""
    if not cache.is_dir():
        return "not there yet"
    end, total, whole = time.monotonic() + _SECONDS, 0, True
    repositories = sum(entry.name.startswith(("models--", "datasets--")) for entry in os.scandir(cache))
    for folder, _, names in os.walk(cache):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            total += status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
        if time.monotonic() > end:
            whole = False
            break
    return f"{repositories} repositories, {'' if whole else 'more than '}{_size(total)}"


def _accelerate() -> str:
    """Return whether `accelerate launch` has settings of its own, which change how a program runs."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    file = home / "accelerate" / "default_config.yaml"
    return f"settings of `accelerate launch`: {file if file.is_file() else 'none, the defaults'}"


def _disk(missing: list[str]) -> Iterator[str]:
    """Yield the room in the working directory and in the home of caches."""
    try:
        here = Path.cwd()
    except OSError as error:
        missing.append(f"the working directory cannot be used: {error}")
        return
    if not os.access(here, os.W_OK):
        missing.append(f"{here} cannot be written; start in another folder, or name one as --output-dir")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    for what, folder in (("working directory", here), ("HF_HOME", home)):
        there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
        yield f"{what} {folder}: {_size(shutil.disk_usage(there).free)} free"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
