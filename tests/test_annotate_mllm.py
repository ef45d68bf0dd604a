"""Annotation by a model, against a stub endpoint: what is written, what is asked again, and what training reads of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from annotated import config as study_config
from annotated import service
from data_build import annotate, annotate_mllm, clean_prompts, mllm_tasks
from data_build.annotate_mllm import Config
from data_build.mllm_tasks import Group
from preftune.mllm import backoff
from preftune.mllm.config import EndpointConfig, OptionalEndpointConfig
from preftune.mllm.templates import OURS
from preftune.records import read_jsonl, read_rankings, write_jsonl
from preftune.training import labelled_pairs, rankings
from rewards.digests import sha256_of
from stub_endpoint import (
    Body,
    Reply,
    StubEndpoint,
    completion,
    failed,
    images_of,
    killed_after,
    look,
    rating,
    score,
    text_of,
)

ROOT = Path(__file__).parents[1]
LEVELS = {"a cat": (0, 255, 128, 64), "a dog": (255, 255, 0), "a hen": (10, 200)}
"""Prompt -> the levels of its grey images; scores are 1 + round(4 level / 255)."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short."""
    monkeypatch.setattr(backoff, "FIRST", 0.01)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A captioned folder; one prompt has one image alone."""
    folder, rows = tmp_path / "data", []
    for prompt, levels in {**LEVELS, "alone": (3,)}.items():
        for number, value in enumerate(levels):
            name = f"{prompt[2:]}/{number}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (value, value, value)).save(folder / name)
            rows.append({"file_name": name, "text": prompt})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def config(stub: StubEndpoint, data: Path, endpoint: dict[str, Any] | None = None, **changes: Any) -> Config:
    settings = {"model": "judge-7b", "base_url": stub.url, "concurrency": 3, **(endpoint or {})}
    given: dict[str, Any] = {
        "output_dir": data.parent / "out",
        "aspects": ("fidelity", "aesthetic"),
        **changes,
    }
    return Config(data=data, endpoint=EndpointConfig(**settings), **given)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def expected(prompt: str) -> dict[str, int]:
    """File -> the stub's score."""
    return {f"{prompt[2:]}/{n}.png": 1 + round(4 * value / 255) for n, value in enumerate(LEVELS[prompt])}


def test_ratings_belong_to_the_images_that_were_shown(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, {"price_input": 2.0, "price_output": 10.0}, orders=2))
    out = data.parent / "out"
    assert len(stub.requests) == 3 * 2 * 2
    rows = read_jsonl(out / "ratings.jsonl")
    assert len(rows) == 2 * 2 * (4 + 3 + 2)
    for row in rows:
        assert row["score"] == expected(row["prompt"])[row["image"]]
        assert row["shown"][row["place"] - 1] == row["image"]
        assert row["rationale"] == f"I see it. {row['place']}"
        assert row["model"] == "judge-7b"
        assert row["template"] == summary(out)["templates"][row["aspect"]]
    shown = {(row["prompt"], row["aspect"], row["order"]): row["shown"] for row in rows}
    assert all(shown[prompt, aspect, 2] == shown[prompt, aspect, 1][::-1] for prompt, aspect, _ in shown)
    assert any(names != sorted(names) for names in shown.values()), "orders are shuffled"
    found = {one.prompt: one for one in read_rankings(out)}
    assert found["a cat"].ranks == (4, 1, 2, 3)
    assert found["a dog"].ranks == (1, 1, 3)
    assert found["a hen"].source == "judge-7b"
    for one in found.values():
        assert [path.read_bytes() for path in one.paths] == [
            (data / path.relative_to(out / "images")).read_bytes() for path in one.paths
        ]
    said = summary(out)
    assert (said["rankings"], said["untied_pairs"], said["ties"]) == (3, 6 + 2 + 1, 1)
    assert said["left_out"] == {"prompts with one image": 1}
    assert said["agreement_of_orders"] == 1
    assert said["all_calls"]["input_tokens"] == 1200
    assert said["all_calls"]["cost"] == pytest.approx((1200 * 2 + 240 * 10) / 1e6)
    printed = capsys.readouterr()
    assert "two orders agree on 100.0 %" in printed.out
    assert "position: mean score by place" in printed.out
    assert "12 requests, 1,200 + 240 tokens, cost 0.0048" in printed.out
    assert "left out: prompts with one image (1)" in printed.err


