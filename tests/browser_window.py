"""A real browser in a process of its own: QtWebEngine, which is Chromium, without a display. Commands come as JSON lines on stdin.

    {"do": "open", "window": "ann", "address": "http://...", "size": [1280, 800]}     a window with a profile of its own
    {"do": "run", "window": "ann", "code": "document.title"}                          {"value": "..."}
    {"do": "click", "window": "ann", "at": [x, y]}                                    with the mouse
    {"do": "drag", "window": "ann", "at": [x, y], "to": [x, y]}
    {"do": "key", "window": "ann", "key": "Enter"}                                    with the keyboard
    {"do": "shot", "window": "ann", "path": "a.png"}; resize, reload, requests

Everything that the window asked a network for is listed by `requests`. Each command has one line as its answer.
"""

import json
import os
import sys
import tempfile
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # which root has not
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu --in-process-gpu"
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp())

from PySide6.QtCore import QEventLoop, QPoint, QPointF, QSocketNotifier, Qt, QTimer, QUrl
from PySide6.QtTest import QTest
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

KEYS = {
    "Enter": Qt.Key.Key_Return, "Backspace": Qt.Key.Key_Backspace, "ArrowUp": Qt.Key.Key_Up, "ArrowDown": Qt.Key.Key_Down,
    "ArrowLeft": Qt.Key.Key_Left, "ArrowRight": Qt.Key.Key_Right, "Delete": Qt.Key.Key_Delete, "Tab": Qt.Key.Key_Tab,
    "PageUp": Qt.Key.Key_PageUp, "Escape": Qt.Key.Key_Escape, "Space": Qt.Key.Key_Space,
}  # fmt: skip


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def interceptRequest(self, info: Any) -> None:  # noqa: N802
        self.seen.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Notes what scripts complain about; alerts are never shown."""

    def __init__(self, profile: QWebEngineProfile, parent: Any) -> None:
        super().__init__(profile, parent)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
        self.said.append(f"{level.name}: {message} ({source}:{line})")

    def javaScriptAlert(self, origin: Any, message: str) -> None:  # noqa: N802
        self.said.append(f"alert: {message}")


class Window:
    """A window of one person."""

    def __init__(self, size: list[int]) -> None:
        self.profile, self.requests = QWebEngineProfile(), Requests()
        self.profile.setUrlRequestInterceptor(self.requests)
        self.view = QWebEngineView()
        self.page = Page(self.profile, self.view)
        self.view.setPage(self.page)
        self.view.resize(*size)
        self.view.show()

    def load(self, address: str) -> bool:
        return bool(waited(self.page.loadFinished, lambda: self.view.load(QUrl(address))))

    def run(self, code: str) -> Any:
        loop, found = QEventLoop(), []
        wrapped = f"JSON.stringify((() => {{ const value = ({code}); return value === undefined ? null : value; }})())"
        self.page.runJavaScript(wrapped, 0, lambda value: (found.append(value), loop.quit()))
        QTimer.singleShot(20_000, loop.quit)
        if not found:
            loop.exec()
        return json.loads(found[0]) if found and found[0] else None

    @property
    def target(self) -> Any:
        return self.view.focusProxy() or self.view

    def mouse(self, at: list[float], to: list[float] | None = None) -> None:
        left, here = Qt.MouseButton.LeftButton, QPointF(*at).toPoint()
        QTest.mouseMove(self.target, here)
        QTest.mousePress(self.target, left, Qt.KeyboardModifier.NoModifier, here)
        if to is not None:
            for step in range(1, 9):
                between = [a + (b - a) * step / 8 for a, b in zip(at, to, strict=True)]
                here = QPointF(*between).toPoint()
                moved(self.target, here)
                QTest.qWait(15)
        QTest.mouseRelease(self.target, left, Qt.KeyboardModifier.NoModifier, here)

    def key(self, name: str) -> None:
        QTest.keyClick(self.target, KEYS.get(name, name))


def moved(widget: Any, at: QPoint) -> None:
    """A movement of the mouse with its left button down, which QTest's own has not."""
    from PySide6.QtCore import QEvent
    from PySide6.QtGui import QMouseEvent

    place = QPointF(at)
    event = QMouseEvent(
        QEvent.Type.MouseMove, place, QPointF(widget.mapToGlobal(at)), Qt.MouseButton.NoButton,
        Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier,
    )  # fmt: skip
    QApplication.sendEvent(widget, event)


def waited(signal: Any, start: Any) -> Any:
    """What a signal brings, at most after 30 seconds."""
    loop, found = QEventLoop(), []
    connection = signal.connect(lambda *values: (found.append(values), loop.quit()))
    start()
    QTimer.singleShot(30_000, loop.quit)
    loop.exec()
    signal.disconnect(connection)
    return found[0][0] if found and found[0] else None


WINDOWS: dict[str, Window] = {}


def do(command: dict[str, Any]) -> Any:
    """Do what a command says, and return its value."""
    kind, name = command["do"], command.get("window", "")
    if kind == "open":
        WINDOWS.setdefault(name, Window(command["size"]))
        return WINDOWS[name].load(command["address"])
    window = WINDOWS[name]
    if kind == "run":
        return window.run(command["code"])
    if kind in ("click", "drag"):
        window.mouse(command["at"], command.get("to"))
    elif kind == "key":
        window.key(command["key"])
    elif kind == "resize":
        window.view.resize(*command["size"])
        QTest.qWait(300)
    elif kind == "reload":
        waited(window.page.loadFinished, window.view.reload)
    elif kind == "shot":
        QTest.qWait(700)  # until it is painted
        return window.view.grab().save(command["path"])
    else:
        return {"requests": window.requests.seen, "said": window.page.said}
    return None


def main() -> None:
    """Do commands until stdin ends."""
    application = QApplication(sys.argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Qt says is no answer

    def read() -> None:
        line = sys.stdin.readline()
        if not line:
            application.quit()
            return
        answers.write(json.dumps({"value": do(json.loads(line))}) + "\n")
        answers.flush()

    notifier = QSocketNotifier(sys.stdin.fileno(), QSocketNotifier.Type.Read)
    notifier.activated.connect(read)
    answers.write('{"value": "ready"}\n')
    answers.flush()
    application.exec()
    os._exit(0)


if __name__ == "__main__":
    main()
