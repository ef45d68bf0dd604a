"""Choices out of the chat with an image bot, as HPS made its data (arXiv 2303.14420, section 3): training data of reward models
and of DPO.

Somebody asks the bot for several images of a prompt, and later sends one of them back with the same prompt, to have it refined:
that image is the choice, and the others of its group are not chosen. Reads the JSON files of DiscordChatExporter, exported with
their media, a message at a time; memory does not grow with their number (measured: 10,000 messages take as much as 1,000).

    DiscordChatExporter.Cli export --format Json --media --channel ID --token TOKEN --output chats/
    python data_build/discord_choices.py --input chats/*.json --output-dir data/choices

    rankings.jsonl   prompt, generations (file names), ranking (1 = chosen, 2 = not), source (who chose, hashed), matched (name,
                     name alone: the file that was sent is missing, or hash)
    images/          the images of these groups; grids are cut, other files are hard links where possible
    rejected.jsonl   place (export and message), reason, detail: what is left out, and images that cannot be used
    summary.json     counts

Left out, and counted: groups of one, answers with fewer images than asked for, images that the bot flags as unsafe for work,
choices with another prompt, of another person's image, of an image whose answer was left out, of a file that is none of the
bot's, and all answers to such a file, which may show somebody. A group is chosen from once. The file name says which image was sent back, as far as the images are
alike, otherwise a perceptual hash (discord_matching.py). Ids of people are hashed with a salt and names are not written. Whether the bot's
grammar (dream_bot.py) is that of another server's bot has to be looked at: `--bot` is only its name. Hardware: one CPU core
reads 9,000 messages per second, and recognises 150 JPEG or 38 PNG images of 512 pixels. Left out: addresses in place of attachments,
and continuing after a kill; the folder gets its name only when it is complete.
"""

import hashlib
import hmac
import json
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_build.dream_bot import BOT
from preftune.cli import exit_on_user_error, parse

IMAGES = "images"
MIN_SALT = 16
"""Characters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the choices that people made in a chat with an image bot, and their images."""

    input: tuple[Path, ...]
    """JSON exports of DiscordChatExporter, of one channel or several, in any order."""
    output_dir: Path
    """Folder to create; it must not exist yet."""
    bot: tuple[str, ...] = (BOT,)
    """Names of the bot."""
    salt_file: Path | None = None
    """Secret text that ids of people are hashed with, made where it is missing: with the same one a later export gives a person
    the same hash. Keep it to yourself, or remove it. None = a new one that is not kept.
    """

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("--input needs at least one file")
        if not self.bot or not all(name.strip() for name in self.bot):
            raise ValueError("--bot needs the name of the bot")


if __name__ == "__main__":  # flags are read before slow imports
    CONFIG = parse(Config)

from PIL import Image
from tqdm import tqdm

from data_build import discord_matching
from data_build.decode import UnusableError
from data_build.discord_export import Export, Message, attachment_path, find_export, read_messages
from data_build.discord_groups import GroupImage, Groups, opened
from data_build.discord_matching import Missed, Upload
from data_build.dream_bot import SPOILER, arrangement, parse_answer, parse_command
from preftune.cli.notes import counted
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.images import save_image
from preftune.records import write_jsonl, write_lines
from rewards.atomic_folder import link
from rewards.input_files import read_text

SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "PPM": ".ppm"}
"""Format -> suffix, where that is not the format's name."""
FOREIGN = ("foreign upload", "upload not readable", "several attachments")
"""Why an attached image may be somebody's own, so that the answers to it are left out, too."""
TO_FOREIGN = "answer to a foreign upload"
UNKNOWN = "nobody knows who asked"
UNSAFE = "unsafe for work"
LEFT_OUT = "image of an answer that was left out"


@dataclass(kw_only=True)
class Work:
    """What is read and written."""

    folder: Path
    bots: frozenset[str]
    salt: bytes
    groups: Groups
    rejected: IO[str]
    reasons: Counter[str] = field(default_factory=Counter)
    """What was left out."""
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    """Images in a ranking -> rankings."""
    choices_of: Counter[str] = field(default_factory=Counter)
    """Person -> choices."""


def check_inputs(config: Config) -> list[Export]:
    """Return the exports in the order of channels and time; ValueError for what is none, and for an output that exists."""
    if config.output_dir.exists():
        raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
    exports = [find_export(path) for path in config.input]
    return sorted(exports, key=lambda export: (export.channel, export.first, str(export.path)))


