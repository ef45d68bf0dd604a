"""The pages of a study over HTTP: who has a link, the sizes of requests, and headers that let a page load nothing from elsewhere.

Every address begins with the token of a person, 128 bits that are in no cookie: another site cannot send requests in their name, and
what a page of another site sends is refused by its Origin.
Images are named by digests and files of the pages by a table, so that no part of an address is ever a path of the file system.
Values of data reach the pages as JSON, which the scripts put into text nodes alone, and the two pages from templates escape them.
"""

import errno
import json
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server, select_address_family
from werkzeug.wrappers import Request, Response

from data_build.annotation_service import WORDS, Person, RefusalError, Service
from preftune.images import MAX_BYTES
from preftune.json_values import json_value
from preftune.pages import render
from rewards.input_files import parse_json, read_bytes

PAGES = Path(__file__).parent / "annotation_pages"
FILES = {
    "annotate.js": "text/javascript", "order.js": "text/javascript", "review.js": "text/javascript",
    "dom.js": "text/javascript", "annotate.css": "text/css",
}  # fmt: skip
"""What the pages load, from the folder of the pages."""
IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
MAX_BODY = 1 << 16
"""Bytes of an answer."""
TIMEOUT = 60
"""Seconds after which a connection that says nothing is closed."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
ROUTES = Map(
    [
        Rule("/static/<name>", endpoint="file", methods=["GET"]),
        Rule("/<token>/", endpoint="page", methods=["GET"]),
        Rule("/<token>/annotate", endpoint="annotate", methods=["GET"]),
        Rule("/<token>/words", endpoint="words", methods=["GET"]),
        Rule("/<token>/task", endpoint="task", methods=["GET"]),
        Rule("/<token>/answer", endpoint="answer", methods=["POST"]),
        Rule("/<token>/image/<identity>", endpoint="image", methods=["GET"]),
        Rule("/<token>/guide", endpoint="guide", methods=["GET"]),
        Rule("/<token>/review", endpoint="review", methods=["GET"]),
        Rule("/<token>/verdict", endpoint="verdict", methods=["POST"]),
        Rule("/<token>/statistics", endpoint="statistics", methods=["GET"]),
        Rule("/<token>/export", endpoint="export", methods=["POST"]),
    ],
    redirect_defaults=False, merge_slashes=False,
)  # fmt: skip
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Handler(WSGIRequestHandler):
    """Says nothing of requests, whose addresses are secrets."""

    timeout = TIMEOUT
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say errors alone."""
        if type == "error":
            sys.stderr.write(f"error while a page was served: {message % args if args else message}\n")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that has an address for itself, so that nothing is begun that cannot be served; ValueError where it cannot be had."""
    try:
        family = select_address_family(host, port)
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"another program listens at {host}, port {port}; --port names another port, --port 0 takes any that is free"
            ) from error
        why = str(error.strerror or error).partition(" (while")[0]
        raise ValueError(f"cannot listen at {host}, port {port}: {why}; see --host and --port") from error


def server(service: Service, place: socket.socket, *, guidelines: str) -> BaseWSGIServer:
    """Return a server with a thread for each connection, at a socket of `listening`, which it takes over."""
    host, port = place.getsockname()[:2]
    web = application(service, guidelines)
    with place:
        return make_server(host, port, web, threaded=True, request_handler=_Handler, fd=place.fileno())


def application(service: Service, guidelines: str) -> Application:
    """Return the WSGI application of a study."""
    handlers: dict[str, Callable[[Person, Request, dict[str, Any]], Response]] = {
        "page": lambda person, request, values: _page(
            "review.html" if person.role == "inspector" else "annotate.html"
        ),
        "annotate": lambda person, request, values: _page("annotate.html"),
        "words": lambda person, request, values: _json(WORDS),
        "task": lambda person, request, values: _json(service.task(person, _place(request))),
        "answer": lambda person, request, values: _json(service.save(person, _body(request))),
        "image": lambda person, request, values: _image(service, values["identity"]),
        "guide": lambda person, request, values: _template("guide.html.jinja", blocks=blocks(guidelines)),
        "review": lambda person, request, values: _json(
            service.review(person, request.args.get("state", "given"), _place(request) or 0)
        ),
        "verdict": lambda person, request, values: _json(service.judge(person, _body(request))),
        "statistics": lambda person, request, values: _template(
            "statistics.html.jinja", found=service.found(person), style="../static/annotate.css"
        ),
        "export": lambda person, request, values: _json(_export(service, person)),
    }

    @Request.application
    def answer(request: Request) -> Response:
        request.max_content_length = MAX_BODY
        try:
            endpoint, values = ROUTES.bind_to_environ(request.environ).match()
            _check_origin(request)
            if endpoint == "file":
                response = _file(values["name"])
            else:
                response = handlers[endpoint](service.person(values["token"]), request, dict(values))
        except RefusalError as refusal:
            response = _json({"error": str(refusal)}, refusal.status)
        except HTTPException as error:
            response = _json({"error": error.name}, error.code or 500)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return answer


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return the parts of a guideline text: ("h", [heading]) of a line `# heading`, ("li", items) of lines `- item`, and
    ("p", [paragraph]) of others; blank lines end a part.
    """
    found: list[tuple[str, list[str]]] = []
    going_on = False
    for line in map(str.strip, text.splitlines()):
        kind = "h" if line.startswith("# ") else "li" if line.startswith("- ") else "p"
        words = line[2:] if kind != "p" else line
        if not line:
            going_on = False
        elif going_on and kind == "li" == found[-1][0]:
            found[-1][1].append(words)
        elif going_on and kind == "p" and found[-1][0] != "h":
            found[-1][1][-1] += f" {words}"
        else:
            found.append((kind, [words]))
            going_on = True
    return found


