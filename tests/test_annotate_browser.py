"""The pages in a real browser, with its own mouse and keyboard: nothing is lost or doubled, whatever is reloaded or killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from annotated import Served, images
from browser import Browser, Tab
from preftune.annotation.items import Item, read_study
from preftune.annotation.storage import Answer, Storage
from preftune.records import read_rankings

PROMPTS = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "two blue stars\nin a row, 'quoted' & \"so\"",
]
PLACES = "[...document.querySelectorAll('.place')].map((one) => [...one.querySelectorAll('[data-image]')].map((i) => i.dataset.image))"

CHECKED = "document.querySelectorAll('input[type=radio]:checked').length"
BOXES = "[...document.querySelectorAll('input[type=checkbox]:checked')].map((box) => box.name).join()"


def wait_for(tab: Tab, places: list[list[int]]) -> None:
    """Wait until the order is this one: keys and mouse take their time to reach the page."""
    wanted = json.dumps([[str(image) for image in place] for place in places])
    tab.until(f"JSON.stringify({PLACES}) === JSON.stringify({wanted})")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


def answers_of(folder: Path) -> tuple[dict[str, Item], list[Answer]]:
    storage = Storage(folder / "study")
    found = storage.answers()
    storage.close()
    return {item.id: item for item in read_study(folder / "study")[1]}, found


def shown_images(tab: Tab) -> list[str]:
    """The ids of the images in the order in which they are shown."""
    found: list[str] = tab.run(
        "[...document.querySelectorAll('#work figure img')].map((image) => image.src.split('/').at(-1))"
    )
    return found


def next_task(tab: Tab, task: str) -> str:
    """Wait until the page shows another task."""
    tab.until(f"document.body.dataset.task !== {json.dumps(task)}")
    return tab.task()


def fill(tab: Tab, by: str, *, until: int = 9) -> dict[str, Any]:
    """Fill in the task that is shown, up to a number of presses; what its answer says then."""
    kind = tab.run("document.body.dataset.kind")
    if kind == "prompt":
        if by == "keys":
            tab.keys("l", "2", "5")
        else:
            tab.click("input[value='World Knowledge']")
            tab.click("input[name='sexual']")
            tab.click("input[name='personal']")
        tab.until(f"{CHECKED} === 1 && {BOXES} === 'sexual,personal'")
        return {"category": "World Knowledge", "problems": ["sexual", "personal"]}
    if kind == "rating":
        points = {"alignment": 2, "fidelity": 7, "harmlessness": 1, "overall": 4}
        if by == "keys":
            tab.keys(
                *[str(value) for value in points.values()][:until], *["b", "c", "b"][: max(0, until - 4)]
            )
        else:
            for axis, value in [*points.items()][:until]:
                tab.click(f"input[name='{axis}'][value='{value}']")
            if until > 4:
                tab.click("input[name='blurred']")
        tab.until(f"{CHECKED} === {min(until, 4)}")
        if until > 4:
            tab.until(f"{BOXES} === 'blurred'")
        return points | {"problems": ["blurred"]}
    shown = shown_images(tab)
    if by == "keys":  # 3, then 1 and 4, then 2; with detours
        tab.keys("3", "2", "Backspace", "1", "=", "4", "2", "2", "ArrowUp", "ArrowDown")
    else:
        tab.click("figure[data-image='0']")
        tab.click("figure[data-image='1']")
        tab.drag("figure[data-image='2']", "[data-gap='0']")
        tab.drag("figure[data-image='3']", "[data-place='1']")
        wait_for(tab, [[2], [0, 3], [1]])
    return {"ranks": dict(zip(shown, [2, 3, 1, 2], strict=True))}


def submit(tab: Tab, by: str) -> None:
    if by == "keys":
        tab.keys("Enter")
    else:
        tab.click("#send")


def quiet(tab: Tab, port: int) -> None:
    """The window asked this server alone, and no script of data ran or complained."""
    assert not [one for one in tab.requests() if not one.startswith(f"http://127.0.0.1:{port}/")]
    noise = [
        one for one in tab.messages() if "ERR_CONNECTION" not in one and "Failed to load resource" not in one
    ]
    assert not noise


def test_three_stages_by_mouse_and_keys(browser: Browser, tmp_path: Path) -> None:
    """Two annotators at once, item by item, one by keys, one by mouse, 12 items each: a reload in the middle of an item, and a
    server that is killed and started again while an answer is sent.
    """
    data = images(tmp_path / "base", PROMPTS, 4)
    words = ("--data", data, "--tasks", "prompt", "rating", "ranking", "--annotators", "ann", "bob", "--repeats", "0", "--output-dir", tmp_path / "study")  # fmt: skip
    web = Served(*words)
    by = {"ann": "keys", "bob": "mouse"}
    tabs = {name: browser.open(name, web.links[name]) for name in by}
    given: dict[tuple[str, str], tuple[str, list[str], dict[str, Any]]] = {}
    for at in range(12):
        for name, tab in tabs.items():
            task = tab.task()
            assert f"{at} of 12" in tab.text()
            prompt, shown = tab.run("document.getElementById('prompt').textContent"), shown_images(tab)
            assert prompt in PROMPTS
            if at == 3:  # a rating, all of which is in the window
                assert tab.run(
                    "document.getElementById('send').getBoundingClientRect().bottom <= innerHeight"
                )
                fill(tab, by[name], until=2)
                tab.until(f"{CHECKED} === 2")
                tab.reload()
                assert tab.task() == task
                assert tab.run(CHECKED) == 2, "kept over a reload"
            given[name, task] = (prompt, shown, fill(tab, by[name]))
            if at == 8 and name == "ann":
                web.kill()
                submit(tab, by[name])
                tab.until("document.getElementById('status').textContent.startsWith('Not saved yet')")
                web = Served(*words, port=web.port)
            else:
                submit(tab, by[name])
            if at < 11:
                next_task(tab, task)
            else:
                tab.until("document.body.dataset.kind === 'finished'")
    for tab in tabs.values():
        assert "That was all" in tab.text()
        quiet(tab, web.port)
    web.kill()
    items, answers = answers_of(tmp_path)
    assert len(answers) == 24
    assert {one.revision for one in answers} == {1}
    assert all(0 < one.seconds < 120 for one in answers)
    expected = {
        name: [(prompt, answer) for (who, _), (prompt, shown, answer) in given.items() if who == name]
        for name in by
    }
    for name in by:
        stored = [
            (items[one.item].prompt, readable(items[one.item], one.answer))
            for one in answers
            if one.annotator == name
        ]
        assert sorted(stored, key=str) == sorted(((p, readable(None, a)) for p, a in expected[name]), key=str)


def readable(item: Item | None, answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with its ranks by image, in one order."""
    if "ranks" not in answer:
        return dict(sorted(answer.items()))
    ranks = answer["ranks"] if item is None else dict(zip(item.image_ids, answer["ranks"], strict=True))
    return {"ranks": dict(sorted(ranks.items()))}


