"""Annotation by a model, against a stub endpoint: what is written, what is asked again, and what training reads of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_build import annotate_mllm
from data_build.annotate_mllm import Config
from preftune.mllm import backoff
from preftune.mllm.config import EndpointConfig
from preftune.records import read_jsonl, read_rankings, write_jsonl
from preftune.training import labelled_pairs, rankings
from stub_endpoint import (
    Body,
    Reply,
    StubEndpoint,
    completion,
    failed,
    images_of,
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
    assert "left out: 1 prompts with one image" in printed.err


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
        annotate_mllm.main(config(stub, data, mode="pointwise", rule="aesthetic"))
    assert len(stub.requests) == 2 * 9
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
            ({"max_images": 1}, "--max-images"),
            ({"count": 0}, "--count"),
        ):
            with pytest.raises(ValueError, match=words):
                config(stub, data, **changes)
    with StubEndpoint(faults=[failed(404, message="model judge-7b not found")]) as stub:
        assert "model judge-7b not found; look at --base-url and --model" in refused(
            config(stub, data, {"concurrency": 1}), capsys
        )
    with StubEndpoint(lambda body: completion("{")) as stub:
        said = refused(config(stub, data, {"answer_retries": 0}), capsys)
        assert "no prompt has a ranking" in said
        assert not read_jsonl(data.parent / "out" / "ratings.jsonl")


def test_large_groups_and_counts(data: Path) -> None:
    with StubEndpoint() as stub:
        annotate_mllm.main(config(stub, data, max_images=3, count=1))
    assert [one.prompt for one in read_rankings(data.parent / "out")] == ["a dog"]
    assert summary(data.parent / "out")["left_out"] == {
        "prompts with more than 3 images": 1,
        "prompts with one image": 1,
    }


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


# ---------------------------------------------------------------- killed


def command(stub: StubEndpoint, data: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "data_build/annotate_mllm.py"), "--data", str(data), "--base-url", stub.url, "--model", "m",
        "--concurrency", "2", "--orders", "2", "--mode", "pairwise", "--output-dir", str(data.parent / "out"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_without_a_second_call(data: Path, sign: signal.Signals) -> None:
    """4 aspects x 10 pairs x 2 orders; killed in the middle, and started again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SECRET": "sk-0123456789abcdef"}
    calls = data.parent / "out" / "calls.jsonl"
    Image.new("RGB", (8, 8), (250, 250, 250)).save(data / "dog/1.png")  # no two questions are the same
    with StubEndpoint(key="sk-0123456789abcdef", after=0.1) as stub:
        words = command(stub, data, "--api-key-env", "SECRET")
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        while stub.answered < 25:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(sign)
        said = process.communicate(timeout=60)[1]
        if sign == signal.SIGINT:
            assert "start the same command again to go on" in said
            assert "Traceback" not in said
        time.sleep(0.2)
        done = len(calls.read_text().splitlines())
        first = list(stub.requests)
        assert 20 <= done < 80
        assert not (data.parent / "out" / "rankings.jsonl").exists()
        again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        second = stub.requests[len(first) :]
        assert len(second) == 80 - done, "what was done is not asked again"
    twice = [body for body in second if body in first]
    assert len(twice) <= 2, "at most what was under way"
    rows = [json.loads(line) for line in calls.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 80
    assert len(read_jsonl(data.parent / "out" / "ratings.jsonl")) == 80
    for path in data.parent.rglob("*"):
        if path.is_file():
            assert b"sk-0123456789abcdef" not in path.read_bytes(), path
    assert "sk-0123456789abcdef" not in again.stdout + again.stderr + said