def _export(service: Service, person: Person) -> Mapping[str, int]:
    if person.role != "inspector":
        raise RefusalError(403, "this is for inspectors")
    return service.export()


def _check_origin(request: Request) -> None:
    """RefusalError for what a page of another site sends; browsers name the site of a page that sends something."""
    origin = request.headers.get("Origin")
    if request.method != "POST" or origin is None:
        return
    scheme, _, site = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")  # which browsers leave out, and proxies may not
    if site.removesuffix(port) != request.host.removesuffix(port):
        raise RefusalError(
            403, "a page of another site has sent this; a server in front of this one has to pass the Host on"
        )


def _body(request: Request) -> dict[str, Any]:
    """The object that a page sends."""
    if request.mimetype != "application/json":  # what a form of another site could send is none
        raise RefusalError(415, "send JSON")
    content = request.get_data(cache=False)
    try:
        body = parse_json(content.decode("utf-8"), "the answer")
    except ValueError as error:
        raise RefusalError(400, "this is not JSON") from error
    if not isinstance(body, dict):
        raise RefusalError(400, "this is no object")
    return body


def _place(request: Request) -> int | None:
    """The place in a list that an address names."""
    text = request.args.get("at")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise RefusalError(400, "at is a whole number")
    return int(text)


def _image(service: Service, identity: str) -> Response:
    path = service.images.get(identity)
    if path is None:
        raise RefusalError(404, "there is no such image")
    try:
        content = read_bytes(path, MAX_BYTES)
    except ValueError as error:
        raise RefusalError(404, "this image is gone") from error
    kept = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(content, mimetype=IMAGE_TYPES[path.suffix], headers=kept)


def _file(name: str) -> Response:
    if name not in FILES:
        raise RefusalError(404, "there is no such file")
    return Response((PAGES / name).read_bytes(), mimetype=FILES[name])


def _page(name: str) -> Response:
    return Response((PAGES / name).read_bytes(), mimetype="text/html")


def _template(name: str, **values: object) -> Response:
    return Response(render(PAGES / name, **values), mimetype="text/html")


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(json_value(value)), status=status, mimetype="application/json")
