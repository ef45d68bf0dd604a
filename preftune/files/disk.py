"""Failed writes in words: a full disk, a read-only file system, a broken device.

Libraries report them in their own ways: Python as OSError, safetensors and pyarrow as text, torch without a cause.
"""

import errno
import os
import re
import tempfile
from pathlib import Path

WORDS = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "the disk quota is used up on",
    errno.EROFS: "the file system is read-only:",
    errno.EIO: "input/output error on",
    errno.EFBIG: "a file would be larger than the system allows:",
}
"""Error number of a failed write -> what it means, as the begin of a sentence."""
_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|iostream error|basic_ios::clear")


def reason(error: BaseException, folder: Path) -> str | None:
    """Return what failed in words, as "no space left on runs/a", where an error is of a failed write; else None.

    `folder` is where the program writes; it is named where the error names no file.
    """
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for one in chain:
        if (code := _code(one)) is not None:
            name = one.filename if isinstance(one, OSError) else None
            return f"{WORDS[code]} {name if isinstance(name, str) else folder}"
    if not any(isinstance(one, RuntimeError) and _TORCH.search(str(one)) for one in chain):
        return None
    code = _probe(folder)
    return f"a file cannot be written in {folder}" if code is None else f"{WORDS[code]} {folder}"


def _code(error: BaseException) -> int | None:
    """The error number of a failed write, of those in WORDS."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in WORDS else None
    text = str(error)
    found = (code for code in WORDS if f"(os error {code})" in text or os.strerror(code) in text)
    return next(found, None)


def _probe(folder: Path) -> int | None:
    """The error that a write into the folder gives now; None where it succeeds."""
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in WORDS else None
    return None
