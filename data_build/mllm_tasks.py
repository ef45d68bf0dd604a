"""What a model is asked about a data set: groups of images of a prompt, and one question for each aspect and order."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preftune.image_folders import Columns
from preftune.mllm.answers import Choice, read_choice, read_scores
from preftune.mllm.client import Asked, Client
from preftune.mllm.questions import Question, of_file
from preftune.mllm.templates import Template
from preftune.records import read_captioned, read_usable_rankings

Mode = Literal["together", "pointwise", "pairwise"]
SHARE: dict[Choice, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""A choice as how far the image that is shown first is preferred."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images of one prompt."""

    prompt: str
    names: tuple[str, ...]
    """Files, relative to the data set's folder."""
    paths: tuple[Path, ...]
    left_out: int = 0
    """Number of further images that it has, which were not drawn."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said of the images that were shown, in the order in which they were."""

    scores: tuple[int, ...] = ()
    choice: Choice | None = None
    """Of two images, where it was asked which is better."""
    rationales: tuple[str, ...]
    """One for each score, or for the choice."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question about some images of a group."""

    group: Group
    template: Template
    order: int
    """0, or 1 = the reversed order."""
    shown: tuple[int, ...]
    """Places in the group, in the order in which they are shown."""
    pairwise: bool

    @property
    def names(self) -> list[str]:
        """The files in the order in which they are shown."""
        return [self.group.names[place] for place in self.shown]

    def question(self) -> Question:
        """Return the question; ValueError for an image that is gone."""
        try:
            pictures = tuple(of_file(self.group.paths[place]) for place in self.shown)
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
        if self.pairwise:
            first, second = pictures
            return self.template.compare(self.group.prompt, (first, second))
        return self.template.rate(self.group.prompt, pictures)

    def read(self, text: str) -> Answer:
        """Return what an answer says; AnswerError for one that is none."""
        if self.pairwise:
            choice, rationale = read_choice(text)
            return Answer(choice=choice, rationales=(rationale,))
        scores, rationales = zip(*read_scores(text, len(self.shown)), strict=True)
        return Answer(scores=scores, rationales=rationales)


def read_groups(
    data: Path, *, least: int, most: int, count: int | None, seed: int
) -> tuple[list[Group], Counter[str]]:
    """Return the images of each prompt, of at most `count` prompts, and how many prompts, images and rows were left out, by reason.

    Of a folder with a rankings.jsonl the images that were ranked together, each once, however many annotators ranked them; else the
    images with one caption. Of more than `most` so many are drawn by seed, prompt and name. ValueError where no group has `least`.
    """
    found, left_out = _groups(data)
    groups = []
    for prompt, paths in found:
        if len(paths) < least:
            left_out["prompts with one image"] += 1
            continue
        names = tuple(path.relative_to(data).as_posix() for path in paths)
        group = Group(prompt=prompt, names=names, paths=paths)
        groups.append(drawn(group, most, seed) if len(paths) > most else group)
    if not groups:
        raise ValueError(f"{data} has no prompt whose images can be compared; {reasons(left_out)}")
    groups = groups[:count]
    if further := sum(group.left_out for group in groups):
        left_out[f"images of prompts with more than {most}"] = further
    return groups, left_out


def reasons(left_out: Counter[str]) -> str:
    """Return in words what was left out."""
    return "left out: " + ", ".join(f"{reason} ({number:,})" for reason, number in left_out.items())


def drawn(group: Group, number: int, seed: int) -> Group:
    """Return a group with so many of its images, in their order; which ones depends on seed, prompt and each name alone."""
    places = range(len(group.names))
    kept = sorted(sorted(places, key=lambda at: _digest([seed, group.prompt, group.names[at]]))[:number])
    return Group(
        prompt=group.prompt,
        names=tuple(group.names[at] for at in kept),
        paths=tuple(group.paths[at] for at in kept),
        left_out=len(places) - number,
    )


def _groups(data: Path) -> tuple[list[tuple[str, tuple[Path, ...]]], Counter[str]]:
    left_out = Counter[str]()
    if (data / "rankings.jsonl").exists():
        rankings, skipped = read_usable_rankings(data)
        found = list(dict.fromkeys((one.prompt, tuple(sorted(one.paths))) for one in rankings))
    else:
        samples, skipped = read_captioned(data, Columns())
        by_prompt: dict[str, dict[Path, None]] = {}
        for sample in samples:
            by_prompt.setdefault(sample.text, {})[sample.path] = None
        found = [(prompt, tuple(paths)) for prompt, paths in by_prompt.items()]
    if skipped:
        left_out["rows that cannot be used"] = len(skipped)
    return found, left_out


def shuffled(places: Sequence[int], group: Group, words: Sequence[object]) -> tuple[int, ...]:
    """Return the places in an order at random, which depends on the words, the prompt and the names alone.

    It stays the same where the data set grows, so that answers stay known.
    """
    context = [*map(str, words), group.prompt, [group.names[place] for place in sorted(places)]]
    digest = {place: _digest([*context, group.names[place]]) for place in places}
    return tuple(sorted(places, key=lambda place: digest[place]))


def _digest(values: Sequence[object]) -> bytes:
    return hashlib.sha256(json.dumps(values).encode()).digest()


def tasks_of(
    group: Group, templates: Sequence[Template], mode: Mode, orders: int, seed: int
) -> Iterator[Task]:
    """Yield the questions about a group: for each aspect about all images together, about each alone, or about each pair.

    The second of two orders is the first one reversed.
    """
    everyone = range(len(group.names))
    by_mode: dict[Mode, list[tuple[int, ...]]] = {
        "together": [tuple(everyone)],
        "pointwise": [(place,) for place in everyone],
        "pairwise": list(itertools.combinations(everyone, 2)),
    }
    for template in templates:
        for places in by_mode[mode]:
            first = shuffled(places, group, (seed, template.name))
            for order, shown in enumerate([first, first[::-1]][:orders]):
                yield Task(
                    group=group, template=template, order=order, shown=shown, pairwise=mode == "pairwise"
                )


def ask(client: Client, task: Task) -> Asked[Answer]:
    """Ask a question; EndpointError where none makes sense any more."""
    try:
        question = task.question()
    except ValueError as error:
        return Asked(error="bad image", detail=str(error))
    return client.ask(question, task.read)


def known(client: Client, task: Task) -> Answer | None:
    """Return the answer that is on record, None without one."""
    text = client.calls.get(task.question().key(client.config))
    return None if text is None else task.read(text)
