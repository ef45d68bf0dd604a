"""The client of an OpenAI-compatible endpoint: POST ADDRESS/chat/completions, as vLLM, llama.cpp, Ollama and hosted services take it.

    with CallLog(folder / "calls.jsonl") as calls, Client(config, calls) as client:
        asked = client.ask(template.rate(prompt, pictures), functools.partial(read_scores, count=4))

A question has an answer, or an error that is counted and written down; it never has a score that no model gave. What goes wrong with
all questions ends the work soon: an address where nobody has ever listened, and a server that can use no request. The key goes into the
header of requests to this address alone: redirects are not followed, and it is cut out of what the server says.
"""

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx2

from preftune.cli.notes import counted
from preftune.mllm import backoff
from preftune.mllm.answers import AnswerError
from preftune.mllm.calls import CallLog, Usage
from preftune.mllm.config import EndpointConfig
from preftune.mllm.questions import Question
from rewards.input_files import parse_json

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_REPLY = 1 << 23
"""Bytes of a reply."""
SHOWN = 300
"""Characters of a server's error message."""
SECRET = 8
"""Characters from which on a key is one; servers at home take any text, such as none."""
_AGAIN = (408, 425, 429)
CONNECT = 10.0
"""Seconds until a connection that does not come is given up, at most; the network has tried it four times by then."""
SECOND_TRY = 1.0
"""Seconds until an address that nobody has listened at is tried again, once."""
FIRST_QUESTIONS = 3
"""So many questions that the server can do nothing with, or twice those asked at a time, and no answer yet end the work."""
_USELESS = {"rejected": "rejected", "bad reply": "gave no usable reply to"}
"""Errors that are of the request or of the address, and not of one question, where all have them -> what is said of the server."""
_WEAKER = {
    "json-schema": "JSON schemas: --response-format json-object",
    "json-object": "JSON objects: --response-format text",
}
"""What holds a model to JSON -> what else to take where a server does not know it."""
_UNREACHED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
_HINTS = {
    401: "--api-key-env names the environment variable with the key",
    403: "--api-key-env names the environment variable with the key",
    404: "look at --base-url and --model",
    405: "look at --base-url",
}


class EndpointError(ValueError):
    """What ends all questions: a wrong address, key or model, a request that is none, or too many failures in a row."""


class _FailedError(Exception):
    """A request without a reply that could be read."""

    def __init__(self, kind: str, detail: str, *, again: bool, asked_for: float | None = None) -> None:
        """`again`: it may be sent again; `asked_for`: seconds that the server asks to wait before."""
        super().__init__(detail)
        self.kind, self.detail, self.again, self.asked_for = kind, detail, again, asked_for


class _UnreachedError(_FailedError):
    """A request that nobody has got: there was no connection."""


@dataclass(frozen=True, kw_only=True)
class Asked(Generic[T]):
    """What became of a question."""

    value: T | None = None
    """What was read from the answer; None after an error."""
    error: str = ""
    """Kind of the error, else empty."""
    detail: str = ""
    cached: bool = False
    """Whether the answer was known before."""


