"""Prompts cleaned by a model, against a stub endpoint: no prompt is lost, whatever the model says, and no answer is asked for twice."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from data_build import clean_prompts
from data_build.clean_prompts import Config
from preftune.cli import parse
from preftune.mllm import backoff
from preftune.mllm.config import OptionalEndpointConfig
from preftune.records import read_jsonl
from stub_endpoint import Body, Reply, StubEndpoint, cleaned, completion, failed, killed_after, look, text_of

TEXTS = ("a cat, 8 k, artgerm", "a dog, oil painting", "", "a cat, 8 k, artgerm", "a hen")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short."""
    monkeypatch.setattr(backoff, "FIRST", 0.01)


def config(
    folder: Path, url: str, *texts: str, endpoint: dict[str, Any] | None = None, **changes: Any
) -> Config:
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    settings = {"base_url": url, "model": "m-7b"} | (endpoint or {})
    given: dict[str, Any] = {
        "prompts": (folder / "prompts.txt",), "output_dir": folder / "out", "cleaner": "model",
        "endpoint": OptionalEndpointConfig(**settings), **changes,
    }  # fmt: skip
    return Config(**given)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out/summary.json").read_text(encoding="utf-8"))
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "out/prompts.jsonl")


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        clean_prompts.main(config)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def about(words: str, wrong: Callable[[Body], Reply]) -> Callable[[Body], Reply]:
    """An honest model but for prompts with these words."""
    return lambda body: wrong(body) if words in text_of(body).split("whatever it says:")[1] else look(body)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stub keeps what is before the first comma."""
    with StubEndpoint() as stub:
        given = config(tmp_path, stub.url, *TEXTS, endpoint={"price_input": 2.0})
        clean_prompts.main(given)
        assert len(stub.requests) == 3, "equal prompts are asked for once"
        assert [len(body["messages"][0]["content"]) for body in stub.requests] == [1] * 3, "no images"
        said = capsys.readouterr()
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        clean_prompts.main(given)
        assert len(stub.requests) == 3
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        clean_prompts.main(config(tmp_path, stub.url, "a pig, 8k", *TEXTS))
        assert len(stub.requests) == 4, "only the new one"
    cat = {
        "prompt": "a cat", "original": "a cat, 8 k, artgerm", "removed": [["resolution", "8k"], ["artist", "artgerm"]],
        "only_style": False, "unsafe": False, "error": None, "detail": None,
    }  # fmt: skip
    dog = {"prompt": "a dog", "original": "a dog, oil painting", "removed": [["medium", "oil painting"]]}
    hen = {"prompt": "a hen", "original": "a hen", "removed": []}
    more = {"only_style": False, "unsafe": False, "error": None, "detail": None}
    assert rows(tmp_path)[1:] == [cat, dog | more, cat, hen | more]
    found = json.loads(before["summary.json"])
    assert (found["cleaner"], found["model"], found["prompts"], found["changed"]) == ("model", "m-7b", 4, 3)
    assert (found["errors"], found["unsafe"], found["left_out"]) == ({}, 0, 0)
    assert found["removed_from_share"] == {"artist": 0.5, "medium": 0.25, "resolution": 0.5}
    assert found["style_words"]["artist artgerm"] == [2, 0]
    assert found["all_calls"]["input_tokens"] == 300
    assert "artist artgerm        50.00% ->   0.00%\nresolution 8k" in said.out
    assert "3 requests, 300 + 60 tokens, cost 0.0006" in said.out
    assert "4 prompts: 0 answered before, 0 without an answer" in said.err
    page = before["index.html"].decode()
    assert "a cat<del>, 8 k, artgerm</del>" in page
    assert '<th scope="row">no answer of m-7b, left as they were</th><td class="number">0</td>' in page
    assert "without an answer, left" not in page


def test_an_error_keeps_the_original_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrongs: dict[str, Callable[[Body], Reply]] = {
        "refusal": lambda body: completion("I'm sorry, I can't help with that."),
        "malformed": lambda body: completion('{"prompt": "a do'),
        "wrong schema": lambda body: completion(cleaned("")),
        "cut off": lambda body: completion(cleaned("a"), finish="length"),
        "server": lambda body: failed(503),
        "rejected": lambda body: failed(400),
    }
    texts = [*TEXTS, *(f"{name} <b>, 8k" for name in wrongs)]

    def moody(body: Body) -> Reply:
        asked = text_of(body).split("whatever it says:")[1]
        return next((wrong(body) for name, wrong in wrongs.items() if name in asked), look(body))

    with StubEndpoint(moody) as stub:
        given = config(tmp_path, stub.url, *texts, endpoint={"retries": 1, "answer_retries": 1})
        clean_prompts.main(given)
        found = rows(tmp_path)
        assert [row["original"] for row in found] == [text for text in texts if text], "none is dropped"
        for row in found[4:]:
            assert (row["prompt"], row["removed"]) == (row["original"], [])
            assert row["error"] in row["original"]
            assert row["unsafe"] is None
        assert [row["detail"] for row in found[4:]] == [
            "it holds no JSON object: \"I'm sorry, I can't help with that.\"",
            'it holds no JSON object: \'{"prompt": "a do\'',
            "prompt is ''; it must be a text",
            "the answer is longer than --max-tokens",
            "status 503: it failed",
            "status 400: it failed",
        ]
        assert all((row["error"], row["detail"], row["unsafe"]) == (None, None, False) for row in found[:4])
        assert summary(tmp_path)["errors"] == dict.fromkeys(sorted(wrongs), 1)
        assert "10 prompts: 0 answered before, 6 without an answer" in capsys.readouterr().err
        page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
        assert '<th scope="row">no answer of m-7b, left as they were</th><td class="number">6</td>' in page
        assert "<h2>Prompts without an answer, left as they were</h2>\n<ul" in page
        assert '<p>server &lt;b&gt;, 8k</p>\n<p class="note">server: status 503: it failed</p>' in page
        asked, stub.answer = len(stub.requests), look
        clean_prompts.main(given)
        assert len(stub.requests) == asked + 6, "only what has failed"
    assert summary(tmp_path)["errors"] == {}
    assert [row["prompt"] for row in rows(tmp_path)[4:]] == [f"{name} <b>" for name in wrongs]


def test_a_model_that_cleans_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEndpoint(lambda body: completion("{")) as stub:
        said = refused(config(tmp_path, stub.url, *TEXTS, endpoint={"answer_retries": 0}), capsys)
        assert "m-7b cleaned no prompt: 4 malformed, the first: it holds no JSON object" in said
        assert [row["prompt"] for row in rows(tmp_path)] == [text for text in TEXTS if text]
        many = config(tmp_path, stub.url, *(f"cat {at}" for at in range(30)), endpoint={"answer_retries": 0})
        assert "20 questions in a row got no answer" in refused(many, capsys)
    with StubEndpoint(faults=[failed(404, message="no model m-7b")] * 4) as stub:
        assert "look at --base-url and --model" in refused(config(tmp_path, stub.url, "a pig"), capsys)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """A process that is killed in the middle; the next asks for nothing that was answered."""
    texts = [f"cat {at}, 8k" for at in range(40)]
    stub = StubEndpoint(after=0.01)
    given = config(tmp_path, stub.url, *texts, endpoint={"concurrency": 2})
    with killed_after(stub, 15, lambda: clean_prompts.main(given)):
        lines = (tmp_path / "out/calls.jsonl").read_bytes().splitlines(keepends=True)
        done = sum(line.endswith(b"\n") for line in lines)
        assert 10 <= done < 40
        assert not (tmp_path / "out/prompts.jsonl").exists()
        before = len(stub.requests)
        clean_prompts.main(given)
        assert len(stub.requests) - before == 40 - done
    assert [row["prompt"] for row in rows(tmp_path)] == [f"cat {at}" for at in range(40)]
    assert len(read_jsonl(tmp_path / "out/calls.jsonl")) == 40


def test_templates_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own").mkdir()
    with StubEndpoint(about("never", look)) as stub:
        given = config(tmp_path, stub.url, "a cat, 8k", templates=tmp_path / "own")
        assert "clean.txt" in refused(given, capsys)
        assert not (tmp_path / "out").exists()
        (tmp_path / "own/clean.txt").write_text("Clean, whatever it says:\n$prompt\n")
        assert 'own/clean.txt does not ask for "unsafe"' in refused(given, capsys)
        assert not (tmp_path / "out").exists()
        (tmp_path / "own/clean.txt").write_text("Clean, is it unsafe, whatever it says:\n$prompt\n")
        clean_prompts.main(given)
        assert text_of(stub.requests[0]) == 'Clean, is it unsafe, whatever it says:\n"a cat, 8k"\n'
        (tmp_path / "own/clean.txt").write_text("Clean it, say unsafe, whatever it says:\n$prompt\n")
        assert "was begun with --templates of digest clean " in refused(given, capsys)


def test_unsafe_prompts_are_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stub calls unsafe what says naked; a prompt that it refuses is not judged, and stays."""
    texts = ["a cat, 8k", "a naked man, 8k", "a refusal, naked", "a dog"]
    with StubEndpoint(about("refusal", lambda body: completion("I can't."))) as stub:
        given = config(tmp_path, stub.url, *texts, endpoint={"answer_retries": 0})
        clean_prompts.main(given)
        told = rows(tmp_path)
        assert [row["unsafe"] for row in told] == [False, True, None, False]
        assert (summary(tmp_path)["unsafe"], summary(tmp_path)["left_out"]) == (1, 0)
        assert not (tmp_path / "out/unsafe.jsonl").exists()
        assert "not judged" not in capsys.readouterr().err
        clean_prompts.main(replace(given, drop_unsafe=True))
        assert rows(tmp_path) == [told[0], told[2], told[3]]
        assert read_jsonl(tmp_path / "out/unsafe.jsonl") == [told[1]], "with its original"
        assert (summary(tmp_path)["unsafe"], summary(tmp_path)["left_out"]) == (1, 1)
        assert summary(tmp_path)["prompts"] == 4
        page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
        assert 'unsafe for work, as m-7b says; left out</th><td class="number">1</td>' in page
        assert "a naked man (unsafe for work)" in page
        assert "1 prompt without an answer, not judged: left in prompts.jsonl" in capsys.readouterr().err
        clean_prompts.main(given)
        assert rows(tmp_path) == told
        assert not (tmp_path / "out/unsafe.jsonl").exists(), "of an earlier start"
        asked = len(stub.requests)
        assert asked == 4 + 2, "what was answered is not asked again"
        alone = replace(config(tmp_path, stub.url, "naked, 8k"), drop_unsafe=True)
        assert "m-7b calls all prompts unsafe: none is left, see" in refused(alone, capsys)
        assert [row["original"] for row in read_jsonl(tmp_path / "out/unsafe.jsonl")] == ["naked, 8k"]
        assert rows(tmp_path) == []


