"""Faults in the real programs: a disk that fills up, an input-output error, a kill, a signal, at any write below a folder.

`Server` starts a process that has imported everything and into which `faults.c` is loaded: it counts the calls of the C library
that change files (of Python, torch, safetensors and pyarrow alike) and injects a fault at one of them. Each program runs in a
fork of that process, so that the imports are paid once.

    with Server() as server:
        child = server.start("finetune.refl", argv, Fault("full", at=17, folder=output))
        ended = server.wait(child)         # code, output, calls, where
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

KINDS = ("count", "full", "error", "kill", "torn", "term", "stop", "read-only")
"""In the order of faults.c. full: from this write on, no space is left, and half of the write arrives; error: one call gives EIO;
kill: SIGKILL before the call; torn: SIGKILL within a write; term: SIGTERM; stop: SIGSTOP, until `Server.go_on`; read-only: every
call from this one on gives EROFS."""

SOURCE = Path(__file__).with_suffix(".c")
ROOT = Path(__file__).parents[1]
WAIT = 300.0
"""Seconds until a program counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault at the `at`-th call, from 1, that changes something below `folder`; 0 = none, the calls are only counted.

    match: only calls on paths that hold this text count.
    """

    kind: str = "count"
    at: int = 0
    folder: Path
    match: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    code: int
    """Exit code; negative: the signal that killed it; None of both: it was stopped, see `stopped`."""
    output: str
    """stdout and stderr."""
    calls: int
    """Calls that changed something below the folder."""
    where: str
    """The call that got the fault."""
    stopped: bool = False

    @property
    def traced(self) -> bool:
        """Whether it ended with a traceback."""
        return "Traceback (most recent call last)" in self.output

    @property
    def tail(self) -> str:
        """How it ended, for messages of tests."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return f"exit code {self.code}: " + " / ".join(lines[-3:])

    @property
    def sentence(self) -> str:
        """The one line of its own that names an error; else empty."""
        lines = re.findall(r"(?:^|\x1b\[A|\r)(\w+\.py: error: .*)", self.output, re.MULTILINE)
        return str(lines[0]) if len(lines) == 1 else ""


class Record(ctypes.Structure):
    """The struct of that name in faults.c."""

    _fields_ = (
        ("pid", ctypes.c_long),
        ("action", ctypes.c_long),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("folder", ctypes.c_char * 1024),
        ("match", ctypes.c_char * 256),
        ("where", ctypes.c_char * 1024),
    )


def compiler() -> str | None:
    """A C compiler, where there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Server:
    """The process from which programs are forked. One at a time, or several side by side."""

    def __init__(self, *modules: str) -> None:
        """Compile the layer, start the process and import these modules in it."""
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "faults.so"
        command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(library), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._answer() == "ready", "the server did not start"

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and with it what it still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def run(self, module: str, argv: list[str], fault: Fault | None = None) -> Ended:
        """Run a program to its end."""
        return self.wait(self.start(module, argv, fault))

    def start(self, module: str, argv: list[str], fault: Fault | None = None) -> int:
        """Start `module.main` on a command line; returns the number of the process."""
        what = [fault.kind, fault.at, str(fault.folder), fault.match] if fault else ["count", 0, "/-", ""]
        return int(self._ask("start", module, argv, *what))

    def wait(self, child: int) -> Ended:
        """Wait until a program ends or stops itself."""
        return Ended(**self._ask("wait", child))

    def go_on(self, child: int) -> None:
        """Let a stopped program continue."""
        self._ask("go_on", child)

    def _ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server is gone"
        return json.loads(line)


# ---------------------------------------------------------------- the server's side


def serve(library: str, modules: list[str]) -> None:
    """Import, then fork a program for each question on stdin, and answer on stdout."""
    layer = ctypes.CDLL(library)
    # What programs print, and what libraries print while they are imported, must not become an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    work = Path(tempfile.mkdtemp())
    children: dict[int, tuple[mmap.mmap, Path]] = {}

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer("ready")
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "start":
            module, argv, *fault = rest
            shared, output = mmap.mmap(-1, ctypes.sizeof(Record)), work / f"{len(children)}.txt"
            child = os.fork()
            if not child:
                _be_a_program(layer, shared, output, module, argv, fault)
            children[child] = (shared, output)
            answer(child)
        elif what == "wait":
            shared, output = children[rest[0]]
            answer(_waited(rest[0], Record.from_buffer_copy(shared), shared, output))
        else:
            os.kill(rest[0], signal.SIGCONT)
            answer(None)
    for child in children:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.kill(child, signal.SIGCONT)
    shutil.rmtree(work)


def _waited(child: int, _: Record, shared: mmap.mmap, output: Path) -> dict[str, Any]:
    """The fields of Ended."""
    end = time.monotonic() + WAIT
    status = 0
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WUNTRACED | os.WNOHANG)
        if done:
            break
        select.select([], [], [], 0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError(f"hangs: {output.read_text(errors='replace')[-2000:]}")
    record = Record.from_buffer_copy(shared)
    stopped = os.WIFSTOPPED(status)
    return {
        "code": 0 if stopped else os.waitstatus_to_exitcode(status),
        "output": output.read_text(encoding="utf-8", errors="replace"),
        "calls": record.count,
        "where": record.where.decode(errors="replace"),
        "stopped": stopped,
    }


def _be_a_program(
    layer: ctypes.CDLL, shared: mmap.mmap, output: Path, module: str, argv: list[str], fault: list[Any]
) -> None:
    """In the fork: run a program's main as `python FILE ARGV` does, and end this process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    code: Any = 1
    try:
        kind, at, folder, match = fault
        record = Record.from_buffer(shared)
        record.folder, record.match = os.fsencode(folder), os.fsencode(match)
        record.action, record.at, record.pid = KINDS.index(kind), at, os.getpid()
        layer.fault_use(ctypes.byref(record))
        program = importlib.import_module(module)
        from tqdm import tqdm

        from preftune.cli import parse

        tqdm.set_lock(threading.RLock())  # the usual one is shared: a killed child would hold it for ever
        sys.argv = [f"{module.rpartition('.')[2]}.py", *argv]
        code = program.main(parse(program.Config, argv))
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


# ---------------------------------------------------------------- what a folder holds

Value = TypeVar("Value")


def tree(folder: Path) -> dict[str, str]:
    """Relative name -> digest of all below a folder: bytes, kinds and link targets; to compare before and after."""
    return dict(_tree(folder))


def _tree(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            yield name, f"-> {os.readlink(path)}"
        elif path.is_dir():
            yield f"{name}/", ""
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
