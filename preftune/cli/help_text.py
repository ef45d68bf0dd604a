"""What --help prints: what a program does, its examples, and its flags in groups.

tyro writes name, type, help and default of each flag; it has one group for all flags without a dot. Here its text is read
flag by flag, and written in the groups that a reader looks for, the program's own flags first.
"""

import contextlib
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator

import tyro

from preftune.cli.leaves import Leaf, flag_of, leaves_of
from preftune.programs import PROGRAMS

OWN = "this program"
_LAST = ("model", "rewards", "sampling", "training", "output")
"""The last groups; before them come the program's own, and those of its other nested settings, such as --stable."""
_FIELDS = {
    "pretrained": "model",
    "lora": "model",
    "reward": "rewards",
    "guard": "rewards",
    "validation": "sampling",
    "sample": "sampling",
    "run": "training",
    "cache": "training",
    "columns": OWN,
    "models": OWN,
    "direct": OWN,
}
"""Field of a Config that holds settings -> group of its flags; another field is its own group."""
_NAMES = {
    **dict.fromkeys(("vae",), "model"),
    **dict.fromkeys(("rewards", "reward_files"), "rewards"),
    **dict.fromkeys(("validation_steps",), "sampling"),
    **dict.fromkeys(
        ("output", "output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpoints_total_limit",
         "resume_from_checkpoint", "report_to", "tracker_project_name"), "output",
    ),
}  # fmt: skip
"""Flag -> group, whatever holds it."""
_PROGRAMS = ("accelerate", "python", "preftune")
_WIDE = 10_000
"""Columns in which tyro does not break a line."""


def help_text(config_class: type, note: str) -> str:
    """Return the help: the docstring of the Config, a note, the commands of the module's docstring, and the flags."""
    width = min(100, max(40, shutil.get_terminal_size().columns))
    groups: dict[str, list[str]] = {OWN: []}
    flags = _flags(_boxes(config_class))
    groups_of = {flag_of(name): _group(name, leaf) for name, leaf in leaves_of(config_class).items()}
    for flag in sorted(
        flags, key=lambda flag: (flag != "--help", "(required)" not in flags[flag][1], flag != "--model")
    ):
        group = groups_of.get(flag, OWN)
        groups.setdefault(group, []).append(_flag(*flags[flag], width))
    titles = [*(name for name in groups if name not in _LAST), *(name for name in _LAST if name in groups)]
    paragraphs = [*(inspect.getdoc(config_class) or "").split("\n\n"), note]
    parts = [f"usage: {sys.argv[0]} [flags]", *(textwrap.fill(text, width) for text in paragraphs)]
    module = sys.modules[config_class.__module__].__doc__ or ""
    if examples := [_example(_as_started(line), comment, width) for line, comment in commands(module)]:
        parts.append("\n".join(("examples:", *examples)))
    parts += ["\n".join((f"{name}:", *groups[name])) for name in titles]
    return "\n\n".join(parts) + "\n"


def commands(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield (command, comment) of the indented command lines of a module's docstring; a line after a backslash is joined."""
    joined = re.sub(r" *\\\n +", " ", docstring)
    for line in joined.splitlines():
        if line.startswith("    ") and line.split(maxsplit=1)[:1] and line.split()[0] in _PROGRAMS:
            command, _, comment = line.strip().partition("  # ")
            yield " ".join(command.split()), comment.strip()


def _as_started(command: str) -> str:
    """A command that names a program's file, by its name where the program was started so: elsewhere there is no such file."""
    if not sys.argv[0].startswith("preftune "):
        return command
    for name, module in PROGRAMS.items():
        file = re.escape(f"{module.replace('.', '/')}.py")
        command = re.sub(rf"\bpython {file}", f"preftune {name}", command)
        command = re.sub(rf"(accelerate launch .*?){file}", rf"\1-m preftune {name}", command)
        command = re.sub(rf"={file}", f"=preftune {name}", command)
    return command


def _flag(head: str, help_: str, width: int) -> str:
    """A flag with its values, and its help below it; a default is not broken off from its word."""
    if len(head) + 2 > width:
        head = re.sub(r",(?=\S)", ", ", head)  # many values
    help_ = in_words(help_).replace("(default: ", "(default:\0")
    lines = [
        textwrap.fill(
            text,
            width,
            initial_indent=first,
            subsequent_indent=others,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for text, first, others in ((head, " " * 2, " " * 10), (help_, " " * 6, " " * 6))
    ]
    return "\n".join(lines).replace("\0", " ")


def in_words(text: str) -> str:
    """A help whose default is said in words, an empty one as none: `size; None = the model's own. (default: None)` has the default `the model's own`."""
    if text.endswith("(default: None)"):
        meaning = re.search(r"[;.]? ?\bNone = (.*?)\.(?=\s)", text)
        if meaning:
            rest = f"{text[: meaning.start()]}.{text[meaning.end() :]}"
            return f"{rest.removesuffix('None)')}{meaning[1]})"
    return re.sub(r"\(default: (None|'')?\)$", "(default: none)", text)


def _example(command: str, comment: str, width: int) -> str:
    """A command, in lines that a shell joins where it is too long; its comment above it."""
    lines = [""]
    for word in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(word) + 8 > width and lines[-1]:
            lines.append("")
        lines[-1] += f" {word}"
    text = " \\\n    ".join(f" {line}" for line in lines)
    return f"  # {comment}\n{text}" if comment else text


def _group(name: str, leaf: Leaf) -> str:
    """The group of a value, such as lora.rank: by its name, else by the field of the Config that holds its settings."""
    if name in _NAMES:
        return _NAMES[name]
    field = leaf.attributes[-2] if len(leaf.attributes) > 1 else ""
    return _FIELDS.get(field, field) if field else OWN


def _boxes(config_class: type) -> str:
    """What tyro prints in _WIDE columns."""
    box = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_WIDE)
    try:
        with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
            tyro.cli(config_class, args=["--help"], description="")
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return box.getvalue()


def _flags(boxes: str) -> dict[str, tuple[str, str]]:
    """Flag -> (the flag with its values, its help): a flag is indented by two columns, its help by more."""
    flags: dict[str, tuple[str, str]] = {}
    last = ""
    for line in boxes.splitlines():
        if re.match(r"  --?[a-z]", line):
            head, _, text = line.strip().partition("  ")
            last = "--help" if head.startswith("-h") else re.split(r"[ ,]", head)[0]
            if head == f"{last} {{None,True,False}}":
                head = f"{last}, {flag_of(last.removeprefix('--'), negated=True)}"
            flags[last] = (head.replace("{None}|", "").replace("{None,", "{"), text.strip())
        elif last and line.startswith("   "):
            head, text = flags[last]
            flags[last] = (head, f"{text} {line.strip()}".strip())
        else:  # a title, or what tyro says about its group
            last = ""
    return flags
