"""Shares of prompts: even at the start; whoever joins takes over what nobody has begun, and no answer is lost by it."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from annotated import answer_of
from data_build.annotation_service import RefusalError, Service
from preftune.annotation.assignment import repeated, shared_out
from preftune.annotation.items import Item, Picture, Settings, item_of
from preftune.annotation.storage import Storage

Key = tuple[str, str, int]
"""Annotator, item, visit."""
NAMES = ["ann", "bob", "cem", "dan", "eva", "fay"]


def prompts(number: int, images: int = 2) -> list[Item]:
    """Items of each prompt: a choice, and for every third one a prompt to describe, too."""
    found = []
    for at in range(number):
        pictures = [Picture(file=f"images/{at}_{k}.png", group="g") for k in range(images)]
        found.append(item_of("choice", f"prompt {at}", pictures))
        if at % 3 == 0:
            found.append(item_of("prompt", f"prompt {at}", []))
    return found


def sizes(shares: dict[str, list[str]]) -> Counter[str]:
    return Counter(name for names in shares.values() for name in names)


class Study:
    """A study whose server is started again each time somebody joins."""

    def __init__(
        self, place: Path | Storage, items: list[Item], number: int | None, repeats: float, seed: int
    ) -> None:
        self.storage = place if isinstance(place, Storage) else Storage(place)
        self.storage._database.execute("PRAGMA synchronous = OFF")  # nothing is killed here
        self.items = items
        self.settings = Settings(
            tasks=("prompt", "choice"), data=(), seed=seed, repeats=repeats, annotators_per_item=number, choice_ties=False, raters=()
        )  # fmt: skip
        self.service = self.started()

    def started(self) -> Service:
        self.service = Service(Path("study"), self.settings, self.items, self.storage)
        return self.service

    def join(self, *names: str) -> None:
        self.storage.add_people(names, "annotator")
        self.started()

    def person(self, name: str) -> Any:
        return next(person for person, _ in self.service.links() if person.name == name)

    def task(self, name: str) -> dict[str, Any]:
        return self.service.task(self.person(name))

    def send(self, name: str, task: dict[str, Any]) -> None:
        self.service.save(self.person(name), {"task": task["task"], "answer": answer_of(task), "seconds": 1})

    def keys(self, name: str) -> set[tuple[str, int]]:
        return {(task.item.id, task.visit) for task in self.service.tasks(name)}

    def holders(self) -> dict[str, set[str]]:
        """Item -> annotators who are asked about it."""
        found: dict[str, set[str]] = {item.id: set() for item in self.items}
        for name in self.storage.people():
            for identity, _ in self.keys(name):
                found[identity].add(name)
        return found


@pytest.mark.parametrize("people", range(1, 6))
@pytest.mark.parametrize("number", [1, 2, 3])
def test_shares_are_even_at_the_start(people: int, number: int) -> None:
    """15 prompts of one item: nobody has two more than another; everyone has all where there are too few."""
    names = NAMES[:people]
    for seed in range(20):
        found = shared_out(dict.fromkeys(map(str, range(15)), 1), names, number, seed, held={}, begun={})
        counts = sizes(found)
        assert max(counts.values()) - min(counts[name] for name in names) <= 1, counts
        assert {len(set(who)) for who in found.values()} == {min(number, people)}
    assert (
        len({str(shared_out({"a": 1, "b": 1}, names, 1, seed, held={}, begun={})) for seed in range(9)}) > 1
        or people == 1
    )


def test_prompts_with_many_items_weigh_more() -> None:
    """Shares differ by no more than the items of one prompt."""
    weights = {f"p{at}": 1 + at % 7 for at in range(40)}
    found = shared_out(weights, NAMES, 2, 1, held={}, begun={})
    work = Counter[str]()
    for prompt, names in found.items():
        for name in names:
            work[name] += weights[prompt]
    assert max(work.values()) - min(work.values()) <= 7, work


def test_who_joins_takes_over_what_is_not_begun_from_those_with_most_left() -> None:
    """30 prompts for one annotator each; ann has begun 12 of 15 and bob 2: cem gets nothing of what they began."""
    prompts = dict.fromkeys(map(str, range(30)), 1)
    before = shared_out(prompts, ["ann", "bob"], 1, 5, held={}, begun={})
    shares = {name: [one for one in prompts if name in before[one]] for name in ("ann", "bob")}
    begun = {("ann", one): 1 for one in shares["ann"][:12]} | {("bob", one): 1 for one in shares["bob"][:2]}
    after = shared_out(prompts, ["ann", "bob", "cem"], 1, 5, held=before, begun=begun)
    moved = [one for one in prompts if before[one] != after[one]]
    assert all(before[one] == ["bob"] and after[one] == ["cem"] for one in moved), "ann has 3 left, bob 13"
    assert len(moved) == 6, "bob keeps 7 that are open"
    assert not {("bob", one) for one in moved} & begun.keys()
    again = shared_out(prompts, ["ann", "bob", "cem"], 1, 5, held=after, begun=begun | {("cem", moved[0]): 1})
    assert again == after, "a restart moves nothing"


def test_what_comes_again_and_was_begun_stays() -> None:
    items = prompts(40)
    first = {item.id for _, item in repeated(items, "ann", 0.1, 1)}
    other = [item for item in items if item.id not in first][-1]
    found = [item.id for _, item in repeated(items, "ann", 0.1, 1, {other.id})]
    assert other.id in found
    assert len(found) == len(first)
    assert [item.id for _, item in repeated(items, "ann", 0, 1, {other.id})] == [other.id]


def test_nothing_to_do_is_said_and_is_no_thanks(tmp_path: Path) -> None:
    study = Study(tmp_path, prompts(2), 1, 0, 1)
    study.join("ann")
    while not (task := study.task("ann")).get("finished"):
        study.send("ann", task)
    assert task["why"] == ""
    study.join("bob")
    said = study.task("bob")
    assert said["why"] == "All items have their 1 annotator; there is nothing for you yet."
    assert (said["total"], said["finished"]) == (0, True)
    assert study.service.task(study.person("bob"), 0) == said, "whatever place is asked for"


def test_who_joins_takes_from_who_has_most_left_to_answer(tmp_path: Path) -> None:
    """ann has answered 9 of her 10 prompts and bob none of his: all that cem gets was bob's, half of it."""
    items = [item for item in prompts(20) if item.kind == "choice"]
    study = Study(tmp_path, items, 1, 0, 1)
    study.join("ann", "bob")
    hers, his = study.keys("ann"), study.keys("bob")
    assert len(hers) == len(his) == 10
    for _ in range(9):
        study.send("ann", study.task("ann"))
    study.join("cem")
    assert study.keys("ann") == hers
    assert study.keys("cem") == his - study.keys("bob")
    assert len(study.keys("cem")) == 5
    assert study.service.shares() == {"ann": (10, 0), "bob": (5, 0), "cem": (5, 0)}


