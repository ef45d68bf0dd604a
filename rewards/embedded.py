"""Where the files that come with the package are: the embedded models, prompts and images, and the shipped configurations.

Commands, YAML files and cards name them by the paths that they have in the repository, such as assets/tiny/prompts.txt. In
a wheel assets/ lies in the package preftune, because a top-level package `assets` would be in the way of others.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the packages: the repository, or site-packages."""
PLACES = (ROOT / "preftune", ROOT)
"""The folders below which embedded files may be: those of a wheel come first, the repository has none there."""
PREFIXES = ("assets/tiny", "finetune/configs", "eval/configs")
"""The folders of embedded files."""


def find(path: Path | str) -> Path:
    """Return the embedded file or folder of a relative path such as assets/tiny/prompts.txt, else the path as it is.

    A file of this name in the working directory comes first, and a name that is nowhere stays as it is.
    """
    path = Path(path)
    found = own(path)
    return path if found is None or path.exists() else found


def own(path: Path | str) -> Path | None:
    """Return the package's own file or folder of a relative path, whatever the working directory holds; None without one."""
    text = Path(path).as_posix()
    if ".." in Path(path).parts or not any(text == one or text.startswith(f"{one}/") for one in PREFIXES):
        return None
    return next((place / path for place in PLACES if (place / path).exists()), None)


def portable(path: Path) -> Path:
    """Return what `find` made a path from: assets/tiny/prompts.txt for the package's own file, every other path as it is.

    Files that outlive the working directory, such as a run's config.yaml, have it, so that they hold on another machine.
    """
    for place in PLACES:
        if path.is_absolute() and path.is_relative_to(place):
            relative = path.relative_to(place)
            return relative if find(relative) == path else path
    return path
