"""The command `preftune`, the embedded files from any folder, and the wheel."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import preftune
from data_build import score
from eval import grid
from eval.trainings import command_record, launch_words
from finetune import refl
from preftune import cli, programs
from preftune.families import locate
from preftune.machine import embedded_check
from preftune.training.folder import commit
from rewards import embedded, find_card
from rewards.terms import parse_weights

ROOT = Path(__file__).parents[1]
PACKAGES = ("rewards", "preftune", "finetune", "data_build", "eval")
NO_COMMANDS = {
    "preftune.programs": "is the command itself",
    "preftune.machine.library_probe": "answers preftune doctor",
}
WORDS = ("prompts.txt", "pipeline/model_index.json", "imagereward/config.json")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".")


def has_main(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def run(
    *words: str, cwd: Path, paths: tuple[Path, ...] = (ROOT,), **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m preftune WORDS`, away from the repository."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    return subprocess.run(
        [sys.executable, "-m", "preftune", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip


# ---------------------------------------------------------------- the command


def test_every_program_has_a_command() -> None:
    found = {
        module_of(path) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py") if has_main(path)
    }
    assert found == {*programs.PROGRAMS.values(), *NO_COMMANDS}
    for command, module in programs.PROGRAMS.items():
        name = module.rpartition(".")[2]
        other = {
            "scorers": "rewards.__main__",
            "benchmark-images": "eval.generate",
        }  # `generate` is data_build's
        assert command.replace("-", "_") == name or other.get(command) == module


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(["--help"]) == 0
    said = capsys.readouterr().out
    for command, module in programs.PROGRAMS.items():
        assert f"\n  {command} " in said
        assert len(programs.summary(module)) > 20
    assert programs.summary("eval.grid") == "Compare models side by side"
    narrow = programs.overview(60).splitlines()[3:]
    assert max(map(len, narrow[:-1])) <= 60
    assert any(line.endswith(" ...") for line in narrow)


def test_help_imports_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from preftune import programs; programs.main([])\n"
        "assert not {'torch', 'numpy', 'tyro', 'yaml'} & sys.modules.keys(), 'imported'"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("word", "instead"),
    [("relf", "did you mean refl?"), ("finetune/refl.py", "see preftune --help"), ("gird", "did you mean grid?")],
)  # fmt: skip
def test_a_wrong_command(word: str, instead: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main([word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"preftune: error: unknown command '{word}'")
    assert instead in said
    assert said.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(["--version"]) == 0
    assert capsys.readouterr().out == f"preftune {version('preftune')}\n"


def test_a_program_is_main_and_says_its_command(tmp_path: Path) -> None:
    """Underscores are dashes; a user's rewards.py in the working directory hides nothing."""
    (tmp_path / "rewards.py").write_text("raise SystemExit('the wrong rewards')\n", encoding="utf-8")
    done = run("compare_reward_models", "--nonsense", "1", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("preftune compare-reward-models: error: unknown flag --nonsense")


def test_spawned_processes_know_main(tmp_path: Path) -> None:
    """What `python -m` gives them: the module's name, by which they import it as `__mp_main__`."""
    package = tmp_path / "job"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "work.py").write_text(
        "import multiprocessing, sys\n"
        "def twice(x):\n    return 2 * x, __name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(twice, [4]), sys.argv)\n"
        "    sys.exit(3)\n",
        encoding="utf-8",
    )
    code = (
        "import sys; from preftune import programs\n"
        "if __name__ == '__main__':\n"
        "    programs.PROGRAMS['work'] = 'job.work'\n"
        "    programs.hidden = lambda name: None  # job is another project's\n"
        "    sys.exit(programs.main(['work', '--x']))\n"
    )
    (tmp_path / "start.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "start.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[(8, '__mp_main__')] ['preftune work', '--x']\n", "")
    assert done.returncode == 3


def test_another_package_of_the_same_name_is_said(tmp_path: Path) -> None:
    other = tmp_path / "eval"
    other.mkdir()
    (other / "__init__.py").touch()
    done = run("grid", cwd=tmp_path, paths=(tmp_path, ROOT))
    assert done.returncode == 2
    assert f"preftune: error: {other} hides preftune's own eval; rename or uninstall it" in done.stderr


def test_a_file_of_the_user_that_hides_a_package_is_said_in_python(tmp_path: Path) -> None:
    """A file with rewards is easily called rewards.py."""
    for name in ("rewards", "finetune"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text("def mine(pixels, prompts): ...\n", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", "from preftune import refl"], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        last = done.stderr.splitlines()[-1]
        assert last.startswith(
            f"ImportError: {folder / name}.py hides preftune's own {name}; rename or uninstall it"
        )


def test_type_checkers_know_the_calls() -> None:
    """They are imported for them alone, and the annotations of the package count (PEP 561)."""
    tree = ast.parse((ROOT / "preftune" / "__init__.py").read_text(encoding="utf-8"))
    blocks = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    (imported,) = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    assert [alias.name for alias in imported.names] == preftune.__all__
    assert "__getattr__" not in {getattr(node, "name", "") for node in tree.body}, "with it any name is known"
    assert (ROOT / "preftune" / "py.typed").is_file()


# ---------------------------------------------------------------- preftune doctor


def test_doctor_names_what_is_broken(tmp_path: Path) -> None:
    """An import that fails, one that takes its process with it, and no secret in the report."""
    broken = {
        "torch": "raise ImportError('libcudart.so.99 is missing')",
        "peft": "import os; os.kill(os.getpid(), 11)",
    }
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text, encoding="utf-8")
    (tmp_path / "cache").mkdir()
    done = run(
        "doctor", cwd=tmp_path / "cache", paths=(ROOT, tmp_path), HF_HOME=str(tmp_path / "cache"), HF_TOKEN="hf_secret"
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    faults = done.stdout.partition("Missing for the demo:\n")[2].splitlines()
    assert "- torch cannot be imported: ImportError: libcudart.so.99 is missing" in faults
    assert "- peft ends the process when it is used (signal 11); install it again" in faults
    assert "HF_TOKEN is set" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    assert f"cache {tmp_path / 'cache' / 'hub'}: not there yet" in " ".join(
        done.stdout.split()
    )  # a long path ends a line


def test_doctor_where_all_is_well(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\nThe demo can run: preftune refl\n")
    assert f"torch {version('torch')}" in done.stdout
    assert f"{version('preftune')} in {ROOT}" in done.stdout
    assert "weights here: brightness, shapes, imagereward-tiny" in done.stdout
    assert len(done.stdout.splitlines()) < 40


def test_damaged_embedded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded_check.damaged() == []
    copy = tmp_path / "assets" / "tiny"
    shutil.copytree(ROOT / "assets" / "tiny", copy, ignore=shutil.ignore_patterns("00*", "*.py"))
    monkeypatch.setattr(embedded, "PLACES", (tmp_path,))
    assert embedded_check.damaged() == []
    unet, vae = (copy / "pipeline" / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    content = unet.read_bytes()
    unet.write_bytes(content[:-1])
    vae.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="ascii")
    (copy / "prompts.txt").unlink()
    said = embedded_check.damaged()
    assert said[0] == f"{copy / 'prompts.txt'} is missing"
    assert said[1] == f"{unet} has {len(content) - 1} bytes, but must have {len(content)}"
    assert "git lfs pull" in said[2]


# ---------------------------------------------------------------- embedded files from any folder


def test_embedded_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in WORDS:
        relative = Path("assets/tiny", name)
        assert embedded.find(relative) == ROOT / relative
        assert embedded.portable(ROOT / relative) == relative
    for name in (
        "assets/tiny/none.txt",
        "assets/before_after.png",
        "assets/tiny/../../pyproject.toml",
        "tests",
        "",
    ):
        assert embedded.find(name) == Path(name)
    assert embedded.portable(ROOT / "pyproject.toml") == ROOT / "pyproject.toml"
    mine = tmp_path / "assets" / "tiny" / "prompts.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine\n", encoding="utf-8")
    assert embedded.find("assets/tiny/prompts.txt") == Path("assets/tiny/prompts.txt")
    assert embedded.portable(ROOT / "assets/tiny/prompts.txt") == ROOT / "assets/tiny/prompts.txt"


def test_a_wheel_has_them_in_preftune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tmp_path / "preftune" / "assets" / "tiny"
    assets.mkdir(parents=True)
    (assets / "prompts.txt").touch()
    monkeypatch.setattr(embedded, "PLACES", (tmp_path / "preftune", tmp_path))
    monkeypatch.chdir("/")
    assert embedded.find("assets/tiny/prompts.txt") == assets / "prompts.txt"
    assert embedded.portable(assets / "prompts.txt") == Path("assets/tiny/prompts.txt")


def test_flags_name_embedded_files_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths, models and scorers of flags and YAML; what is written down does not name this machine."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", "finetune/configs/refl/tiny.yaml", "--rewards", "assets/tiny/imagereward=2"]
    config = cli.parse(refl.Config, words)
    assert config.prompts == ROOT / "assets/tiny/prompts.txt"
    assert config.validation.validation_prompts == ROOT / "assets/tiny/held_out.txt"
    assert config.model.pretrained.source().folder == ROOT / "assets/tiny/pipeline"
    assert config.run.output_dir == Path("runs/refl-tiny")
    assert parse_weights(config.reward.rewards) == {"assets/tiny/imagereward": 2.0}
    assert find_card("assets/tiny/imagereward").folder == str((ROOT / "assets/tiny/imagereward").resolve())
    text = cli.dump(config)
    assert str(ROOT) not in text
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert cli.parse(refl.Config, ["--config", "again.yaml"]) == config
    config = cli.parse(refl.Config, [*words, "--output-dir", "assets/tiny/pipeline"])
    assert config.run.output_dir == Path("assets/tiny/pipeline"), "what is written is never in the package"


def test_grid_takes_embedded_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = cli.parse(grid.Config, ["--columns", "base=", "again=assets/tiny/pipeline", "--count", "1"])
    request = grid.check_inputs(config)
    assert [column.pipeline.folder for column in request.columns] == [ROOT / "assets/tiny/pipeline"] * 2
    assert locate("assets/tiny/pipeline").name == "assets/tiny/pipeline"


def test_scores_are_not_written_into_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--data assets/tiny/images --rewards brightness --output-dir scored"
    assert score.check_inputs(cli.parse(score.Config, words.split()))[1] == 600
    with pytest.raises(ValueError, match="would write into the package"):
        score.check_inputs(cli.parse(score.Config, [*words.split(), "--add-to-metadata"]))


def test_comparisons_start_drivers_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--config", "finetune/configs/refl/tiny.yaml"]
    start = ["-m", "preftune", "refl", *flags]
    assert launch_words(["finetune/refl.py", *flags]) == start
    assert launch_words(["preftune", "refl", *flags]) == start
    assert launch_words(["finetune/weird_lora.py"]) == ["-m", "preftune", "weird-lora"]
    assert "with SHA-256" in command_record(["preftune", "refl", *flags])
    for wrong in (["preftune"], ["preftune", "grid"], ["eval/grid.py"], ["rm", "-rf"]):
        with pytest.raises(ValueError, match="is no driver; give"):
            launch_words(wrong)
    own = tmp_path / "finetune" / "refl.py"
    own.parent.mkdir()
    own.touch()
    assert launch_words(["finetune/refl.py", *flags]) == ["finetune/refl.py", *flags]


# ---------------------------------------------------------------- the wheel


def test_the_wheel_forgets_no_file() -> None:
    """Every package is listed, and every file that is no module matches a pattern."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = [
        path.parent.relative_to(ROOT) for folder in PACKAGES for path in (ROOT / folder).rglob("__init__.py")
    ]
    packages = [folder.as_posix().replace("/", ".") for folder in found]
    assert sorted(packages) == sorted(settings["packages"])
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
                continue
            owner = next(parent for parent in path.parents if (parent / "__init__.py").is_file())
            patterns = settings["package-data"].get(owner.relative_to(ROOT).as_posix().replace("/", "."), [])
            assert any(path in set(owner.glob(pattern)) for pattern in patterns), f"{path} is in no wheel"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    hidden = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, source, ignore=hidden)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    apart = ["--no-build-isolation"] if int(version("setuptools").partition(".")[0]) >= 77 else []
    subprocess.run([*pip, "wheel", "--no-deps", *apart, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 30e6
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    assert not (site / "assets").exists()
    assert not (site / "tests").exists()
    images = empty / "five"
    images.mkdir()
    for name in range(5):
        shutil.copy(site / "preftune" / "assets" / "tiny" / "images" / "000" / f"{name:06}.png", images)

    def start(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(site / "bin" / "preftune"), *words]
        done = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout} {done.stderr}"
        return done.stdout

    assert f"in {site}" in start("doctor")
    tiny = "--config finetune/configs/refl/tiny.yaml --max-train-steps 1 --train-batch-size 1 --num-validation-prompts 1"
    start("refl", *tiny.split(), "--mixed-precision", "no", "--sample.num-inference-steps", "2")
    assert (empty / "runs" / "refl-tiny" / "lora").is_dir()
    assert "model: assets/tiny/pipeline\n" in (empty / "runs/refl-tiny/config.yaml").read_text(
        encoding="utf-8"
    )
    start(
        "score", "--data", "five", "--prompt", "a red circle", "--rewards", "imagereward-tiny", "brightness", "--output-dir",
        "scored",
    )  # fmt: skip
    assert json.loads((empty / "scored" / "summary.json").read_text(encoding="utf-8"))
    start("grid", "--columns", "base=", "tuned=runs/refl-tiny", "--count", "1", "--num-inference-steps", "2")
    assert (empty / "grid" / "index.html").is_file()
    assert sorted(path.name for path in empty.iterdir()) == ["five", "grid", "runs", "scored"]


def test_a_wheel_in_a_repository_of_others_says_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of the repository around a virtual environment says nothing about this package."""
    if (ROOT / ".git").exists():
        assert "version" not in commit()
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    assert commit() == f"unknown (version {version('preftune')})"
