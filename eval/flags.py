"""Values of flags that several programs of eval/ have, and their checks; needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from preftune.cli.given_once import check_given_once

BASE = "base"
"""Name of what all methods start from and are compared with."""


def split_term(term: str) -> tuple[str, str]:
    """Return TITLE and WHAT of a column."""
    title, equals, source = term.partition("=")
    if not equals or not title.strip():
        raise ValueError(f"column {term!r} is not TITLE=WHAT, as in base= or tuned=runs/refl")
    return title, source


def named_folders(terms: Sequence[str]) -> dict[str, Path]:
    """Return title -> folder of --folders, each TITLE=FOLDER, or FOLDER, whose name is the title; ValueError for what is neither."""
    found: dict[str, Path] = {}
    for term in terms:
        title, equals, folder = term.partition("=")
        if not equals or Path(term).is_dir():
            title, folder = Path(term).resolve().name, term
        if not title.strip() or not folder:
            raise ValueError(f"--folders {term!r} is not TITLE=FOLDER, as in base=images/base, or FOLDER")
        if title in found:
            raise ValueError(f"--folders has two folders with the title {title}; write TITLE=FOLDER for one")
        found[title] = Path(folder)
    if not found:
        raise ValueError(
            "--folders is empty; name at least one, as in --folders base=images/base images/tuned"
        )
    return found


def check_folders(folders: Sequence[Path]) -> None:
    """Raise ValueError unless there are folders, each once, by whatever path."""
    why = "its annotators would be compared with themselves"
    check_given_once("--data", folders, "folder with rankings.jsonl", why)


def check_crops(crops: Sequence[float]) -> None:
    """Raise ValueError unless all are different shares of an image's side."""
    if len(set(crops)) != len(crops) or not all(0 < crop <= 1 for crop in crops):
        raise ValueError(f"--crops must be different shares in (0, 1], got {tuple(crops)}")