def test_prompts_without_an_answer_are_not_changed_ones_and_some_are_shown(tmp_path: Path) -> None:
    texts = ["a cat, 8k", *(f"refusal {at}, " for at in range(5))]
    with StubEndpoint(about("refusal", lambda body: completion("I can't."))) as stub:
        clean_prompts.main(config(tmp_path, stub.url, *texts, shown=3, endpoint={"answer_retries": 0}))
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "<h2>1 of the prompts that changed</h2>" in page
    assert '<p class="note">The first 3 of 5.</p>' in page
    assert page.count("<p>refusal ") == 3


def test_nobody_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEndpoint() as stub:
        pass
    said = refused(config(tmp_path, stub.url, *TEXTS), capsys)
    assert f"no connection to {stub.url}: " in said
    assert said.endswith("; is a server running there? (--base-url)")


def test_flags_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    model, url = ["--cleaner", "model"], ["--base-url", "http://h/v1"]
    for words, said in (
        (model, "--base-url and --model name it"),
        ([*model, *url], "--base-url and --model name it"),
        ([*model, "--model", "m"], "--base-url and --model name it"),
        ([*model, "--base-url", "h", "--model", "m"], "--base-url is 'h'"),
        ([*model, *url, "--model", "m", "--temperature", "-1"], "--temperature must be"),
        ([*model, *url, "--model", "m", "--keep", "light"], "--keep is for --cleaner rules"),
        (url, "--base-url is for --cleaner model"),
        (["--concurrency", "8"], "--concurrency is for --cleaner model"),
        (["--templates", "x"], "--templates is for --cleaner model"),
        (["--drop-unsafe"], "--drop-unsafe is for --cleaner model"),
        ([*model, *url, "--model", "m", "--image-side", "64"], "--image-side"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(Config, ["--prompts", "a.txt", "--output-dir", "x", *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    given = config(tmp_path, "http://h/v1", "a cat", endpoint={"api_key_env": "NO_KEY"})
    assert "NO_KEY: this environment variable is not set" in refused(given, capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    assert "holds something else" in refused(config(tmp_path, "http://h/v1", "a cat"), capsys)


def test_the_page_in_a_narrow_window(tmp_path: Path) -> None:
    """At 400 pixels nothing is out of the window, and the words before and after are not broken."""
    long = "x" * 90
    with StubEndpoint() as stub:
        clean_prompts.main(config(tmp_path, stub.url, f"a cat, trending on artstation, {long}, 8k", long))
    browser = Browser()
    try:
        page = browser.open("reader", (tmp_path / "out/index.html").as_uri(), (400, 900))
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        lines = page.run(
            "[...document.querySelectorAll('thead th + th')].map((head) => { const range = document.createRange();"
            " range.selectNodeContents(head); return range.getClientRects().length; })"
        )
    finally:
        browser.close()
    assert lines == [1, 1]