def test_an_older_study_without_shares_goes_on(tmp_path: Path) -> None:
    """Answers that are there keep their prompts with those who gave them, even two of one prompt."""
    items = prompts(9)
    storage = Storage(tmp_path)
    storage.add_people(["ann", "bob"], "annotator")
    for name, at in (("ann", 0), ("bob", 0), ("bob", 2), ("bob", 3)):
        storage.save(name, items[at].id, 0, {"ranks": [1, 2]}, 1.0)
    storage.close()
    study = Study(tmp_path, items, 1, 0, 1)
    holders = study.holders()
    assert holders[items[0].id] == {"ann", "bob"}
    assert holders[items[2].id] == holders[items[3].id] == {"bob"}
    assert all(
        len(names) == 1 for identity, names in holders.items() if identity not in (items[0].id, items[1].id)
    )


def test_without_a_number_everyone_gets_everything(tmp_path: Path) -> None:
    study = Study(tmp_path, prompts(5), None, 0, 1)
    study.join("ann", "bob")
    assert all(names == {"ann", "bob"} for names in study.holders().values())
    study.task("ann")
    assert not study.storage.begun()


class Course:
    """A random course of a study, checked at each step."""

    def __init__(self, storage: Storage, seed: int) -> None:
        self.rng = random.Random(seed)
        self.number, self.waiting = self.rng.randint(1, 3), NAMES[:]
        items = prompts(self.rng.randint(1, 12))
        self.study = Study(storage, items, self.number, self.rng.choice([0, 0.1, 0.5]), seed)
        self.open_pages: dict[str, dict[str, Any]] = {}
        self.sent, self.returned = set[Key](), set[Key]()

    def check(self) -> None:
        stored = {(one.annotator, one.item, one.visit): one for one in self.study.storage.answers()}
        assert stored.keys() == self.sent, "no answer is lost, none is invented"
        assert {key for key, one in stored.items() if one.state == "returned"} == self.returned
        people = self.study.storage.people()
        asked = {(name, *key) for name in people for key in self.study.keys(name)}
        assert self.sent <= asked, "each is still asked of its author"
        for names in self.study.holders().values():
            assert len(names) == min(self.number, len(people)), "none too many, none too few"

    def send(self, name: str, task: dict[str, Any]) -> None:
        self.study.send(name, task)  # a page that was open while somebody joined, perhaps: never refused
        found = next(one for one in self.study.service.tasks(name) if one.id == task["task"])
        self.sent.add((name, found.item.id, found.visit))
        self.returned.discard((name, found.item.id, found.visit))

    def join(self) -> None:
        count = min(self.rng.randint(1, 2), len(self.waiting))
        self.study.join(*(self.waiting.pop(0) for _ in range(count)))
        self.check()

    def send_back(self) -> None:
        name, item, visit = self.rng.choice(sorted(self.sent))
        answers = self.study.storage.answers(name)
        one = next(one for one in answers if (one.item, one.visit) == (item, visit))
        self.study.storage.judge(name, item, visit, one.revision, state="returned", note="x", inspector="i")
        self.returned.add((name, item, visit))
        assert self.study.task(name)["note"] == "x", "it is asked about first"

    def work(self) -> None:
        name = self.rng.choice([*self.study.storage.people()])
        task = self.open_pages.pop(name, None) or self.study.task(name)
        if task.get("finished"):
            assert bool(task["why"]) == (not self.study.keys(name))
        elif self.rng.random() < 0.3:
            self.open_pages[name] = task
        else:
            self.send(name, task)

    def finish(self) -> None:
        """Send what is open, and answer everything."""
        self.check()
        for name, task in self.open_pages.items():
            self.send(name, task)
        for name in self.study.storage.people():
            while not (task := self.study.task(name)).get("finished"):
                self.send(name, task)
        self.check()
        voters = Counter(item for _, item, visit in self.sent if not visit)
        everyone = min(self.number, len(self.study.storage.people()))
        assert voters == {item.id: everyone for item in self.study.items}, "all are answered"
        assert not self.returned


