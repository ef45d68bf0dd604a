"""The browser of browser_window.py for tests, which are skipped where it cannot start."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("browser_window.py")
WAIT = 60
"""Seconds for what a page does."""


class Browser:
    """A browser with a window for each person."""

    def __init__(self) -> None:
        if importlib.util.find_spec("PySide6") is None:
            pytest.skip("PySide6, the browser of these tests, is not installed: pip install -e .[dev]")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        if "ready" not in self._process.stdout.readline():
            self._log.seek(0)
            pytest.skip(f"PySide6 cannot start a browser here: {self._log.read()[-300:]}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def do(self, **command: Any) -> Any:
        """Send a command, and return what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the browser has died"
        return json.loads(line)["value"]

    def open(self, name: str, address: str, size: tuple[int, int] = (1280, 900)) -> "Tab":
        """Open an address in the window of a name."""
        assert self.do(do="open", window=name, address=address, size=size), f"{address} cannot be loaded"
        return Tab(self, name)


class Tab:
    """A window; elements are named by CSS selectors."""

    def __init__(self, browser: Browser, name: str) -> None:
        self._browser, self.name = browser, name

    def _do(self, kind: str, **more: Any) -> Any:
        return self._browser.do(do=kind, window=self.name, **more)

    def run(self, code: str) -> Any:
        """Return the value of an expression in the page."""
        return self._do("run", code=code)

    def until(self, code: str) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + WAIT
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"{self.name}: never {code}; {self.text()}; {self.messages()}"
            time.sleep(0.03)
        return value

    def text(self) -> str:
        """Return what the page shows."""
        return str(self.run("document.body.innerText"))

    def task(self) -> str:
        """Return the id of the task that the page shows, once it does; "" where all are done."""
        return str(self.until("document.body.dataset.kind && {task: document.body.dataset.task}")["task"])

    def _middle(self, selector: str) -> list[float]:
        # its images have their size by then: what is below does not move away
        self.until("[...document.images].every((image) => image.complete)")
        code = (
            f"((found) => {{ if (!found) return null; found.scrollIntoView({{block: 'nearest'}}); const box ="
            " found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return list(self.until(code))

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        self._do("click", at=self._middle(selector))

    def drag(self, selector: str, to: str) -> None:
        """Drag an element onto another with the mouse; both must be in the window."""
        self._middle(to)
        self._do("drag", at=self._middle(selector), to=self._middle(to))

    def type(self, text: str) -> None:
        """Type a text, letter by letter."""
        self.keys(*text)

    def keys(self, *names: str) -> None:
        """Press keys one after the other."""
        for name in names:
            self._do("key", key=name)

    def reload(self) -> None:
        """Load the page again."""
        self._do("reload")

    def shot(self, path: Path, size: tuple[int, int] | None = None) -> None:
        """Write a picture of the window, of another size than before if one is given."""
        if size is not None:
            self._do("resize", size=size)
        assert self._do("shot", path=str(path))

    def requests(self) -> list[str]:
        """Return all addresses that the window has asked for."""
        return list(self._do("requests")["requests"])

    def messages(self) -> list[str]:
        """Return what scripts have complained about, alerts included."""
        return list(self._do("requests")["said"])
