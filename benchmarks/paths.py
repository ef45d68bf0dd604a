"""Where the embedded models and prompts are, and whether a file can be written; needs no torch."""

from pathlib import Path

from preftune.files import check_writable

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
PROMPTS = TINY / "prompts.txt"


def check_file(path: Path | None, flag: str = "--output") -> None:
    """Raise ValueError for the file of a flag that is a folder, or whose folder cannot be made or written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it, as {path / 'result.json'}")
    try:
        check_writable(path.parent)
    except ValueError as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise ValueError(
            f"{flag} {path} cannot be written: {getattr(reason, 'strerror', None) or reason}; choose another folder"
        ) from error
