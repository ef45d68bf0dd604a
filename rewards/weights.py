"""Finding weights, reading them without executing anything in them, and writing a folder of them."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import embedded
from rewards.atomic_folder import replace_folder
from rewards.card import Card
from rewards.digests import sha256_of
from rewards.hub import cached_file
from rewards.input_files import check_pointer

ROOT = Path(__file__).resolve().parents[1]
"""The repository root, where weights/ may be, too."""
FOLDER_FILE = "model.safetensors"
"""The weights in an embedded folder."""
LOOSE = "weights"
"""The folder for published files that are on no hub, below the working directory or the repository root; git ignores it."""


def find(card: Card, weights: Path | None) -> Path:
    """Return the weights file or embedded-style folder of a card that has weights.

    An explicit path, else the embedded folder, else weights/ or the hub's cache; `rewards.check_all` downloads.
    ValueError says which file to put where when there is none, or when a file that claims to be the published one has another size or SHA-256.
    """
    if weights is not None:
        if not weights.exists():
            raise ValueError(
                f"weights of {card.name}: {weights} does not exist; {remedy(card)}, or name the path of one that you have"
            )
        if weights.is_dir() and card.file is not None and (weights / card.file).is_file():
            weights = weights / card.file
        if weights.name == card.file:
            verify(weights, num_bytes=card.num_bytes, sha256=card.sha256)
        return weights
    path = local(card)
    if path is None:
        raise ValueError(
            f"the weights of {card.name} are not here; {remedy(card)}, or name the path of one that you have"
        )
    if path.is_file():
        verify(path, num_bytes=card.num_bytes, sha256=card.sha256)
    return path


def find_file(card: Card, weights: Path | None) -> Path:
    """Return the weights file of a card whose scorer does not read folders; ValueError as `find`, and for a folder without it."""
    file = find(card, weights)
    if file.is_dir():
        raise ValueError(f"{file} lacks {card.file}; name the file itself if it is called otherwise")
    return file


def local(card: Card) -> Path | None:
    """Return weights that are on the disk, unverified: the embedded folder, or the published file."""
    if card.folder is not None:
        folder = embedded.own(card.folder) or ROOT / card.folder
        return folder if (folder / FOLDER_FILE).is_file() else None
    assert card.file is not None, f"{card.name} has no weights to find"
    return loose(card.file) if card.repo is None else cached_file(card.repo, card.file, card.revision)


def loose(file: str) -> Path | None:
    """Return a file of the folder weights/, below the working directory or the repository root, or None."""
    return next((path for path in (Path(LOOSE, file), ROOT / LOOSE / file) if path.is_file()), None)


def verify(path: Path, *, num_bytes: int | None, sha256: str | None) -> None:
    """Raise ValueError when a file is not the published one; the size goes first because it costs nothing."""
    if num_bytes is not None and path.stat().st_size != num_bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, the published file has {num_bytes}; download it again"
        )
    if sha256 is None:
        return
    digest = sha256_of(path)
    if digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, the published file has {sha256}; download it again")


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file on the CPU; nothing in the file is executed.

    A `state_dict` or `model` wrapper and the `module.` prefix of a distributed run are taken off. ValueError
    when the file is truncated, is a Git LFS pointer or no weights file, or holds anything but tensors.
    """
    if path.is_file():
        check_pointer(path)
    try:
        content = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a readable weights file (truncated, or not tensors only): {reason}"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def check(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path, what: str) -> None:
    """Raise ValueError unless a state dict has exactly the expected names and shapes; it names what differs.

    A partially loaded checkpoint would give random scores without an error.
    """
    faults = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected.keys() & state.keys()
            if expected[key].shape != state[key].shape
        },
    }
    reports = [
        f"{kind}: {', '.join(sorted(keys)[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for kind, keys in faults.items()
        if keys
    ]
    if reports:
        raise ValueError(f"{file} does not hold {what}; {'; '.join(reports)}")


def write_folder(folder: Path, state: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write model.safetensors and text files, name -> content, into a folder: all together or, after a kill, none of them.

    Other files of the folder stay there. ValueError for a folder that is a file.
    """

    def write(unfinished: Path) -> None:
        save_file({key: value.cpu().contiguous() for key, value in state.items()}, unfinished / FOLDER_FILE)
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8", newline="\n")

    replace_folder(folder, {FOLDER_FILE, *texts}, write)


def remedy(card: Card) -> str:
    """Return what to do about missing weights: a command or a place, with the size where it is known."""
    if card.folder is not None:
        return f"put config.json, vocab.txt and {FOLDER_FILE} into {card.folder}"
    size = f" ({card.size})" if card.size else ""
    if card.repo is None:
        place = f"put {card.file} of {card.source}{size} into {LOOSE}/"
        return (
            f"{place}, as `curl -L --create-dirs -o {LOOSE}/{card.file} {card.url}` does"
            if card.url
            else place
        )
    return f"run `hf download {card.repo} {card.file}`{size}"