def test_pairs_of_images(data: Path) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, mode="pairwise", rule="majority"))
    out = data.parent / "out"
    assert len(stub.requests) == 2 * (6 + 3 + 1)
    assert all(len(images_of(body)) == 2 for body in stub.requests)
    for row in read_jsonl(out / "ratings.jsonl"):
        first, second = (expected(row["prompt"])[name] for name in row["shown"])
        assert row["choice"] == ("tie" if first == second else "first" if first > second else "second")
    found = {one.prompt: one.ranks for one in read_rankings(out)}
    assert found == {"a cat": (4, 1, 2, 3), "a dog": (1, 1, 3), "a hen": (2, 1)}


def test_one_image_at_a_time(data: Path) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, {"concurrency": 1}, mode="pointwise", rule="aesthetic"))
    assert len(stub.requests) == 2 * 8, "two of the nine images are equal: what was answered is known"
    assert {len(images_of(body)) for body in stub.requests} == {1}
    assert {one.prompt: one.ranks for one in read_rankings(data.parent / "out")}["a cat"] == (4, 1, 2, 3)
    found = summary(data.parent / "out")
    assert found["mean_score_by_place"] is None
    assert found["earlier_is_better"] is None


def test_a_model_that_likes_what_it_sees_first(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def first(body: Body) -> Reply:
        return completion('{"rationale": "r", "better": "first"}')

    with StubEndpoint(first) as stub:
        annotate_mllm.main(config(stub, data, mode="pairwise", orders=2))
    found = summary(data.parent / "out")
    assert found["agreement_of_orders"] == 0
    assert found["earlier_is_better"][0] == 1
    assert found["untied_pairs"] == 0, "two orders that contradict each other prefer nothing"
    assert "wins 100.0 %" in capsys.readouterr().out


def by_aspect(body: Body) -> Reply:
    """Aesthetic says the opposite of fidelity."""
    scores = [score(image) for image in images_of(body)]
    return completion(rating([6 - s for s in scores] if "aesthetic quality" in text_of(body) else scores))


def test_another_rule_asks_nothing(data: Path) -> None:
    out = data.parent / "out"
    with StubEndpoint(by_aspect) as stub:
        annotate_mllm.main(config(stub, data))
        assert {one.prompt: one.ranks for one in read_rankings(out)}["a cat"] == (1, 1, 1, 1), "sums of 6"
        asked = len(stub.requests)
        for rule, ranks in (
            ("fidelity", (4, 1, 2, 3)),
            ("aesthetic", (1, 4, 3, 2)),
            ("mean", (1, 1, 1, 1)),
            ("majority", (1, 1, 1, 1)),
        ):
            annotate_mllm.main(config(stub, data, rule=rule))
            assert {one.prompt: one.ranks for one in read_rankings(out)}["a cat"] == ranks
        annotate_mllm.main(config(stub, data, rule="each"))
        assert len(stub.requests) == asked
    found = [one for one in read_rankings(out) if one.prompt == "a cat"]
    assert {one.source: one.ranks for one in found} == {
        "judge-7b fidelity": (4, 1, 2, 3),
        "judge-7b aesthetic": (1, 4, 3, 2),
    }


def test_training_reads_soft_labels_of_aspects(data: Path) -> None:
    """Three of four aspects prefer one image: reward models learn a share of 3/4, and so does DPO."""

    with StubEndpoint(by_aspect) as stub:
        annotate_mllm.main(config(stub, data, rule="each", aspects=annotate_mllm.ASPECTS))
    out = data.parent / "out"
    hen = [one for one in rankings.by_images(read_rankings(out)) if one.prompt == "a hen"]
    assert rankings.votes(hen)[1].tolist() == [0.25]
    labelled_pairs.check([out], ())
    found, _ = labelled_pairs.read([out], ())
    pairs, _ = labelled_pairs.label([one for one in found if one.prompt == "a hen"], "soft", "drop")
    assert [(pair.label, pair.first.name) for pair in pairs] == [(0.75, "1.png")]
    found, _ = labelled_pairs.read([out], ["judge-7b aesthetic"])
    assert {one.source for one in found} == {"judge-7b aesthetic"}


def test_a_failure_is_no_score(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An aspect that fails for a prompt; the next start asks for it alone."""

    def moody(body: Body) -> Reply:
        cat = '"a cat"' in text_of(body) and "aesthetic quality" in text_of(body)
        return completion("I'm sorry, I can't.") if cat else look(body)

    out = data.parent / "out"
    with StubEndpoint(moody) as stub:
        annotate_mllm.main(config(stub, data))
        assert {one.prompt for one in read_rankings(out)} == {"a dog", "a hen"}
        (error,) = read_jsonl(out / "errors.jsonl")
        assert (error["prompt"], error["aspect"], error["error"]) == ("a cat", "aesthetic", "refusal")
        assert sorted(error["shown"]) == sorted(expected("a cat"))
        assert "score" not in json.dumps(error)
        rows = read_jsonl(out / "ratings.jsonl")
        assert Counter(row["prompt"] for row in rows if row["aspect"] == "aesthetic") == {
            "a dog": 3,
            "a hen": 2,
        }
        assert summary(out)["errors"] == {"refusal": 1}
        assert summary(out)["prompts_without_a_ranking"] == 1
        assert "no answer, in errors.jsonl: 1 refusal" in capsys.readouterr().out
        asked = len(stub.requests)
        assert asked == 6 + 2, "asked for again twice"
        annotate_mllm.main(config(stub, data, rule="mean"))
        assert {one.prompt: one.ranks for one in read_rankings(out)}["a cat"] == (4, 1, 2, 3), (
            "of the other aspect"
        )
        assert len(stub.requests) == asked + 3
        stub.answer = look
        annotate_mllm.main(config(stub, data))
        assert len(stub.requests) == asked + 4
    assert not read_jsonl(out / "errors.jsonl")
    assert {one.prompt for one in read_rankings(out)} == set(LEVELS)


def test_faults_of_the_server_change_no_row(data: Path) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, orders=2, output_dir=data.parent / "one"))
    faults = [
        failed(429, {"Retry-After": "0.2"}),
        failed(500),
        Reply(hang_up=True),
        completion("{"),
        completion(rating([9])),
        failed(503),
    ]
    with StubEndpoint(faults=faults * 2) as stub:
        annotate_mllm.main(config(stub, data, {"concurrency": 8}, orders=2, output_dir=data.parent / "two"))
        assert len(stub.requests) == 12 + len(faults) * 2
    for name in ("ratings.jsonl", "rankings.jsonl", "errors.jsonl"):
        assert (data.parent / "one" / name).read_text() == (data.parent / "two" / name).read_text()


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        annotate_mllm.main(config)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with StubEndpoint() as stub:
        assert "NO_KEY: this environment variable is not set" in refused(
            config(stub, data, {"api_key_env": "NO_KEY"}), capsys
        )
        assert "no aspect 'beauty'" in refused(config(stub, data, aspects=("beauty",)), capsys)
        assert "no data at" in refused(config(stub, data / "x"), capsys)
        assert "is --data" in refused(config(stub, data, output_dir=data), capsys)
        (data.parent / "mine").mkdir()
        (data.parent / "mine" / "notes.txt").touch()
        assert "holds something else" in refused(config(stub, data, output_dir=data.parent / "mine"), capsys)
        assert "without captions" in refused(config(stub, data / "cat"), capsys)
        assert not stub.requests
        assert not (data.parent / "out").exists()
        for changes, words in (
            ({"rule": "beauty"}, "--rule is beauty"),
            ({"aspects": ("a", "a")}, "each once"),
            ({"mode": "pointwise", "orders": 2}, "--orders 2 is for"),
            ({"max_images": 1}, "^--max-images must be at least 2, got 1$"),
            ({"count": 0}, "^--count must be at least 1, got 0$"),
        ):
            with pytest.raises(ValueError, match=words):
                config(stub, data, **changes)
    with StubEndpoint(faults=[failed(404, message="model judge-7b not found")]) as stub:
        assert "model judge-7b not found; look at --base-url and --model" in refused(
            config(stub, data, {"concurrency": 1}), capsys
        )
    with StubEndpoint(lambda body: completion("{")) as stub:
        said = refused(config(stub, data, {"answer_retries": 0}), capsys)
        assert "no prompt has a ranking: 6 malformed, the first: it holds no JSON object: '{'" in said
        assert not read_jsonl(data.parent / "out" / "ratings.jsonl")


def test_a_folder_belongs_to_one_program_and_its_flags(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results that are there are not replaced by those of another question; another rule asks nothing."""
    own, same = data.parent / "own", data.parent / "same"
    for folder in (own, same):
        shutil.copytree(OURS, folder)
    (own / "rate.txt").write_text((OURS / "rate.txt").read_text().replace("experienced", "kind"))
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data))
        asked, before = len(stub.requests), (data.parent / "out/ratings.jsonl").read_bytes()
        annotate_mllm.main(config(stub, data, templates=same, orders=1, count=9))
        assert len(stub.requests) == asked, "the texts count, not their folder"
        for changes, endpoint, said in (
            ({"mode": "pairwise"}, {}, "was begun with --mode "),
            ({"aspects": ("fidelity",)}, {}, "was begun with --aspects fidelity aesthetic, got fidelity"),
            ({"templates": own}, {}, "was begun with --templates of digest fidelity "),
            ({}, {"model": "another"}, "was begun with --model judge-7b, got another"),
        ):
            assert said in refused(config(stub, data, endpoint, **changes), capsys)
        (data.parent / "prompts.txt").write_text("a cat, 8k\n")
        cleaning = clean_prompts.Config(
            prompts=(data.parent / "prompts.txt",), output_dir=data.parent / "out", cleaner="model",
            endpoint=OptionalEndpointConfig(base_url=stub.url, model="judge-7b"),
        )  # fmt: skip
        with pytest.raises(SystemExit):
            clean_prompts.main(cleaning)
        assert "was begun by annotate-mllm; choose another --output-dir" in capsys.readouterr().err
        with StubEndpoint(
            faults=[failed(404, message="no such model")]
        ) as other:  # nothing was answered: nothing is lost
            typo = config(other, data, {"model": "typo", "concurrency": 1}, output_dir=data.parent / "new")
            assert "no such model" in refused(typo, capsys)
        annotate_mllm.main(config(stub, data, output_dir=data.parent / "new"))
        assert json.loads((data.parent / "new/begun.json").read_text())["flags"]["--model"] == "judge-7b"
        asked = len(stub.requests)
        (data.parent / "out/begun.json").write_text("{")
        assert "begun.json is damaged" in refused(config(stub, data), capsys)
        assert (len(stub.requests), (data.parent / "out/ratings.jsonl").read_bytes()) == (asked, before)


