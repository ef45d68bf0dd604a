"""Every command of README and docs/ runs, or has flags that exist and says what it needs (docs_pages.py)."""

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest

from docs_pages import NEEDS, PAGES, ROOT, Block, Command, blocks, program
from preftune.cli import parse

PROGRAMS: dict[str, str] = pytest.importorskip("preftune.programs").PROGRAMS

BLOCKS = {block.place: block for page in PAGES for block in blocks(page)}
LONG = ("evaluation", "lora", "methods", "reward-models")
"""Pages with many trainings, which the tests of the drivers do as well; but for the slow tests, their flags alone are parsed."""
STORIES = [
    pytest.param(page, marks=[pytest.mark.slow] * (page.stem in LONG), id=page.stem)
    for page in PAGES
    if any(block.language in ("bash", "python") for block in blocks(page))
]
TOOLS = ("pip", "hf", "tensorboard", "mkdocs", "pytest", "git")
"""Programs of others; a block with one is not run."""


def run(command: Command, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program in this process, as its file is run: no time goes into importing everything again."""
    words = [*command.words, *block.extra(command.name)]
    monkeypatch.setattr("sys.argv", [command.name, *words])
    code: Any = 0
    try:
        runpy.run_module(command.module, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    assert code in (None, 0), f"{block.place}: {command.name} {' '.join(words)} ended with {code}"


@pytest.mark.parametrize("page", STORIES)
def test_what_a_page_says_works(
    page: Path, tmp_path: Path, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in their order in one folder, which is empty before: a page works without a checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # tests run in a process for each core
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.needs or block.run_by_the_gate:
            continue
        if block.title:
            (tmp_path / block.title).write_text(block.text + "\n")
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        elif block.language == "bash":
            for words in block.lines():
                command = program(words)
                assert command is not None, f"{block.place}: {words[0]} is not run; mark what it needs"
                run(command, block, monkeypatch)


MARKED = [
    place
    for place, block in BLOCKS.items()
    if block.language == "bash" and (block.needs or block.page.stem in LONG)
]


@pytest.mark.parametrize("place", MARKED)
def test_flags_of_what_is_not_run(place: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block that needs a GPU or data has commands that exist, with flags that they know."""
    for words in BLOCKS[place].lines():
        command = program(words)
        if command is None:
            assert words[0] in TOOLS, f"{place}: {words[0]} is unknown"
            continue
        module = importlib.import_module(command.module)
        config = getattr(module, "Config", None)
        for folder in (Path(word.partition("=")[0]) for word in command.words if "/scorer" in word):
            folder.parent.mkdir(
                parents=True, exist_ok=True
            )  # a scorer that an earlier command would have trained
            if not folder.exists():
                folder.symlink_to(ROOT / "assets/tiny/imagereward")
        if config is None:
            assert not command.words, f"{place}: {command.name} takes no flags"
            continue
        flags = [
            "bf16" if word == "fp16" else word for word in command.words
        ]  # fp16 is refused without a GPU
        try:
            parse(config, flags, default_config=getattr(module, "TINY", None))
        except SystemExit:
            pytest.fail(f"{place}: {' '.join(words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("place", BLOCKS)
def test_marks(place: str) -> None:
    """A block has a known language, and its comments say known things."""
    block = BLOCKS[place]
    assert block.language in ("bash", "python", "text", "yaml", "json"), (
        "commands are fenced with bash, the rest with text"
    )
    assert all(word in ("needs", "test", "command") for word, _, _ in block.comments), block.comments
    assert all(NEEDS.fullmatch(need) for need in block.needs), block.needs
    names = (
        {command.name for words in block.lines() if (command := program(words))}
        if block.language == "bash"
        else set()
    )
    for word, name, _ in block.comments:
        assert word != "test" or name in ("", *names), f"no command {name} is in the block"


def test_each_program_has_its_line() -> None:
    """The page of commands lists each program with its file."""
    page = (ROOT / "docs/commands.md").read_text()
    for name, module in PROGRAMS.items():
        file = f"`{module.replace('.', '/')}.py`"
        line = next((line for line in page.splitlines() if line.startswith(f"| `preftune {name}` |")), "")
        assert file in line or f"`python -m {module.removesuffix('.__main__')}`" in line, name
