"""The bot's answers read so far, by channel, person and prompt, in a temporary database: memory does not grow with them.

SQLite keeps it in a file of the system's folder for temporary files that has no name, so that nothing is left behind. It holds
hashes of persons' ids, never the ids.
"""

import errno
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from data_build.discord_export import Attachment

_TABLES = """
CREATE TABLE commands (message TEXT PRIMARY KEY, person TEXT, foreign_upload INT) WITHOUT ROWID;
CREATE TABLE groups (id INTEGER PRIMARY KEY, channel TEXT, person TEXT, prompt TEXT, left_out TEXT, chosen INT);
CREATE INDEX groups_of ON groups (channel, person, prompt, left_out);
CREATE TABLE images (id INTEGER PRIMARY KEY, "group" INT, place INT, folder TEXT, name TEXT, url TEXT, rows INT, columns INT, hash TEXT);
CREATE INDEX images_of ON images ("group");
CREATE INDEX images_named ON images (name);
"""
NEWEST = 50
"""Groups of one person and prompt in which an image is looked for."""
RECENT = 10
"""Groups of one person in which an image is looked for that belongs to no group of its prompt."""
UNUSABLE = "unusable"
"""In the place of the hash of an image that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class GroupImage:
    """An image of an answer."""

    id: int
    group: int
    place: int
    """In its group, from 0."""
    folder: str
    """Folder of the export that names it."""
    name: str
    """Name of its file as it was uploaded, in small letters."""
    url: str
    layout: tuple[int, int] | None
    """Rows and columns of the grid that it is cut from at its place; None for a file of its own."""
    hash: str | None
    """Perceptual hash, UNUSABLE, or None where it was not asked for yet."""


class Groups:
    """The groups of images that were answered so far, and who asked in which message."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES} BEGIN;")

    def close(self) -> None:
        """Forget all."""
        self._database.close()

    def asked(self, message: int, person: str, *, foreign_upload: bool) -> None:
        """Note who asked in a message, and whether an image was uploaded with it that is none of the bot's."""
        row = (str(message), person, foreign_upload)
        self._database.execute("INSERT OR REPLACE INTO commands VALUES (?, ?, ?)", row)

    def asker(self, message: str) -> tuple[str, bool] | None:
        """Return who asked in a message, and whether with an upload; None where that is not known."""
        found = self._database.execute(
            "SELECT person, foreign_upload FROM commands WHERE message = ?", (message,)
        )
        return next(((person, bool(foreign)) for person, foreign in found), None)

    def add(
        self, channel: str, person: str, prompt: str, folder: str, files: Sequence[Attachment], layout: tuple[int, int] | None,
        *, left_out: str = "",
    ) -> None:  # fmt: skip
        """Add an answer: its files, or the cells of the one grid that it has; `left_out` says why nobody can choose from it."""
        row = (channel, person, prompt, left_out)
        group = self._database.execute(
            "INSERT INTO groups (channel, person, prompt, left_out) VALUES (?, ?, ?, ?)", row
        ).lastrowid
        rows, columns = layout or (0, 0)
        members = files if layout is None else [files[0]] * (rows * columns)
        self._database.executemany(
            'INSERT INTO images ("group", place, folder, name, url, rows, columns) VALUES (?, ?, ?, ?, ?, ?, ?)',
            [
                (group, place, folder, file.name.casefold(), file.url, rows, columns)
                for place, file in enumerate(members)
            ],
        )

    def candidates(self, channel: str, person: str, prompt: str) -> list[GroupImage]:
        """Return the images that a person got for a prompt in a channel, of the newest NEWEST groups."""
        newest = f"SELECT id FROM groups WHERE channel = ? AND person = ? AND prompt = ? AND left_out = '' ORDER BY id DESC LIMIT {NEWEST}"
        where = f'"group" IN ({newest})'
        return self._images(f"{where} ORDER BY id", channel, person, prompt)

    def recent(self, channel: str, person: str, *, left_out: bool = False) -> list[GroupImage]:
        """Return the images of the newest RECENT groups that a person got for any prompt in a channel, or of those left out."""
        sort = "<>" if left_out else "="
        newest = f"SELECT id FROM groups WHERE channel = ? AND person = ? AND left_out {sort} '' ORDER BY id DESC LIMIT {RECENT}"
        return self._images(f'"group" IN ({newest}) ORDER BY id', channel, person)

    def named(
        self, channel: str, name: str, limit: int = 20, *, left_out: bool = False
    ) -> list[tuple[GroupImage, str]]:
        """Return the newest images apart of a name in a channel, whoever asked for them, with that person; or those left out."""
        some = f"SELECT id FROM groups WHERE channel = ? AND left_out {'<>' if left_out else '='} ''"
        where = f'name = ? AND rows = 0 AND "group" IN ({some}) ORDER BY id DESC LIMIT {limit}'
        return [(image, self._owner(image.group)) for image in self._images(where, name.casefold(), channel)]

    def why_left_out(self, image: GroupImage) -> str:
        """Return why nobody can choose an image; empty where somebody can."""
        row = self._database.execute("SELECT left_out FROM groups WHERE id = ?", (image.group,)).fetchone()
        return str(row[0])

    def members(self, group: int) -> list[GroupImage]:
        """Return the images of a group, in their order."""
        return self._images('"group" = ? ORDER BY place', group)

    def set_hash(self, image: GroupImage, value: str) -> None:
        """Keep an image's hash."""
        self._database.execute("UPDATE images SET hash = ? WHERE id = ?", (value, image.id))

    def choose(self, image: GroupImage) -> bool:
        """Note the choice of an image; False where its group has one already."""
        done = self._database.execute(
            "UPDATE groups SET chosen = ? WHERE id = ? AND chosen IS NULL", (image.place, image.group)
        )
        return done.rowcount == 1

    def _owner(self, group: int) -> str:
        row = self._database.execute("SELECT person FROM groups WHERE id = ?", (group,)).fetchone()
        return str(row[0])

    def _images(self, where: str, *values: str | int) -> list[GroupImage]:
        found = self._database.execute(
            f'SELECT id, "group", place, folder, name, url, rows, columns, hash FROM images WHERE {where}',
            values,
        )
        return [
            GroupImage(
                id=row[0], group=row[1], place=row[2], folder=row[3], name=row[4], url=row[5],
                layout=(row[6], row[7]) if row[6] else None, hash=row[8],
            )
            for row in found
        ]  # fmt: skip


@contextmanager
def opened() -> Iterator[Groups]:
    """Context with groups, none at first. OSError where the temporary folder has no more room."""
    groups = Groups()
    try:
        yield groups
    except sqlite3.OperationalError as error:
        raise OSError(errno.ENOSPC, str(error), tempfile.gettempdir()) from error
    finally:
        groups.close()
