"""Answers on disk: an SQLite database that a kill at any moment leaves as it was after the last answer that was confirmed.

There is one answer for (annotator, item, visit). Sending it again changes nothing; another one takes its place, and the older
one goes to `history`. Each is one transaction, flushed to the disk before it is confirmed.
"""

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

FILE = "answers.sqlite"
State = Literal["given", "accepted", "returned"]
Role = Literal["annotator", "inspector"]
MAX_SECONDS = 3600.0
"""Of an answer: longer is a pause."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS people (name TEXT PRIMARY KEY, role TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
  annotator TEXT, item TEXT, visit INTEGER, answer TEXT NOT NULL, seconds REAL NOT NULL, state TEXT NOT NULL,
  note TEXT NOT NULL DEFAULT '', inspector TEXT NOT NULL DEFAULT '', revision INTEGER NOT NULL, at TEXT NOT NULL,
  PRIMARY KEY (annotator, item, visit));
CREATE TABLE IF NOT EXISTS history (
  annotator TEXT, item TEXT, visit INTEGER, answer TEXT, seconds REAL, state TEXT, note TEXT, inspector TEXT, revision INTEGER,
  at TEXT);
CREATE TABLE IF NOT EXISTS shares (annotator TEXT, item TEXT, PRIMARY KEY (annotator, item)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun (annotator TEXT, item TEXT, visit INTEGER, PRIMARY KEY (annotator, item, visit)) WITHOUT ROWID;
"""
_COLUMNS = "annotator, item, visit, answer, seconds, state, note, inspector, revision, at"


class ConflictError(Exception):
    """What was decided meanwhile forbids it; the text says so to the user."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A stored answer."""

    annotator: str
    item: str
    visit: int
    answer: dict[str, Any]
    seconds: float
    """Of all its revisions together."""
    state: State
    note: str
    """Of the inspector."""
    inspector: str
    revision: int
    at: str
    """Time (UTC) of the last change."""


class Storage:
    """The database of a study; any thread may use it."""

    def __init__(self, folder: Path) -> None:
        """Open the database, or make one that only its owner can read: it holds the secret of all links."""
        path = folder / FILE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
        self._lock = threading.Lock()
        with self._change() as change:
            change.execute("INSERT OR IGNORE INTO meta VALUES ('secret', ?)", (secrets.token_hex(32),))
        self.secret: str = self._rows("SELECT value FROM meta WHERE key = 'secret'")[0][0]

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def add_people(self, names: Sequence[str], role: Role) -> None:
        """Note people of a role; ValueError for a name that has the other one."""
        with self._change() as change:
            for name in names:
                change.execute("INSERT OR IGNORE INTO people VALUES (?, ?)", (name, role))
        known = self.people()
        for name in names:
            if known[name] != role:
                raise ValueError(
                    f"{name} is an {known[name]} of this study already; give the {role} another name"
                )

    def people(self) -> dict[str, Role]:
        """Return name -> role."""
        return dict(self._rows("SELECT name, role FROM people ORDER BY rowid"))

    def shares(self) -> list[tuple[str, str]]:
        """Return (annotator, item) of what was shared out; nothing where each annotator gets every item."""
        return [(name, item) for name, item in self._rows("SELECT annotator, item FROM shares")]

    def share_out(self, rows: Iterable[tuple[str, str]]) -> None:
        """Keep other shares in the place of those that there were."""
        with self._change() as change:
            change.execute("DELETE FROM shares")
            change.executemany("INSERT INTO shares VALUES (?, ?)", rows)

    def begun(self) -> list[tuple[str, str, int]]:
        """Return (annotator, item, visit) of the tasks that were shown or answered."""
        query = "SELECT annotator, item, visit FROM answers UNION SELECT annotator, item, visit FROM begun"
        return [(name, item, visit) for name, item, visit in self._rows(query)]

    def begin(self, annotator: str, item: str, visit: int) -> None:
        """Note that a task is shown: it stays its annotator's."""
        with self._change() as change:
            change.execute("INSERT OR IGNORE INTO begun VALUES (?, ?, ?)", (annotator, item, visit))

    def answers(self, annotator: str | None = None) -> list[Answer]:
        """Return all answers, or those of one annotator, in the order of annotators, items and visits."""
        where, values = ("", ()) if annotator is None else (" WHERE annotator = ?", (annotator,))
        rows = self._rows(f"SELECT {_COLUMNS} FROM answers{where} ORDER BY annotator, item, visit", values)
        return [_answer(row) for row in rows]

    def save(self, annotator: str, item: str, visit: int, answer: dict[str, Any], seconds: float) -> bool:
        """Store an answer, and return whether it is new or another one than before; ConflictError where it is accepted already."""
        text = json.dumps(answer, sort_keys=True)
        seconds = min(max(seconds, 0.0), MAX_SECONDS)
        key = (annotator, item, visit)
        with self._change() as change:
            row = change.execute(
                f"SELECT {_COLUMNS} FROM answers WHERE annotator = ? AND item = ? AND visit = ?", key
            ).fetchone()
            before = None if row is None else _answer(row)
            if before is not None and before.answer == answer and before.state != "returned":
                return False
            if before is not None and before.state == "accepted":
                raise ConflictError("this answer has been accepted; it cannot be changed any more")
            if row is not None and before is not None:
                change.execute(f"INSERT INTO history ({_COLUMNS}) VALUES ({', '.join('?' * 10)})", row)
                seconds += before.seconds
            revision = 1 if before is None else before.revision + 1
            change.execute(
                f"INSERT OR REPLACE INTO answers ({_COLUMNS}) VALUES ({', '.join('?' * 10)})",
                (*key, text, seconds, "given", "", "", revision, _now()),
            )
        return True

    def judge(
        self, annotator: str, item: str, visit: int, revision: int, *, state: State, note: str, inspector: str
    ) -> None:
        """Accept an answer or send it back; ConflictError where it is another one by now."""
        with self._change() as change:
            done = change.execute(
                "UPDATE answers SET state = ?, note = ?, inspector = ?, at = ?"
                " WHERE annotator = ? AND item = ? AND visit = ? AND revision = ?",
                (state, note, inspector, _now(), annotator, item, visit, revision),
            )
            if done.rowcount != 1:
                raise ConflictError("the annotator has changed this answer meanwhile; look at it again")

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, of one thread."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:  # also a commit that fails, on a full disk
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


def is_there(folder: Path) -> bool:
    """Return whether a study has a database."""
    return (folder / FILE).is_file()


def _answer(row: Sequence[Any]) -> Answer:
    annotator, item, visit, answer, seconds, state, note, inspector, revision, at = row
    return Answer(
        annotator=annotator, item=item, visit=visit, answer=json.loads(answer), seconds=seconds, state=state, note=note,
        inspector=inspector, revision=revision, at=at,
    )  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
