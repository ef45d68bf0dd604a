"""Reading JSON exports of DiscordChatExporter (https://github.com/Tyrrrz/DiscordChatExporter), one message at a time.

    {"guild": {...}, "channel": {"id", ...}, "messages": [{"id", "content", "author": {"id", "name", "isBot"},
     "attachments": [{"url", "fileName"}], "reference": {"messageId"}, "mentions": [{"id", "isBot"}], ...}, ...]}

Ids are digits in a string, and grow with time. `url` is a path relative to the export where the media were exported, too, and
otherwise an address, which is never fetched. What is in an export was typed by strangers: the bytes of a message and the depth
of its lists are bounded, an attachment is read only below the export's folder, and a message that is none is passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import ijson
from ijson.common import ObjectBuilder

from data_build.decode import UnusableError, or_unusable
from preftune import images
from preftune.cli.notes import counted
from preftune.records import check_name, field, inside
from rewards.input_files import MAX_DEPTH, check_regular, has_surrogate, read_bytes

MAX_MESSAGE = 1 << 22
"""Bytes between the ends of two messages; most of a long one are the names of those who reacted."""
MAX_DIGITS = 20
"""Of an id, which has 64 bits."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A file of a message."""

    name: str
    """As it was uploaded."""
    url: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """What matters here of a message."""

    id: int
    author: str
    """Id of a person or bot."""
    author_name: str
    is_bot: bool
    text: str
    attachments: tuple[Attachment, ...]
    answers: str
    """Id of the message that it replies to, or empty."""
    mentions: tuple[str, ...]
    """Ids of the people that it mentions, without bots; a reply mentions whom it replies to."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A file of messages of one channel."""

    path: Path
    channel: str
    first: int
    """Id of its first message, or 0 where it has none."""


def find_export(path: Path) -> Export:
    """Return what a file exports, which its begin says; ValueError where it is no export."""
    if path.is_dir():
        raise ValueError(f"--input {path} is a folder; name the exports in it: {path}/*.json")
    channel, first, has_list = "", 0, False
    for kind, value in _parts(path):
        if kind == "channel":
            channel = str(value)
        elif kind == "list":
            has_list = True
        elif (message := _message_of(value)) is not None:
            first = message.id
            break
    if not channel:
        raise ValueError(
            f"{path} is no JSON export of DiscordChatExporter: no channel with an id comes before its messages"
        )
    if not has_list:
        raise ValueError(f"{path} is no JSON export of DiscordChatExporter: it has no list of messages")
    return Export(path=path, channel=channel, first=first)


def read_messages(export: Export) -> Iterator[Message | None]:
    """The messages of an export; None for one that is malformed. ValueError where the file breaks off or is in another order."""
    last = 0
    for kind, value in _parts(export.path):
        if kind != "message":
            continue
        message = _message_of(value)
        if message is not None:
            if message.id <= last:
                raise ValueError(
                    f"{export.path} is not in the order of time: message {message.id} comes after {last}; export it without --reverse"
                )
            last = message.id
        yield message


class _Bounded:
    """A file whose parser may not read more than MAX_MESSAGE bytes without the end of a message."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, MAX_MESSAGE
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"a message has more than {MAX_MESSAGE} bytes")
        return content

    def message_ended(self) -> None:
        self.left = MAX_MESSAGE


def _parts(path: Path) -> Iterator[tuple[str, Any]]:
    """("channel", id), ("list", None) where the messages begin and ("message", value) for each, in the order of the file; ValueError
    where it is not JSON.

    Events are taken one by one, for the parser has no bound on depth and would hold the names of all levels.
    """
    count = 0
    try:
        check_regular(path)
        with path.open("rb") as file:
            bounded = _Bounded(file)
            for part in _parsed(ijson.basic_parse(bounded, use_float=True)):
                count += part[0] == "message"
                bounded.message_ended()
                yield part
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ijson.JSONError, ValueError, OverflowError) as error:
        detail = str(error).split("\n")[0].removeprefix("parse error: ").removeprefix("lexical error: ")
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path} is empty, no JSON export of DiscordChatExporter") from error
        if count:
            raise ValueError(
                f"{path} breaks off, or cannot be read, after {counted(count, 'message')}: {detail}"
            ) from error
        raise ValueError(
            f"{path} cannot be read as far as its first message: {detail.rstrip('.')}; is it a whole export of --format Json?"
        ) from error


def _parsed(events: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    section = key = ""
    depth, builder = 0, None
    for event, value in events:
        depth -= event in ("end_map", "end_array")
        if builder is not None:
            builder.event(event, value)
            if event == "end_map" and depth == 2:
                yield "message", builder.value
                builder = None
        elif event == "map_key":
            section = value if depth == 1 else section
            key = value
        elif section == "channel" and depth == 2 and key == "id" and event in ("string", "number"):
            yield "channel", value
        elif section == "messages" and depth == 1 and event == "start_array":
            yield "list", None
        elif section == "messages" and depth == 2 and event == "start_map":
            builder = ObjectBuilder()
            builder.event(event, value)
        elif section == "messages" and depth == 2 and not event.startswith("end_"):
            yield "message", None
        depth += event in ("start_map", "start_array")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested too deep; at most {MAX_DEPTH} levels are read")


def _message_of(value: Any) -> Message | None:
    """What matters of a message; None where that is missing or of another type."""
    place = "a message"
    try:
        if not isinstance(value, dict):
            return None
        author = field(value, "author", dict, place)
        rows = value.get("attachments") or ()
        reference = value.get("reference") or {}
        mentions = [row for row in value.get("mentions") or () if row.get("isBot") is not True]
        message = Message(
            id=int(_id(value, place)),
            author=_id(author, place),
            author_name=_text(author, "name", place),
            is_bot=author.get("isBot") is True,
            text=_text(value, "content", place),
            attachments=tuple(
                Attachment(name=_text(row, "fileName", place), url=_text(row, "url", place)) for row in rows
            ),
            answers=_id(reference, place, "messageId") if reference.get("messageId") else "",
            mentions=tuple(_id(row, place) for row in mentions),
        )
    except (ValueError, AttributeError, TypeError):  # a list where an object should be
        return None
    return message


def _id(row: dict[str, Any], place: str, key: str = "id") -> str:
    value: str = field(row, key, str, place)
    if not (value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS):
        raise ValueError(f"{place}: {key} is no id")
    return value


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value: str = field(row, key, str, place)
    if has_surrogate(value) or "\0" in value:
        raise ValueError(f"{place}: {key} holds what is no character")
    return value


def attachment_path(folder: Path, url: str) -> Path:
    """The file of an attachment below an export's folder; UnusableError with the reason."""
    if "://" in url:
        raise UnusableError("missing", "it was not downloaded; export the media, too")
    name = url.replace("\\", "/")  # as an export on Windows writes it
    with or_unusable("unsafe name"):
        check_name(name, "the export")
        if "%" in name and not (folder / name).is_file():
            name = unquote(name)
            check_name(name, "the export")
        there = (folder / name).is_file()
    if not there:
        raise UnusableError("missing", "the export names a file that is not there")
    with or_unusable("unsafe name"):
        return inside(folder, name, "the export")


def read_attachment(folder: Path, url: str) -> bytes:
    """The bytes of an attachment; UnusableError with the reason."""
    path = attachment_path(folder, url)
    with or_unusable("broken file"):
        if (size := check_regular(path)) <= images.MAX_BYTES:
            return read_bytes(path, images.MAX_BYTES)
    raise UnusableError("too large", f"{size} bytes; at most {images.MAX_BYTES}")
