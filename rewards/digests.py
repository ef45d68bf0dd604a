"""Digests of files, worked out once as long as a file stays the same."""

import functools
import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return _digest(path, path.stat().st_mtime_ns, "sha256", git=False)


def git_sha1_of(path: Path) -> str:
    """Return a file's name as a git blob: the SHA-1 of its length and its content."""
    return _digest(path, path.stat().st_mtime_ns, "sha1", git=True)


@functools.cache
def _digest(path: Path, _modified: int, algorithm: str, *, git: bool) -> str:
    """Return a file's digest; a run checks its weights before it starts and again when it loads them."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if git:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
