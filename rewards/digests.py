"""Digests of files: whole, worked out once as long as a file stays the same, or of a sample of a large file."""

import functools
import hashlib
from pathlib import Path

_WHOLE, _BLOCK, _BLOCKS = 1 << 30, 1 << 20, 256


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal; a file of the same size and time of change is not read again."""
    return _kept(path, "sha256", git=False)


def git_sha1_of(path: Path) -> str:
    """Return a file's name as a git blob: the SHA-1 of its length and its content."""
    return _kept(path, "sha1", git=True)


def sampled_sha256_of(path: Path) -> str:
    """Return a file's SHA-256; above 1 GiB that of its size and 257 blocks of 1 MiB, spread evenly from its start to its end."""
    size = path.stat().st_size
    if size <= _WHOLE:
        return sha256_of(path)
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for k in range(_BLOCKS + 1):
            file.seek(k * (size - _BLOCK) // _BLOCKS)
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def sha256_now(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal; it is read in any case, for damage on a disk leaves no time of change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(path: Path, algorithm: str, *, git: bool) -> str:
    there = path.stat()
    return _digest(path, there.st_mtime_ns, there.st_size, algorithm, git=git)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, _modified: int, size: int, algorithm: str, *, git: bool) -> str:
    """Return a file's digest; a run checks its weights before it starts and again when it loads them."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if git:
        digest.update(f"blob {size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
