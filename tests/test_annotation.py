"""Studies, orders, answers, storage and results of annotation, without HTTP."""

import json
import sqlite3
import threading
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from annotated import answer_of, config, images, service
from data_build import annotate
from data_build.annotation_service import RefusalError, Service
from data_build.annotation_study import read_raters
from preftune.annotation import assignment, items, storage, tasks
from preftune.annotation.items import Item, Picture, item_of, paired, parts, questions
from preftune.annotation.results import Selection, problems_of
from preftune.annotation.storage import ConflictError, Storage
from preftune.cli import parse
from preftune.records import read_imagefolder, read_rankings, write_jsonl
from preftune.training import labelled_pairs

PROMPTS = ["a red circle", "two blue stars", "a <b>cat</b>", "an owl, 'reading'"]


def picture(name: str, group: str = "g", **more: Any) -> Picture:
    return Picture(file=f"images/{name}.png", group=group, **more)


# ---------------------------------------------------------------- answers


def test_answers_are_checked() -> None:
    good = {"alignment": 1, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": ["violent", "body"]}
    assert tasks.read_answer("rating", ["a"], good, ties=False) == good | {"problems": ["body", "violent"]}
    assert tasks.read_answer("prompt", [], {"category": "Arts", "problems": []}, ties=False)
    assert tasks.read_answer("choice", ["a", "b"], {"ranks": {"b": 1, "a": 2}}, ties=False) == {
        "ranks": [2, 1]
    }
    assert tasks.read_answer("choice", ["a", "b"], {"ranks": {"b": 1, "a": 1}}, ties=True) == {
        "ranks": [1, 1]
    }
    assert tasks.read_answer("ranking", ["a", "b", "c"], {"ranks": {"b": 3, "a": 1, "c": 3}}, ties=False) == {
        "ranks": [1, 2, 2]
    }
    assert tasks.read_answer("ranking", ["a", "b"], {"skip": "unable", "ranks": 7}, ties=False) == {
        "skip": "unable"
    }


BAD: list[tuple[tasks.Kind, object]] = [
    ("rating", None),
    ("rating", []),
    ("rating", {}),
    ("rating", {"alignment": 8, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": []}),
    ("rating", {"alignment": True, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": []}),
    ("rating", {"alignment": 1.0, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": []}),
    ("rating", {"alignment": 1, "fidelity": 7, "harmlessness": 7, "overall": 3}),
    ("rating", {"alignment": 1, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": ["<script>"]}),
    ("rating", {"alignment": 1, "fidelity": 7, "harmlessness": 7, "overall": 3, "problems": [[]]}),
    ("prompt", {"category": "Cats", "problems": []}),
    ("prompt", {"category": ["Arts"], "problems": []}),
    ("prompt", {"category": "Arts", "problems": "sexual"}),
    ("choice", {"ranks": {"a": 1, "b": 1}}),
    ("choice", {"ranks": {"a": 1}}),
    ("choice", {"ranks": {"a": 1, "b": 2, "c": 1}}),
    ("choice", {"ranks": {"a": 0, "b": 2}}),
    ("choice", {"ranks": {"a": 1, "b": 3}}),
    ("choice", {"ranks": {"a": 1, "b": "2"}}),
    ("choice", {"ranks": [1, 2]}),
    ("choice", {"skip": "boring"}),
    ("choice", {"skip": {}}),
]


@pytest.mark.parametrize(("kind", "answer"), BAD)
def test_what_is_no_answer_is_refused(kind: tasks.Kind, answer: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        tasks.read_answer(kind, ["a", "b"], answer, ties=False)


def test_contradictions_by_hand() -> None:
    """Image 0 first, 1 and 2 tied behind it; points 3, 5 and none."""
    assert tasks.contradictions([1, 2, 2], [3, 5, None]) == [(0, 1)]
    assert tasks.contradictions([1, 2, 2], [5, 5, 5]) == []
    assert tasks.contradictions([1, 1], [2, 5]) == []


# ---------------------------------------------------------------- items


def test_questions_of_two_models() -> None:
    one = [picture("a0", "base", seed=2), picture("a1", "base", seed=1)]
    other = [picture("b0", "tuned", seed=1), picture("b1", "tuned", seed=2), picture("b2", "tuned", seed=3)]
    found = list(questions({"p": [*one, *other]}, ("prompt", "rating", "ranking", "choice")))
    assert Counter(item.kind for item in found) == {"prompt": 1, "rating": 5, "ranking": 1, "choice": 2}
    pairs = [item.image_ids for item in found if item.kind == "choice"]
    assert pairs == [["a1", "b0"], ["a0", "b1"]], "the same seeds face each other"
    assert len({item.id for item in found}) == len(found)


def test_equal_images_are_not_compared() -> None:
    same = [picture("a", "base"), picture("a", "tuned")]
    assert not list(questions({"p": same}, ("ranking", "choice")))
    assert [item.kind for item in questions({"p": same}, ("rating",))] == ["rating"]
    twice = [picture("a"), picture("a"), picture("b")]
    assert [item.image_ids for item in questions({"p": twice}, ("ranking", "choice"))] == [
        ["a", "b"],
        ["a", "b"],
    ]


def test_a_single_folder_gives_all_pairs_and_rankings_of_nine() -> None:
    many = [picture(f"a{k:02d}") for k in range(20)]
    assert len(list(paired(many))) == 190
    assert [len(part) for part in parts(many, 9)] == [7, 7, 6]
    assert not list(parts(many[:1], 9))


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "base", PROMPTS, 2)
    annotate.study_of(config(tmp_path, data))
    path = tmp_path / "study" / items.ITEMS
    path.write_text(path.read_text().replace("red", "rad"))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        items.read_study(tmp_path / "study")


# ---------------------------------------------------------------- orders


def many_items(number: int, n: int = 3) -> list[Item]:
    return [
        item_of("ranking", f"prompt {at}", [picture(f"{at}_{k}") for k in range(n)]) for at in range(number)
    ]


def order_of(found: list[Item], name: str = "ann", **flags: Any) -> list[assignment.Task]:
    return assignment.tasks_of(found, name, "secret", **{"seed": 1, "repeats": 0.05} | flags)


def test_orders_are_each_annotators_own_and_stay() -> None:
    found = many_items(200)
    first, again, other = order_of(found), order_of(list(reversed(found))), order_of(found, "bob")
    assert first == again, "whatever the order of the items"
    assert [one.item for one in first if not one.visit] != [one.item for one in other if not one.visit]
    assert not {one.id for one in first} & {one.id for one in other}
    assert len({one.order for one in first}) == 6
    more = order_of([*found, *many_items(201)[200:]])
    kept = [one.item.id for one in more if not one.visit and one.item in found]
    assert kept == [one.item.id for one in first if not one.visit], "a new item moves no other"


def test_images_stand_everywhere_alike() -> None:
    """Each of three images is first in a third of 3000 items: 1000 +- 4 standard deviations of 26."""
    firsts = Counter(one.order[0] for one in order_of(many_items(3000), repeats=0))
    assert all(abs(count - 1000) < 104 for count in firsts.values()), firsts


def test_one_in_twenty_comes_again_later() -> None:
    found = order_of(many_items(200))
    places: dict[str, list[int]] = {}
    for at, one in enumerate(found):
        places.setdefault(one.item.id, []).append(at)
    twice = {identity: at for identity, at in places.items() if len(at) > 1}
    assert len(found) == 210
    assert len(twice) == 10
    for identity, (first, second) in twice.items():
        assert second - first >= assignment.GAP
        assert [found[at].visit for at in (first, second)] == [0, 1], identity
    assert any(found[first].order != found[second].order for first, second in twice.values())
    assert len(order_of(many_items(9))) == 9
    assert [one.visit for one in order_of(many_items(3), repeats=1)].count(1) == 3


def test_stages_of_a_prompt_stand_together() -> None:
    pictures = {f"p{at}": [picture(f"{at}{k}") for k in range(4)] for at in range(20)}
    found = order_of(list(questions(pictures, ("prompt", "rating", "ranking"))), repeats=0)
    for at in range(0, len(found), 6):
        part = found[at : at + 6]
        assert len({one.item.prompt for one in part}) == 1
        assert [one.item.kind for one in part] == ["prompt", *["rating"] * 4, "ranking"]


# ---------------------------------------------------------------- storage


def test_an_answer_is_stored_once(tmp_path: Path) -> None:
    found = Storage(tmp_path)
    assert found.save("ann", "i", 0, {"ranks": [1, 2]}, 3.0)
    assert not found.save("ann", "i", 0, {"ranks": [1, 2]}, 9.0), "sent again"
    assert found.save("ann", "i", 0, {"ranks": [2, 1]}, 4.0)
    assert found.save("ann", "i", 1, {"ranks": [2, 1]}, -4.0)
    assert found.save("bob", "i", 0, {"ranks": [2, 1]}, 1e9)
    one, two, three = found.answers()
    assert (one.answer, one.seconds, one.revision, one.state) == ({"ranks": [2, 1]}, 7.0, 2, "given")
    assert (two.seconds, three.seconds) == (0.0, storage.MAX_SECONDS)
    found.judge("ann", "i", 0, 2, state="returned", note="look again", inspector="eve")
    assert found.save("ann", "i", 0, {"ranks": [2, 1]}, 1.0), "the same once more is an answer"
    with pytest.raises(ConflictError, match="changed this answer"):
        found.judge("ann", "i", 0, 2, state="accepted", note="", inspector="eve")
    found.judge("ann", "i", 0, 3, state="accepted", note="", inspector="eve")
    assert not found.save("ann", "i", 0, {"ranks": [2, 1]}, 1.0)
    with pytest.raises(ConflictError, match="accepted"):
        found.save("ann", "i", 0, {"ranks": [1, 2]}, 1.0)
    found.close()
    again = Storage(tmp_path)
    assert again.secret == found.secret
    assert again.answers("ann")[0].revision == 3
    history = (
        sqlite3.connect(tmp_path / storage.FILE).execute("SELECT answer, state, note FROM history").fetchall()
    )
    assert history == [('{"ranks": [1, 2]}', "given", ""), ('{"ranks": [2, 1]}', "returned", "look again")]
    assert (tmp_path / storage.FILE).stat().st_mode & 0o077 == 0, "the secret is its owner's alone"


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    found = Storage(tmp_path)

    def work(name: str) -> None:
        for at in range(20):
            found.save(name, f"i{at % 10}", 0, {"ranks": [at // 10, 2]}, 1.0)

    threads = [threading.Thread(target=work, args=(f"a{at}",)) for at in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = found.answers()
    assert len(answers) == 100
    assert {(one.revision, one.seconds) for one in answers} == {(2, 2.0)}


def test_a_failed_commit_leaves_no_open_transaction(tmp_path: Path) -> None:
    found = Storage(tmp_path)
    with pytest.raises(sqlite3.IntegrityError), found._change() as change:
        change.execute("INSERT INTO answers (annotator, item, visit) VALUES ('a', 'b', 0)")
    assert found.save("a", "b", 0, {}, 1)


def test_a_name_has_one_role(tmp_path: Path) -> None:
    found = Storage(tmp_path)
    found.add_people(["ann"], "annotator")
    found.add_people(["ann"], "annotator")
    with pytest.raises(ValueError, match="ann is an annotator of this study already"):
        found.add_people(["ann"], "inspector")


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / storage.FILE).write_text("no database " * 100)
    with pytest.raises(ValueError, match=r"answers.sqlite cannot be used"):
        Storage(tmp_path)


# ---------------------------------------------------------------- the study, from folder to training


def person(found: Service, name: str) -> Any:
    return next(person for person, _ in found.links() if person.name == name)


def answer_everything(found: Service, name: str, best: Any = sorted) -> int:
    who, done = person(found, name), 0
    while not (task := found.task(who)).get("finished"):
        found.save(who, {"task": task["task"], "answer": answer_of(task, best), "seconds": 1})
        done += 1
    return done


def test_pages_say_nothing_of_where_images_are_from(tmp_path: Path) -> None:
    data = [
        f"{name}={images(tmp_path / name, PROMPTS, 2, shade)}" for shade, name in enumerate(("base", "tuned"))
    ]
    found = service(tmp_path, *data, tasks=("ranking", "choice"), repeats=0)
    seen = json.dumps(found.task(person(found, "ann")))
    assert "base" not in seen
    assert "tuned" not in seen
    assert "secret" not in seen.replace("secret_", "")
    assert ".png" not in seen
    answer_everything(found, "ann")
    assert "tuned" not in json.dumps(found.review(person(found, "eve"), "given", 0))


def test_results_are_what_training_reads(tmp_path: Path) -> None:
    data = images(tmp_path / "base", PROMPTS, 4)
    found = service(tmp_path, data, tasks=("prompt", "rating", "ranking", "choice"))
    expected = 4 + 16 + 4 + 24
    assert answer_everything(found, "ann") == expected + 1 + 1, "5 % of 16 and 24 come again, none of 4"
    counts = found.export()
    assert counts == {"rankings.jsonl": 28, "metadata.jsonl": 16, "answers.jsonl": expected + 2}
    folder = tmp_path / "study"
    rankings = read_rankings(folder)
    assert {len(ranking.paths) for ranking in rankings} == {2, 4}
    assert {ranking.source for ranking in rankings} == {"ann"}
    samples = read_imagefolder(folder)
    assert len(samples) == 16
    assert samples[0].extra["overall"] == 5
    pairs, _ = labelled_pairs.label(labelled_pairs.read([folder], [])[0], "majority", "drop")
    assert len(pairs) == 24
    assert all(pair.first.name < pair.second.name for pair in pairs), "sorted names were best first"
    rows = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    assert {image for row in rows for image in row["generations"]} <= {
        f"images/{path.name}" for path in (folder / "images").iterdir()
    }


def test_accepted_only(tmp_path: Path) -> None:
    found = service(tmp_path, images(tmp_path / "base", PROMPTS, 2), repeats=0)
    answer_everything(found, "ann")
    eve = person(found, "eve")
    found.selection = Selection(accepted_only=True)
    assert found.export()["rankings.jsonl"] == 0
    first, second = (found.review(eve, "given", at)["entry"]["id"] for at in (0, 1))
    found.judge(eve, {"id": first, "verdict": "accept"})
    found.judge(eve, {"id": second, "verdict": "return", "note": "why?"})
    assert found.export()["rankings.jsonl"] == 1
    found.selection = Selection()
    assert found.export()["rankings.jsonl"] == 3
    back = found.task(person(found, "ann"))
    assert (back["note"], back["done"], back["total"]) == ("why?", 3, 4)
    found.save(person(found, "ann"), {"task": back["task"], "answer": answer_of(back), "seconds": 1})
    assert found.task(person(found, "ann"))["finished"]
    assert found.review(eve, "given", 0)["counts"] == {"given": 3, "accepted": 1, "returned": 0}


def test_prompts_with_problems_are_left_out(tmp_path: Path) -> None:
    """Of four prompts one is marked sexual by ann, one personal and unclear by bob, one sexual by both."""
    data = images(tmp_path / "base", PROMPTS, 2)
    found = service(tmp_path, data, tasks=("prompt", "rating", "ranking"), repeats=0)
    marks = {
        "ann": {PROMPTS[0]: ["sexual"], PROMPTS[2]: ["sexual"]},
        "bob": {PROMPTS[1]: ["unclear", "personal"], PROMPTS[2]: ["sexual"]},
    }
    for name, own in marks.items():
        who = person(found, name)
        while not (task := found.task(who)).get("finished"):
            answer = answer_of(task)
            if task["kind"] == "prompt":
                answer["problems"] = own.get(task["prompt"], [])
            found.save(who, {"task": task["task"], "answer": answer, "seconds": 1})
    again = next(one for one in found.items.values() if one.kind == "prompt" and one.prompt == PROMPTS[3])
    found.storage.save("ann", again.id, 1, {"category": "Arts", "problems": ["violent", "sexual"]}, 1.0)
    assert found.export() == {"rankings.jsonl": 8, "metadata.jsonl": 8, "answers.jsonl": 33}
    found.selection = Selection(drop_problems=("sexual", "personal"))
    assert found.export() == {
        "rankings.jsonl": 2, "metadata.jsonl": 2, "answers.jsonl": 33,
        "prompts left out as sexual": 2, "prompts left out as personal": 1,
    }  # fmt: skip
    assert {ranking.prompt for ranking in read_rankings(tmp_path / "study")} == {PROMPTS[3]}
    found.selection = Selection(drop_problems=("violent", "unclear"))
    assert found.export()["rankings.jsonl"] == 6
    eve, at = person(found, "eve"), 0
    while (entry := found.review(eve, "given", at)["entry"])["answer"].get("problems") != [
        "unclear",
        "personal",
    ]:
        at += 1
    found.judge(eve, {"id": entry["id"], "verdict": "return", "note": "it is clear"})
    assert found.export()["rankings.jsonl"] == 8, "a mark that was sent back counts for nothing"
    assert problems_of(found.items, found.storage.answers()) == {
        PROMPTS[0]: {"sexual"}, PROMPTS[2]: {"sexual"}, PROMPTS[1]: set(), PROMPTS[3]: set(),
    }  # fmt: skip


def test_problems_have_one_list() -> None:
    assert [*tasks.PROMPT_PROBLEMS] == [*get_args(tasks.PromptProblem)]


def test_raters_of_other_folders(tmp_path: Path) -> None:
    """Votes of a source: by the bytes of images, and by the names that the study gives them; others are left out."""
    data = images(tmp_path / "base", PROMPTS[:2], 3)
    _, found = annotate.study_of(config(tmp_path, data))
    ids = [image.id for image in next(one for one in found if one.prompt == PROMPTS[0]).images]
    names = [path.name for path in sorted(data.glob("*.png"))]
    (data / "other.png").write_bytes(b"not of the study")
    rows = [
        {"prompt": PROMPTS[0], "generations": [names[0], "other.png", names[1]], "ranking": [2, 3, 1], "source": "judge"},
        {"prompt": PROMPTS[1], "generations": ["other.png", names[3]], "ranking": [1, 2], "source": "judge"},
        {"prompt": PROMPTS[0], "generations": names[:2], "ranking": [1, 1]},
    ]  # fmt: skip
    write_jsonl(data / "rankings.jsonl", rows)
    votes = read_raters([data], found)
    pair = (PROMPTS[0], *sorted(ids[:2]))
    second_is_better = 1 if ids[1] < ids[0] else -1
    assert votes == {"judge": {pair: second_is_better}, "base": {pair: 0}}
    own = tmp_path / "study"
    named = [{"prompt": PROMPTS[0], "generations": [f"images/{one}.png" for one in ids], "ranking": [1, 2, 3], "source": "x"}]  # fmt: skip
    write_jsonl(own / "rankings.jsonl", named)
    assert len(read_raters([own], found)["x"]) == 3
    write_jsonl(data / "rankings.jsonl", rows[1:2])
    with pytest.raises(ValueError, match=r"--raters-from .*base: none of its rankings is of two images"):
        read_raters([own, data], found)


def test_back_shows_the_answer_in_the_order_of_then(tmp_path: Path) -> None:
    found = service(tmp_path, images(tmp_path / "base", PROMPTS, 3), repeats=0)
    ann = person(found, "ann")
    first = found.task(ann)
    found.save(ann, {"task": first["task"], "answer": answer_of(first), "seconds": 1})
    again = found.task(ann, 0)
    assert again["images"] == first["images"]
    assert again["answer"] == answer_of(first)
    assert found.task(ann, 99)["at"] == 1, "not beyond the next one"


def test_an_order_that_contradicts_the_points_is_refused(tmp_path: Path) -> None:
    found = service(
        tmp_path, images(tmp_path / "base", PROMPTS[:1], 2), tasks=("rating", "ranking"), repeats=0
    )
    ann, points = person(found, "ann"), {}
    for overall in (3, 6):
        task = found.task(ann)
        points[task["images"][0]] = overall
        found.save(
            ann, {"task": task["task"], "answer": answer_of(task) | {"overall": overall}, "seconds": 1}
        )
    task = found.task(ann)
    better = sorted(points, key=lambda image: -points[image])
    with pytest.raises(RefusalError, match=r"image \d has 3 points overall and image \d has 6"):
        found.save(
            ann, {"task": task["task"], "answer": answer_of(task, lambda ids: better[::-1]), "seconds": 1}
        )
    found.save(ann, {"task": task["task"], "answer": answer_of(task, lambda ids: better), "seconds": 1})


# ---------------------------------------------------------------- the program


def test_flags_and_data_that_do_not_fit_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--tasks", "rating", "rating"], "each once"),
        (["--annotators", "ann", "--inspectors", "ann"], "ann is named twice"),
        (["--annotators", "../x"], "must have 1 to 40 letters"),
        (["--repeats", "2"], "--repeats must be in"),
        (["--annotators-per-item", "0"], "at least 1"),
        (["--port", "70000"], "--port must be"),
    ):
        with pytest.raises(SystemExit):
            parse(annotate.Config, ["--output-dir", "x", *words])
        assert said in capsys.readouterr().err
    data = images(tmp_path / "base", PROMPTS, 1)
    for flags, said in (
        ({"data": ("nowhere",)}, "there is no folder nowhere"),
        ({"data": ()}, "there is no study at"),
        ({"data": (str(data),)}, "nothing to ask: 4 prompts"),
        ({"data": (str(data), str(data))}, "two folders with the name base"),
        (
            {"data": (str(data),), "tasks": ("rating",), "raters": ("hpsv2",)},
            "hpsv2 is no column of scores in --data; there are none",
        ),
    ):
        with pytest.raises(SystemExit):
            annotate.main(annotate.Config(output_dir=tmp_path / "study", annotators=("ann",), **flags))
        assert said in capsys.readouterr().err
        assert not (tmp_path / "study").exists()


def test_another_study_in_the_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "base", PROMPTS, 2)
    annotate.main(config(tmp_path, data, serve=False))
    with pytest.raises(SystemExit):
        annotate.main(config(tmp_path, data, serve=False, seed=7))
    assert "holds a study with --seed 1, not --seed 7; leave --data and the flags" in capsys.readouterr().err
    for flags, said in (
        ({"seed": 7}, "--seed 1, not --seed 7"),
        ({"repeats": 0.5}, "--repeats 0.05, not --repeats 0.5"),
        ({"raters": ("hpsv2.1",)}, "--raters none, not --raters hpsv2.1"),
        ({"tasks": ("prompt", "ranking")}, "--tasks ranking, not --tasks prompt ranking"),
        ({"choice_ties": True}, "--no-choice-ties, not --choice-ties"),
    ):
        with pytest.raises(SystemExit):
            annotate.main(config(tmp_path, serve=False, **flags))
        assert f"holds a study with {said};" in capsys.readouterr().err, "without --data, too"
    annotate.main(config(tmp_path, serve=False))
    with pytest.raises(SystemExit):
        annotate.main(config(tmp_path, serve=False, drop_problems=("sexual",)))
    assert (
        "--drop-problems needs answers of the task prompt, and this study has ranking"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        annotate.main(annotate.Config(output_dir=data, data=(str(data),)))
    assert "exists already and is no study" in capsys.readouterr().err


def test_broken_images_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "base", PROMPTS, 3)
    names = sorted(path.name for path in data.glob("*.png"))
    (data / names[0]).write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 64)
    (data / names[1]).write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    Image.new("RGB", (20, 20)).save(data / names[2], format="TIFF")
    _, found = annotate.study_of(config(tmp_path, data, tasks=("rating",)))
    assert len(found) == 10
    assert "2 images set aside; the first: cannot read the image" in capsys.readouterr().err
    kept = list((tmp_path / "study" / "images").iterdir())
    assert len(kept) == 10
    assert {path.suffix for path in kept} == {".png"}
    for path in kept:
        with Image.open(path) as image:
            assert image.format == "PNG", "a TIFF, which browsers do not show, is written anew"


def test_rankings_are_data_too(tmp_path: Path) -> None:
    data = images(tmp_path / "base", PROMPTS, 4)
    names = [json.loads(line)["file_name"] for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": PROMPTS[0], "generations": names[:4], "ranking": [2, 1, 3, 3], "source": source}
        for source in ("model", "other")
    ]
    (data / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (item,) = annotate.study_of(config(tmp_path, data, raters=("model",)))
    assert [image.scores["model"] for image in item.images] == [-2, -1, -3, -3]
    assert len(item.images) == 4
