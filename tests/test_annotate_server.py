"""The pages over HTTP: who may what, hostile requests, many at once, and a server that is killed."""

import json
import random
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from werkzeug.test import Client

from annotated import Served, answer_all, answer_of, ask, images, service
from data_build import annotate
from data_build.annotation_server import FILES, MAX_BODY, PAGES, application, blocks, listening, server
from data_build.annotation_service import Service
from preftune.annotation.storage import Storage
from preftune.records import read_rankings

PROMPTS = [
    "a red circle",
    "two blue stars",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "an owl",
]
OUTSIDE = (
    "http:",
    "https:",
    "//",
    "url(",
    "@import",
    "<script>",
    "onload",
    "innerHTML",
    "eval(",
    "outerHTML",
    "document.write",
)
"""What a page or script of ours must not say: it loads nothing from elsewhere, and reads no text as HTML."""


class Site:
    """A study with a client in the place of a browser."""

    def __init__(self, folder: Path, *data: str | Path, **flags: Any) -> None:
        self.service: Service = service(folder, *data, **flags)
        self.client = Client(application(self.service, "# A\ntext"))
        self.paths = {person.name: path for person, path in self.service.links()}

    def get(self, path: str, name: str = "ann", **more: Any) -> Any:
        return self.client.get(self.paths[name] + path, **more)

    def post(self, path: str, body: object, name: str = "ann", **more: Any) -> Any:
        return self.client.post(self.paths[name] + path, json=body, **more)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        tmp_path, images(tmp_path / "base", PROMPTS, 3), tasks=("prompt", "rating", "ranking", "choice")
    )


def test_a_task_from_page_to_answer(site: Site) -> None:
    page = site.get("")
    assert page.status_code == 200
    assert page.mimetype == "text/html"
    task = site.get("task").json
    assert task["kind"] == "prompt"
    assert task["total"] == 4 + 12 + 4 + 12 + 1 + 1
    assert site.post("answer", {"task": task["task"], "answer": answer_of(task), "seconds": 3}).json == {
        "saved": task["task"]
    }
    following = site.get("task").json
    assert (following["done"], following["kind"]) == (1, "rating")
    image = site.get(f"image/{following['images'][0]}")
    assert image.mimetype == "image/png"
    assert "immutable" in image.headers["Cache-Control"]
    assert set(following["ahead"]) <= set(site.service.images)
    assert site.get("words").json["points"] == 7


def test_every_answer_of_the_server_has_the_headers(site: Site) -> None:
    paths = ["", "task", "words", "guide", "image/x", "nothing", "statistics", "../..", "task?at=x"]
    found = [site.get(path, name) for path in paths for name in ("ann", "eve")]
    found += [
        site.client.get(path) for path in ("/", "/static/annotate.js", "/static/no", "/" + "0" * 32 + "/")
    ]
    for one in found:
        policy = one.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert one.headers["X-Content-Type-Options"] == "nosniff"
        assert one.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name", [*FILES, "annotate.html", "review.html", "guide.html.jinja", "statistics.html.jinja"]
)
def test_pages_load_nothing_from_elsewhere_and_read_no_html(name: str) -> None:
    text = (PAGES / name).read_text(encoding="ascii")
    code = "\n".join(line for line in text.splitlines() if not line.strip().startswith("//"))
    assert not [word for word in OUTSIDE if word in code.replace(" // ", " ").replace("; // ", "; ")], name
    if name.endswith((".html", ".jinja")):
        assert " style=" not in text
        assert " onclick=" not in text


def test_roles(site: Site) -> None:
    for path in ("review", "statistics"):
        assert site.get(path).status_code == 403
        assert site.get(path, "eve").status_code == 200
    assert site.post("export", {}).status_code == 403
    assert site.post("verdict", {"id": ["ann", "x", 0, 1], "verdict": "accept"}).status_code == 403
    assert site.get("task", "eve").status_code == 200, "an inspector may answer, too"
    assert b"review.js" in site.get("", "eve").data
    assert b"annotate.js" in site.get("annotate", "eve").data
    assert site.post("export", {}, "eve").json["rankings.jsonl"] == 0


def test_another_annotators_tasks_cannot_be_written(site: Site) -> None:
    theirs = site.get("task", "bob").json
    assert site.post("answer", {"task": theirs["task"], "answer": answer_of(theirs)}).status_code == 403
    assert not site.service.storage.answers()
    token = site.paths["bob"].strip("/")
    for wrong in (token[:-1], token[:-1] + "x", token.upper(), "", "ann", "%00", token + "/../" + token):
        assert site.client.get(f"/{wrong}/task").status_code in (404, 405), wrong
    assert site.client.get("/").status_code == 404