def test_choices_inspection_and_statistics(browser: Browser, tmp_path: Path) -> None:
    """12 choices by keys and by mouse, left open, skipped, changed afterwards; an inspector sends one back; the results."""
    prompts = [f"prompt {at}" for at in range(12)]
    data = [
        f"{name}={images(tmp_path / name, prompts, 1, shade)}" for shade, name in enumerate(("base", "tuned"))
    ]
    words = ("--data", *data, "--tasks", "choice", "--choice-ties", "--annotators", "ann", "--inspectors", "eve", "--repeats", "0", "--output-dir", tmp_path / "study")  # fmt: skip
    with Served(*words) as web:
        ann = browser.open("chooser", web.links["ann"])
        wanted: dict[str, dict[str, int]] = {}
        for at in range(12):
            task, shown = ann.task(), shown_images(ann)
            prompt = ann.run("document.getElementById('prompt').textContent")
            left, right = {shown[0]: 1, shown[1]: 2}, {shown[0]: 2, shown[1]: 1}
            if at == 0:
                ann.keys("0")
                wanted[prompt] = dict.fromkeys(shown, 1)
            elif at == 1:
                ann.keys("Delete")
                ann.until("document.querySelector('#skips[open] button') !== null")
                ann.click("[data-skip='unable']")
                wanted[prompt] = {}
            elif at % 2:
                ann.keys("1" if at % 4 == 1 else "ArrowLeft")
                wanted[prompt] = left
            elif at == 6:
                ann.keys("ArrowRight")
                next_task(ann, task)
                ann.keys("PageUp")
                ann.until(f"document.body.dataset.task === {json.dumps(task)}")
                ann.until("document.querySelector('figure.chosen')?.dataset.image === '1'")
                ann.keys("1")
                wanted[prompt] = left
            else:
                ann.click("figure[data-image='1'] button.image")
                wanted[prompt] = right
            if at < 11:
                ann.until(f"document.getElementById('count').textContent === '{at + 1} of 12'")
                ann.until(f"document.body.dataset.task !== {json.dumps(task)}")
        ann.until("document.body.dataset.kind === 'finished'")
        eve = browser.open("inspector", web.links["eve"])
        eve.until("document.body.dataset.entry")
        assert "To inspect (12)" in eve.text()
        eve.keys("r")
        eve.until("document.activeElement.id === 'note'")
        eve.type("look again")
        eve.keys("Escape", "r")
        eve.until("document.getElementById('status').textContent === 'Sent back.'")
        for left_over in range(11, 0, -1):
            eve.until(
                f"document.querySelector('[data-state=given]').textContent === 'To inspect ({left_over})'"
            )
            eve.keys("a") if left_over % 2 else eve.click("#accept")
        eve.until("document.getElementById('place').textContent === 'nothing here'")
        ann.reload()
        ann.until("document.getElementById('note').textContent.endsWith('look again')")
        prompt, shown = ann.run("document.getElementById('prompt').textContent"), shown_images(ann)
        ann.keys("2")
        ann.until("document.body.dataset.kind === 'finished'")
        wanted[prompt] = {shown[0]: 2, shown[1]: 1}
        eve.click("#export")
        eve.until("document.getElementById('status').textContent.startsWith('rankings.jsonl')")
        statistics = browser.open("inspector", web.links["eve"] + "statistics")
        assert "tuned" in statistics.text()
        for width in (1280, 400):
            narrow = browser.open("statistics", web.links["eve"] + "statistics", (width, 800))
            assert narrow.run("document.documentElement.scrollWidth <= innerWidth"), width
            tables = "[...document.querySelectorAll('.table')]"
            assert narrow.run(
                f"{tables}.length > 2 && {tables}.every((one) => one.scrollWidth <= one.clientWidth)"
            ), width
        for tab in (ann, eve):
            quiet(tab, web.port)
    items, answers = answers_of(tmp_path)
    found = {
        items[one.item].prompt: {} if "skip" in one.answer else readable(items[one.item], one.answer)["ranks"]
        for one in answers
    }
    assert found == {prompt: dict(sorted(ranks.items())) for prompt, ranks in wanted.items()}
    assert sorted(one.state for one in answers) == ["accepted"] * 11 + ["given"]
    assert len(read_rankings(tmp_path / "study")) == sum(map(bool, wanted.values()))