def sequence(storage: Storage, seed: int) -> int:
    """Run a course in an empty database; how many answers it has at the end."""
    for table in ("people", "answers", "history", "shares", "begun"):
        storage._database.execute(f"DELETE FROM {table}")
    course = Course(storage, seed)
    course.join()
    for _ in range(course.rng.randint(5, 40)):
        act = course.rng.random()
        if act < 0.12 and course.waiting:
            course.join()
        elif act < 0.15:
            before = course.study.holders()
            course.study.started()
            assert course.study.holders() == before, "a restart moves nothing"
        elif act < 0.3 and course.sent:
            course.send_back()
        else:
            course.work()
    course.finish()
    return len(course.sent)


@pytest.mark.parametrize("part", range(10))
def test_whatever_happens_no_answer_is_lost(tmp_path: Path, part: int) -> None:
    """500 random courses: people join, answer, leave a page open, are sent back; the server is started again and again."""
    storage = Storage(tmp_path)
    assert sum(sequence(storage, seed) for seed in range(50 * part, 50 * (part + 1))) > 500


def test_another_persons_prompt_is_refused(tmp_path: Path) -> None:
    study = Study(tmp_path, prompts(6), 1, 0, 1)
    study.join("ann", "bob")
    with pytest.raises(RefusalError, match="no task of yours"):
        study.send("bob", study.task("ann"))
