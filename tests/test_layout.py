"""The shape of the house: who imports whom, file names, and that every driver and every YAML file is sound."""

import ast
import functools
import graphlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from preftune import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("rewards", "preftune", "finetune", "data_build", "eval", "benchmarks", "tests")
LIBRARIES = {"rewards": ("rewards",), "preftune": ("rewards", "preftune")}
"""What the two libraries may import of ours: rewards itself alone, preftune also rewards."""

RUN = tuple(
    f"preftune.training.{name}"
    for name in (
        "checkpoint",
        "folder",
        "inputs",
        "metrics",
        "optimizer",
        "process_state",
        "report_to",
        "resume",
        "signals",
        "trackers",
    )
)
"""The parts of Run, which programs leave to it."""

HOMES = {
    "accelerate": (
        "preftune/training/run.py",
        "preftune/training/trackers.py",
        "preftune/training/process_state.py",
    ),
    "diffusers": ("preftune/families/", "preftune/solvers.py"),
    "jinja2": ("preftune/pages.py",),
    "peft": ("preftune/lora/tuning.py",),
    "open_clip": (),
    "httpx2": ("preftune/mllm/client.py",),
    "ray": ("data_build/cluster.py",),
    "werkzeug": ("data_build/annotation_server.py",),
    "sqlite3": ("preftune/annotation/storage.py", "data_build/discord_groups.py"),
}
"""The only places that know a library, so that swapping it touches one file."""

SOURCES = [path for folder in FOLDERS[:5] for path in sorted((ROOT / folder).rglob("*.py"))]
PROGRAMS = [
    path
    for folder in ("finetune", "data_build", "eval", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
]
CONFIGS = sorted(
    path for folder in ("finetune", "eval") for path in (ROOT / folder / "configs").glob("*/*.yaml")
)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The dotted names that a file imports, at any depth; `from a import b` is a.b."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)} line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_at_once(body: list[ast.stmt]) -> set[str]:
    """The dotted names that running a module imports, those of its functions and of type checks left out."""
    names = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif (
            isinstance(node, ast.Try | ast.If) and "TYPE_CHECKING" not in ast.unparse(node).partition(":")[0]
        ):
            names |= imported_at_once([*node.body, *node.orelse])
    return names


def module_of(path: Path) -> str:
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def is_program(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree_of(path).body)


DRIVERS = [path for path in sorted((ROOT / "finetune").glob("*.py")) if is_program(path)]


def under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def allowed(module: str) -> tuple[str, ...]:
    """What a module may import of ours: the libraries, and of its own folder what is no program."""
    folder = module.split(".")[0]
    if folder in LIBRARIES:
        return LIBRARIES[folder]
    plumbing = [f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py") if not is_program(path)]
    return ("rewards", "preftune", *plumbing)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_arrows(path: Path) -> None:
    """rewards <- preftune <- {finetune, data_build, eval}; programs never import each other: they meet through files."""
    module = module_of(path)
    may = allowed(module)
    wrong = {name for name in imports(path) if under(name, FOLDERS) and not under(name, may)}
    assert not wrong, f"{short(path)} imports {wrong}; of ours it may import {may}"
    if not under(module, tuple(LIBRARIES)):
        inner = {name for name in imports(path) if under(name, RUN)}
        assert not inner, f"{short(path)} imports {inner}, which it must leave to preftune.training.run"


def test_finetune_holds_programs_only() -> None:
    """What drivers share is in preftune/training."""
    others = [
        path for path in (ROOT / "finetune").rglob("*.py") if path.stem != "__init__" and not is_program(path)
    ]
    assert not others, f"move to preftune/training: {[short(path) for path in others]}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Of nodes and what they point to: every group whose members all reach each other; a node that points to itself."""
    reach = {node: set(others) for node, others in graph.items()}
    for middle in graph:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    groups = {frozenset(n for n in graph if node in reach[n] and n in reach[node]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"d"}}) == [["a", "b", "c"]]
    assert circles({"a": {"a"}, "b": {"a"}}) == [["a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_two_files_import_each_other() -> None:
    """Not even through others, or inside a function: such files can only be understood together."""
    modules = {module_of(path) for path in SOURCES}
    graph = {
        module_of(path): {
            name if name in modules else name.rpartition(".")[0]
            for name in imports(path)
            if {name, name.rpartition(".")[0]} & modules
        }
        for path in SOURCES
    }
    assert "rewards.card" in graph["rewards.trained_cards"], "imports are found"
    assert "preftune.training.checkpoint" in graph["preftune.training.run"], "imports are found"
    assert not circles(graph)


def test_no_rule_for_a_file_that_is_not_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for pattern in settings["tool"]["ruff"]["lint"]["per-file-ignores"]:
        assert list(ROOT.glob(pattern)), f"pyproject.toml has a rule for {pattern}, which no file matches"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_library_has_one_home(path: Path) -> None:
    for library, homes in HOMES.items():
        knows = any(under(name, (library,)) for name in imports(path))
        assert not knows or short(path).startswith(homes), (
            f"{short(path)} imports {library}, at home in {homes}"
        )


def test_no_program_shadows_a_module() -> None:
    """`accelerate launch finetune/x.py` puts finetune/ first on sys.path: finetune/datasets.py would hide the library."""
    installed = {
        name
        for name, projects in importlib.metadata.packages_distributions().items()
        if set(projects) != {"preftune"}
    }
    taken = sys.stdlib_module_names | installed | set(FOLDERS)
    shadows = [short(path) for path in PROGRAMS if path.stem in taken]
    assert not shadows, f"these names hide a module; rename them: {shadows}"


def test_no_utils_and_no_long_file() -> None:
    for path in SOURCES:
        assert path.stem not in ("utils", "helpers", "misc", "common"), (
            f"{short(path)}: name it for what it owns"
        )
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{short(path)} has {lines} lines"


CALLS = {
    "Image.open": ("preftune/images.py",),
    "ImageFile.Parser": (),
    "imread": (),
    "io.read_image": (),
    "utils.load_image": (),
    "print": ("preftune/cli/printable.py", "rewards/__main__.py"),
}
"""Function -> the only files that may call it: what opens images has limits, what prints makes text printable."""


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=short)
def test_dangerous_calls_have_one_home(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        where = f"{short(path)} line {node.lineno}"
        for call, homes in CALLS.items():
            known = name == call or name.endswith(f".{call}")
            program = short(path).startswith("benchmarks/") and call == "print"
            assert not known or program or short(path) in homes, f"{where} calls {call}, at home in {homes}"
        if name == "jinja2.Environment":
            assert {"autoescape": "True"}.items() <= {
                k.arg: ast.unparse(k.value) for k in node.keywords
            }.items(), f"{where}: pages must escape"
        if name == "zipfile.ZipFile" and [ast.unparse(mode) for mode in node.args[1:2]] != ["'w'"]:
            assert short(path) == "data_build/decode.py", f"{where} reads an archive without open_zip"
        if name == "torch.load":
            weights_only = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
            assert weights_only == "True", f"{where} unpickles"


def flag_fields() -> set[str]:
    """Fields of the programs' Configs whose flags are written in another way: max_train_steps, and lora.rank of a group."""
    trees = [tree_of(path) for path in SOURCES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    by_name = {node.name: node for node in classes if node.name != "Config"}
    found, todo = set[str](), [node for node in classes if node.name == "Config"]
    while todo:
        for field in todo.pop().body:
            if isinstance(field, ast.AnnAssign):
                words = {node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)}
                groups = [by_name.pop(word) for word in sorted(words) if word in by_name]
                name = ast.unparse(field.target)
                inside = [
                    ast.unparse(one.target)
                    for one in ast.walk(*groups[:1] or [field])
                    if isinstance(one, ast.AnnAssign)
                ]
                found |= {f"{name}.{one}" for one in inside} if groups else {name}
                todo += groups
    return {name for name in found if "_" in name or "." in name}


def test_sentences_name_flags() -> None:
    """As the user types them: --num-inference-steps, not the field num_inference_steps."""
    fields = flag_fields()
    assert {"max_train_steps", "lora.rank", "num_inference_steps", "output_dir"} <= fields
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, sorted(fields)))})\b(?![\w=])")
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Raise) or short(path).startswith(
                ("preftune/api/", "rewards/card.py")
            ):
                continue  # what is called from Python has arguments, not flags, and a card the keys of a file
            for text in ast.walk(node):
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    match = pattern.search(text.value)
                    assert not match, (
                        f"{short(path)} line {text.lineno} names the field {match[0]}, not its flag"
                    )