def test_large_groups_and_counts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, max_images=3, count=1))
        assert len(stub.requests) == 2
    (found,) = read_rankings(data.parent / "out")
    assert found.prompt == "a cat"
    scores = [expected("a cat")[f"cat/{path.name}"] for path in found.paths]
    assert len(scores) == 3
    assert [sorted(scores, reverse=True).index(one) + 1 for one in scores] == [*found.ranks]
    about = summary(data.parent / "out")
    assert about["left_out"] == {"images of prompts with more than 3": 1, "prompts with one image": 1}
    assert about["prompts_with_images_left_out"] == 1
    said = capsys.readouterr().err
    assert "of 1 prompt with more images 3 each were drawn (--max-images)" in said
    assert "left out: prompts with one image (1), images of prompts with more than 3 (1)" in said


def test_images_are_drawn_alike_and_stay() -> None:
    """Of four images of 600 prompts two: each 300 times, +- 4 standard deviations of 12. A further image replaces one at the most."""
    names = tuple(f"{at}.png" for at in range(4))

    def of(prompt: str, names: tuple[str, ...], seed: int = 0) -> tuple[str, ...]:
        group = Group(prompt=prompt, names=names, paths=tuple(map(Path, names)))
        found = mllm_tasks.drawn(group, 2, seed)
        assert [path.name for path in found.paths] == [*found.names]
        assert (len(found.names), found.left_out) == (2, len(names) - 2)
        return found.names

    chosen = [of(f"prompt {at}", names) for at in range(600)]
    counts = Counter(name for pair in chosen for name in pair)
    assert all(abs(count - 300) < 49 for count in counts.values()), counts
    assert all(pair == tuple(sorted(pair)) for pair in chosen), "in their order"
    for at, pair in enumerate(chosen[:50]):
        more = {*of(f"prompt {at}", (*names, "new.png"))}
        assert len(more & {*pair}) >= 1
        assert more - {*pair} <= {"new.png"}
    assert [of(f"prompt {at}", names, seed=1) for at in range(600)] != chosen


