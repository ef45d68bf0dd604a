"""Choices out of chats: the bot's grammar, each case of a choice by hand, 10,000 messages with known choices, hostile exports."""

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_build import discord_choices, discord_export, discord_matching
from data_build.discord_choices import Config, hashed
from data_build.discord_export import find_export, read_messages
from data_build.discord_groups import Groups
from data_build.discord_matching import distance, nearest, perceptual_hash
from data_build.dream_bot import Command, arrangement, cells, parse_answer, parse_command
from preftune.records import read_jsonl, read_rankings
from preftune.training import labelled_pairs, rankings

ROOT = Path(__file__).parents[1]
ALICE, BOB, BOT = "111111111111111111", "222222222222222222", "999999999999999999"
SALT = "a salt of more than sixteen letters"


def pattern(seed: int) -> Image.Image:
    """A grey image of 48 pixels unlike that of any other seed, with the spectrum 1/f of photographs."""
    frequencies = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.rfftfreq(48)[None])
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((48, 48)))
    levels = np.fft.irfft2(noise / np.maximum(frequencies, 1 / 48), s=(48, 48))
    return Image.fromarray(np.clip(128 + 40 * levels / levels.std(), 0, 255).astype(np.uint8)).convert("RGB")


def grid_of(seeds: list[int], rows: int, columns: int) -> Image.Image:
    whole = Image.new("RGB", (48 * columns, 48 * rows))
    for at, seed in enumerate(seeds):
        whole.paste(pattern(seed), (48 * (at % columns), 48 * (at // columns)))
    return whole


class Chat:
    """An export that is being written."""

    def __init__(self, folder: Path, channel: str = "42") -> None:
        self.folder, self.channel = folder, channel
        self.messages: list[dict[str, Any]] = []
        self.files = 0
        (folder / "chat.json_Files").mkdir(parents=True, exist_ok=True)

    def file(self, name: str, image: Image.Image | None, **settings: Any) -> dict[str, Any]:
        """An attachment; on disk it has a name of its own, as the exporter gives it."""
        self.files += 1
        url = f"chat.json_Files/{Path(name).stem}-{self.files:05d}{Path(name).suffix}"
        if image is not None:
            image.save(self.folder / url, **settings)
        return {"id": "7", "url": url, "fileName": name, "fileSizeBytes": 1}

    def say(self, person: str, text: str, *files: dict[str, Any], **more: Any) -> int:
        number = 1_000_000 + len(self.messages)
        author = {
            "id": person, "name": "DreamBotMothership" if person == BOT else f"name of {person}", "discriminator": "0001",
            "nickname": f"nick of {person}", "color": None, "isBot": person == BOT, "roles": [], "avatarUrl": "a.png",
        }  # fmt: skip
        message = {
            "id": str(number), "type": "Default", "timestamp": "2022-08-01T00:00:00+00:00", "timestampEdited": None,
            "callEndedTimestamp": None, "isPinned": False, "content": text, "author": author, "attachments": list(files),
            "embeds": [], "stickers": [], "reactions": [], "mentions": [], "inlineEmojis": [],
        }  # fmt: skip
        self.messages.append(message | more)
        return number

    def asks(self, person: str, prompt: str, flags: str = "-n 4", *files: dict[str, Any]) -> int:
        return self.say(person, f'!dream "{prompt}" {flags}', *files)

    def answers(
        self, asked: int, prompt: str, flags: str, *files: dict[str, Any], text: str = "", **more: Any
    ) -> int:
        echo = f'`!dream "{prompt}" {flags} -S 12` {text}'
        return self.say(BOT, echo, *files, reference={"messageId": str(asked), "channelId": self.channel}, **more)  # fmt: skip

    def four(self, asked: int, prompt: str, first: int) -> list[str]:
        """The bot answers with the images of four seeds."""
        names = [f"image_{seed}.png" for seed in range(first, first + 4)]
        self.answers(asked, prompt, "-n 4", *(self.file(name, pattern(first + at)) for at, name in enumerate(names)))  # fmt: skip
        return names

    def write(self, name: str = "chat.json") -> Path:
        export = {
            "guild": {"id": "1", "name": "a server", "iconUrl": "x"},
            "channel": {"id": self.channel, "type": "GuildTextChat", "name": "dream", "topic": None},
            "dateRange": {"after": None, "before": None},
            "messages": self.messages, "messageCount": len(self.messages),
        }  # fmt: skip
        (self.folder / name).write_text(json.dumps(export, indent=2), encoding="utf-8")
        return self.folder / name


def write_small(folder: Path) -> None:
    """An export with a choice out of images apart and one out of a grid, and a salt."""
    chat = Chat(folder)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    chat.asks(ALICE, "x", "", chat.file(names[2], pattern(2)))
    chat.answers(
        chat.asks(BOB, "y", "-n 4 -g"), "y", "-n 4 -g", chat.file("grid.png", grid_of([5, 6, 7, 8], 2, 2))
    )
    chat.asks(BOB, "y", "", chat.file("mine.png", pattern(7)))
    chat.asks(BOB, "y", "", chat.file("me.png", pattern(70)))
    chat.write()
    (folder / "salt").write_text(SALT)


def run(chat: Chat, *inputs: Path, **changes: Any) -> dict[str, Any]:
    """The summary of a chat's choices in out/."""
    (chat.folder / "salt").write_text(SALT)
    given: dict[str, Any] = {"salt_file": chat.folder / "salt", "output_dir": chat.folder / "out"} | changes
    discord_choices.main(Config(input=inputs or (chat.write(),), **given))
    found: dict[str, Any] = json.loads((given["output_dir"] / "summary.json").read_text())
    return found


def left_out(chat: Chat, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed where no choice is left."""
    with pytest.raises(SystemExit) as stop:
        run(chat)
    assert stop.value.code == 2
    assert not (chat.folder / "out").exists()
    return capsys.readouterr().err


# ---------------------------------------------------------------- the bot's grammar


def test_commands() -> None:
    plain = Command(prompt="a red house", number=1, grid=False, letters=False)
    assert parse_command('!dream "a red house"') == plain
    assert parse_command('  !dream -C 9 "a  red\nhouse" -S 1 -s50') == plain
    found = parse_command('!dream "a "big" house" -n 20 -g -W 640')
    assert found == Command(prompt='a "big" house', number=20, grid=True, letters=False)
    for flags, number, grid, letters in (
        ("-n 2", 2, False, False), ("-n2", 2, False, False), ("-n 20", 20, False, False), ("-gn 2", 1, False, False),
        ("--number=6 --grid", 6, True, False), ("-n 4 -n 3", 3, False, False), ("-ac 40", 1, False, True), ("-a", 1, False, True),
        ("-A ddim", 1, False, False), ("x-n 4", 1, False, False), ("-n -4", 1, False, False),
    ):  # fmt: skip
        for text in (f'!dream "x" {flags}', f'!dream {flags} "x"'):
            assert parse_command(text) == Command(prompt="x", number=number, grid=grid, letters=letters), text
    assert parse_command('!dream "a -n 4 b" -n 3') == Command(
        prompt="a -n 4 b", number=3, grid=False, letters=False
    )
    for text in (
        '!dreams "x"',
        'so !dream "x"',
        '!dream "x',
        "!dream x",
        '!dream ""',
        'dream "x"',
        '"!dream "',
        "",
    ):
        assert parse_command(text) is None, text


def test_answers() -> None:
    found = parse_answer('hi `!dream "a `b` c" -n 2`')
    assert found is None, "an inline code ends at the next backtick"
    found = parse_answer('``!dream "a `b` c" -n 2`` nsfw-ish')
    assert found is not None
    assert (found.command.prompt, found.listed, found.nsfw) == ("a `b` c", None, True)
    found = parse_answer(
        '`!dream "NSFW" -n 3 -g` The seeds for each individual image are [1, 22, 333]. `!dream "z"`'
    )
    assert found is not None
    assert (found.command.prompt, found.listed, found.nsfw) == ("NSFW", 3, False)
    found = parse_answer(
        '`!dream "a" -n 2 -g` The commands for each individual image are\n`!dream "a" -S 1`\n`!dream "a" -S 2`'
    )
    assert found is not None
    assert (found.command.number, found.listed) == (2, 2)
    assert parse_answer('!dream "a"') is None
    assert parse_answer("`hello`") is None


def test_what_attachments_are() -> None:
    def found(flags: str, attachments: int, text: str = "") -> object:
        answer = parse_answer(f'`!dream "a" {flags}` {text}')
        assert answer is not None
        return arrangement(answer, attachments)

    seeds = "The seeds for each individual image are [{}]"
    assert found("-n 4", 4) is None
    for number, layout in {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3)}.items():
        assert found(f"-n {number} -g", 1) == layout
        assert found(f"-n {number}", 1, seeds.format(", ".join("1" * number))) == layout
    few, many = "fewer images than asked for", "more images than asked for"
    assert found("-n 4 -g", 1, seeds.format("1, 2, 3")) == few
    assert (found("-n 4", 1), found("-n 20 -g", 1), found("-n 5 -g", 1), found("-n 4", 3)) == (few,) * 4
    assert (found("-n 2", 3), found("-n 2 -g", 1, seeds.format("1, 2, 3"))) == (many,) * 2
    assert found("-n 1", 1) == found("", 1) == found("", 4) == "group of one"
    assert found("-n 4 -a", 4) == "letters instead of images"


def test_cells_of_a_grid() -> None:
    """Row by row, all pixels once."""
    assert cells(6, 4, (2, 3)) == [
        (0, 0, 2, 2), (2, 0, 4, 2), (4, 0, 6, 2), (0, 2, 2, 4), (2, 2, 4, 4), (4, 2, 6, 4),
    ]  # fmt: skip
    assert cells(7, 4, (2, 3)) == cells(6, 5, (2, 3)) == []


# ---------------------------------------------------------------- the rule


def test_six_messages(tmp_path: Path) -> None:
    """A choice, another prompt, another person, a file from outside, a grid, and a reaction, which chooses nothing."""
    chat = Chat(tmp_path)
    people = [{"id": ALICE, "name": "alice", "isBot": False}]
    images = [chat.file(f"{at}.png", pattern(at)) for at in range(4)]
    chat.say(BOT, '`!dream "a red house" -n 4`', *images, mentions=people)
    chat.asks(ALICE, "a  red house", "-C 9", chat.file("2.png", pattern(2)))
    chat.asks(ALICE, "a blue house", "", chat.file("1.png", pattern(1)))
    chat.asks(BOB, "a red house", "", chat.file("0.png", pattern(0)))
    chat.asks(ALICE, "a red house", "", chat.file("me.png", pattern(77)))
    thumb = {"emoji": {"id": "", "name": "thumbsup"}, "count": 3, "users": [{"id": BOB, "isBot": False}]}
    chat.say(BOT, '`!dream "a cat" -n 4 -g`', chat.file("grid.png", grid_of([10, 11, 12, 13], 2, 2)), mentions=people, reactions=[thumb])  # fmt: skip
    assert len(chat.messages) == 6
    found = run(chat)
    assert found == {
        "messages": 6, "repeated_messages": 0, "commands": 4, "answers": 2, "groups": 2, "commands_with_images": 4, "choices": 1,
        "images": 4, "people": 1, "most_choices_of_one": 1, "images_in_a_choice": {"4": 1}, "matched": {"name": 1, "name alone": 0, "hash": 0},
        "images_unsafe_for_work": 0,
        "left_out": {"foreign upload": 1, "image of another person": 1, "prompt changed": 1},
    }  # fmt: skip
    (row,) = read_jsonl(tmp_path / "out/rankings.jsonl")
    names = [f"images/000/000000-{at}.png" for at in range(4)]
    source = hashed(SALT.encode(), ALICE)
    assert row == {
        "prompt": "a red house", "generations": names, "ranking": [2, 2, 1, 2], "source": source, "matched": "name",
    }  # fmt: skip
    for at, name in enumerate(names):
        assert Image.open(tmp_path / "out" / name).tobytes() == pattern(at).tobytes()
        assert (tmp_path / "out" / name).samefile(tmp_path / images[at]["url"]), "a hard link"
    assert [row["place"] for row in read_jsonl(tmp_path / "out/rejected.jsonl")] == [
        f"export 1 message {at}" for at in (3, 4, 5)
    ]


def test_a_grid_is_cut(tmp_path: Path) -> None:
    """What is sent back has another name, size and format."""
    chat = Chat(tmp_path)
    asked = chat.asks(ALICE, "six", "-n 6 -g")
    chat.answers(asked, "six", "-n 6 -g", chat.file("grid.png", grid_of([*range(6)], 2, 3)))
    chat.asks(ALICE, "six", "", chat.file("download.jpg", pattern(4).resize((96, 96)), quality=80))
    found = run(chat)
    assert (found["matched"], found["images_in_a_choice"]) == (
        {"name": 0, "name alone": 0, "hash": 1},
        {"6": 1},
    )
    (row,) = read_jsonl(tmp_path / "out/rankings.jsonl")
    assert row["ranking"] == [2, 2, 2, 2, 1, 2]
    for seed, name in enumerate(row["generations"]):
        assert Image.open(tmp_path / "out" / name).tobytes() == pattern(seed).tobytes()


def test_a_grid_that_cannot_be_cut_or_comes_back_whole(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    asked = chat.asks(ALICE, "odd", "-n 4 -g")
    chat.answers(asked, "odd", "-n 4 -g", chat.file("odd.png", Image.new("RGB", (97, 96))))
    chat.asks(ALICE, "odd", "", chat.file("a.png", pattern(1)))
    asked = chat.asks(ALICE, "whole", "-n 4 -g")
    whole = grid_of([4, 5, 6, 7], 2, 2)
    chat.answers(asked, "whole", "-n 4 -g", chat.file("whole.png", whole))
    chat.asks(ALICE, "whole", "", chat.file("whole.png", whole))
    chat.asks(ALICE, "whole", "", chat.file("b.png", pattern(5)))
    found = run(chat)
    assert (found["choices"], found["left_out"]) == (1, {"foreign upload": 1, "the whole grid": 1})


def test_names_alone_choose_nothing(tmp_path: Path) -> None:
    """A file from outside with the name of one of the images; two groups with the same names, told apart by the hash."""
    chat = Chat(tmp_path)
    for first in (0, 10):
        asked = chat.asks(ALICE, "a dog")
        files = [chat.file("image.png" if at == 0 else f"{at}.png", pattern(first + at)) for at in range(4)]
        chat.answers(asked, "a dog", "-n 4", *files)
    chat.asks(ALICE, "a dog", "", chat.file("image.png", pattern(70)))
    chat.asks(ALICE, "a dog", "", chat.file("image.png", pattern(10)))
    chat.asks(ALICE, "a dog", "", chat.file("3.png", pattern(71)))
    chat.four(chat.asks(ALICE, "a dog"), "a dog", 20)
    chat.asks(ALICE, "a dog", "", chat.file("image_21.png", pattern(72)))
    found = run(chat)
    assert (found["choices"], found["matched"]) == (1, {"name": 0, "name alone": 0, "hash": 1})
    assert found["left_out"] == {"foreign upload": 3}
    (row,) = read_jsonl(tmp_path / "out/rankings.jsonl")
    assert row["ranking"] == [1, 2, 2, 2]
    assert Image.open(tmp_path / "out" / row["generations"][0]).tobytes() == pattern(10).tobytes()


def test_an_upload_that_was_not_exported(tmp_path: Path) -> None:
    """Its name is all that there is, which the ranking says; a name of two images says nothing."""
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    chat.asks(ALICE, "x", "", chat.file(names[2], None))
    for first in (10, 20):
        files = [chat.file("image.png", pattern(first + at)) for at in range(2)]
        chat.answers(chat.asks(ALICE, "y", "-n 2"), "y", "-n 2", *files)
    chat.asks(ALICE, "y", "", chat.file("image.png", None))
    found = run(chat)
    assert (found["choices"], found["matched"]["name alone"]) == (1, 1)
    assert read_jsonl(tmp_path / "out/rankings.jsonl")[0]["ranking"] == [2, 2, 1, 2]


def test_what_is_left_out(tmp_path: Path) -> None:
    """Each reason once or twice; the choice of the last group alone is left."""
    chat = Chat(tmp_path)

    def group(
        flags: str, number: int, prompt: str, text: str = "", name: str = "{}.png", back: int = 0
    ) -> None:
        asked = chat.asks(ALICE, prompt, flags)
        first = 100 * len(chat.messages)
        files = [chat.file(name.format(first + at), pattern(first + at)) for at in range(number)]
        chat.answers(asked, prompt, flags, *files, text=text)
        chat.asks(ALICE, prompt, "", chat.file(f"{first + back}.png", pattern(first + back)))

    group("-n 1", 1, "one")
    group("-n 4", 3, "three of four")
    group("-n 4", 4, "flagged", "This may be NSFW.")
    group("-n 4", 4, "hidden", name="SPOILER_{}.png")
    group("-n 4", 4, "a nsfw word in the prompt")
    chat.answers(1, "who asked", "-n 2", chat.file("p.png", pattern(1)), chat.file("q.png", pattern(2)))
    foreign = chat.asks(ALICE, "myself", "-n 2", chat.file("me.png", pattern(3)))
    chat.answers(foreign, "myself", "-n 2", chat.file("r.png", pattern(4)), chat.file("s.png", pattern(5)))
    chat.asks(ALICE, "myself", "", chat.file("r.png", pattern(4)))
    asked = chat.asks(ALICE, "before", "-n 2")
    chat.answers(asked, "later", "-n 4", chat.file("t.png", pattern(6)))
    chat.asks(BOB, "two", "", chat.file("u.png", pattern(1)), chat.file("v.png", pattern(2)))
    chat.say(ALICE, "no command", chat.file("w.png", pattern(8)))
    found = run(chat)
    assert found["choices"] == 1
    assert found["left_out"] == {
        "answer to a foreign upload": 1, "fewer images than asked for": 2, "foreign upload": 1, "group of one": 1,
        "image of an answer that was left out": 5, "nobody knows who asked": 1, "several attachments": 1, "unsafe for work": 2,
    }  # fmt: skip
    rows = read_jsonl(tmp_path / "out/rejected.jsonl")
    assert [row["detail"] for row in rows if row["reason"].startswith("image of an answer")] == [
        "group of one", "fewer images than asked for", "unsafe for work", "unsafe for work", "answer to a foreign upload",
    ]  # fmt: skip
    assert read_rankings(tmp_path / "out")[0].prompt == "a nsfw word in the prompt"


@pytest.mark.parametrize(("first", "is_foreign"), [("", False), ("me.png", True)])
def test_what_is_made_of_an_image_of_a_group_of_one(tmp_path: Path, first: str, *, is_foreign: bool) -> None:
    """It is the bot's image, under another name, too, and its refinements are choices; but not where it was made of a foreign one."""
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(BOB, "fine"), "fine", 90)
    chat.asks(BOB, "fine", "", chat.file(names[0], pattern(90)))
    asked = chat.asks(ALICE, "x", "", *([chat.file(first, pattern(50))] if first else []))
    chat.answers(asked, "x", "", chat.file("single.png", pattern(1)))
    names = chat.four(chat.asks(ALICE, "x", "-n 4", chat.file("saved.jpg", pattern(1), quality=90)), "x", 10)
    chat.asks(ALICE, "x", "", chat.file(names[2], pattern(12)))
    names = chat.four(chat.asks(BOB, "x", "-n 4", chat.file("single.png", pattern(2))), "x", 20)
    chat.asks(BOB, "x", "", chat.file(names[2], pattern(22)))
    found = run(chat)
    assert found["choices"] == (1 if is_foreign else 2)
    reason = "image of an answer that was left out"
    assert found["left_out"][reason] == (3 if is_foreign else 2), (
        "and of bob's own, whose upload has the name only"
    )
    assert found["left_out"]["foreign upload"] == (2 if is_foreign else 1)


def test_a_group_is_chosen_from_once_and_after_it_is_there(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    chat.asks(ALICE, "x", "", chat.file("image_1.png", pattern(1)))
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    chat.asks(ALICE, "x", "", chat.file(names[3], pattern(3)))
    chat.asks(ALICE, "x", "", chat.file(names[0], pattern(0)))
    found = run(chat)
    assert (found["choices"], found["left_out"]) == (
        1,
        {"foreign upload": 1, "the group was chosen from before": 1},
    )
    assert read_rankings(tmp_path / "out")[0].ranks == (2, 2, 2, 1)


def test_channels_are_apart_and_parts_in_order(tmp_path: Path) -> None:
    """An export in three parts that overlap, given in any order, is as one; the same talk in another channel chooses nothing."""
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    chat.say(BOB, "hm")
    chat.asks(ALICE, "x", "", chat.file(names[2], pattern(2)))
    whole, parts = chat.messages, []
    for number, (start, end) in enumerate(((0, 2), (1, 3), (2, 4))):
        chat.messages = whole[start:end]
        parts.append(chat.write(f"chat [part {number}].json"))
    chat.messages, chat.channel = whole[3:], "43"
    other = chat.write("other.json")
    found = run(chat, parts[2], other, parts[0], parts[1])
    assert (found["messages"], found["repeated_messages"], found["choices"]) == (7, 2, 1)
    assert found["left_out"] == {"foreign upload": 1}


def test_people_are_hashed(tmp_path: Path) -> None:
    """No id, name or nickname in any file; the same salt gives the same hash, another one another, and the salt is nowhere."""
    chat = Chat(tmp_path)
    for person, first in ((ALICE, 0), (BOB, 10)):
        names = chat.four(chat.asks(person, "x"), "x", first)
        chat.asks(person, "x", "", chat.file(names[0], pattern(first)))
    chat.asks(BOB, "y", "", chat.file(f"name of {BOB}.png", pattern(50)))
    export = chat.write()
    salts = [tmp_path / "deep/salt", tmp_path / "deep/salt", None]
    for number, salt in enumerate(salts):
        run(chat, export, salt_file=salt, output_dir=tmp_path / f"out{number}")
    sources = [{row.source for row in read_rankings(tmp_path / f"out{number}")} for number in range(3)]
    assert sources[0] == sources[1]
    assert len(sources[0] | sources[2]) == 4
    secret = (tmp_path / "deep/salt").read_text().strip()
    assert len(secret) == 64
    assert stat.S_IMODE((tmp_path / "deep/salt").stat().st_mode) == 0o600
    for path in (tmp_path / "out0").rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        for word in (ALICE, BOB, "name of", "nick of", secret):
            assert word.encode() not in content, path
            assert word not in path.name
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(SystemExit):
        run(chat, export, salt_file=tmp_path / "short", output_dir=tmp_path / "out4")


def test_training_reads_it(tmp_path: Path) -> None:
    """As choices of one among n for reward models, and as pairs for DPO."""
    chat = Chat(tmp_path)
    for number, back in ((0, 1), (1, 3)):
        names = chat.four(chat.asks(ALICE, f"prompt {number}"), f"prompt {number}", 10 * number)
        chat.asks(ALICE, f"prompt {number}", "", chat.file(names[back], pattern(10 * number + back)))
    run(chat)
    ranked = rankings.by_images(read_rankings(tmp_path / "out"))
    rows, best, weights = rankings.choices(ranked)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert best.tolist() == [1, 3]
    assert weights.tolist() == [1, 1]
    pairs, skipped = labelled_pairs.label(labelled_pairs.read((tmp_path / "out",), ())[0], "each", "drop")
    assert [(pair.first.stem[-1], pair.second.stem[-1]) for pair in pairs] == [
        ("1", "0"), ("1", "2"), ("1", "3"), ("3", "0"), ("3", "1"), ("3", "2"),
    ]  # fmt: skip
    assert not skipped


# ---------------------------------------------------------------- images that are saved again


def test_copies_are_near_and_others_far() -> None:
    """The thresholds, on real images: of the embedded model's, 64 pixels wide, and copies of good quality."""
    files = sorted((ROOT / "assets/tiny/images").rglob("*.png"))[:40]
    hashes = []
    for path in files:
        image = Image.open(path).convert("RGB")
        hashes.append(perceptual_hash(image))
        buffer = io.BytesIO()
        image.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=60)
        assert distance(hashes[-1], perceptual_hash(Image.open(buffer))) <= discord_matching.ALIKE
    others = [distance(a, b) for at, a in enumerate(hashes) for b in hashes[:at]]
    assert min(others) > discord_matching.NAMED
    assert distance("0f", "f0") == 8


def test_the_nearest_by_hand() -> None:
    assert nearest([]) is None
    assert nearest([39]) is None
    assert nearest([90, 38]) == 1
    assert nearest([90, 38, 63]) is None
    assert nearest([90, 38, 64]) == 1
    assert nearest([3, 3]) is None


# ---------------------------------------------------------------- many messages


def generated(folder: Path, number: int, seed: int) -> tuple[Path, dict[str, tuple[int, int]]]:
    """An export of so many messages; prompt -> images and the chosen place of each choice that is to be found."""
    rng = np.random.default_rng(seed)
    chat, truth = Chat(folder), dict[str, tuple[int, int]]()
    waiting = list[Any]()
    talk = "lorem ipsum " * 40
    while len(chat.messages) < number:
        kind = rng.integers(0, 100)
        if kind < 88 or number - len(chat.messages) < 20:
            chat.say(str(10**17 + int(rng.integers(0, 500))), talk[: int(rng.integers(1, 400))])
        elif kind < 94 or not waiting:
            person = str(10**17 + int(rng.integers(0, 50)))
            size, is_grid = int(rng.choice([2, 3, 4])), rng.random() < 0.2
            prompt, first = f"prompt {len(chat.messages)}", 10 * len(chat.messages)
            flags = f"-n {size}{' -g' if is_grid else ''}"
            asked = chat.asks(person, prompt, flags)
            if is_grid:
                rows, columns = {2: (1, 2), 3: (1, 3), 4: (2, 2)}[size]
                files = [chat.file("grid.png", grid_of([*range(first, first + size)], rows, columns))]
            else:
                files = [chat.file(f"{first + at}.png", pattern(first + at)) for at in range(size)]
            chat.answers(asked, prompt, flags, *files)
            waiting.append((person, prompt, first, size, is_grid))
        else:
            person, prompt, first, size, is_grid = waiting.pop(int(rng.integers(0, len(waiting))))
            place = int(rng.integers(0, size))
            case = rng.choice(["name", "copy", "copy", "name", "prompt", "person", "foreign"])
            renamed = is_grid or case == "copy"
            file = (f"copy{first}.jpg" if renamed else f"{first + place}.png", pattern(first + place))
            if case == "prompt":
                prompt = f"{prompt} at night"
            elif case == "person":
                person = "5" * 18
            elif case == "foreign":
                file = ("upload.png", pattern(10**9 + first))
            else:
                truth[prompt] = (size, place)
            chat.asks(person, prompt, "-C 12", chat.file(*file))
    return chat.write(), truth


PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module("data_build.discord_choices", run_name="__main__")
print(open("/proc/self/status").read())
"""


@pytest.mark.parametrize("most", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_messages(most: int, tmp_path: Path) -> None:
    """All choices are found and none is invented, in the memory that few of the messages take."""
    peaks = {}
    for number in (1_000, most):
        folder = tmp_path / str(number)
        export, truth = generated(folder, number, seed=3)
        words = ["discord_choices.py", "--input", str(export), "--output-dir", str(folder / "out")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True,
            text=True,
        )  # fmt: skip
        peaks[number] = int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024
        found = {row.prompt: (len(row.paths), row.ranks.index(1)) for row in read_rankings(folder / "out")}
        assert found == truth
        summary = json.loads((folder / "out/summary.json").read_text())
        assert summary["messages"] == number
        assert len(truth) == summary["choices"] > number / 50
    assert peaks[most] < peaks[1_000] + 6, f"MiB: {peaks}"


# ---------------------------------------------------------------- hostile exports


def test_attachments_stay_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths that lead out, links, addresses, devices and what is no image: no choice, each counted."""
    (tmp_path / "chats").mkdir()
    pattern(2).save(tmp_path / "secret.png")
    (tmp_path / "chats/link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "chats/pipe.png")
    (tmp_path / "chats/text.png").write_bytes(b"<svg onload=alert(1)>")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "chats/huge.png")
    urls = {
        "../secret.png": "image: unsafe name", "..\\secret.png": "image: unsafe name", "%2e%2e/secret.png": "image: unsafe name",
        str(tmp_path / "secret.png"): "image: unsafe name", "C:\\secret.png": "image: unsafe name", "link.png": "image: unsafe name",
        "https://cdn.invalid/secret.png": "image: missing", "file:///secret.png": "image: missing", "chats": "image: missing",
        "pipe.png": "image: missing", "/dev/zero": "image: unsafe name", "text.png": "image: undecodable",
        "huge.png": "image: too large", "a" * 5000: "image: unsafe name", "": "image: unsafe name",
    }  # fmt: skip
    for number, (url, reason) in enumerate(urls.items()):
        chat = Chat(tmp_path / "chats")
        bad = {"id": "7", "url": url, "fileName": "bad.png", "fileSizeBytes": 1}
        other = chat.file("fine.png", pattern(1))
        chat.answers(chat.asks(ALICE, "x", "-n 2"), "x", "-n 2", bad, other)
        chat.asks(ALICE, "x", "", chat.file("fine.png", pattern(1)))
        chat.asks(ALICE, "x", "", bad)
        said = left_out(chat, capsys)
        assert f"1 {reason}" in said, (number, url, said)
        assert "Traceback" not in said


def test_an_image_that_is_lost_costs_itself(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    (tmp_path / chat.messages[1]["attachments"][1]["url"]).write_bytes(b"")
    chat.asks(ALICE, "x", "", chat.file(names[2], pattern(2)))
    found = run(chat)
    assert (found["images_in_a_choice"], found["left_out"]) == ({"3": 1}, {"image: no bytes": 1})
    assert read_rankings(tmp_path / "out")[0].ranks == (2, 1, 2)


def test_who_only_looks_like_the_bot(tmp_path: Path) -> None:
    """A person with the bot's name posts no groups, and another bot neither."""
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    chat.messages[1]["author"]["isBot"] = False
    chat.asks(ALICE, "x", "", chat.file(names[0], pattern(0)))
    chat.messages[2]["author"]["isBot"] = True
    names = chat.four(chat.asks(ALICE, "y"), "y", 10)
    chat.asks(ALICE, "y", "", chat.file(names[0], pattern(10)))
    assert run(chat)["choices"] == 1
    assert read_rankings(tmp_path / "out")[0].prompt == "y"


def test_malformed_messages_are_passed_over(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    names = chat.four(chat.asks(ALICE, "x"), "x", 0)
    good = chat.messages[0]
    bad: list[Any] = [
        {}, 3, None, "text", [], good | {"id": 5}, good | {"id": "-5"}, good | {"id": "9" * 30}, good | {"id": "\u0663"},
        good | {"author": []}, good | {"content": None}, good | {"content": "a\ud800"}, good | {"content": "a\0"},
        good | {"attachments": [1]}, good | {"attachments": 3}, good | {"attachments": [{"url": 1}]}, good | {"mentions": [3]},
        good | {"author": {"id": {}, "name": "x"}}, good | {"reference": 3}, good | {"reference": {"messageId": "../x"}},
    ]  # fmt: skip
    chat.messages += bad
    for message in bad:
        if isinstance(message, dict) and message.get("id") == "1000000":
            message["id"] = "1500000"
    chat.messages.append(
        json.loads(json.dumps(good | {"id": "2000000", "attachments": [chat.file(names[1], pattern(1))]}))
    )
    text = json.dumps({"channel": {"id": "42"}, "messages": chat.messages})
    (tmp_path / "bad.json").write_text(text)
    found = run(chat, tmp_path / "bad.json")
    assert found["left_out"]["malformed message"] >= len(bad) - 1
    assert found["choices"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "chat.json is empty, no JSON export of DiscordChatExporter"),
        ("[]", "is no JSON export of DiscordChatExporter"),
        ('{"channel": {"id": []}, "messages": []}', "no channel with an id comes before its messages"),
        ('{"channel": {"id": "1"}}', "is no JSON export of DiscordChatExporter: it has no list of messages"),
        ('{"channel": {"id": "1"}, "messages": {"id": "2"}}', "it has no list of messages"),
        ('{"channel": {"id": "1"}, "messages": []}', "the exports have no messages: their lists of messages are empty"),
        ("<!DOCTYPE html>", "as far as its first message: invalid char in json text; is it a whole export of --format Json?"),
        ('{"messages": [], "channel": {"id": "1"', "cannot be read as far as its first message"),
        ('{"channel": {"id": "1"}, "messages": [{"id": "1"}, {"id"', "breaks off, or cannot be read, after 1 message: "),
        ('{"channel": {"id": "1"}, "messages": ' + "[" * 300_000, "nested too deep"),
        ('{"channel": {"id": "1"}, "messages": [' + '{"a": ' * 300_000, "nested too deep"),
        ('{"channel": {"id": "1"}, "messages": [{"a": "' + "x" * 5_000_000, "has more than 4194304 bytes"),
        ('{"channel": {"id": "1"}, "messages": [{"id": NaN}]}', "cannot be read as far as its first message"),
        ("\x1b[2J", "cannot be read as far as its first message"),
    ],
)  # fmt: skip
def test_what_is_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        discord_choices.main(Config(input=(path,), output_dir=tmp_path / "out"))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in said
    assert said.count("error: ") == 1
    assert [*tmp_path.iterdir()] == [path]


def test_an_export_that_breaks_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The progress is ended first: the sentence has a line of its own."""
    chat = Chat(tmp_path)
    for _ in range(3):
        chat.say(ALICE, "hm")
    path = chat.write()
    path.write_text(path.read_text().rpartition('"content"')[0])
    with pytest.raises(SystemExit):
        discord_choices.main(Config(input=(path,), output_dir=tmp_path / "out"))
    said = capsys.readouterr().err
    assert "2 message" in said
    line = next(line for line in said.split("\n") if "error: " in line)
    assert line.startswith(
        f"{Path(sys.argv[0]).name}: error: {path} breaks off, or cannot be read, after 2 messages: "
    )


def test_files_that_are_none_and_a_reversed_export(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json"):
        with pytest.raises(ValueError, match=r"cannot be read|cannot read"):
            find_export(tmp_path / name)
    with pytest.raises(ValueError, match=r"is a folder; name the exports in it: .*/\*\.json"):
        find_export(tmp_path)
    chat = Chat(tmp_path)
    for _ in range(3):
        chat.say(ALICE, "hm")
    chat.messages.reverse()
    with pytest.raises(ValueError, match=r"not in the order of time.*--reverse"):
        list(read_messages(find_export(chat.write())))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"channel": {"id": "1"}, "messages": [3]}')
    assert list(read_messages(find_export(tmp_path / "bom.json"))) == [None]


def test_nothing_to_choose_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tmp_path)
    chat.say(ALICE, "hello")
    assert "--bot names another bot" in left_out(chat, capsys)
    chat.four(chat.asks(ALICE, "x"), "x", 0)
    assert "no choice is left of 1 group; left out: nothing" in left_out(chat, capsys)
    with pytest.raises(ValueError, match="--input needs"):
        Config(input=(), output_dir=tmp_path)
    with pytest.raises(ValueError, match="--bot needs"):
        Config(input=(tmp_path,), output_dir=tmp_path, bot=(" ",))


def test_one_person_with_many_groups_is_bounded() -> None:
    groups = Groups()
    for number in range(60):
        file = discord_export.Attachment(name="a.png", url=f"{number}.png")
        groups.add("c", "p", "x", "folder", [file, file], None)
    assert len(groups.candidates("c", "p", "x")) == 100
    assert groups.candidates("c", "p", "x")[-1].url == "59.png"
    assert len(groups.named("c", "A.PNG")) == 20
    assert groups.named("d", "a.png") == []
    assert len(groups.recent("c", "p")) == 20
    groups.close()