def test_sources_are_ascii() -> None:
    for path in SOURCES:
        assert path.read_text(encoding="utf-8").isascii(), f"{short(path)} is not ASCII"


@pytest.mark.parametrize("path", DRIVERS, ids=short)
def test_every_driver_has_a_config_help_and_a_yaml(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver = importlib.import_module(f"finetune.{path.stem}")
    with pytest.raises(SystemExit) as stop:
        cli.parse(driver.Config, ["--help"])
    assert not stop.value.code
    assert "--config FILE.yaml" in capsys.readouterr().out
    assert any(config.parent.name == path.stem for config in CONFIGS), (
        f"no finetune/configs/{path.stem}/*.yaml"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_every_shipped_yaml_parses(config: Path, tmp_path: Path) -> None:
    folder, name = config.parents[2].name, config.parent.name
    driver = importlib.import_module(f"{folder}.{name}")
    kind = driver.Protocol if name == "benchmark" else driver.Config  # whose keys the file has
    parsed = cli.parse(kind, ["--config", str(config)])
    first = config.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#"), f"{short(config)} must begin with its command in a comment"
    assert f"{folder}/{name}.py" in first, f"{short(config)} must begin with its command in a comment"
    (tmp_path / "replay.yaml").write_text(cli.dump(parsed), encoding="utf-8")
    assert cli.parse(kind, ["--config", str(tmp_path / "replay.yaml")]) == parsed


@pytest.mark.parametrize(
    "module",
    ["rewards", "rewards.terms", "preftune.cli", "preftune.training.config", "preftune.training.run_config"],
)
def test_importable_without_torch(module: str) -> None:
    """Flags, --help and the scorer table must not wait for torch."""
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_no_module_needs_itself() -> None:
    """Any module can be the first that is imported: modules, with the packages that they lie in, form no circle."""
    known = {module_of(path): path for path in SOURCES}
    needs: dict[str, set[str]] = {}
    for name, path in known.items():
        found = imported_at_once(ast.parse(path.read_text(encoding="utf-8")).body)
        parents = {
            ".".join(one.split(".")[:depth]) for one in found for depth in range(1, one.count(".") + 2)
        }
        needs[name] = {one for one in parents & known.keys() if not f"{name}.".startswith(f"{one}.")}
    assert needs["preftune.prompts"] >= {"preftune.cli", "preftune.typed_prompts"}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle
