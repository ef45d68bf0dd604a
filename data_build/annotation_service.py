"""What the pages of a study ask for, without HTTP: the next task, saving an answer, an inspector's view and verdict.

A `Refusal` is what a user did that cannot be; its text is for the user.
"""

import json
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.annotation import results, statistics
from preftune.annotation.assignment import Task, sealed, shared_out, tasks_of
from preftune.annotation.items import Item, Settings
from preftune.annotation.results import Selection
from preftune.annotation.storage import Answer, ConflictError, Role, State, Storage
from preftune.annotation.tasks import (
    AXES,
    CATEGORIES,
    IMAGE_PROBLEMS,
    POINTS,
    PROMPT_PROBLEMS,
    SKIPS,
    contradictions,
    read_answer,
)
from preftune.annotation.votes import Votes
from preftune.cli.notes import counted
from preftune.files import write_text
from preftune.json_values import json_value

AHEAD = 3
"""Tasks whose images a page loads while the one before is answered."""
MAX_NOTE = 1000
"""Letters of an inspector's note."""
WORDS = {
    "categories": CATEGORIES, "axes": AXES, "points": POINTS, "prompt_problems": PROMPT_PROBLEMS,
    "image_problems": IMAGE_PROBLEMS, "skips": SKIPS,
}  # fmt: skip
"""What the pages need to ask."""