class Client:
    """Asks an endpoint, from several threads."""

    def __init__(self, config: EndpointConfig, calls: CallLog) -> None:
        """ValueError where the variable of the key is not set."""
        self.config, self.calls = config, calls
        self._key = config.key()
        local = httpx2.URL(config.url).host in ("localhost", "127.0.0.1", "::1")
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key or 'none'}", "Content-Type": "application/json"},
            timeout=httpx2.Timeout(config.timeout, connect=min(config.timeout, CONNECT)),
            limits=httpx2.Limits(max_connections=config.concurrency),
            verify=config.url.startswith("https:"),  # certificates take a while to read
            trust_env=not local,  # a proxy of the environment does not lead to this machine
        )
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._not_before = 0.0
        self._failures = 0  # in a row
        self._useless = Counter[str]()  # failures of this run, by kind
        self._reached = False  # whether there was ever a connection
        self._end = ""  # what ends the work
        self._random = random.Random()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._http.close()

    def each(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Yield items with function(item), as they are done, so many at a time as the configuration says; few items wait in memory.

        What the function raises ends it, once the requests that are under way are done.
        """
        threads = self.config.concurrency
        self._end = ""
        self._stop.clear()

        def ending(item: Item) -> Result:
            try:
                return function(item)
            except EndpointError as error:
                with self._lock:
                    self._end = self._end or str(error)  # threads that wait say the same
                self._stop.set()  # before this thread takes the next item
                raise

        pending: dict[Future[Result], Item] = {}
        with ThreadPoolExecutor(threads) as pool:
            try:
                for item in items:
                    pending[pool.submit(ending, item)] = item
                    if len(pending) >= 2 * threads:
                        yield from _done(pending)
                while pending:
                    yield from _done(pending)
            except BaseException:
                self._stop.set()  # nobody waits for a pause to end
                for future in pending:
                    future.cancel()
                raise

    def ask(self, question: Question, read: Callable[[str], T]) -> Asked[T]:
        """Ask a question, unless its answer is known, and read the answer; `read` raises AnswerError for one that is none.

        EndpointError where no further question makes sense.
        """
        key = question.key(self.config)
        known = self.calls.get(key)
        if known is not None:
            try:
                return Asked(value=read(known), cached=True)
            except AnswerError:  # by rules that are stricter now
                pass
        usage, wrong = Usage(), AnswerError("", "")
        for attempt in range(1 + self.config.answer_retries):
            try:
                body = question.body(self.config, attempt)
            except ValueError as error:
                return Asked(error="bad image", detail=str(error))  # the endpoint has no part in it
            try:
                reply = self._send(json.dumps(body).encode())
            except _FailedError as failed:
                return self._failed(key, failed.kind, failed.detail, usage, attempt + 1)
            usage += usage_of(reply)
            try:
                text = self._redacted(text_of(reply))
                value = read(text)
            except AnswerError as error:
                wrong = error
                continue
            self._failures = 0
            row = {"key": key, "model": self.config.model, "text": text, "attempts": attempt + 1}
            self.calls.add(row, usage)
            return Asked(value=value)
        return self._failed(key, wrong.kind, wrong.detail, usage, attempt + 1)

    def _failed(self, key: str, kind: str, detail: str, usage: Usage, attempts: int) -> Asked[Any]:
        """Write a failure down. EndpointError where it is one too many."""
        detail = self._redacted(detail)
        row = {"key": key, "model": self.config.model, "error": kind, "detail": detail, "attempts": attempts}
        self.calls.add(row, usage)
        with self._lock:
            self._failures += 1
            self._useless[kind] += 1
            failures, alike = self._failures, self._useless[kind]
        if not self.config.max_failures:
            return Asked(error=kind, detail=detail)
        first = max(
            FIRST_QUESTIONS, 2 * self.config.concurrency
        )  # answers under way take longer than refusals
        if kind in _USELESS and alike == failures >= first and not self.calls.answered:
            raise EndpointError(
                f"{self.config.url} {_USELESS[kind]} the first {failures} questions, so no others are asked: {detail}"
                f"{advice(self.config, kind)}; --max-failures 0 goes on nevertheless"
            )
        if self.config.max_failures <= failures:
            raise EndpointError(
                f"{counted(failures, 'question')} in a row got no answer from {self.config.url}, the last: {kind}: {detail}"
                f"{advice(self.config, kind)}; answers are kept, and the same command goes on (--max-failures 0 = never give up)"
            )
        return Asked(error=kind, detail=detail)

    def _send(self, content: bytes) -> dict[str, Any]:
        """Send a request until it is answered; _FailedError where it must not be sent, or not as often, again."""
        for failures in itertools.count(1):
            self._wait_turn()
            try:
                return self._post(content)
            except _FailedError as failed:
                if isinstance(failed, _UnreachedError) and not self._reached:
                    self._try_again_once(failures, failed)
                    continue
                if not failed.again or failures > self.config.retries:
                    raise
                pause = backoff.delay(failures, failed.asked_for, self._random.random())
                if failed.asked_for is None:
                    self._stop.wait(pause)
                else:  # all threads wait
                    with self._lock:
                        self._not_before = max(self._not_before, time.monotonic() + pause)
        raise AssertionError("the count has no end")

    def _try_again_once(self, failures: int, failed: _FailedError) -> None:
        """Wait a moment; EndpointError for the second failure at an address where there was never a connection."""
        if failures > min(self.config.retries, 1):
            secure = "SSL" in failed.detail
            ask = (
                "does it speak https, by a certificate that is known here?"
                if secure
                else "is a server running there?"
            )
            raise EndpointError(
                f"no connection to {self.config.base_url}: {failed.detail}; {ask} (--base-url)"
            )
        self._stop.wait(SECOND_TRY)

    def _wait_turn(self) -> None:
        """Wait while the server has asked for a pause. EndpointError where the work ends."""
        while not self._stop.is_set() and (left := self._not_before - time.monotonic()) > 0:
            self._stop.wait(left)
        if self._stop.is_set():
            raise EndpointError(self._end or "the program is ending")

    def _post(self, content: bytes) -> dict[str, Any]:
        """Send a request once, and return the object of a reply with status 200."""
        deadline = time.monotonic() + self.config.timeout
        try:
            with self._http.stream("POST", self.config.url, content=content) as response:
                self._reached, raw = True, b""
                for part in response.iter_bytes():
                    raw += part
                    if len(raw) > MAX_REPLY:
                        raise _FailedError("bad reply", f"more than {MAX_REPLY} bytes", again=False)
                    if time.monotonic() > deadline:
                        raise _FailedError("timeout", f"not done in {self.config.timeout:g} s", again=True)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            self._reached = self._reached or not isinstance(error, _UNREACHED)
            raise self._lost(error) from error
        if response.status_code != 200:
            self._refuse(response, raw)
        try:
            reply = parse_json(raw.decode(), "the reply")
        except ValueError as error:  # a proxy's page, say
            raise _FailedError("bad reply", str(error)[:SHOWN], again=True) from error
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list) or not reply["choices"]:
            raise _FailedError("bad reply", f"it has no choices: {_message(raw)}", again=True)
        return reply

    def _lost(self, error: httpx2.RequestError) -> _FailedError:
        """What became of a request without a reply."""
        kind = "timeout" if isinstance(error, httpx2.TimeoutException) else "connection"
        detail, name = f"{type(error).__name__}: {error}"[:SHOWN], type(error).__name__
        if isinstance(error, _UNREACHED):
            seconds = min(self.config.timeout, CONNECT)
            silent = f"it did not answer in {seconds:g} s"
            return _UnreachedError(kind, silent if kind == "timeout" else detail, again=True)
        late = f"no answer in {self.config.timeout:g} s ({name})"
        return _FailedError(kind, late if kind == "timeout" else detail, again=True)

    def _refuse(self, response: httpx2.Response, raw: bytes) -> None:
        """Raise what a status other than 200 means: EndpointError where it concerns all questions."""
        status, said = response.status_code, self._redacted(_message(raw))
        detail = f"status {status}: {said}"
        if status in _AGAIN or status >= 500:
            asked_for = backoff.retry_after(response.headers.get("Retry-After"), time.time())
            if asked_for is not None and asked_for > backoff.PATIENCE:
                raise _FailedError("server", f"{detail}; it asks to wait {asked_for:.0f} s", again=False)
            raise _FailedError("server", detail, again=True, asked_for=asked_for)
        if status in _HINTS:
            raise EndpointError(f"{self.config.url} answered with {detail}; {_HINTS[status]}")
        if status < 400:
            where = self._redacted(response.headers.get("Location", "no address"))[:SHOWN]
            raise EndpointError(
                f"{self.config.url} answered with status {status}, which leads to {where}; give the address where it is as --base-url"
            )
        raise _FailedError("rejected", detail, again=False)

    def _redacted(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "[key]") if len(self._key) >= SECRET else text


def advice(config: EndpointConfig, kind: str) -> str:
    """Return what may help against an error of this kind, beginning with a semicolon; nothing where that is not known."""
    if kind == "bad reply":
        return "; look at --base-url"
    weaker = _WEAKER.get(config.response_format) if kind == "rejected" else None
    return f"; if it does not know {weaker}" if weaker else ""


def _done(pending: dict[Future[Result], Item]) -> Iterator[tuple[Item, Result]]:
    """Wait until some are done, and take them out."""
    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in [future for future in pending if future in finished]:  # in the order of the items
        item = pending.pop(future)
        yield item, future.result()


def text_of(reply: dict[str, Any]) -> str:
    """Return the text of a reply's first choice; AnswerError where the model refused, was cut off, or said nothing."""
    choice = reply["choices"][0] if isinstance(reply["choices"][0], dict) else {}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    reason = choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        raise AnswerError(
            "refusal", str(message.get("refusal") or "the content filter of the server")[:SHOWN]
        )
    content = message.get("content")
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if reason == "length":
        raise AnswerError("cut off", "the answer is longer than --max-tokens")
    if not isinstance(content, str) or not content.strip():
        raise AnswerError("malformed", "the answer is empty")
    return content


def usage_of(reply: dict[str, Any]) -> Usage:
    """Return the tokens of a reply, as the server counted them; uncounted where it did not."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return Usage(requests=1, uncounted=1)
    tokens, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(tokens, int) or not isinstance(written, int) or min(tokens, written) < 0:
        return Usage(requests=1, uncounted=1)
    return Usage(requests=1, input=int(tokens), output=int(written))


def _message(raw: bytes) -> str:
    """What a server says of an error: the message of its JSON, else the beginning of the text."""
    text = raw[:MAX_REPLY].decode("utf-8", "replace")
    try:
        value = parse_json(text, "the reply")
    except ValueError:
        value = None
    error = value.get("error", value.get("message")) if isinstance(value, dict) else None
    error = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(error if error is not None else text).split())[:SHOWN]
