"""The fenced blocks of README and docs/, and the commands in them.

A block of commands is fenced with ```bash, and one of Python with ```python; other blocks are shown only. HTML comments directly
above a block say how it is tested:

    <!-- needs: gpu, network -->             not run, but its flags are parsed; also hours, people, data (what)
    <!-- test: --count 4 -->                 flags that are added to each command, so that it is quick
    <!-- test grid: --count 4 -->            flags for the command of this name alone
    <!-- command run -->                     run by .ci/run
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NEEDS = re.compile(r"gpu|network|hours|people|data \(.+\)")
"""What a block may need that the tests have not."""

_FENCE = re.compile(r"( *)```(\w*) *(.*)")
_COMMENT = re.compile(r" *<!-- *(\w+) *([\w-]*):? *(.*?) *-->")
_TITLE = re.compile(r'title="([\w.]+)"')


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program of this package with the words behind it."""

    name: str
    """As `preftune NAME`."""
    module: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of the fence, from 1."""
    language: str
    text: str
    title: str
    """Name of the file that it shows, or empty."""
    comments: tuple[tuple[str, str, str], ...]
    """(word, name, rest) of each HTML comment directly above it."""

    @property
    def place(self) -> str:
        """Where it is, as in README.md:12."""
        return f"{self.page.name}:{self.line}"

    @property
    def needs(self) -> list[str]:
        """What it needs that the tests have not."""
        rest = ", ".join(rest for word, _, rest in self.comments if word == "needs")
        return re.split(r", (?![^(]*\))", rest) if rest else []

    @property
    def run_by_the_gate(self) -> bool:
        """Whether .ci/run runs it."""
        return any(word == "command" for word, _, _ in self.comments)

    def lines(self) -> Iterator[list[str]]:
        """The commands, each as its words."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words

    def extra(self, name: str) -> list[str]:
        """The flags that a test adds to a command."""
        return [
            flag
            for word, only, rest in self.comments
            if word == "test" and only in ("", name)
            for flag in shlex.split(rest)
        ]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    found: list[Block] = []
    comments: list[tuple[str, str, str]] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if fence := _FENCE.fullmatch(line):
            indent, language, rest = fence.groups()
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner.removeprefix(indent))
            title = _TITLE.search(rest)
            found.append(
                Block(
                    page=page,
                    line=number,
                    language=language,
                    text="\n".join(body),
                    title=title[1] if title else "",
                    comments=tuple(comments),
                )
            )
        match = _COMMENT.fullmatch(line)
        comments = [*comments, (match[1], match[2], match[3])] if match else []
    return found


def program(words: Sequence[str]) -> Command | None:
    """The program of this package that a command starts; None for another one, such as pip."""
    from preftune.programs import PROGRAMS  # the pages can be read without it

    if words[0] == "preftune":
        return Command(name=words[1], module=PROGRAMS[words[1]], words=tuple(words[2:]))
    if words[0] not in ("python", "accelerate"):
        return None
    if "-m" in words:
        at = words.index("-m") + 1
        if words[at] == "preftune":
            return program(words[at:])
        module = "rewards.__main__" if words[at] == "rewards" else words[at]
    else:
        at = next(at for at, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[at]).is_file(), words[at]
        module = words[at].removesuffix(".py").replace("/", ".")
    names = {module: name for name, module in PROGRAMS.items()}
    return Command(name=names.get(module, module), module=module, words=tuple(words[at + 1 :]))