def test_people_are_compared_with_a_model_that_was_asked_afterwards(data: Path) -> None:
    """ann agrees with the model, bob contradicts it, on 6 + 1 + 1 pairs: equal images are one."""
    people = service(data.parent, data, inspectors=(), repeats=0)
    level = {sha256_of(path)[:24]: score(Image.open(path)) for path in data.rglob("*.png")}
    for person, _ in people.links():
        sign = -1 if person.name == "ann" else 1
        while not (task := people.task(person)).get("finished"):
            best = sorted(task["images"], key=lambda image: sign * level[image])
            ranks = {image: rank for rank, image in enumerate(best, 1)}
            people.save(person, {"task": task["task"], "answer": {"ranks": ranks}, "seconds": 1})
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data))
    out, flags = data.parent / "out", {"inspectors": (), "serve": False}
    annotate.main(study_config(data.parent, raters_from=(out,), **flags))
    found = json.loads((data.parent / "study/statistics.json").read_text())
    (cell,) = [row for row in found["agreement"] if (row["of"], row["with"]) == ("annotator", "judge-7b")]
    assert (cell["mean"], cell["raters"], cell["pairs"]) == (0.5, 2, 2 * (6 + 1 + 1))
    assert "<th>judge-7b</th>" in (data.parent / "study/statistics.html").read_text()
    # a study that is made of what the model ranked knows it, too
    other = service(data.parent / "second", out, inspectors=(), raters=("judge-7b",))
    (ranked,) = [item for item in other.items.values() if item.prompt == "a hen"]
    assert sorted(image.scores["judge-7b"] for image in ranked.images) == [-2, -1]


