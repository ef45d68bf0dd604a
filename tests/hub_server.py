"""A stub of the Hugging Face Hub on 127.0.0.1 that speaks its protocol, for tests of downloads.

/api/models/ID/revision/REV (or /api/models/ID) gives the commit, /api/models/ID/tree/COMMIT the files. HEAD and GET of
/ID/resolve/REV/FILE answer with ETag and X-Repo-Commit; a large file (as in Git LFS) has X-Linked-Etag and X-Linked-Size
and is redirected (302) to /cdn/... of another host name, which serves ranges.

    with Hub({"a/b": {"config.json": b"{}"}}, lfs=("*.safetensors",)) as hub, hub.in_use(monkeypatch, tmp_path):
        fetch_file("a/b", "config.json")
"""

import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories: id -> file name -> content. Every request is in `requests` as (method, path, Range header)."""

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, bytes]],
        *,
        lfs: tuple[str, ...] = ("*.safetensors", "*.bin", "*.pt", "*.ckpt"),
        revisions: tuple[str, ...] = ("main",),
        gated: tuple[str, ...] = (),
        broken_after: int | None = None,
        breaks: int = 1,
        corrupted: tuple[str, ...] = (),
        status: int | None = None,
    ) -> None:
        """lfs: patterns of large files; broken_after: the first `breaks` transfers of a large file end after so many
        bytes; corrupted: files that arrive with other bytes than the ETag says; status: the answer to everything.
        """
        self.repos, self.lfs, self.revisions, self.gated = repos, lfs, revisions, gated
        self.broken_after, self.breaks, self.corrupted, self.status = broken_after, breaks, corrupted, status
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"
        """Another host, as the hub's: its redirects to itself are followed by the HEAD request already."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def in_use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Self]:
        """Let huggingface_hub of this process ask this server and keep its files in `cache`."""
        with monkeypatch.context() as patch:
            constants = "huggingface_hub.constants"
            patch.setattr(f"{constants}.ENDPOINT", self.endpoint)
            patch.setattr(
                f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE",
                self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            )
            patch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
            patch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
            patch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
            yield self

    def commit(self, repo: str) -> str:
        """The one commit of a repository."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def is_large(self, file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in self.lfs)

    def etag(self, repo: str, file: str) -> str:
        """SHA-256 of a large file, the git blob's SHA-1 of a small one."""
        content = self.repos[repo][file]
        if self.is_large(file):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """The answers."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            self._send(self.hub.status, {}, b"", body=body)
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body=body)
        elif parts[0] == "cdn":
            self._content("/".join(parts[1:3]), "/".join(parts[3:]), body=body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
        else:
            self._send(404, {}, b"", body=body)

    def _refused(self, repo: str, revision: str, *, body: bool) -> bool:
        if repo not in self.hub.repos:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", body=body)
        elif repo in self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body=body)
        elif revision not in (*self.hub.revisions, self.hub.commit(repo)):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body=body)
        else:
            return False
        return True

    def _api(self, repo: str, rest: list[str], *, body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if self._refused(repo, revision, body=body):
            return
        files = self.hub.repos[repo]
        content: Any
        if rest[:1] == ["tree"]:
            content = [self._entry(repo, file) for file in files]
        else:
            siblings = [{"rfilename": file} for file in files]
            content = {"id": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode(), body=body)

    def _entry(self, repo: str, file: str) -> dict[str, Any]:
        size, etag = len(self.hub.repos[repo][file]), self.hub.etag(repo, file)
        entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": etag[:40]}
        if self.hub.is_large(file):
            entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
        return entry

    def _resolve(self, repo: str, revision: str, file: str, *, body: bool) -> None:
        if self._refused(repo, revision, body=body):
            return
        headers = {"X-Repo-Commit": self.hub.commit(repo)}
        if file not in self.hub.repos[repo]:
            self._send(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"", body=body)
        elif self.hub.is_large(file):
            headers["X-Linked-Etag"] = f'"{self.hub.etag(repo, file)}"'
            headers["X-Linked-Size"] = str(len(self.hub.repos[repo][file]))
            headers["Location"] = f"{self.hub.cdn}/cdn/{repo}/{file}"
            self._send(302, headers, b"", body=body)
        else:
            self._content(repo, file, body=body, headers=headers)

    def _content(self, repo: str, file: str, *, body: bool, headers: Mapping[str, str] | None = None) -> None:
        content = self.hub.repos[repo][file]
        if file in self.hub.corrupted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        answer = {**(headers or {}), "ETag": f'"{self.hub.etag(repo, file)}"', "Accept-Ranges": "bytes"}
        start, status, total = 0, 200, len(content)
        if (wanted := self.headers.get("Range")) is not None:
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            answer["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        rest = content[start:]
        if body and self.hub.is_large(file) and self.hub.broken_after is not None and self.hub.breaks > 0:
            self.hub.breaks -= 1
            self._send(status, answer, rest, body=body, cut=self.hub.broken_after)
            self.close_connection = True
        else:
            self._send(status, answer, rest, body=body)

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        content: bytes,
        *,
        body: bool,
        cut: int | None = None,
    ) -> None:
        """Send an answer; `cut`: its length is announced, and the line goes dead after so many bytes."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
            self.wfile.flush()
