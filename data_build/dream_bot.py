"""What the image bot of HPS's chats says (arXiv 2303.14420, section 3), and what people say to it.

    person   !dream "a red house" -n 4 -g                      with an image: refine this one
    bot      `!dream "a red house" -n 4 -g -S 12` The seeds for each individual image are [12, 13, 14, 15]

The prompt is the text between the first and the last double quote. Flags stand before or after it: -n number of images,
-g one grid of them, -a and -ac letters instead of an image, others that do not matter here. The bot replies to the message
that asked, and flags what may be unsafe for work with that word (NSFW) or as a spoiler.
"""

import re
from dataclasses import dataclass
from typing import Literal

LAYOUTS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3)}
"""Images in a grid -> its rows and columns."""
BOT = "DreamBotMothership"
"""Name of the bot."""
SPOILER = "SPOILER_"
"""What the name of a hidden attachment begins with."""

Reason = Literal[
    "letters instead of images", "group of one", "fewer images than asked for", "more images than asked for"
]
"""Why an answer is no group of images."""

# a flag and its value, as words: -n 2 is not in -n 20
_NUMBER = re.compile(r"(?<!\S)(?:-n|--number)[ =]?\s*(\d{1,4})(?!\S)")
_GRID = re.compile(r"(?<!\S)(?:-g|--grid)(?!\S)")
_LETTERS = re.compile(r"(?<!\S)(?:-ac?|--ascii(?:cols)?)(?=[\s\d=]|$)")
_COMMAND = re.compile(r"\s*!dream(?![\w-])")
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_SEEDS = re.compile(r"The seeds for each individual image are\s*\[([^\]]*)\]")
_COMMANDS = re.compile(r"The commands for each individual image are")
_NSFW = re.compile(r"\bNSFW\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a person asks for."""

    prompt: str
    """With single spaces."""
    number: int
    grid: bool
    letters: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the bot answers."""

    command: Command
    """As the bot repeats it."""
    listed: int | None
    """Number of images whose seeds or commands it lists; None where it lists none."""
    nsfw: bool


def parse_command(text: str) -> Command | None:
    """Return what a message asks for; None where it is no command or has no prompt."""
    start = _COMMAND.match(text)
    first, last = text.find('"'), text.rfind('"')
    if start is None or not start.end() <= first < last:
        return None
    flags = f"{text[start.end() : first]} {text[last + 1 :]}"
    prompt = " ".join(text[first + 1 : last].split())
    numbers = _NUMBER.findall(flags)
    if not prompt:
        return None
    return Command(
        prompt=prompt,
        number=int(numbers[-1]) if numbers else 1,
        grid=_GRID.search(flags) is not None,
        letters=_LETTERS.search(flags) is not None,
    )


def parse_answer(text: str) -> Answer | None:
    """Return what a message of the bot answers; None where it repeats no command."""
    codes = [*_CODE.finditer(text)]
    commands = [(code.end(), command) for code in codes if (command := parse_command(code[2])) is not None]
    if not commands:
        return None
    end, command = commands[0]
    listed = None
    if seeds := _SEEDS.search(text, end):
        listed = len([seed for seed in seeds[1].split(",") if seed.strip()])
    elif sentence := _COMMANDS.search(text, end):
        listed = sum(at > sentence.end() for at, _ in commands)
    return Answer(command=command, listed=listed, nsfw=_NSFW.search(_CODE.sub(" ", text)) is not None)


def arrangement(answer: Answer, attachments: int) -> tuple[int, int] | Reason | None:
    """Return rows and columns of the grid that so many attachments are, None for images apart, or why they are no group."""
    number = answer.command.number
    if answer.command.letters:
        return "letters instead of images"
    if number < 2:
        return "group of one"
    if answer.listed is not None and answer.listed < number:
        return "fewer images than asked for"
    if attachments > number or (answer.listed or 0) > number:
        return "more images than asked for"
    if attachments == number:
        return None
    is_grid = attachments == 1 and number in LAYOUTS and (answer.command.grid or answer.listed is not None)
    return LAYOUTS[number] if is_grid else "fewer images than asked for"


def cells(width: int, height: int, layout: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return left, top, right and bottom of the images in a grid of (rows, columns), row by row; none where it cannot be cut evenly."""
    rows, columns = layout
    if width % columns or height % rows:
        return []
    wide, high = width // columns, height // rows
    return [
        (wide * column, high * row, wide * (column + 1), high * (row + 1))
        for row in range(rows)
        for column in range(columns)
    ]