def test_images_of_rankings_by_people(data: Path) -> None:
    rows = [
        {"prompt": "a hen", "generations": ["hen/1.png", "hen/0.png"], "ranking": ranks, "source": "ann"}
        for ranks in ([1, 2], [2, 1])
    ]
    write_jsonl(data / "rankings.jsonl", rows)
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data))
    assert len(stub.requests) == 2, "the two annotators' images are the same"
    (found,) = read_rankings(data.parent / "out")
    assert [(path.name, rank) for path, rank in zip(found.paths, found.ranks, strict=True)] == [
        ("0.png", 2),
        ("1.png", 1),
    ]


def test_an_image_that_changed_is_asked_again_and_replaced(data: Path) -> None:
    out = data.parent / "out"
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data))
        asked = len(stub.requests)
        (data / "hen/0.png").unlink()
        Image.new("RGB", (8, 8), (255, 255, 255)).save(data / "hen/0.png")
        annotate_mllm.main(config(stub, data))
        assert len(stub.requests) == asked + 2
    assert (out / "images/hen/0.png").read_bytes() == (data / "hen/0.png").read_bytes()
    assert {one.prompt: one.ranks for one in read_rankings(out)}["a hen"] == (1, 2)


def test_a_broken_image_is_an_error_of_its_questions(data: Path) -> None:
    (data / "hen/0.png").write_bytes(b"no image")
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, {"max_failures": 1}))
    assert summary(data.parent / "out")["errors"] == {"bad image": 2}
    assert {one.prompt for one in read_rankings(data.parent / "out")} == {"a cat", "a dog"}


