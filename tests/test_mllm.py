"""The client of multimodal models against a stub that speaks the protocol: what is an answer, what is retried, what is kept."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rewards
from preftune.mllm import answers, backoff, client
from preftune.mllm.answers import AnswerError, CleanPrompt, read_choice, read_prompt, read_scores
from preftune.mllm.calls import CallLog, Usage
from preftune.mllm.cleaning import clean, clean_all
from preftune.mllm.client import Asked, Client, EndpointError
from preftune.mllm.config import ASPECTS, EndpointConfig
from preftune.mllm.judge import Judge
from preftune.mllm.questions import Question, of_file, of_image
from preftune.mllm.templates import OURS, aspects_of, load
from rewards import own
from stub_endpoint import Reply, StubEndpoint, cleaned, completion, failed, images_of, level, rating, text_of

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short."""
    monkeypatch.setattr(backoff, "FIRST", 0.01)


def grey(value: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def question(*values: int, prompt: str = "a cat") -> Question:
    return load(OURS, "rate", "fidelity").rate(prompt, tuple(of_image(grey(value)) for value in values))


def asked(stub: StubEndpoint, *values: int, calls: CallLog | None = None, **settings: Any) -> Asked[Any]:
    """Ask for the scores of grey images."""
    config = EndpointConfig(base_url=stub.url, model="m", **settings)
    with Client(config, calls or CallLog(None)) as one:
        return one.ask(question(*values), partial(read_scores, count=len(values)))


# ---------------------------------------------------------------- what is sent


def test_the_body_of_a_request() -> None:
    with StubEndpoint() as stub:
        found = asked(
            stub, 0, 255, 128, seed=7, max_tokens=99, image_side=16, body='{"top_p": 0.5, "seed": null}'
        )
    assert found.value == [(1, "I see it. 1"), (5, "I see it. 2"), (3, "I see it. 3")]
    (body,) = stub.requests
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 99
    assert body["top_p"] == 0.5
    assert "seed" not in body
    sent = body["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["strict"] is True
    assert sent["json_schema"]["schema"] == answers.scores_schema(3)
    text = text_of(body)
    assert '"a cat"' in text
    assert "from 1 to 3" in text
    assert "$" not in text
    assert stub.headers[0]["Authorization"] == "Bearer none"


@pytest.mark.parametrize(("name", "sent"), [("json-object", {"type": "json_object"}), ("text", None)])
def test_other_formats(name: str, sent: object) -> None:
    with StubEndpoint() as stub:
        assert asked(stub, 0, response_format=name).value == [(1, "I see it. 1")]
    assert stub.requests[0].get("response_format") == sent


def test_images_are_made_smaller_and_not_larger(tmp_path: Path) -> None:
    grey(255, 8).resize((100, 40)).save(tmp_path / "a.png")
    with (
        StubEndpoint() as stub,
        Client(EndpointConfig(base_url=stub.url, model="m", image_side=50), CallLog(None)) as one,
    ):
        pictures = (of_file(tmp_path / "a.png"), of_image(grey(0, 8)), of_image(grey(9, 60)))
        one.ask(load(OURS, "rate", "fidelity").rate("a", pictures), partial(read_scores, count=3))
    images = images_of(stub.requests[0])
    assert [image.size for image in images] == [(50, 20), (8, 8), (50, 50)]
    assert level(images[0]) == 1


def test_an_address_may_lack_its_version() -> None:
    def url(base: str) -> str:
        return EndpointConfig(base_url=base, model="m").url

    assert (
        url("http://localhost:11434")
        == url("http://localhost:11434/")
        == "http://localhost:11434/v1/chat/completions"
    )
    assert url("https://a.b/openai/v1/") == "https://a.b/openai/v1/chat/completions"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_url": "localhost:8000"}, "must be like http"),
        ({"base_url": "http://me:pass@host/v1"}, "user or password"),
        ({"base_url": "http://host/v1?key=x"}, "must be like http"),
        ({"model": " "}, "--model is empty"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"timeout": 0.0}, "--timeout"),
        ({"concurrency": 0}, "--concurrency must be at least 1"),
        ({"image_side": 8}, "--image-side must be at least 16"),
        ({"price_input": -1.0}, "--price-input"),
        ({"body": "[1]"}, "JSON object"),
        ({"body": "{"}, "not JSON"),
        ({"body": '{"messages": []}'}, "must not hold messages"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        EndpointConfig(**({"base_url": "http://host/v1", "model": "m"} | change))
    assert "pass" not in str(error.value).replace("password", "")


# ---------------------------------------------------------------- what is an answer


@pytest.mark.parametrize(
    "text",
    [
        rating([4, 2]),
        f"```json\n{rating([4, 2])}\n```",
        f'<think>{{"scores": 1}} perhaps</think>\n{rating([4, 2])}',
        f"Here is it: {rating([4, 2])} I hope it helps.",
        rating([4, 2]).replace('"score": 4', '"score": 4.0'),
        json.dumps({"scores": json.loads(rating([4, 2]))["scores"][::-1]}),
    ],
)
def test_answers_that_count(text: str) -> None:
    assert [score for score, _ in read_scores(text, 2)] == [4, 2]
    assert read_scores(text, 2)[0][1] == "I see it. 1"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I\u2019m sorry, I can\u2019t.", "refusal"),
        ("Both are nice.", "malformed"),
        ("[4, 2]", "malformed"),
        (rating([4, 2])[:-3], "malformed"),
        ('{"scores": ' + "[" * 200 + "]" * 200 + "}", "malformed"),
        ("{}", "wrong schema"),
        ('{"scores": 4}', "wrong schema"),
        (rating([4]), "wrong schema"),
        (rating([4, 2, 3]), "wrong schema"),
        (rating([4, 6]), "wrong schema"),
        (rating([0, 2]), "wrong schema"),
        (rating([4, 2]).replace('"score": 4', '"score": "4"'), "wrong schema"),
        (rating([4, 2]).replace('"score": 4', '"score": true'), "wrong schema"),
        (rating([4, 2]).replace('"score": 4', '"score": 4.5'), "wrong schema"),
        (rating([4, 2]).replace('"score": 4', '"score": NaN'), "wrong schema"),
        (rating([4, 2]).replace('"score": 4', '"score": null'), "wrong schema"),
        (rating([4, 2]).replace('"image": 2', '"image": 1'), "wrong schema"),
        (rating([4, 2]).replace('"image": 2', '"image": 0'), "wrong schema"),
        (rating([4, 2]).replace('"I see it. 1"', "7"), "wrong schema"),
        ('{"scores": ["a", "b"]}', "wrong schema"),
    ],
)
def test_answers_that_do_not_count(text: str, kind: str) -> None:
    with pytest.raises(AnswerError) as error:
        read_scores(text, 2)
    assert error.value.kind == kind


