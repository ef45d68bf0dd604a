"""Whether what was typed for a prompt file is a file or the prompts themselves; imports nothing, for the flags need it first."""

from pathlib import Path

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""File types that read_prompts reads."""


def is_text(path: Path) -> bool:
    """Whether what was typed for a prompt file is a prompt, or several, one a line: words with spaces that name no such file."""
    text = str(path)
    looks_like_a_path = path.suffix.lower() in SUFFIXES or text.startswith(("/", "~", ".."))
    if looks_like_a_path or not any(letter.isspace() for letter in text):
        return False
    try:
        return not path.exists()
    except OSError:  # too long for a name
        return True
