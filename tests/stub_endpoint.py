"""A stub of an OpenAI-compatible endpoint on 127.0.0.1 that speaks its protocol, for tests of models as annotators.

By default it looks at the images: a score is 1 to 5 by the mean level, and of two images the brighter one is better. `faults` are
replies that are given first, one a request, in place of that.

    with StubEndpoint(faults=[failed(429, {"Retry-After": "1"})]) as stub:
        Client(EndpointConfig(base_url=stub.url, model="m"), CallLog(None)).ask(...)
"""

import base64
import functools
import io
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from PIL import Image

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a request gets."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds before it is sent."""
    hang_up: bool = False
    """Close the connection without a reply."""


def completion(
    text: str | None, *, tokens: tuple[int, int] | None = (100, 20), finish: str = "stop", **message: Any
) -> Reply:
    """A chat completion with this text."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
    }
    reply: Body = {"id": "x", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice]}
    if tokens is not None:
        reply["usage"] = {
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "total_tokens": sum(tokens),
        }
    return Reply(content=json.dumps(reply).encode(), headers={"Content-Type": "application/json"})


def failed(status: int, headers: Mapping[str, str] | None = None, message: str = "it failed") -> Reply:
    """An error, as OpenAI writes it."""
    content = json.dumps({"error": {"message": message, "type": "e", "code": None}}).encode()
    return Reply(status=status, content=content, headers=headers or {})


def images_of(body: Body) -> list[Image.Image]:
    """The images of a request, decoded; AssertionError unless it is well formed."""
    (message,) = body["messages"]
    assert message["role"] == "user"
    images, label = [], ""
    for part in message["content"]:
        if part["type"] == "text":
            label = part["text"]
            continue
        assert part["type"] == "image_url"
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert label == f"Image {len(images) + 1}:"
        images.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]))
    return images


def text_of(body: Body) -> str:
    """The instructions of a request."""
    return str(body["messages"][0]["content"][0]["text"])


def level(image: Image.Image) -> float:
    """The mean level of an image, in [0, 1]."""
    grey = image.convert("L").resize((1, 1), Image.Resampling.BOX)
    return float(grey.getpixel((0, 0))) / 255  # type: ignore[arg-type]


def score(image: Image.Image) -> int:
    """What the stub thinks of an image."""
    return 1 + round(4 * level(image))


def rating(scores: Iterable[int], rationale: str = "I see it.") -> str:
    """An answer with scores."""
    rows = [{"image": n, "rationale": f"{rationale} {n}", "score": s} for n, s in enumerate(scores, 1)]
    return json.dumps({"scores": rows})


def cleaned(prompt: str, *, unsafe: bool = False) -> str:
    """An answer with a cleaned prompt."""
    return json.dumps({"prompt": prompt, "unsafe": unsafe})


def look(body: Body) -> Reply:
    """The answer of an honest model."""
    images, text = images_of(body), text_of(body)
    if '"better"' in text:
        first, second = map(score, images)
        better = "tie" if first == second else "first" if first > second else "second"
        return completion(json.dumps({"rationale": "Brighter.", "better": better}))
    if '"scores"' in text:
        return completion(rating(map(score, images)))
    prompt = json.loads(re.findall(r'^(".*")$', text, re.MULTILINE)[0])
    return completion(cleaned(prompt.partition(",")[0], unsafe="naked" in prompt))


class StubEndpoint:
    """The server. `requests` holds every request's body in the order in which they came; `most` how many were there at once."""

    def __init__(
        self,
        answer: Callable[[Body], Reply] = look,
        *,
        faults: Iterable[Reply] = (),
        key: str = "",
        after: float = 0.0,
        port: int = 0,
    ) -> None:
        """key: what requests must bring; after: seconds that every answer takes."""
        self.answer, self.key, self.after = answer, key, after
        self.faults = list(faults)
        self.requests: list[Body] = []
        self.headers: list[Mapping[str, str]] = []
        self.times: list[float] = []
        self.answered = self.now = self.most = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})(
            ("127.0.0.1", port), handler
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, headers: Mapping[str, str], content: bytes) -> Reply:
        """What a request gets; an error of the protocol is a 400 with a sentence."""
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            given = headers.get("Authorization", "").removeprefix("Bearer ")
            return failed(401, message=f"Incorrect API key provided: {given}")
        if path != "/v1/chat/completions":
            return failed(404, message=f"no such path {path}")
        try:
            body = json.loads(content)
            assert headers.get("Content-Type") == "application/json"
            images_of(body)
        except (ValueError, AssertionError, LookupError) as error:
            return failed(400, message=f"bad request: {error!r}")
        with self.lock:
            self.requests.append(body)
            self.headers.append(dict(headers))
            self.times.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
        return self.answer(body) if fault is None else fault


@contextmanager
def killed_after(stub: StubEndpoint, answers: int, work: Callable[[], None]) -> Iterator[None]:
    """Do work in a child of this process, which is killed once the stub has answered so often; the stub runs in the block, not before.

    The child starts at once, with all that is imported here: a fork, from before the stub has threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that other tests have left
        child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    with stub:
        while stub.answered < answers:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended by itself"
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen = -1
        while seen != (seen := len(stub.requests)) or stub.now:  # what was under way
            time.sleep(0.2)
        yield


@functools.cache
def background() -> str:
    """The address of a stub that runs to the end of this process."""
    return StubEndpoint().__enter__().url


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubEndpoint

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.stub.lock:
            self.stub.now += 1
            self.stub.most = max(self.stub.most, self.stub.now)
        try:
            reply = self.stub.reply(self.path, self.headers, content)
            time.sleep(self.stub.after + reply.after)
        finally:
            with self.stub.lock:
                self.stub.now -= 1
        if reply.hang_up:
            self.close_connection = True
            return
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)
        except OSError:  # the client was killed, or did not wait
            self.close_connection = True
            return
        with self.stub.lock:
            self.stub.answered += reply.status == 200

    def log_message(self, *_: object) -> None:
        """Nothing."""
