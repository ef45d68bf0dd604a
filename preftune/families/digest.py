"""What tells the weights of one model from those of another."""

import hashlib
from pathlib import Path

from preftune.families import weights
from preftune.families.locate import as_source
from preftune.families.source import INDEX, Source, models_of, names_in, parts_of
from rewards.digests import sha256_of

_WHOLE, _BLOCK, _BLOCKS = 1 << 30, 1 << 20, 256


def digest(model: Source | Path | str) -> str:
    """Return what tells a model's weights and configurations from those of another model, in about a second.

    SHA-256 over the names and digests of the files that are loaded; of a file above 1 GiB, over its size and 257 blocks of
    1 MiB, spread evenly from its start to its end, so that one changed bit between them is not seen. It is the same in
    another folder. A model in the hub's cache counts as its commit and the names of its files.
    """
    source = as_source(model)
    files = {"file": source.file} if source.file is not None else _files(source)
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        found.update(f"{name} {source.commit or _digest_of(path)}\n".encode())
    return found.hexdigest()


def _files(source: Source) -> dict[str, Path]:
    """Return the files that a pipeline folder is loaded from: name in the folder -> path."""
    names = [INDEX]
    index = source.index()
    models = models_of(index)
    for part in parts_of(index):
        inside = names_in(source.folder / part)
        kept = [name for name in inside if name.endswith((".json", ".txt")) and ".index." not in name]
        if part in models:
            kept += weights.find(source.folder / part, models[part], source.variant).files
        names += [f"{part}/{name}" for name in kept]
    return {name: source.folder / name for name in names}


def _digest_of(path: Path) -> str:
    """Return a file's SHA-256, or that of a sample of a large file."""
    size = path.stat().st_size
    if size <= _WHOLE:
        return sha256_of(path)
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for k in range(_BLOCKS + 1):
            file.seek(k * (size - _BLOCK) // _BLOCKS)
            found.update(file.read(_BLOCK))
    return found.hexdigest()
