"""What tells the weights of one model from those of another."""

import hashlib
import json
from pathlib import Path

from preftune.families import weights
from preftune.families.locate import as_source
from preftune.families.source import INDEX, Source, models_of, parts_of
from rewards.digests import sampled_sha256_of


def digest(model: Source | Path | str) -> str:
    """Return what tells a model's weights and configurations from those of another model, in about a second.

    SHA-256 over the names and digests of the files that are loaded, and of a single file over its noise schedule.
    Of a file above 1 GiB a sample is read, so that one changed bit between its blocks is not seen. It is the same in another
    folder. A model in the hub's cache counts as its commit and the names of its files.
    """
    source = as_source(model)
    files = {"file": source.file} if source.file is not None else _files(source)
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        found.update(f"{name} {source.commit or sampled_sha256_of(path)}\n".encode())
    if source.file is not None:  # its metadata or a .yaml beside it may decide
        found.update(json.dumps(source.scheduler_config(), sort_keys=True).encode())
    return found.hexdigest()


def digest_of_part(folder: Path) -> str:
    """Return what tells the folder of a UNet or an autoencoder from others, as `digest`; ValueError where it has no weights."""
    found = hashlib.sha256()
    for name in sorted(["config.json", *weights.find(folder, "diffusers").files]):
        found.update(f"{name} {sampled_sha256_of(folder / name)}\n".encode())
    return found.hexdigest()


def _files(source: Source) -> dict[str, Path]:
    """Return the files that a pipeline folder is loaded from: name in the folder -> path."""
    names = [INDEX]
    index = source.index()
    models = models_of(index)
    for part in parts_of(index):
        inside = weights.names_in(source.folder / part)
        kept = [name for name in inside if name.endswith((".json", ".txt")) and ".index." not in name]
        if part in models:
            kept += weights.find(source.folder / part, models[part], source.variant).files
        names += [f"{part}/{name}" for name in kept]
    return {name: source.folder / name for name in names}