def test_inspection_over_http(site: Site) -> None:
    task = site.get("task").json
    site.post("answer", {"task": task["task"], "answer": answer_of(task), "seconds": 1})
    entry = site.get("review", "eve").json["entry"]
    assert entry["answer"]["category"] == "Animals"
    done = {"id": entry["id"], "verdict": "return", "note": "<b>no</b>"}
    for wrong in (
        done | {"verdict": "delete"}, done | {"note": "x" * 1001}, done | {"note": 7}, done | {"id": "ann"},
        done | {"id": ["ann", entry["id"][1], True, 1]}, done | {"id": [*entry["id"], 1]}, {},
    ):  # fmt: skip
        assert site.post("verdict", wrong, "eve").status_code == 400, wrong
    assert site.post("verdict", done | {"id": [*entry["id"][:3], 10**30]}, "eve").status_code == 409
    assert site.post("verdict", done, "eve").status_code == 200
    assert site.get("task").json["note"] == "<b>no</b>"
    assert site.post("verdict", done | {"id": ["eve", "x", 0, 1]}, "eve").status_code == 403


# ---------------------------------------------------------------- hostile requests


def paths_of(rng: random.Random) -> str:
    """An address that would lead somewhere else where a part of it were a path."""
    steps = [
        "..",
        "%2e%2e",
        "..%2f",
        "%2f",
        "etc",
        "passwd",
        "answers.sqlite",
        "study.json",
        "\\",
        "%5c",
        "%00",
        "images",
        ".",
        "~",
        "C:",
    ]
    return "/".join(rng.choice(steps) for _ in range(rng.randint(1, 6)))