def test_choices_and_prompts() -> None:
    assert read_choice('{"rationale": " r ", "better": "second"}') == ("second", "r")
    for better in ('"both"', "1", "null", '["first"]'):
        with pytest.raises(AnswerError, match="wrong schema"):
            read_choice(f'{{"rationale": "r", "better": {better}}}')
    for unsafe in (False, True):
        assert read_prompt(cleaned(" a\n cat ", unsafe=unsafe)) == CleanPrompt(prompt="a cat", unsafe=unsafe)
    for prompt in ('" "', "3", '"\\ud800"'):
        with pytest.raises(AnswerError, match="wrong schema: prompt"):
            read_prompt(f'{{"prompt": {prompt}, "unsafe": false}}')
    for text in ('{"prompt": "a"}', '{"prompt": "a", "unsafe": "no"}', '{"prompt": "a", "unsafe": 0}'):
        with pytest.raises(AnswerError, match="wrong schema: unsafe"):
            read_prompt(text)


def test_schemas_say_what_is_read() -> None:
    """What the server enforces is what is accepted."""
    item = answers.scores_schema(2)["properties"]["scores"]
    assert (item["minItems"], item["maxItems"]) == (2, 2)
    assert list(item["items"]["properties"]) == ["image", "rationale", "score"]
    assert item["items"]["properties"]["image"]["enum"] == [1, 2]
    assert item["items"]["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]
    assert answers.choice_schema()["required"] == ["rationale", "better"]
    for schema in (answers.scores_schema(2), item["items"], answers.choice_schema(), answers.prompt_schema()):
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])