def test_somebody_joins_in_the_middle(browser: Browser, tmp_path: Path) -> None:
    """One annotator for each prompt: a page that is open keeps its item; who comes when all is begun is told so, not thanked."""
    data = images(tmp_path / "base", [f"prompt {at}" for at in range(5)], 2)
    words = ("--data", data, "--tasks", "choice", "--annotators", "ann", "--annotators-per-item", "1", "--repeats", "0", "--output-dir", tmp_path / "study")  # fmt: skip
    with Served(*words) as web:
        ann = browser.open("early", web.links["ann"])
        shown = ann.task()
        port = web.port
    for name, left, count in (("bob", 3, 2), ("cem", 0, 0)):
        with Served("--annotators", name, "--output-dir", tmp_path / "study", port=port) as web:
            joined = browser.open(f"late {name}", web.links[name])
            joined.task()
            if count:
                assert f"0 of {count}" in joined.text()
                ann.keys("1")
                next_task(ann, shown)
                for done in range(1, left):
                    ann.until(f"document.getElementById('count').textContent === '{done} of {left}'")
                    ann.keys("1")
                ann.until("document.body.dataset.kind === 'finished'")
                assert "That was all. Thank you!" in ann.text()
                for done in range(count):
                    joined.until(f"document.getElementById('count').textContent === '{done} of {count}'")
                    joined.keys("2")
                joined.until("document.body.dataset.kind === 'finished'")
            else:
                assert "All items have their 1 annotator; there is nothing for you yet." in joined.text()
                assert "Thank you" not in joined.text()
                assert "0 of" not in joined.text()
    items, answers = answers_of(tmp_path)
    assert sorted(one.item for one in answers) == sorted(items)