def values_of(rng: random.Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kinds = [
        None,
        True,
        -1,
        0,
        1,
        7,
        1e308,
        10**30,
        "",
        "<script>",
        "../..",
        "\x00",
        "\ud800",
        "'; DROP TABLE answers; --",
    ]
    if depth < 2 and rng.random() < 0.5:
        some = [values_of(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        names = [
            "ranks",
            "skip",
            "problems",
            "category",
            "alignment",
            "task",
            "answer",
            "seconds",
            "__proto__",
        ]
        return {rng.choice(names): one for one in some} if rng.random() < 0.6 else some
    return rng.choice(kinds)


def test_a_thousand_hostile_requests(site: Site) -> None:
    """Nothing is stored, nothing outside is served, and nothing is the server's own fault."""
    rng = random.Random(0)
    secrets = [
        (site.service.folder / name).read_bytes()[:40]
        for name in ("study.json", "items.jsonl", "answers.sqlite")
    ]
    task = site.get("task").json
    for at in range(1000):
        kind = at % 5
        if kind == 0:
            found = site.client.get(site.paths["ann"] + rng.choice(["image/", "", "guide/"]) + paths_of(rng))
        elif kind == 1:
            found = site.client.get(f"/static/{paths_of(rng)}")
        elif kind == 2:
            found = site.post("answer", values_of(rng))
        elif kind == 3:
            found = site.post(
                "answer", {"task": task["task"], "answer": values_of(rng), "seconds": values_of(rng)}
            )
        else:
            content = rng.randbytes(rng.randint(0, 200))
            found = site.client.post(
                site.paths["ann"] + "answer",
                data=content,
                content_type=rng.choice(["application/json", "text/plain", ""]),
            )
        assert 400 <= found.status_code < 500, (at, found.status_code, found.data[:200])
        assert not any(secret in found.data for secret in secrets)
        assert found.mimetype == "application/json"
    assert not site.service.storage.answers()


def test_bodies_are_bounded(site: Site) -> None:
    task = site.get("task").json
    big = {"task": task["task"], "answer": answer_of(task) | {"x": "y" * MAX_BODY}}
    assert site.post("answer", big).status_code == 413
    deep = b'{"answer": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    done = site.client.post(site.paths["ann"] + "answer", data=deep, content_type="application/json")
    assert done.status_code == 400
    number = b'{"task": ' + b"9" * 60_000 + b"}"
    assert (
        site.client.post(
            site.paths["ann"] + "answer", data=number, content_type="application/json"
        ).status_code
        == 400
    )
    for seconds in (float("nan"), float("inf"), -5, 1e9, "3", None, True, []):
        body = json.dumps({"task": task["task"], "answer": answer_of(task), "seconds": seconds})
        code = site.client.post(
            site.paths["ann"] + "answer", data=body, content_type="application/json"
        ).status_code
        assert code == (200 if seconds == 1e9 else 400), seconds
    assert site.service.storage.answers()[0].seconds == 3600


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_names_of_items_do_no_harm(count: int, tmp_path: Path) -> None:
    """Prompts with HTML and path tricks, a thousand items among the slow tests; captions reach the page as they are, as text."""
    tricks = [
        "<script>alert(1)</script>",
        "</title><svg onload=alert(1)>",
        "../../etc/passwd",
        "\u202etxt.exe",
        "{{7*7}}",
        "a\x07b",
        "'\"><img src=x>",
    ]
    prompts = [f"{tricks[at % len(tricks)]} {at}" for at in range(count)]
    found = Site(tmp_path, images(tmp_path / "<i>base", prompts, 2), tasks=("choice", "prompt"), repeats=0)
    seen = set()
    for at in range(2 * count):
        task = found.get("task").json
        seen.add(task["prompt"])
        answer = answer_of(task)
        assert (
            found.post("answer", {"task": task["task"], "answer": answer, "seconds": at}).status_code == 200
        )
    assert found.get("task").json["finished"]
    assert seen == set(prompts)
    page = found.get("statistics", "eve").text
    assert "<i>base" not in page
    assert found.post("export", {}, "eve").json["rankings.jsonl"] == count
    assert {ranking.prompt for ranking in read_rankings(found.service.folder)} == set(prompts)
    standalone = found.service.folder / "statistics.json"
    assert json.loads(standalone.read_text())["answers"] == 2 * count


def test_an_image_that_is_gone_or_huge(tmp_path: Path) -> None:
    data = images(tmp_path / "base", PROMPTS, 2)
    Image.new("L", (9000, 9000)).save(data / "secret_base_0000_0.png")
    (data / "secret_base_0001_0.png").unlink()
    (data / "secret_base_0001_0.png").symlink_to("/etc/passwd")
    found = Site(tmp_path, data, tasks=("rating",), repeats=0)
    assert len(found.service.items) == 6
    next(iter(found.service.images.values())).unlink()
    codes = [found.get(f"image/{identity}").status_code for identity in found.service.images]
    assert sorted(codes) == [200] * 5 + [404]


def test_guidelines_of_the_user_are_text(tmp_path: Path) -> None:
    assert blocks("# A\n\none\ntwo\n- x\n- y\n\nthree\n# B\nfour") == [
        ("h", ["A"]), ("p", ["one two"]), ("li", ["x", "y"]), ("p", ["three"]), ("h", ["B"]), ("p", ["four"]),
    ]  # fmt: skip
    found = Site(tmp_path, images(tmp_path / "base", PROMPTS, 2))
    found.client = Client(application(found.service, "# <script>\n- <b>\n\n{{ 1 }}"))
    page = found.get("guide").text
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<b>" not in page


# ---------------------------------------------------------------- the real server


@pytest.fixture
def running(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server in this process: name -> link."""
    found = service(
        tmp_path,
        images(tmp_path / "base", PROMPTS, 4),
        annotators=tuple(f"p{at}" for at in range(50)),
        repeats=0,
    )
    web = server(found, listening("127.0.0.1", 0), guidelines="")
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield {person.name: f"http://127.0.0.1:{web.port}{path}" for person, path in found.links()}
    web.shutdown()
    thread.join()
    web.server_close()


def test_fifty_at_once(running: dict[str, str], tmp_path: Path) -> None:
    """50 annotators answer everything at the same time, each answer sent twice at once: each is there once."""
    links = [link for name, link in running.items() if name != "eve"]

    def work(link: str) -> None:
        for _ in range(4):
            task = ask(f"{link}task")
            body = {"task": task["task"], "answer": answer_of(task), "seconds": 1}
            with ThreadPoolExecutor(2) as two:
                list(two.map(ask, [f"{link}answer"] * 2, [body] * 2))

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(work, links))
    answers = Storage(tmp_path / "study").answers()
    assert len(answers) == 200
    assert {one.revision for one in answers} == {1}
    assert all(ask(f"{link}task")["finished"] for link in links)


def test_a_refused_body_does_not_spoil_the_connection(running: dict[str, str]) -> None:
    link = running["p0"]
    host, path = link.removeprefix("http://").split("/", 1)
    connection = HTTPConnection(host, timeout=20)
    for size, code in ((200_000, 413), (10, 400)):
        connection.request("POST", f"/{path}answer", b"x" * size, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == code
        response.read()
    connection.request("GET", f"/{path}task")
    assert connection.getresponse().status == 200


def test_a_taken_port_is_said(
    running: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(running["p0"].split(":")[2].split("/")[0])
    data = images(tmp_path / "other", PROMPTS, 2)
    with pytest.raises(SystemExit) as stop:
        annotate.main(
            annotate.Config(output_dir=tmp_path / "b", data=(str(data),), annotators=("ann",), port=port)
        )
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert (
        f"another program listens at 127.0.0.1, port {port}; --port names another port, --port 0 takes"
        in said.err
    )
    assert (said.out, said.err.count("\n")) == ("", 1), "one sentence, before anything is printed"
    assert not (tmp_path / "b").exists(), "and before anything is written"
    for host, why in (
        ("192.0.2.1", "cannot listen at 192.0.2.1, port 0: "),
        ("no.such.host.invalid", "cannot listen at no.such"),
    ):
        with pytest.raises(ValueError, match=why):
            listening(host, 0)


def test_what_another_site_sends_is_refused(site: Site) -> None:
    """Browsers name the site of the page that sends; what is no browser names none, and reading is no matter."""
    task = site.get("task").json
    body = {"task": task["task"], "answer": answer_of(task), "seconds": 1}
    for path, name in (("answer", "ann"), ("verdict", "eve"), ("export", "eve")):
        for origin in (
            "http://evil.example",
            "null",
            "http://localhost.evil.example",
            "http://localhost:81",
            "http://localhost:443",
            "",
            "::",
            "http://[x",
        ):
            found = site.post(path, body, name, headers={"Origin": origin})
            assert found.status_code == 403, (path, origin)
            assert "page of another site" in found.json["error"]
    assert not site.service.storage.answers()
    assert site.get("task", headers={"Origin": "http://evil.example"}).status_code == 200
    for headers in (
        {"Origin": "http://localhost"},
        {"Origin": "https://study.example", "Host": "study.example"},
        {"Origin": "https://study.example", "Host": "study.example:443"},
        {},
    ):
        assert site.post("answer", body, headers=headers).status_code == 200, headers


def test_shares_and_too_few_annotators_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "base", [f"prompt {at}" for at in range(21)], 2)
    flags = {"data": (str(data),), "annotators_per_item": 2, "repeats": 0.1, "serve": False}
    annotate.main(annotate.Config(output_dir=tmp_path / "study", annotators=("ann",), **flags))
    said = capsys.readouterr().err
    assert "note: shares: ann 21 items and 2 repeats\n" in said
    assert (
        "warning: each prompt is to have 2 annotators, and 1 takes part so far; --annotators adds people"
        in said
    )
    annotate.main(annotate.Config(output_dir=tmp_path / "study", annotators=("bob", "cem"), **flags))
    said = capsys.readouterr().err
    assert (
        "note: shares: ann 14 items and 1 repeat, bob 14 items and 1 repeat, cem 14 items and 1 repeat\n"
        in said
    )
    assert "warning" not in said


def test_a_killed_server_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """Killed in the middle of answers that come as fast as they can, three times: all that was confirmed is there, once."""
    data = images(tmp_path / "base", [f"prompt {at}" for at in range(150)], 2)
    words = (
        "--data",
        data,
        "--tasks",
        "choice",
        "--annotators",
        "ann",
        "bob",
        "--output-dir",
        tmp_path / "study",
    )
    confirmed: dict[str, dict[str, Any]] = {"ann": {}, "bob": {}}
    links: list[dict[str, str]] = []
    for trial in range(3):
        with Served(*words) as web:
            links.append(web.links)

            def work(name: str, link: str) -> None:
                try:
                    while not (task := ask(f"{link}task")).get("finished"):
                        body = {"task": task["task"], "answer": answer_of(task), "seconds": 1}
                        ask(f"{link}answer", body)
                        confirmed[name][task["task"]] = body
                except (OSError, ValueError, HTTPException):  # killed, perhaps within an answer
                    return

            threads = [threading.Thread(target=work, args=pair) for pair in web.links.items()]
            for thread in threads:
                thread.start()
            while min(len(found) for found in confirmed.values()) < 25 * (trial + 1):
                assert any(thread.is_alive() for thread in threads)
                time.sleep(0.01)
            web.kill()
            for thread in threads:
                thread.join()
    tokens = [{name: link.split("/")[3] for name, link in found.items()} for found in links]
    assert tokens[0] == tokens[1] == tokens[2], "links stay"
    with Served(*words) as web:
        stored = Storage(tmp_path / "study").answers()
        assert {one.revision for one in stored} == {1}
        for name, link in web.links.items():
            task = ask(f"{link}task")
            assert len(confirmed[name]) <= task["done"] <= len(confirmed[name]) + 3, (
                "3: stored, but not confirmed any more"
            )
            assert task["task"] not in confirmed[name]
            answer_all(link)
            assert ask(f"{link}task")["done"] == 158
        said = web.end()
    assert "rankings.jsonl: 300" in said
    assert len(read_rankings(tmp_path / "study")) == 300
    page = (tmp_path / "study" / "statistics.html").read_text()
    assert "316 answers of 2 annotators (ann, bob)" in page
    assert "--accent" in page


def test_a_second_server_on_the_folder_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "base", PROMPTS, 2)
    words = ("--data", data, "--annotators", "ann", "--output-dir", tmp_path / "study")
    with Served(*words) as web:
        with pytest.raises(AssertionError, match="is being written by process"):
            Served(*words)
        assert "error" not in web.end()
    with pytest.raises(urllib.error.URLError):
        ask(f"{web.links['ann']}task")