class RefusalError(Exception):
    """A request that cannot be done: an HTTP status, and a sentence for the user."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Person:
    """Whoever has a link."""

    name: str
    role: Role


class Service:
    """A study that is being answered; any thread may use it."""

    def __init__(
        self, folder: Path, settings: Settings, items: Sequence[Item], storage: Storage, *,
        raters: Mapping[str, Votes] | None = None, selection: Selection | None = None,
    ) -> None:  # fmt: skip
        """Look at who takes part; whoever is added later needs a new service.

        `raters`: votes that people are compared with; `selection`: what `export` writes for training, None = all.
        """
        self.folder, self.settings, self.storage = folder, settings, storage
        self.raters, self.selection = raters or {}, selection or Selection()
        self.items = {item.id: item for item in items}
        self.images = {image.id: folder / image.file for item in items for image in item.images}
        self._people = {
            sealed(storage.secret, "person", role, name): Person(name=name, role=role)
            for name, role in storage.people().items()
        }
        self._tasks: dict[str, list[Task]] = {}
        self._begun = set(storage.begun())
        number = settings.annotators_per_item
        self._held = self._shared_out(number) if number else {}
        self._results = threading.Lock()

    def links(self) -> list[tuple[Person, str]]:
        """Return each person with the path of their pages."""
        return [(person, f"/{token}/") for token, person in self._people.items()]

    def person(self, token: str) -> Person:
        """Return who has a token; RefusalError for nobody."""
        person = self._people.get(token)
        if person is None:
            raise RefusalError(404, "this link is not known; ask for yours")
        return person

    def tasks(self, name: str) -> list[Task]:
        """Return the tasks of an annotator, or of an inspector who answers, too."""
        if name not in self._tasks:
            is_shared = self._held and self.storage.people()[name] == "annotator"
            mine = [item for item in self.items.values() if not is_shared or name in self._held[item.prompt]]
            again = {item for other, item, visit in tuple(self._begun) if other == name and visit}
            self._tasks[name] = tasks_of(
                mine,
                name,
                self.storage.secret,
                seed=self.settings.seed,
                repeats=self.settings.repeats,
                again=again,
            )
        return self._tasks[name]

    def _shared_out(self, number: int) -> dict[str, list[str]]:
        """Give those who are new their shares, and return prompt -> annotators."""
        sizes = Counter(item.prompt for item in self.items.values())
        annotators = [name for name, role in self.storage.people().items() if role == "annotator"]
        before = self.storage.shares()
        held: dict[str, set[str]] = {prompt: set() for prompt in sizes}
        for name, item in before:
            held[self.items[item].prompt].add(name)
        begun: Counter[tuple[str, str]] = Counter()
        for name, item, _ in self._begun:
            if name in annotators:
                begun[name, self.items[item].prompt] += 0
        for one in self.storage.answers():
            if (one.annotator, self.items[one.item].prompt) in begun:
                begun[one.annotator, self.items[one.item].prompt] += not one.visit
        found = shared_out(sizes, annotators, number, self.settings.seed, held=held, begun=begun)
        after = [(name, item.id) for item in self.items.values() for name in found[item.prompt]]
        if set(after) != set(before):
            self.storage.share_out(after)
        return found

    def shares(self) -> dict[str, tuple[int, int]]:
        """Return annotator -> items, and how many of them come a second time."""
        tasks = {
            name: self.tasks(name) for name, role in self.storage.people().items() if role == "annotator"
        }
        return {
            name: (sum(not task.visit for task in some), sum(task.visit for task in some))
            for name, some in tasks.items()
        }

    def task(self, person: Person, at: int | None = None) -> dict[str, Any]:
        """Return the task at a place, by default the next: first those that were sent back, then the first without an answer."""
        tasks, answers = self.tasks(person.name), self._answers(person.name)
        open_places = [place for place, task in enumerate(tasks) if _key(task) not in answers]
        returned = [
            place
            for place, task in enumerate(tasks)
            if _key(task) in answers and answers[_key(task)].state == "returned"
        ]
        upcoming = returned + open_places
        about = {
            "name": person.name, "role": person.role, "done": len(tasks) - len(upcoming), "total": len(tasks),
            "ties": self.settings.choice_ties,
        }  # fmt: skip
        if at is None or not tasks:
            if not upcoming:
                return about | {"finished": True, "at": len(tasks), "why": "" if tasks else self._nothing()}
            at = upcoming[0]
        at = max(0, min(at, upcoming[0] if upcoming else len(tasks) - 1))
        task = tasks[at]
        self._begin(person, task)
        later = [tasks[place] for place in upcoming if place != at][:AHEAD]
        before = answers.get(_key(task))
        return about | {
            "at": at,
            "task": task.id,
            "kind": task.item.kind,
            "prompt": task.item.prompt,
            "images": _shown(task),
            "answer": None if before is None else outside(task.item, before.answer),
            "note": before.note if before is not None and before.state == "returned" else "",
            "accepted": before is not None and before.state == "accepted",
            "ahead": [image for other in later for image in _shown(other)],
        }

    def _begin(self, person: Person, task: Task) -> None:
        """Note that a task is shown, where somebody who joins could be given it."""
        key = person.name, task.item.id, task.visit
        if self._held and person.role == "annotator" and key not in self._begun:
            self.storage.begin(*key)
            self._begun.add(key)

    def _nothing(self) -> str:
        """Why an annotator has no task."""
        number = self.settings.annotators_per_item
        return f"All items have their {counted(number or 0, 'annotator')}; there is nothing for you yet."

    def save(self, person: Person, body: Mapping[str, Any]) -> dict[str, Any]:
        """Store the answer of a task of this person; RefusalError for another's task, or an answer that is none."""
        identity, seconds = body.get("task"), body.get("seconds")
        task = next((task for task in self.tasks(person.name) if task.id == identity), None)
        if task is None:
            raise RefusalError(403, "this is no task of yours")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise RefusalError(400, "seconds is no time")
        try:
            answer = read_answer(
                task.item.kind, task.item.image_ids, body.get("answer"), ties=self.settings.choice_ties
            )
        except ValueError as error:
            raise RefusalError(400, str(error)) from error
        self._check_consistent(person.name, task, answer)
        try:
            self.storage.save(person.name, task.item.id, task.visit, answer, float(seconds))
        except ConflictError as error:
            raise RefusalError(409, str(error)) from error
        return {"saved": task.id}

    def _check_consistent(self, name: str, task: Task, answer: Mapping[str, Any]) -> None:
        """RefusalError for a ranking that contradicts the annotator's own points of the same images."""
        if "ranks" not in answer or task.visit:
            return
        overall = {
            (self.items[one.item].prompt, self.items[one.item].images[0].id): one.answer["overall"]
            for one in self.storage.answers(name)
            if not one.visit and "overall" in one.answer
        }
        known = [overall.get((task.item.prompt, image)) for image in task.item.image_ids]
        wrong = contradictions(answer["ranks"], known)
        if wrong:
            shown = {place: number for number, place in enumerate(task.order, 1)}
            i, j = wrong[0]
            raise RefusalError(
                400,
                f"image {shown[i]} has {known[i]} points overall and image {shown[j]} has {known[j]}, but it is placed"
                " before it; change the order, or go back and change the points",
            )

    def review(self, person: Person, state: str, at: int) -> dict[str, Any]:
        """Return the answer at a place among those of a state, of first and second visits, as an inspector sees it."""
        _inspector(person)
        answers = [one for one in self.storage.answers() if one.annotator != person.name]
        counts = {
            name: sum(one.state == name for one in answers) for name in ("given", "accepted", "returned")
        }
        some = [one for one in answers if one.state == state]
        about: dict[str, Any] = {"name": person.name, "counts": counts, "total": len(some)}
        if not some:
            return about | {"at": 0, "entry": None}
        at = max(0, min(at, len(some) - 1))
        one, item = some[at], self.items[some[at].item]
        entry = {
            "id": [one.annotator, one.item, one.visit, one.revision],
            "annotator": one.annotator, "kind": item.kind, "prompt": item.prompt, "images": item.image_ids,
            "answer": outside(item, one.answer), "seconds": one.seconds, "visit": one.visit, "note": one.note,
        }  # fmt: skip
        ahead = [
            image for later in some[at + 1 : at + 1 + AHEAD] for image in self.items[later.item].image_ids
        ]
        return about | {"at": at, "entry": entry, "ahead": ahead}

    def judge(self, person: Person, body: Mapping[str, Any]) -> dict[str, Any]:
        """Accept an answer, or send it back with a note."""
        _inspector(person)
        identity, verdict, note = body.get("id"), body.get("verdict"), body.get("note", "")
        states: dict[object, State] = {"accept": "accepted", "return": "returned"}
        if verdict not in states or not isinstance(note, str) or len(note) > MAX_NOTE:
            raise RefusalError(
                400, f"a verdict is accept or return, with a note of at most {MAX_NOTE} letters"
            )
        kinds = [type(part) for part in identity] if isinstance(identity, list) else []
        if kinds != [str, str, int, int] or not isinstance(identity, list):
            raise RefusalError(400, "the answer is not named")
        annotator, item, visit, revision = identity
        if annotator == person.name:
            raise RefusalError(403, "your own answers are for another inspector")
        try:
            self.storage.judge(
                annotator,
                item,
                visit,
                revision,
                state=states[verdict],
                note=note.strip(),
                inspector=person.name,
            )
        except (ConflictError, OverflowError) as error:
            raise RefusalError(409, str(error)) from error
        return {"saved": identity}

    def found(self, person: Person | None = None) -> dict[str, Any]:
        """Return the statistics of the study as it is now."""
        if person is not None:
            _inspector(person)
        inspectors = [name for name, role in self.storage.people().items() if role == "inspector"]
        return statistics.summary(self.items, self.storage.answers(), inspectors, self.raters)

    def export(self) -> dict[str, int]:
        """Write what training reads, and the statistics."""
        with self._results:
            counts = results.write_results(self.folder, self.items, self.storage.answers(), self.selection)
            text = json.dumps(json_value(self.found()), indent=1)
            write_text(self.folder / "statistics.json", text + "\n")
        return counts

    def _answers(self, name: str) -> dict[tuple[str, int], Answer]:
        return {(one.item, one.visit): one for one in self.storage.answers(name)}


def outside(item: Item, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored answer as a page has it: ranks by image."""
    if "ranks" not in answer:
        return dict(answer)
    return {"ranks": dict(zip(item.image_ids, answer["ranks"], strict=True))}


def _key(task: Task) -> tuple[str, int]:
    return task.item.id, task.visit


def _shown(task: Task) -> list[str]:
    return [task.item.images[place].id for place in task.order]


def _inspector(person: Person) -> None:
    if person.role != "inspector":
        raise RefusalError(403, "this is for inspectors")
