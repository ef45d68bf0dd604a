"""The command `preftune`: which program each of its words starts.

    preftune refl --max-train-steps 10        # the same as python finetune/refl.py --max-train-steps 10
    accelerate launch --num_processes 2 -m preftune refl

Nothing of a program is imported before it starts: its line in `preftune --help` is read from its source.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

PROGRAMS = {
    "refl": "finetune.refl",
    "draft": "finetune.draft",
    "drtune": "finetune.drtune",
    "flowbp": "finetune.flowbp",
    "ddpo": "finetune.ddpo",
    "raft": "finetune.raft",
    "awm": "finetune.awm",
    "nft": "finetune.nft",
    "reward-weighted": "finetune.reward_weighted",
    "weird-lora": "finetune.weird_lora",
    "dpo": "finetune.dpo",
    "pretrain": "finetune.pretrain",
    "reward-model": "finetune.reward_model",
    "pretrain-scorer": "finetune.pretrain_scorer",
    "autoencoder": "finetune.autoencoder",
    "score": "data_build.score",
    "generate": "data_build.generate",
    "diffusiondb": "data_build.diffusiondb",
    "preferences": "data_build.preferences",
    "annotate-mllm": "data_build.annotate_mllm",
    "discord-choices": "data_build.discord_choices",
    "annotate": "data_build.annotate",
    "unpack": "data_build.unpack",
    "select-prompts": "data_build.select_prompts",
    "clean-prompts": "data_build.clean_prompts",
    "shapes": "data_build.shapes",
    "simulate-rankings": "data_build.simulate_rankings",
    "grid": "eval.grid",
    "benchmark-images": "eval.generate",
    "benchmark": "eval.benchmark",
    "compare-methods": "eval.compare_methods",
    "compare-reward-models": "eval.compare_reward_models",
    "preference-accuracy": "eval.preference_accuracy",
    "steps": "eval.steps",
    "distribution": "eval.distribution",
    "selection": "eval.selection",
    "scorers": "rewards.__main__",
    "export-lora": "preftune.lora.export_lora",
    "doctor": "preftune.machine.doctor",
}
"""Command -> the module that it runs."""

_GROUPS = {
    "train": ("finetune",),
    "build data sets": ("data_build",),
    "measure and show": ("eval",),
    "other": ("rewards", "preftune"),
}
"""Title -> folders of the programs below it."""
_ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Start the program of the first word as `__main__`, with the words after it as its flags; argv defaults to the process's.

    What the program raises, SystemExit included, passes through, so its exit code is that of `preftune`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview(shutil.get_terminal_size((100, 24)).columns))
        return 0
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"preftune {importlib.metadata.version('preftune')}\n")
        return 0
    command = words[0].replace("_", "-")
    try:
        spec = _spec_of(command)
    except ValueError as error:
        sys.stderr.write(f"preftune: error: {error}\n")
        return 2
    sys.argv = [f"preftune {command}", *words[1:]]
    _run(spec)
    return 0


def overview(width: int) -> str:
    """Return the list of commands, each with the first sentence of its program, in lines of at most `width` letters."""
    wide = max(map(len, PROGRAMS)) + 4
    lines = ["usage: preftune COMMAND [FLAGS]", "       preftune COMMAND --help", ""]
    for title, folders in _GROUPS.items():
        lines.append(f"{title}:")
        for command, module in PROGRAMS.items():
            if module.partition(".")[0] in folders:
                text = shortened(summary(module), max(width, 60) - wide)
                lines.append(f"  {command}".ljust(wide) + text)
        lines.append("")
    lines += ["`preftune refl` without flags is the demo. `preftune doctor` says what is missing here."]
    return "\n".join(lines) + "\n"


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` letters, cut between words."""
    if len(text) <= width:
        return text
    return text[: width - 3].rpartition(" ")[0].rstrip(",") + " ..."


def summary(module: str) -> str:
    """Return the first sentence of a module's docstring, up to a colon, without parentheses; the module is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no {module}"
    assert spec.origin is not None, f"{module} is no file"
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    sentence = re.sub(r"\s*\([^()]*\)", "", paragraph).partition(". ")[0].rstrip(".")
    return re.split(r"(?<=.{25})[:;] ", sentence)[0]


def _spec_of(command: str) -> ModuleSpec:
    """Return the module of a command; ValueError for one that is none, and where another package hides one of this."""
    if command not in PROGRAMS:
        near = difflib.get_close_matches(command, PROGRAMS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown command {command!r}{meant}; see preftune --help")
    module = PROGRAMS[command]
    for name in dict.fromkeys(("rewards", module.partition(".")[0])):
        if (fault := hidden(name)) is not None:
            raise ValueError(fault)
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{command} is in the table without a module {module}"
    return spec


def hidden(name: str) -> str | None:
    """Return a sentence where Python finds something else than the package of this project with such a name, else None."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return f"the package {name} is not beside {_ROOT / 'preftune'}; install preftune again"
    places = [Path(place).resolve() for place in spec.submodule_search_locations or [str(spec.origin)]]
    if places[0] == _ROOT / name:
        return None
    return f"{places[0]} hides preftune's own {name}; rename or uninstall it, or start in a folder without it"


def _run(spec: ModuleSpec) -> None:
    """Execute a module as `__main__`, as `python -m` does, but with sys.argv as it is.

    It stays `__main__` to the end of the process, and has its spec: a spawned process imports it by its name, and what is
    pickled by reference to `__main__` is found there.
    """
    module = types.ModuleType("__main__")
    module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
    module.__package__ = spec.parent
    sys.modules["__main__"] = module
    loader: object = spec.loader
    code = loader.get_code(spec.name)  # type: ignore[attr-defined]
    exec(code, vars(module))


if __name__ == "__main__":
    sys.exit(main())
