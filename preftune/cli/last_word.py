"""The last word under a launcher: accelerate launch prints a traceback of its own below the sentence that a program ended with.

A program cannot keep its launcher from that. It can leave a small process behind, which prints the sentence once more when the
launcher has ended; of several processes one does so.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from preftune.cli.launcher import is_launcher, parent

_WAIT = """
import os, select, sys, time
launcher, mark, text = int(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    if not select.select([os.pidfd_open(launcher)], [], [], 60)[0]:
        sys.exit()
except AttributeError:  # not Linux
    for _ in range(600):
        try:
            os.kill(launcher, 0)
        except OSError:
            break
        time.sleep(0.1)
except OSError:
    pass
try:
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
except OSError:  # another process of this launcher has spoken
    sys.exit()
os.write(2, text.encode())
os.close(2)
time.sleep(2)
os.unlink(mark)
"""


def last_word(text: str, code: int) -> None:
    """Print what this program ends with, again, after its launcher's traceback; nothing without a launcher or with its --quiet.

    text: lines of stderr, each with its end. code: the exit code of this program.
    """
    if os.name != "posix":
        return
    launcher = parent()
    if not is_launcher(launcher.words) or {"-q", "--quiet"} & {*launcher.words}:
        return
    mark = Path(tempfile.gettempdir()) / f"preftune-last-word-{launcher.pid}"
    name = Path(sys.argv[0]).name
    again = f"\nThe traceback above is the launcher's own (exit code 1): {name} ended with exit code {code}.\n{text}"
    command = [sys.executable, "-I", "-S", "-c", _WAIT, str(launcher.pid), str(mark), again]
    with contextlib.suppress(OSError):
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
