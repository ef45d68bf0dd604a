"""The texts of questions: files of a folder, ours or the user's.

A folder holds one file for each aspect, ASPECT.yaml with title, definition and anchors of the scores 1, 3 and 5, and one for each
kind of question: rate.txt (scores of numbered images), compare.txt (a choice between two) and clean.txt (a prompt).
In those, $prompt, $count, $title, $definition and $anchor_1, $anchor_3, $anchor_5 are filled in, and $$ is a dollar.
"""

import hashlib
import json
import string
from dataclasses import dataclass
from pathlib import Path

import yaml

from preftune.mllm.answers import choice_schema, prompt_schema, scores_schema
from preftune.mllm.questions import Picture, Question
from rewards.input_files import read_text

OURS = Path(__file__).parent / "templates"
MAX_FILE = 1 << 16
"""Bytes of a template."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text of one kind of question, about one aspect or, where a prompt is cleaned, about none."""

    name: str
    """Of the aspect, or of the kind of question."""
    digest: str
    """The first 12 digits of the SHA-256 of the text before prompt and number of images are filled in."""
    _text: string.Template

    @property
    def text(self) -> str:
        """The text before prompt and number of images are filled in."""
        return self._text.template

    def rate(self, prompt: str, pictures: tuple[Picture, ...]) -> Question:
        """Return the question for the scores of images."""
        return self._question(prompt, pictures, scores_schema(len(pictures)), "scores")

    def compare(self, prompt: str, pictures: tuple[Picture, Picture]) -> Question:
        """Return the question which of two images is better."""
        return self._question(prompt, pictures, choice_schema(), "choice")

    def clean(self, prompt: str) -> Question:
        """Return the question for a prompt without words of style."""
        return self._question(prompt, (), prompt_schema(), "prompt")

    def _question(
        self, prompt: str, pictures: tuple[Picture, ...], schema: dict[str, object], name: str
    ) -> Question:
        quoted = json.dumps(prompt, ensure_ascii=False)  # a text in quotes, whatever it says
        text = self._text.substitute(prompt=quoted, count=len(pictures))
        return Question(text=text, pictures=pictures, schema=schema, name=name)


def load(folder: Path, kind: str, aspect: str | None = None) -> Template:
    """Return the template of a kind of question (rate, compare, clean) and of an aspect; ValueError for a file that is none."""
    path = folder / f"{kind}.txt"
    text = read_text(path, MAX_FILE, "the template ")
    values = {} if aspect is None else _aspect(folder, aspect)
    try:
        filled = string.Template(text).substitute(values | {"prompt": "\0{prompt}", "count": "\0{count}"})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: $ must stand before prompt, count, title, definition or anchor_1, _3, _5, or be $$: {error}"
        ) from error
    if "\0{prompt}" not in filled:
        raise ValueError(f"{path} has no $prompt")
    again = filled.replace("$", "$$").replace("\0", "$")
    digest = hashlib.sha256(again.encode()).hexdigest()[:12]
    return Template(name=aspect or kind, digest=digest, _text=string.Template(again))


def aspects_of(folder: Path) -> list[str]:
    """Return the names of the aspects of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _aspect(folder: Path, aspect: str) -> dict[str, str]:
    """What an aspect's file says, under the names that a text may use."""
    if aspect not in aspects_of(folder):
        known = ", ".join(aspects_of(folder)) or "none"
        raise ValueError(f"there is no aspect {aspect!r}: {folder} has {known}, each in a file NAME.yaml")
    path = folder / f"{aspect}.yaml"
    try:
        rows = yaml.safe_load(read_text(path, MAX_FILE))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    anchors = rows.get("anchors") if isinstance(rows, dict) else None
    wanted = {"title": rows.get("title"), "definition": rows.get("definition")} if anchors else {}
    wanted |= (
        {f"anchor_{score}": anchors.get(score) for score in (1, 3, 5)} if isinstance(anchors, dict) else {}
    )
    if len(wanted) != 5 or not all(isinstance(value, str) and value.strip() for value in wanted.values()):
        raise ValueError(f"{path} must hold texts: title, definition, and anchors of 1, 3 and 5")
    return {name: " ".join(value.split()) for name, value in wanted.items()}
