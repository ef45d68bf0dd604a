"""One writer for each output folder: an advisory lock, held from before anything is written until the program ends.

The lock of `runs/a` is the file `runs/.a.lock`, or `runs/a/.lock` where `runs` cannot be written. The system
releases it when the process ends, however it ends: a file that a killed process left behind does not block. It
says which process holds it. Processes on several machines see each other's locks on file systems that share
`flock`, such as NFS; where a file system has no locks, one line warns, and nothing is checked.
"""

import atexit
import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["acquire", "is_held_elsewhere", "is_lock", "is_main_process", "release"]

_INSIDE = ".lock"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, tuple[int, FileLock]] = {}
"""Folder -> process and lock. A forked process has the dictionary, but not the locks."""


def is_main_process() -> bool:
    """Return whether this process of those that a launcher started, or the only one, is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def acquire(folder: Path) -> None:
    """Make this process the only writer of a folder, which need not exist; no effect where it is already.

    ValueError where another process is, or where neither the folder nor its parent can be written.
    """
    place = Path(os.path.realpath(folder))
    if _held.get(place, (0, None))[0] == os.getpid():
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}{_INSIDE}") if place.name else place / _INSIDE
        try:
            lock = _locked(beside)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in _NOT_WRITABLE or not place.is_dir():
                raise
            lock = _locked(place / _INSIDE)
    except Timeout as timeout:
        if not Path(timeout.lock_file).exists():  # as in /proc
            raise ValueError(f"--output-dir {folder} cannot be written; choose another folder") from timeout
        raise ValueError(
            f"{folder} is being written by {_holder(Path(timeout.lock_file))}; wait for it, stop it, or choose another"
            " --output-dir"
        ) from timeout
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ValueError(
                f"--output-dir {folder} cannot be written: {error.strerror or error}; choose another folder"
            ) from error
        sys.stderr.write(
            f"warning: {folder} cannot be locked ({error.strerror}): start no other command on it\n"
        )
        return
    _held[place] = (os.getpid(), lock)


def release(folder: Path) -> None:
    """End what `acquire` began; no effect where it did not."""
    pid, lock = _held.pop(Path(os.path.realpath(folder)), (0, None))
    if lock is not None and pid == os.getpid():
        with contextlib.suppress(OSError):  # removed while it is held: whoever opens it next makes a new one
            os.unlink(lock.lock_file)
        lock.release()


def is_held_elsewhere(folder: Path) -> bool:
    """Return whether another process is the writer of a file or folder, as its lock beside it says."""
    beside = folder.with_name(f".{folder.name}{_INSIDE}")
    if not beside.exists() or _held.get(Path(os.path.realpath(folder)), (0, None))[0] == os.getpid():
        return False
    other = FileLock(beside, blocking=False, fallback_to_soft=False)
    try:
        other.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    other.release()
    return False


def is_lock(path: Path) -> bool:
    """Return whether a file of an output folder is its lock."""
    return path.name == _INSIDE


def _locked(path: Path) -> FileLock:
    """Lock a file and note in it who did. Timeout where another process has; OSError where it cannot be locked."""
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    lock.acquire()
    with contextlib.suppress(OSError):  # the note is a courtesy: a full disk must not stop the program here
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return lock


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "another process"
    except OSError:
        return "another process"


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release(folder)
