"""What tells the weights of scorers from those of others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import rewards
from rewards import own
from rewards.digests import sha256_of


def digests(names: Sequence[str], files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the digests of the weights of scorers, which tell a job from others; ValueError where some are neither here nor on the hub."""
    found = rewards.check_all(names, files)
    weights = {name: {path.name: sha256_of(path) for path in paths} for name, paths in found.items()}
    return weights | {name: {"source": own.source_digest(name)} for name in names if own.is_given(name)}