def read_salt(path: Path | None) -> bytes:
    """Return the secret of a file, which is made for its owner alone where it is missing; None = one that is not kept."""
    if path is None:
        return secrets.token_bytes(32)
    if not path.exists():
        with replacing(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
    salt = read_text(path, 1 << 16, "--salt-file ").strip()
    if len(salt) < MIN_SALT:
        raise ValueError(f"--salt-file {path} has {len(salt)} characters; a secret needs at least {MIN_SALT}")
    return salt.encode()


def hashed(salt: bytes, person: str) -> str:
    """Return 16 hexadecimal digits that stand for a person: without the salt nobody can compute them from the id."""
    return hmac.new(salt, person.encode(), hashlib.sha256).hexdigest()[:16]


def leave_out(work: Work, place: str, reason: str, detail: str = "") -> None:
    """Note what is left out."""
    work.reasons[reason] += 1
    work.rejected.write(json.dumps({"place": place, "reason": reason, "detail": detail[:500]}) + "\n")


def sound_messages(export: Export) -> Iterator[Message | None]:
    """The messages of an export; a file that breaks off ends the program."""
    with exit_on_user_error():
        yield from read_messages(export)


def ranking_rows(exports: list[Export], work: Work) -> Iterator[dict[str, Any]]:
    """The lines of rankings.jsonl; their images are stored on the way."""
    channel, last = "", 0
    for number, export in enumerate(exports, 1):
        if export.channel != channel:
            channel, last = export.channel, 0
        messages = enumerate(sound_messages(export), 1)
        for at, message in tqdm(messages, desc=f"export {number}", unit=" message", mininterval=1):
            place = f"export {number} message {at}"
            work.counts["messages"] += 1
            if message is None:
                leave_out(work, place, "malformed message")
            elif message.id <= last:
                work.counts["repeated_messages"] += 1  # exports that overlap
            else:
                last = message.id
                if message.is_bot and message.author_name in work.bots:
                    take_answer(work, export, message, place)
                elif not message.is_bot and (row := take_command(work, export, message, place)):
                    yield row


def take_answer(work: Work, export: Export, message: Message, place: str) -> None:
    """Keep the images that the bot answers with, as a group that may be chosen from."""
    answer = parse_answer(message.text)
    if answer is None or not message.attachments:
        work.counts["other_messages_of_the_bot"] += 1
        return
    work.counts["answers"] += 1
    asker = work.groups.asker(message.answers)
    if asker is None and len(message.mentions) == 1:
        asker = hashed(work.salt, message.mentions[0]), False
    layout = arrangement(answer, len(message.attachments))
    shown = [file for file in message.attachments if not file.name.startswith(SPOILER)]
    alone = layout is None and len(shown) == 1
    reason = ""
    if asker is not None and asker[1]:
        reason = TO_FOREIGN
    elif isinstance(layout, str):
        reason = layout
    elif asker is None:
        reason = UNKNOWN
    elif answer.nsfw or not shown or alone:
        reason = UNSAFE
    whole = message.attachments if reason else [file for file in message.attachments if file not in shown]
    about = (export.channel, asker[0] if asker else "", answer.command.prompt, str(export.path.parent))
    if whole:  # what is known of them says where a file is from that is sent back
        work.groups.add(*about, whole, None, left_out=reason or UNSAFE)
    if reason:
        is_flagged = reason == UNSAFE and alone and not answer.nsfw
        leave_out(work, place, reason, "one image is left" if is_flagged else "")
    elif not isinstance(layout, str):
        work.counts.update(groups=1, images_unsafe_for_work=len(message.attachments) - len(shown))
        work.groups.add(*about, shown, layout)


def take_command(work: Work, export: Export, message: Message, place: str) -> dict[str, Any] | None:
    """The line of rankings.jsonl for a command that sends one of the bot's images back; None for others."""
    command = parse_command(message.text)
    if command is None:
        return None
    work.counts["commands"] += 1
    person = hashed(work.salt, message.author)
    if not message.attachments:
        work.groups.asked(message.id, person, foreign_upload=False)
        return None
    work.counts["commands_with_images"] += 1
    found: tuple[GroupImage, str] | Missed | str = "several attachments"
    why = ""
    if len(message.attachments) == 1:
        upload = Upload(export.path.parent, message.attachments[0])
        candidates = work.groups.candidates(export.channel, person, command.prompt)
        found = discord_matching.match(work.groups, upload, candidates)
        if found in ("foreign upload", "upload not readable"):
            other = discord_matching.elsewhere(work.groups, upload, export.channel, person)
            found = other if other != "foreign upload" else found
        if found in FOREIGN and (
            why := discord_matching.left_out(work.groups, upload, export.channel, person)
        ):
            found = LEFT_OUT
    foreign = found in FOREIGN or why in (TO_FOREIGN, UNKNOWN)
    work.groups.asked(message.id, person, foreign_upload=foreign)
    if isinstance(found, str):
        leave_out(work, place, found, why)
        return None
    image, how = found
    if not work.groups.choose(image):
        leave_out(work, place, "the group was chosen from before")
        return None
    names = store_group(work, image, place)
    if names is None:
        return None
    work.counts.update({"choices": 1, f"matched_by_{how}": 1})
    work.sizes[len(names)] += 1
    work.choices_of[person] += 1
    ranking = [1 if place == image.place else 2 for place in names]
    row = {"prompt": command.prompt, "generations": [*names.values()], "ranking": ranking}
    return row | {"source": person, "matched": how}


def store_group(work: Work, chosen: GroupImage, place: str) -> dict[int, str] | None:
    """Write the images of a group: place in the group -> file name. None where too few can be read, or the chosen one cannot."""
    found = dict[int, tuple[GroupImage, Image.Image]]()
    for image in work.groups.members(chosen.group):
        try:
            found[image.place] = image, discord_matching.read_image(image)[1]
        except UnusableError as unusable:
            leave_out(work, place, f"image: {unusable.reason}", str(unusable))
    if chosen.place not in found or len(found) < 2:
        detail = "the chosen one" if chosen.place not in found else f"{len(found)} of a group; two are needed"
        leave_out(work, place, "images cannot be used", detail)
        return None
    number = work.counts["choices"]
    names = {}
    for at, (image, pixels) in found.items():
        kind = pixels.format or "PNG"  # None for what was cut
        suffix = SUFFIXES.get(kind, f".{kind.lower()}")
        names[at] = f"{IMAGES}/{number // 1000:03d}/{number:06d}-{at}{suffix}"
        store_image(image, pixels, work.folder / names[at])
    work.counts["images"] += len(names)
    return names


def store_image(image: GroupImage, pixels: Image.Image, target: Path) -> None:
    """Write what was cut from a grid, or give a file its second name."""
    if image.layout is not None:
        save_image(pixels, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    link(attachment_path(Path(image.folder), image.url).resolve(), target)


def write_folder(config: Config, exports: list[Export], salt: bytes, folder: Path) -> dict[str, Any]:
    """Write the folder and return its summary."""
    with opened() as groups, (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
        work = Work(folder=folder, bots=frozenset(config.bot), salt=salt, groups=groups, rejected=rejected)
        write_jsonl(folder / "rankings.jsonl", ranking_rows(exports, work))
    names = (
        "messages",
        "repeated_messages",
        "commands",
        "answers",
        "groups",
        "commands_with_images",
        "choices",
        "images",
    )
    summary = {name: work.counts[name] for name in names} | {
        "people": len(work.choices_of),
        "most_choices_of_one": max(work.choices_of.values(), default=0),
        "images_in_a_choice": {str(size): work.sizes[size] for size in sorted(work.sizes)},
        "matched": {how: work.counts[f"matched_by_{how}"] for how in ("name", "name alone", "hash")},
        "images_unsafe_for_work": work.counts["images_unsafe_for_work"],
        "left_out": dict(sorted(work.reasons.items())),
    }  # fmt: skip
    write_lines(folder / "summary.json", json.dumps(summary, indent=2).splitlines())
    return summary


def nothing_found(summary: dict[str, Any], bots: tuple[str, ...]) -> str:
    """Why there is no choice."""
    if not summary["answers"]:
        if not summary["messages"]:
            return "the exports have no messages: their lists of messages are empty"
        return f"no message of {' or '.join(bots)} repeats a command and has images; --bot names another bot"
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in summary["left_out"].items())
    return f"no choice is left of {counted(summary['groups'], 'group')}; left out: {reasons or 'nothing'}"


@one_writer
def main(config: Config) -> None:
    """Check, write under a temporary name, rename."""
    with exit_on_user_error():
        exports = check_inputs(config)
        salt = read_salt(config.salt_file)
    with replacing(config.output_dir) as partial:
        partial.mkdir()
        summary = write_folder(config, exports, salt, partial)
        with exit_on_user_error():
            if not summary["choices"]:
                raise ValueError(nothing_found(summary, config.bot))
    show(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(CONFIG)
