"""Which files hold the weights of a pipeline's part: safetensors before .bin, a variant such as fp16, shards.

A part is a folder such as unet/. diffusers and transformers give variants and shards the same names:
diffusion_pytorch_model.fp16.safetensors, and diffusion_pytorch_model.safetensors.index.fp16.json for the list of shards.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from preftune.families.configs import read_json
from rewards.input_files import check_pointer

FILES = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
"""Library -> the names of its weights, the preferred one first."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a part."""

    files: tuple[str, ...]
    """Their names; of shards, the list of shards comes first."""
    variant: str | None
    """As from_pretrained takes it."""
    safetensors: bool


def choose(
    names: Collection[str],
    library: str,
    variant: str | None,
    shards: Callable[[str, Collection[str]], Collection[str]] | None = None,
) -> Weights | None:
    """Return the weights among the file names of a part, or None where there are none.

    Those of the variant where the part has it, else those without a variant, else those of its only variant.
    `shards` returns the files of a list of shards; None judges by their names. ValueError where shards are missing,
    or where the part has several variants alone and none of them was chosen.
    """
    found = list(_candidates(names, library))
    kinds = {kind for kind, _ in found}
    wanted = next((kind for kind in (variant, None) if kind in kinds), None)
    if wanted is None and None not in kinds:
        if len(kinds) > 1:
            listed = ", ".join(sorted(str(kind) for kind in kinds))
            raise ValueError(
                f"there are no weights without a variant, only {listed}; choose one with --variant"
            )
        wanted = next(iter(kinds), None)
    name = next((name for kind, name in found if kind == wanted), None)
    if name is None:
        return None
    files: tuple[str, ...] = (name,)
    if name.endswith(".json"):
        parts = sorted((shards or _by_name)(name, names))
        missing = [part for part in parts if part not in names]
        if missing or not parts:
            raise ValueError(f"it lacks {', '.join(missing) or 'the shards'}, which {name} names")
        files += tuple(parts)
    return Weights(files=files, variant=wanted, safetensors=".safetensors" in name)


def variants(names: Collection[str], library: str) -> set[str]:
    """Return the variants of the weights that a part has."""
    return {kind for kind, _ in _candidates(names, library) if kind is not None}


def _candidates(names: Collection[str], library: str) -> Iterator[tuple[str | None, str]]:
    """Yield (variant, file name) of whole weights and of lists of shards, the preferred ones first."""
    for known in FILES[library]:
        stem, _, suffix = known.rpartition(".")
        whole = re.compile(rf"{stem}(?:\.(?P<variant>[^.]+))?\.{suffix}")
        listing = re.compile(rf"{stem}\.{suffix}\.index(?:\.(?P<variant>[^.]+))?\.json")
        for pattern in (whole, listing):
            for name in sorted(names):
                match = pattern.fullmatch(name)
                if match and not re.search(r"-\d+-of-\d+$", match["variant"] or ""):
                    yield match["variant"], name


def _by_name(listing: str, names: Collection[str]) -> list[str]:
    """Return the shards that belong to a list of shards as their names say."""
    stem, _, rest = listing.partition(".index")
    stem, _, suffix = stem.rpartition(".")
    variant = rest.removesuffix(".json")  # "" or ".fp16", before the number or, in old files, after it
    variant = re.escape(variant)
    pattern = re.compile(rf"{stem}({variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{suffix}")
    return [name for name in names if pattern.fullmatch(name)]


def names_in(folder: Path) -> set[str]:
    """Return the names in a folder; none where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def find(folder: Path, library: str, variant: str | None = None) -> Weights:
    """Return the weights in the folder of a part; ValueError where they are missing, incomplete, or Git LFS pointers."""

    def shards(listing: str, _: Collection[str]) -> Collection[str]:
        weight_map = read_json(folder / listing).get("weight_map")
        return {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else ()

    try:
        weights = choose(names_in(folder), library, variant, shards)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if weights is None:
        raise ValueError(f"{folder} has no weights: neither {' nor '.join(FILES[library])} is there")
    for name in weights.files:
        check_pointer(folder / name)
    return weights