def test_a_choice_by_mouse_after_a_ranking(browser: Browser, tmp_path: Path) -> None:
    """What a ranking listens to ends with it: the mouse chooses an image of the next task."""
    data = [f"{name}={images(tmp_path / name, PROMPTS, 1, shade)}" for shade, name in enumerate(("a", "b"))]
    words = ("--data", *data, "--tasks", "ranking", "choice", "--annotators", "ann", "--repeats", "0", "--output-dir", tmp_path / "study")  # fmt: skip
    kinds = []
    with Served(*words) as web:
        tab = browser.open("mixed", web.links["ann"])
        while (task := tab.task()) and (kind := tab.run("document.body.dataset.kind")) != "finished":
            kinds.append(kind)
            if kind == "ranking":
                tab.click("figure[data-image='1']")
                tab.click("figure[data-image='0']")
                wait_for(tab, [[1], [0]])
                tab.click("#send")
            else:
                tab.click("figure[data-image='1'] button.image")
            next_task(tab, task)
    assert sorted(kinds) == ["choice", "choice", "ranking", "ranking"]
    assert "choice" in kinds[kinds.index("ranking") :]
    assert [sorted(one.answer["ranks"]) for one in answers_of(tmp_path)[1]] == [[1, 2]] * 4


def test_an_order_by_every_key(browser: Browser, tmp_path: Path) -> None:
    """Moves, ties and taking out by keys and by mouse, step by step; an unfinished order is not sent."""
    data = images(tmp_path / "base", PROMPTS[1:], 5)
    with Served("--data", data, "--annotators", "ann", "--output-dir", tmp_path / "study") as web:
        tab = browser.open("order", web.links["ann"])
        tab.task()
        steps: list[tuple[list[str], list[list[int]]]] = [
            (["3"], [[2]]),
            (["1"], [[2], [0]]),
            (["=", "5"], [[2], [0, 4]]),
            (["9", "0", "x"], [[2], [0, 4]]),
            (["5", "ArrowUp"], [[2], [4], [0]]),
            (["ArrowUp"], [[4], [2], [0]]),
            (["ArrowUp"], [[4], [2], [0]]),
            (["ArrowDown"], [[2], [4], [0]]),
            (["="], [[2, 4], [0]]),
            (["ArrowDown"], [[2], [4], [0]]),
            (["Backspace"], [[2], [0]]),
            (["2"], [[2], [0], [1]]),
        ]
        for keys, places in steps:
            tab.keys(*keys)
            wait_for(tab, places)
        tab.keys("Enter")
        tab.until("document.body.innerText.includes('2 of 5 images have no place yet.')")
        tab.drag("#order [data-image='1']", "figure[data-image='4']")
        wait_for(tab, [[2], [0]])  # dragged back to the images: taken out
        tab.drag("#order [data-image='0']", "[data-place='0']")
        wait_for(tab, [[2, 0]])
        tab.drag("#order [data-image='2']", "[data-gap='1']")
        wait_for(tab, [[0], [2]])
        tab.click("#order [data-image='2']")
        tab.until("document.querySelector('.thumbnail.selected')?.dataset.image === '2'")
        tab.click("figure[data-image='1'] .zoom")
        tab.until("document.getElementById('zoom').open")
        tab.keys("4")  # does nothing behind an enlarged image
        tab.keys("Escape")
        tab.until("!document.getElementById('zoom').open")
        wait_for(tab, [[0], [2]])
        tab.keys("2", "4", "5", "Enter")
        tab.until("document.body.dataset.kind === 'finished'")
        quiet(tab, web.port)
    (answer,) = answers_of(tmp_path)[1]
    assert sorted(answer.answer["ranks"]) == [1, 2, 3, 4, 5]