def test_a_model_that_cannot_be_asked(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody there, or a server that rejects all: one sentence, soon, and a bar that has not moved."""
    with StubEndpoint() as stub:
        pass
    start = time.monotonic()
    said = refused(config(stub, data), capsys)
    assert time.monotonic() - start < 5
    assert f"error: no connection to {stub.url}: " in said
    assert said.endswith("; is a server running there? (--base-url)")
    with StubEndpoint(lambda body: failed(400, message="unknown response_format")) as stub:
        with pytest.raises(SystemExit):
            annotate_mllm.main(config(stub, data, {"concurrency": 1}))
        said = capsys.readouterr().err
        assert len(stub.requests) == 3
    assert "unknown response_format; if it does not know JSON schemas: --response-format json-object" in said
    assert "2 without an answer" in said
    assert "0/6" in said.replace("\r", "\n").splitlines()[-2]


def test_one_is_no_plural(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, aspects=("fidelity",), count=1, max_images=2))
    said = capsys.readouterr().out
    assert "1 prompt: 2 ratings, 1 ranking by sum, 1 untied pair, 0 ties" in said
    assert "all calls of this folder: 1 request, " in said


# ---------------------------------------------------------------- killed


KEY = "sk-0123456789abcdef"


def check_complete(out: Path) -> None:
    """All of 4 aspects x 10 pairs x 2 orders are there, each once, and the key is in no file."""
    rows = [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 80
    assert len(read_jsonl(out / "ratings.jsonl")) == 80
    for path in out.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def all_pairs(stub: StubEndpoint, data: Path) -> Config:
    """The configuration of 80 questions, no two of which are the same."""
    Image.new("RGB", (8, 8), (250, 250, 250)).save(data / "dog/1.png")
    endpoint = {"concurrency": 2, "api_key_env": "SECRET", "model": "m"}
    return config(stub, data, endpoint, mode="pairwise", orders=2, aspects=annotate_mllm.ASPECTS)


def test_a_killed_process_goes_on_without_a_second_call(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", KEY)
    stub, out = StubEndpoint(key=KEY, after=0.01), data.parent / "out"
    given = all_pairs(stub, data)
    with killed_after(stub, 25, lambda: annotate_mllm.main(given)):
        done = sum(
            line.endswith(b"\n") for line in (out / "calls.jsonl").read_bytes().splitlines(keepends=True)
        )
        first = list(stub.requests)
        assert 20 <= done < 80
        assert not (out / "rankings.jsonl").exists()
        annotate_mllm.main(given)
        second = stub.requests[len(first) :]
        assert len(second) == 80 - done, "what was done is not asked again"
    assert len([body for body in second if body in first]) <= 2, "at most what was under way"
    check_complete(out)
    said = capfd.readouterr()
    assert KEY not in said.out + said.err


def test_ctrl_c_says_how_to_go_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", KEY)
    out = data.parent / "out"
    with StubEndpoint(key=KEY, after=0.05) as stub:
        given = all_pairs(stub, data)
        words = [
            sys.executable, str(ROOT / "data_build/annotate_mllm.py"), "--data", str(data), "--base-url", stub.url, "--model", "m",
            "--concurrency", "2", "--orders", "2", "--mode", "pairwise", "--output-dir", str(out), "--api-key-env", "SECRET",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        while stub.answered < 25:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert "start the same command again to go on" in said
        assert "Traceback" not in said
        assert KEY not in said
        asked = len(stub.requests)
        stub.after = 0
        annotate_mllm.main(given)
        assert len(stub.requests) == 80, "all that was asked was answered and kept"
        assert asked < 80
    check_complete(out)