WRONG = {
    "malformed": completion("{"),
    "wrong schema": completion(rating([9])),
    "refusal": completion(None, refusal="I cannot help with that."),
    "cut off": completion(rating([3]), finish="length"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answers_are_asked_for_again_and_never_a_score(kind: str, tmp_path: Path) -> None:
    with StubEndpoint(faults=[WRONG[kind]] * 2) as stub, CallLog(tmp_path / "c.jsonl") as calls:
        assert asked(stub, 255, calls=calls, answer_retries=2, seed=5).value == [(5, "I see it. 1")]
        assert [body["seed"] for body in stub.requests] == [5, 6, 7]
        assert calls.used == Usage(requests=3, input=300, output=60), "what was paid"
    with StubEndpoint(faults=[WRONG[kind]] * 9) as stub, CallLog(tmp_path / "d.jsonl") as calls:
        found = asked(stub, 255, calls=calls, answer_retries=1)
        assert (found.value, found.error) == (None, kind)
        assert len(stub.requests) == 2
        assert calls.errors == {kind: 1}
    (row,) = map(json.loads, (tmp_path / "d.jsonl").read_text().splitlines())
    assert row["error"] == kind
    assert row["attempts"] == 2
    assert row["usage"]["requests"] == 2
    assert "text" not in row
    with StubEndpoint() as stub, CallLog(tmp_path / "d.jsonl") as calls:
        assert asked(stub, 255, calls=calls).value == [(5, "I see it. 1")], "a failure is no answer"
        assert len(stub.requests) == 1


def test_other_shapes_of_a_reply() -> None:
    parts = [{"type": "text", "text": rating([3])[:9]}, {"type": "text", "text": rating([3])[9:]}]
    faults = [
        completion(None, content=parts),
        completion(rating([2]), tokens=None),
        completion(" "),
        completion(rating([1]), finish="content_filter"),
    ]
    with StubEndpoint(faults=faults) as stub:
        log = CallLog(None)
        assert asked(stub, 0, calls=log).value == [(3, "I see it. 1")]
        assert asked(stub, 9, calls=log).value == [(2, "I see it. 1")]
        assert log.used == Usage(requests=2, uncounted=1, input=100, output=20)
        assert asked(stub, 19, answer_retries=0).error == "malformed"
        assert asked(stub, 29, answer_retries=0).error == "refusal"


# ---------------------------------------------------------------- what is sent again


@pytest.mark.parametrize(
    "fault",
    [
        failed(429),
        failed(500),
        failed(503),
        failed(529),
        failed(408),
        Reply(hang_up=True),
        Reply(content=b"<html>a proxy</html>"),
        Reply(content=b'{"error": {"message": "overloaded"}}'),
        Reply(content=b'{"choices": []}'),
        Reply(after=3.0),
    ],
    ids=lambda fault: f"{fault.status} {fault.content[:12]!r} {fault.hang_up} {fault.after}",
)
def test_transient_faults_are_retried(fault: Reply) -> None:
    timeout = 1.0 if fault.after else 30.0
    with StubEndpoint(faults=[fault] * 2) as stub:
        found = asked(stub, 255, timeout=timeout, retries=2)
        assert found.value == [(5, "I see it. 1")]
        assert len(stub.requests) == 3
        assert stub.requests[0] == stub.requests[2], "the same request"
    with StubEndpoint(faults=[fault] * 2) as stub:
        found = asked(stub, 255, timeout=timeout, retries=1)
        assert found.value is None
        assert found.error in ("server", "connection", "bad reply", "timeout")
        assert len(stub.requests) == 2


NOBODY = r"no connection to {}: .*; is a server running there\? \(--base-url\)$"


@pytest.mark.parametrize("retries", [0, 5])
def test_a_server_that_is_not_there(retries: int) -> None:
    """All threads say the same sentence, soon."""
    with StubEndpoint() as stub:
        pass
    start = time.monotonic()
    with (
        Client(EndpointConfig(base_url=stub.url, model="m", retries=retries), CallLog(None)) as one,
        pytest.raises(EndpointError, match=NOBODY.format(stub.url)),
    ):
        for _ in one.each(lambda n: one.ask(question(n), partial(read_scores, count=1)), range(40)):
            pass
    assert time.monotonic() - start < (1 if not retries else 3)


def test_a_thread_that_waited_says_why_the_work_ends() -> None:
    """Not that it ends, in place of the reason, where both are done at once."""
    said: list[str] = []

    def rate(value: int) -> None:
        if value == 0:
            one._stop.wait(30)
        try:
            one.ask(question(value), partial(read_scores, count=1))
        except EndpointError as error:
            said.append(str(error))
            raise

    with StubEndpoint(faults=[failed(404, message="no model m")]) as stub:
        config = EndpointConfig(base_url=stub.url, model="m", concurrency=2)
        with Client(config, CallLog(None)) as one, pytest.raises(EndpointError, match="no model m"):
            list(one.each(rate, range(2)))
    assert len(said) == 2
    assert len({*said}) == 1


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket whose queue is full: the network drops what comes, as it does for a host behind a wall."""
    monkeypatch.setattr(client, "CONNECT", 0.3)
    monkeypatch.setattr(client, "SECOND_TRY", 0.01)
    with socket.socket() as deaf, contextlib.ExitStack() as stack:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(8):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        with (
            Client(EndpointConfig(base_url=url, model="m"), CallLog(None)) as one,
            pytest.raises(EndpointError, match=NOBODY.format(url)) as error,
        ):
            one.ask(question(1), partial(read_scores, count=1))
    assert "it did not answer in 0.3 s" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "words", "ask"),
    [
        ("ConnectError", "[Errno -2] Name or service not known", "is a server running there?"),
        ("ConnectError", "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed", "does it speak https"),
        ("ProxyError", "403 Forbidden", "is a server running there?"),
    ],
)
def test_an_address_that_leads_nowhere(
    kind: str, words: str, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that nobody knows, a certificate, a proxy: tried twice, whatever --retries."""
    monkeypatch.setattr(client, "SECOND_TRY", 0.01)
    tries = []

    def stream(*args: object, **kwargs: object) -> None:
        tries.append(args)
        raise getattr(client.httpx2, kind)(words)

    config = EndpointConfig(base_url="http://nowhere.invalid/v1", model="m")
    with Client(config, CallLog(None)) as one:
        monkeypatch.setattr(one._http, "stream", stream)
        with pytest.raises(EndpointError) as error:
            one.ask(question(1), partial(read_scores, count=1))
    assert len(tries) == 2
    assert f"no connection to http://nowhere.invalid/v1: {kind}: {words}; {ask}" in str(error.value)


def test_a_server_that_comes_at_once_or_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there at the second try is asked; where one was, a lost connection is retried as always."""
    with StubEndpoint() as stub:
        pass
    port = int(stub.url.split(":")[2].partition("/")[0])
    with Client(EndpointConfig(base_url=stub.url, model="m", retries=2), CallLog(None)) as one:
        monkeypatch.setattr(client, "SECOND_TRY", 0.5)
        started: list[StubEndpoint] = []
        timer = threading.Timer(0.2, lambda: started.append(StubEndpoint(port=port).__enter__()))
        timer.start()
        assert one.ask(question(255), partial(read_scores, count=1)).value == [(5, "I see it. 1")]
        started[0].__exit__()
    with StubEndpoint(faults=[Reply(hang_up=True)]) as stub:
        calls = CallLog(None)
        with Client(EndpointConfig(base_url=stub.url, model="m", retries=2), calls) as one:
            monkeypatch.setattr(one, "_wait_turn", lambda: stub.__exit__() if stub.requests else None)
            found = one.ask(question(255), partial(read_scores, count=1))
    assert (found.error, calls.errors) == ("connection", {"connection": 1})


@pytest.mark.parametrize(
    ("reply", "settings", "words"),
    [
        (failed(400, message="unknown json_schema"), {}, "rejected the first 3 questions.*status 400: unknown json_schema; if it"
         " does not know JSON schemas: --response-format json-object; --max-failures 0 goes on nevertheless$"),
        (failed(422, message="no"), {"response_format": "json-object"}, "status 422: no; if it .* --response-format text; --max-failures 0 goes on nevertheless$"),
        (failed(400, message="no"), {"response_format": "text"}, "status 400: no; --max-failures 0 goes on nevertheless$"),
        (Reply(content=b"<html>"), {"retries": 0}, "gave no usable reply to the first 3 questions.*; look at --base-url; --max-failures 0 goes on nevertheless$"),
    ],
)  # fmt: skip
def test_a_server_that_can_use_no_question(reply: Reply, settings: dict[str, Any], words: str) -> None:
    """Three questions show it; where there was an answer, or another failure, or --max-failures 0, they do not."""

    def ask(calls: CallLog, answer: Callable[[dict[str, Any]], Reply], **more: Any) -> int:
        with StubEndpoint(answer) as stub:
            config = EndpointConfig(base_url=stub.url, model="m", **{"concurrency": 1} | settings | more)
            with Client(config, calls) as one:
                rate = partial(read_scores, count=1)
                return sum(
                    found.value is None
                    for _, found in one.each(lambda n: one.ask(question(n), rate), range(9))
                )

    with pytest.raises(EndpointError, match=words):
        ask(CallLog(None), lambda body: reply)
    assert ask(CallLog(None), lambda body: reply, max_failures=0) == 9
    calls = CallLog(None)
    calls.add({"key": "earlier", "text": "an answer"}, Usage())
    assert ask(calls, lambda body: reply) == 9
    seen: list[object] = []

    def mixed(body: dict[str, Any]) -> Reply:
        seen.append(body)
        return completion("I can't.") if len(seen) == 2 else reply

    assert ask(CallLog(None), mixed, answer_retries=0) == 9
    some = {"concurrency": 8, "max_failures": 20}

    def filtered(body: dict[str, Any]) -> Reply:  # the first five are refused at once, while others think
        seen.append(body)
        if len(seen) <= 5:
            return reply
        time.sleep(0.3)
        return completion(rating([3]))

    seen.clear()
    assert ask(CallLog(None), filtered, **some) == 5
    with pytest.raises(EndpointError, match=r"2 questions in a row got no answer.*(rejected|bad reply)"):
        ask(CallLog(None), lambda body: reply, max_failures=2)


def test_retry_after_is_honoured_by_all_threads() -> None:
    def rate(value: int) -> Asked[Any]:
        return one.ask(question(value), partial(read_scores, count=1))

    with StubEndpoint(faults=[failed(429, {"Retry-After": "1"})]) as stub:
        config = EndpointConfig(base_url=stub.url, model="m", concurrency=2)
        with Client(config, CallLog(None)) as one:
            assert all(found.value for _, found in one.each(rate, range(20)))
    after = [at - stub.times[0] for at in stub.times[1:]]
    assert not [at for at in after if 0.3 < at < 0.95], "but one that was under way"
    assert after[-1] > 0.95
    assert len(stub.requests) == 21


def test_a_pause_beyond_patience_fails() -> None:
    with StubEndpoint(faults=[failed(429, {"Retry-After": "3600"}, "quota")]) as stub:
        found = asked(stub, 255)
    assert found.error == "server"
    assert "3600 s" in found.detail
    assert len(stub.requests) == 1


def test_back_off() -> None:
    backoff_first, backoff.FIRST = backoff.FIRST, 0.5
    try:
        assert [backoff.delay(n, None, 0) for n in (1, 2, 3, 4)] == [0.25, 0.5, 1, 2]
        assert backoff.delay(3, None, 0.5) == 1.5
        assert backoff.delay(50, None, 0) == 30
        assert backoff.delay(1, 7.0, 0) == 7
        assert 7 < backoff.delay(1, 7.0, 0.999) <= 7.5
    finally:
        backoff.FIRST = backoff_first
    assert backoff.retry_after(None, 0) is None
    assert backoff.retry_after("2.5", 0) == 2.5
    assert backoff.retry_after("-1", 0) == 0
    assert backoff.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 60) == 40
    assert backoff.retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 160) == 0
    assert backoff.retry_after("soon", 0) is None
    assert backoff.retry_after("inf", 0) is None


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_request_is_not_sent_again(status: int) -> None:
    with StubEndpoint(faults=[failed(status, message="too many images")]) as stub:
        found = asked(stub, 255)
    assert (found.value, found.error) == (None, "rejected")
    assert "too many images" in found.detail
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "--api-key-env"),
        (403, "--api-key-env"),
        (404, "look at --base-url and --model"),
        (307, "leads to http://elsewhere/v1"),
    ],
)
def test_what_ends_all_questions(status: int, words: str) -> None:
    fault = failed(status, {"Location": "http://elsewhere/v1"})
    with StubEndpoint(faults=[fault]) as stub, pytest.raises(EndpointError, match=words):
        asked(stub, 255)
    assert len(stub.requests) == 1


def test_many_failures_in_a_row_end_the_work() -> None:
    def rate(value: int) -> Asked[Any]:
        return one.ask(question(value), partial(read_scores, count=1))

    def moody(body: dict[str, Any]) -> Reply:
        return completion("{") if len(stub.requests) % 4 else completion(rating([3]))

    settings: dict[str, Any] = {"model": "m", "max_failures": 4, "answer_retries": 0, "concurrency": 1}
    with (
        StubEndpoint(moody) as stub,
        Client(EndpointConfig(base_url=stub.url, **settings), CallLog(None)) as one,
    ):
        assert sum(found.value is not None for _, found in one.each(rate, range(40))) == 10
    with (
        StubEndpoint(lambda body: completion("{")) as stub,
        Client(EndpointConfig(base_url=stub.url, **settings), CallLog(None)) as one,
    ):
        with pytest.raises(EndpointError, match=r"4 questions in a row got no answer.*malformed"):
            list(one.each(rate, range(40)))
        assert 4 <= len(stub.requests) <= 5


def test_fifty_at_once() -> None:
    def rate(value: int) -> Asked[Any]:
        return one.ask(question(value), partial(read_scores, count=1))

    with StubEndpoint(after=1.0) as stub, CallLog(None) as calls:
        config = EndpointConfig(base_url=stub.url, model="m", concurrency=50, timeout=60)
        with Client(config, calls) as one:
            found = dict(one.each(rate, range(0, 200, 2)))
    values = {value: one.value[0][0] for value, one in found.items()}
    assert values == {value: 1 + round(4 * value / 255) for value in range(0, 200, 2)}
    assert 20 <= stub.most <= 50
    assert calls.used.requests == 100


def test_few_items_wait_in_memory() -> None:
    drawn, done = 0, 0

    def items() -> Any:
        nonlocal drawn
        for value in range(100):
            drawn += 1
            assert drawn - done <= 7
            yield value

    with Client(
        EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m", concurrency=3), CallLog(None)
    ) as one:
        for _ in one.each(lambda value: value, items()):
            done += 1
    assert done == 100


# ---------------------------------------------------------------- what is kept


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    with StubEndpoint() as stub:
        for _ in range(2):
            with CallLog(path) as calls:
                found = [asked(stub, 255, calls=calls) for _ in range(2)]
                assert [one.value for one in found] == [[(5, "I see it. 1")]] * 2
                assert found[1].cached
        assert len(stub.requests) == 1
        with CallLog(path) as calls:
            assert calls.used == Usage(requests=1, input=100, output=20)
            for change in (
                {"temperature": 0.1},
                {"seed": 1},
                {"image_side": 64},
                {"max_tokens": 5},
                {"body": '{"a": 1}'},
            ):
                assert not asked(stub, 255, calls=calls, **change).cached, change
            assert not asked(stub, 254, calls=calls).cached
            assert not asked(stub, 255, 255, calls=calls).cached
            assert asked(stub, 255, calls=calls, concurrency=9, timeout=9.0, retries=1).cached, (
                "these change no answer"
            )
    with StubEndpoint() as elsewhere, CallLog(path) as calls:
        assert asked(elsewhere, 255, calls=calls).cached, "the same model at another address"


def test_a_key_tells_questions_apart() -> None:
    config = EndpointConfig(base_url="http://h/v1", model="m")
    pair = (of_image(grey(1)), of_image(grey(2)))
    made = [
        load(OURS, "rate", "fidelity").rate("a", pair),
        load(OURS, "rate", "fidelity").rate("a", pair[::-1]),
        load(OURS, "rate", "fidelity").rate("b", pair),
        load(OURS, "rate", "aesthetic").rate("a", pair),
        load(OURS, "compare", "fidelity").compare("a", pair),
    ]
    assert len({one.key(config) for one in made}) == 5
    assert of_image(grey(0, 8)).digest != of_image(Image.new("RGB", (16, 4))).digest


def test_lines_that_are_broken_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calls.jsonl"
    with CallLog(path) as calls:
        for key in "abc":
            calls.add({"key": key, "text": f"text {key}"}, Usage(requests=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with CallLog(path) as calls:
        assert [calls.get(key) for key in "abc"] == ["text a", "text b", None]
        calls.add({"key": "d", "text": "text d"}, Usage())
        assert calls.get("d") == "text d"
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"key": "d"')
    path.write_bytes(whole[:-4])
    with CallLog(path, alone=False) as calls:
        calls.add({"key": "d", "text": "text d"}, Usage())
    with CallLog(path) as calls:
        assert [calls.get(key) for key in "abcd"] == ["text a", "text b", None, "text d"]
        assert calls.used.requests == 2
    assert "1 line is no call" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"file_name": "a"}\n')
    with pytest.raises(ValueError, match="no file of calls"):
        CallLog(tmp_path / "other.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="named pipe"):
        CallLog(tmp_path / "pipe")


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    with CallLog(tmp_path / "c.jsonl") as calls:

        def write(first: int) -> None:
            for number in range(first, first + 200):
                calls.add({"key": str(number), "text": "x" * (number % 97)}, Usage(requests=1))

        threads = [threading.Thread(target=write, args=(1000 * k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(
            calls.get(str(1000 * k + n)) == "x" * ((1000 * k + n) % 97) for k in range(8) for n in range(200)
        )
    with CallLog(tmp_path / "c.jsonl") as calls:
        assert calls.used.requests == 1600


def test_cost() -> None:
    used = Usage(input=1_000_000, output=500_000) + Usage(input=1_000_000)
    assert used.cost(0.4, 1.6) == pytest.approx(1.6)


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_is_in_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level("DEBUG")
    echo = failed(500, message=f"the key {KEY} is tired")
    faults = [echo, completion(f"I cannot, by {KEY}"), completion(rating([4], KEY)), echo, echo]
    with StubEndpoint(faults=faults, key=KEY) as stub, CallLog(tmp_path / "c.jsonl") as calls:
        assert asked(stub, 255, calls=calls, api_key_env="MY_KEY").value == [(4, "[key] 1")]
        found = asked(stub, 0, calls=calls, api_key_env="MY_KEY", retries=1)
        assert "[key] is tired" in found.detail
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OTHER", "sk-wrong-98765")
    with StubEndpoint(key=KEY) as stub, pytest.raises(EndpointError) as error:
        asked(stub, 255, api_key_env="OTHER")
    said = "".join(
        (str(error.value), *capsys.readouterr(), caplog.text, *(p.read_text() for p in tmp_path.iterdir()))
    )
    assert "Incorrect API key provided: [key]" in said
    assert KEY not in said
    assert "sk-wrong" not in said


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_KEY: this environment variable is not set"):
        EndpointConfig(base_url="http://h/v1", model="m", api_key_env="NO_KEY").key()
    monkeypatch.setenv("NO_KEY", "a\nb secret")
    with pytest.raises(ValueError, match="no key has") as error:
        EndpointConfig(base_url="http://h/v1", model="m", api_key_env="NO_KEY").key()
    assert "secret" not in str(error.value)


def test_redirects_are_not_followed_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with StubEndpoint() as elsewhere:
        fault = failed(307, {"Location": f"{elsewhere.url}/chat/completions"})
        with StubEndpoint(faults=[fault]) as stub, pytest.raises(EndpointError, match="status 307"):
            asked(stub, 255, api_key_env="MY_KEY")
        assert not elsewhere.requests


# ---------------------------------------------------------------- templates


def test_our_templates() -> None:
    assert set(aspects_of(OURS)) == set(ASPECTS)
    digests = {load(OURS, kind, aspect).digest for kind in ("rate", "compare") for aspect in ASPECTS}
    assert len(digests) == 8
    for aspect in ASPECTS:
        text = load(OURS, "rate", aspect).rate('say "$prompt" and $count', (of_image(grey(1)),)).text
        assert r'"say \"$prompt\" and $count"' in text, "a prompt is data"
        assert all(f"\n{score}: " in text for score in (1, 3, 5))
        assert "from 1 to 1" in text


def test_own_templates(tmp_path: Path) -> None:
    (tmp_path / "rate.txt").write_text(
        "${title}s cost $$5, $definition $anchor_1 $anchor_3 $anchor_5 in $prompt, ${count}x"
    )
    (tmp_path / "joy.yaml").write_text(
        "title: joy\ndefinition: is it $fun?\nanchors: {1: no, 3: so, 5: 'yes'}\n".replace("no,", "'no',")
    )
    text = load(tmp_path, "rate", "joy").rate("p", (of_image(grey(1)),)).text
    assert text == 'joys cost $5, is it $fun? no so yes in "p", 1x'
    with pytest.raises(ValueError, match=r"no aspect 'jo'.*has joy"):
        load(tmp_path, "rate", "jo")
    with pytest.raises(ValueError, match=r"compare.txt"):
        load(tmp_path, "compare", "joy")
    before = load(tmp_path, "rate", "joy").digest
    (tmp_path / "rate.txt").write_text("$prompt $title")
    assert load(tmp_path, "rate", "joy").digest != before
    for text, words in (
        ("$prompt $other", "must stand before"),
        ("$title", "has no .prompt"),
        ("$prompt $", "must stand before"),
    ):
        (tmp_path / "rate.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            load(tmp_path, "rate", "joy")
    for text in (
        "title: joy\n",
        "[1]\n",
        "title: a\ndefinition: b\nanchors: {1: a, 3: b}\n",
        "title: 3\ndefinition: b\nanchors: {1: a, 3: b, 5: c}\n",
        "{",
    ):
        (tmp_path / "joy.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"joy.yaml"):
            load(tmp_path, "rate", "joy")


# ---------------------------------------------------------------- judge and cleaner

JUDGE = """
from preftune.mllm.judge import Judge
judge = Judge(base_url={url!r}, model="m", aspects=["fidelity", "aesthetic"], calls={calls!r}, answer_retries=0)
"""


def test_a_judge_is_a_reward(tmp_path: Path) -> None:
    """FILE.py:judge, as --rewards and --holdout-rewards name it; what was judged is not asked for again."""
    with StubEndpoint() as stub:
        (tmp_path / "j.py").write_text(JUDGE.format(url=stub.url, calls=str(tmp_path / "calls.jsonl")))
        name = f"{tmp_path / 'j.py'}:judge"
        own.named_by_user(name)
        scorer = rewards.load(name)
        pixels = torch.tensor([0.0, 0.25, 1.2])[:, None, None, None].expand(3, 3, 8, 8)
        scores = scorer(pixels, ["a", "b", "c"])
        assert scores.tolist() == [1, 2, 5]
        assert len(stub.requests) == 6
        assert scorer(pixels, ["a", "b", "c"]).tolist() == [1, 2, 5]
        assert len(stub.requests) == 6
        assert '"b"' in "".join(map(text_of, stub.requests))
        stub.answer = lambda body: completion("I can't.")
        with pytest.raises(own.OwnRewardError, match=r"did not rate .* of an image of 'd': refusal"):
            scorer(pixels[:1], ["d"])
        stub.answer = lambda body: completion(rating([4]))
        assert scorer(pixels[:1], ["d"]).tolist() == [4], "it works again"


def test_a_judge_averages_aspects() -> None:
    def by_aspect(body: dict[str, Any]) -> Reply:
        return completion(rating([5 if "aesthetic" in text_of(body) else 2]))

    with StubEndpoint(by_aspect) as stub:
        judge = Judge(base_url=stub.url, model="m", aspects=("fidelity", "aesthetic"))
        assert judge(torch.zeros(2, 3, 8, 8), ["a", "a"]).tolist() == [3.5, 3.5]
        with pytest.raises(ValueError, match="no aspect 'beauty'"):
            Judge(base_url=stub.url, model="m", aspects=("beauty",))
        with pytest.raises(ValueError, match="needs an aspect"):
            Judge(base_url=stub.url, model="m", aspects=())


def test_cleaned_prompts() -> None:
    with StubEndpoint() as stub, Client(EndpointConfig(base_url=stub.url, model="m"), CallLog(None)) as one:
        assert clean(one, 'a "red" cat, trending on artstation').value == CleanPrompt(
            prompt='a "red" cat', unsafe=False
        )
        prompts = ["a dog, 8k", "a hen, hd", "a dog, 8k"]
        assert {place: found.value and found.value.prompt for place, found in clean_all(one, prompts)} == {
            0: "a dog",
            1: "a hen",
            2: "a dog",
        }
        assert len(stub.requests) == 3
        assert not images_of(stub.requests[0])
        stub.answer = lambda body: completion(cleaned(""))
        assert clean(one, "a pig").error == "wrong schema"


def test_a_slow_drip_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never."""

    class Drip:
        status_code, headers = 200, {}

        def __enter__(self) -> "Drip":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def iter_bytes(self) -> Any:
            while True:
                time.sleep(0.05)
                yield b" "

    stream: Callable[..., Drip] = lambda *args, **kwargs: Drip()  # noqa: E731
    with Client(
        EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m", timeout=0.2, retries=0), CallLog(None)
    ) as one:
        monkeypatch.setattr(one._http, "stream", stream)
        assert one.ask(question(1), partial(read_scores, count=1)).error == "timeout"
        monkeypatch.setattr(client, "MAX_REPLY", 2)
        assert one.ask(question(1), partial(read_scores, count=1)).error == "bad reply"
