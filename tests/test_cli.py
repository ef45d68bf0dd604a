"""The command line: a YAML file is a list of flags written down, and the last one wins."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from finetune import refl, reward_weighted
from preftune import cli
from preftune.cli.leaves import leaves_of
from preftune.sampling import Sampling
from preftune.training import run_config


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: Path = Path("runs/default")
    """Folder of the run."""
    lr: float = 1e-5
    """Learning rate."""
    resume: str = "no"
    """Where to go on: no or auto."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    rank: int = 4
    """Rank of the update."""
    use_bias: bool = True
    """Whether there is a bias."""
    alpha: float | None = None
    """Scale."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a thing."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    lora: LoRA = field(default_factory=LoRA)
    rewards: tuple[str, ...] = ("a=1",)
    """Scorers and weights."""
    mode: Literal["no", "fast"] = "no"
    window: tuple[int, int] = (30, 39)
    note: str | None = None
    demo: bool = False
    tri: bool | None = None
    batch_size: int = 2
    margin: float = 2.0

    def __post_init__(self) -> None:
        if self.margin == 0:
            raise ValueError(
                "margin is 0.0, which leaves nothing of the reward to learn from; choose a margin above the rewards "
                "that you expect, for example --margin 2 as the paper does, or more when the scorer's scale is wider"
            )


@dataclass(frozen=True, kw_only=True)
class Required:
    """Needs a file."""

    prompts: Path
    """The prompt file."""
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Has a model."""

    model: str
    """The model."""
    prompts: Path
    """The prompt file."""
    batch: int = 1
    lora: LoRA = field(default_factory=LoRA)


@dataclass(frozen=True, kw_only=True)
class RealRun:
    """Has a run."""

    run: Annotated[run_config.RunConfig, tyro.conf.arg(name="")] = field(default_factory=run_config.RunConfig)


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], config: type = Config) -> str:
    """The one sentence with which argv is refused."""
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.isascii()
    return captured.err


def test_defaults_and_flags() -> None:
    assert cli.parse(Config, []) == Config()
    config = cli.parse(
        Config, ["--lora.rank", "8", "--lr=1e-4", "--lora.no-use-bias", "--rewards", "b=2", "c=3"]
    )
    assert config == Config(
        run=RunConfig(lr=1e-4), lora=LoRA(rank=8, use_bias=False), rewards=("b=2", "c=3"), batch_size=2
    )
    assert cli.parse(Config, ["--batch_size", "3"]).batch_size == 3


def test_yaml_is_flags_written_down(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "# command\nlr: 1e-4\nresume: no\nmode: fast\nlora:\n  rank: 8\n  use-bias: off\nlora.alpha: 2\n"
        "rewards: [b=2, 'c=3']\nwindow:\n- 1\n- 2\nnote: ~\ndemo: yes\ntri: false\noutput: runs/x\nbatch_size: 7\n",
    )
    assert cli.parse(Config, ["--config", file]) == Config(
        run=RunConfig(output=Path("runs/x"), lr=1e-4, resume="no"),
        lora=LoRA(rank=8, use_bias=False, alpha=2.0),
        rewards=("b=2", "c=3"),
        mode="fast",
        window=(1, 2),
        demo=True,
        tri=False,
        batch_size=7,
    )


def test_the_type_of_the_field_decides_not_yaml(tmp_path: Path) -> None:
    file = write(tmp_path, "resume: no\nmode: no\nnote: 007\noutput: 2024-01-01\nlr: 1e-4\n")
    config = cli.parse(Config, [f"--config={file}"])
    assert (config.run.resume, config.mode, config.note, config.run.lr) == ("no", "no", "007", 1e-4)
    assert config.run.output == Path("2024-01-01")
    assert isinstance(config.run.lr, float)


def test_last_wins(tmp_path: Path) -> None:
    one = write(tmp_path, "rewards: [b=2, c=3]\nlr: 1\nlora.rank: 1\ndemo: true\n", "1.yaml")
    two = write(tmp_path, "rewards: d=4\nlora: {rank: 2}\ndemo: false\n", "2.yaml")
    config = cli.parse(Config, ["--lr", "3", "--config", one, "--config", two])
    assert (config.rewards, config.run.lr, config.lora.rank, config.demo) == (("d=4",), 3.0, 2, False)
    assert cli.parse(Config, ["--config", two, "--rewards", "e", "f", "--config", one]).rewards == ("e", "f")
    assert cli.parse(Config, ["--rewards", "e", "f", "--rewards", "g"]).rewards == ("g",)


def test_empty_list(tmp_path: Path) -> None:
    file = write(tmp_path, "rewards: []\nlr: 2\n")
    assert cli.parse(Config, ["--config", file]).rewards == ()
    assert cli.parse(Config, ["--config", file, "--demo"]).rewards == ()


def test_the_default_config_is_read_where_no_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags follow it and win; it is said which file is read."""
    demo = Path(write(tmp_path, "model: embedded\nprompts: p.txt\nbatch: 9\nlora.rank: 8\n"))

    def parsed(*argv: str) -> tuple[str, int, int]:
        config = cli.parse(Tuned, list(argv), default_config=demo)
        return config.model, config.batch, config.lora.rank

    assert parsed() == ("embedded", 9, 8)
    assert capsys.readouterr().err == (
        f"note: without --model the embedded model is tuned, by {demo} and the flags that follow; name another with --model\n"
    )
    assert parsed("--batch", "3", "--lora.rank=2") == ("embedded", 3, 2)
    assert "by " in capsys.readouterr().err
    for model in (["--model", "x"], ["--model=x"], ["--pretrained_model_name_or_path=x"]):
        assert parsed(*model, "--prompts", "q.txt") == ("x", 1, 4)
    other = write(tmp_path, "model: y\nprompts: q.txt\n", "other.yaml")
    assert parsed("--config", other) == ("y", 1, 4)
    with pytest.raises(SystemExit) as stop:
        parsed("--model", "x")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --prompts is missing; see --help\n")
    with pytest.raises(SystemExit):
        parsed("--help")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("typed", [["--overwrite-output-dir"], ["--resume-from-checkpoint", "latest"], []])
def test_of_overwriting_and_resuming_the_later_place_counts(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = write(tmp_path, "resume_from_checkpoint: latest\n", "resume.yaml")
    overwrite = write(tmp_path, "overwrite_output_dir: true\n", "overwrite.yaml")

    def parsed(*argv: str) -> tuple[object, bool]:
        config = cli.parse(RealRun, [*argv, *typed])
        return config.run.resume_from_checkpoint, config.run.overwrite_output_dir

    after = {"--overwrite-output-dir": (None, True), "--resume-from-checkpoint": ("latest", False)}
    for files, last in (([resume], overwrite), ([overwrite], resume), ([], overwrite), ([], resume)):
        flags = [word for file in [*files, last] for word in ("--config", file)]
        assert parsed(*flags) == after.get(
            typed[0] if typed else "", (None, True) if last == overwrite else ("latest", False)
        )
    assert parsed("--config", resume, "--no-overwrite-output-dir")[0] in ("latest", None)
    both = write(tmp_path, "resume_from_checkpoint: latest\noverwrite_output_dir: true\n", "both.yaml")
    if not typed:
        assert "give one of them" in refused(capsys, ["--config", both], RealRun)
        argv = ["--resume_from_checkpoint=latest", "--overwrite_output_dir"]
        assert "give one of them" in refused(capsys, argv, RealRun)
        step = "runs/x/step_000050"  # to go back to a checkpoint and remove what came after it
        assert parsed("--config", overwrite, "--resume-from-checkpoint", step) == (Path(step), True)


def test_argv_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["refl.py", "--batch-size", "5"])
    assert cli.parse(Config).batch_size == 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora.rnak", "3"], "unknown flag --lora.rnak (did you mean --lora.rank?)"),
        (["--batchsize", "3"], "--batchsize (did you mean --batch-size?)"),
        (["--zzzzzz"], "unknown flag --zzzzzz; see --help"),
        (["--no-mode"], "unknown flag --no-mode"),
        (["--lr", "abc"], "--lr: 'abc' is not a number"),
        (["--lora.rank", "1.5"], "--lora.rank: '1.5' is not a whole number"),
        (["--mode", "slow"], "--mode is 'slow'; it must be no or fast"),
        (["--window", "1"], "--window takes 2 whole numbers, got 1"),
        (["--lora.rank", "-1"], "error: lora.rank is -1; it must be 0 or more\n"),
        (["--margin", "0"], "wider\n"),
        (["--demo=maybe"], "--demo takes no value: write --demo or --no-demo"),
        (["--demo", "maybe"], "--demo takes no value, got 'maybe': write --demo or --no-demo"),
        (["stray"], "unexpected 'stray'"),
        (["--config"], "--config needs a file"),
        (["--config", "--lr"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml: No such file"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nlora:\n  rnak: 3\n", "line 3: unknown key lora.rnak (did you mean lora.rank?)"),
        ("run:\n  lr: 3\n", "line 1: unknown key run"),
        ("lr: 1\nlr: 2\n", "line 2: lr is there twice, first on line 1"),
        ("lora.rank: 1\nlora: {rank: 2}\n", "line 2: lora.rank is there twice"),
        ("lora:\n  rank:\n    a: 3\n", "line 2: lora.rank takes a value, not a mapping"),
        ("lora: 3\n", "lora is a group and has no value; set lora.rank"),
        ("lr: [1, 2]\n", "lr takes one value, not a list"),
        ("rewards: [[a]]\n", "rewards takes a list of plain values"),
        ("rewards: [a, ~]\n", "rewards takes a list of plain values"),
        ("rewards: [a, --demo]\n", "an element may not begin with -"),
        ("lr:\n", "lr has no value"),
        ("demo: maybe\n", "demo is 'maybe'; it must be true or false"),
        ("lr: abc\n", "c.yaml line 1: --lr: 'abc' is not a number"),
        ("window: [1]\n", "c.yaml line 1: --window"),
        ("lora.rank: -2\n", "lora.rank is -2; it must be 0 or more"),
        ("a: [\n", "is not YAML"),
        ("lr: 1\n---\nlr: 2\n", "is not YAML"),
        ("- lr\n", "must hold `key: value` lines"),
        ("[" * 800, "is not YAML"),
        ("? [a, b]\n: 3\n", "line 1: a key must be a name, not a list"),
        ("lr: \x07\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, ["--config", write(tmp_path, text)])
    assert words in message
    assert "c.yaml" in message or "lora.rank is -2" in message


def test_a_flag_that_overrides_the_file_is_not_blamed_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "lr: 1\n")
    assert "c.yaml" not in refused(capsys, ["--config", file, "--lr", "abc"])


def test_a_bare_word_does_not_join_the_list_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "rewards: [a]\n")
    assert "unexpected 'b'" in refused(capsys, ["--config", file, "b"])
    assert "unexpected 'b'" in refused(capsys, ["--rewards", "a", "--config", file, "b"])


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_bytes(b"lr: \xff\n")
    assert "is not UTF-8 text" in refused(capsys, ["--config", str(tmp_path / "c.yaml")])


def test_a_tag_builds_no_object(tmp_path: Path) -> None:
    file = write(tmp_path, f"note: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(SystemExit):
        cli.parse(Config, ["--config", file])
    assert not (tmp_path / "made").exists()


def test_several_values_for_a_flag_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    for values in (["a", "red", "circle"], ["a red circle", "cat"], ["a.txt", "b.txt"]):
        prompts = refused(capsys, ["--prompts", *values, "--batch", "3"], Required)
        assert f"--prompts takes one value, got {len(values)}: {values[0]!r} {values[1]!r}" in prompts
        assert "a prompt stands in quotes, and a file of many prompts, one a line, is named once" in prompts
    assert (
        "--note takes one value, got 3: 'a' 'red' 'circle'; a value with spaces stands in quotes"
        in refused(capsys, ["--note", "a", "red", "circle"])
    )
    assert "--note takes one value, got 2: 'b'" in refused(capsys, ["--note=a", "b"])
    assert cli.parse(Config, ["--rewards", "a=1", "b=1", "--note", "-1"]).note == "-1"


def test_missing_required_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, [], Required).endswith("error: --prompts is missing; see --help\n")
    missing = refused(capsys, ["--rewards", "brightness=1"], refl.Config)
    assert missing.endswith("error: --prompts and --model are missing; see --help\n")
    missing = refused(capsys, [], reward_weighted.Config)
    assert missing.endswith("error: --data, --score and --model are missing; see --help\n")
    assert cli.parse(Required, ["--config", write(tmp_path, "prompts: p.txt\n")]).prompts == Path("p.txt")


def test_help_shows_docstrings_defaults_and_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code in (0, None)
    for words in (
        "Tune a thing.",
        "Learning rate. (default: 1e-05)",
        "--lora.rank INT",
        "--config FILE.yaml",
    ):
        assert words in text


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            run=RunConfig(output=Path("a b/c"), lr=float("inf"), resume="null"),
            lora=LoRA(alpha=1 / 3, use_bias=False),
            rewards=(),
            note="two\nlines: # and 'quotes' \u00e9",
            tri=True,
        ),
        Config(rewards=("a=1", "b c", "", "yes"), note="7", run=RunConfig(lr=1e-300)),
    ],
)
def test_dump_replays(tmp_path: Path, config: Config) -> None:
    file = write(tmp_path, cli.dump(config))
    assert cli.parse(Config, ["--config", file]) == config


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_script_says_one_sentence_whatever_the_terminal(tmp_path: Path, encoding: str) -> None:
    script = write(
        tmp_path,
        "from dataclasses import dataclass\nfrom preftune.cli import parse\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Config:\n    lr: float = 1.0\nparse(Config)\n",
        "drive.py",
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, script, "--lr", "abc"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "drive.py: error: --lr: 'abc' is not a number\n"


def test_exit_on_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli.exit_on_user_error():
        raise ValueError("no such\nscorer")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: no such scorer\n")
    with pytest.raises(RuntimeError), cli.exit_on_user_error():
        raise RuntimeError("ours")


DIFFUSERS = (
    "--pretrained_model_name_or_path=assets/tiny/pipeline --prompts assets/tiny/prompts.txt --rewards brightness=1"
    " --pretraining off --resolution=64 --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing"
    " --max_train_steps=400 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant_with_warmup --lr_warmup_steps=10"
    " --adam_beta1 0.9 --adam_beta2 0.99 --adam_weight_decay 0.01 --adam_epsilon 1e-7 --checkpointing_steps 100"
    " --checkpoints_total_limit 3 --resume_from_checkpoint latest --mixed_precision=bf16 --seed 1 --output_dir=sd-model"
)


def test_flags_pasted_from_diffusers_scripts_work() -> None:
    from finetune import refl

    config = cli.parse(refl.Config, DIFFUSERS.split())
    assert (config.model.pretrained.model, config.model.resolution) == ("assets/tiny/pipeline", "64")
    run = config.run
    assert (run.max_train_steps, run.train_batch_size, run.gradient_accumulation_steps) == (400, 1, 4)
    assert (run.learning_rate, run.lr_scheduler, run.lr_warmup_steps) == (1e-5, "constant_with_warmup", 10)
    assert (run.adam_beta1, run.adam_beta2, run.adam_weight_decay, run.adam_epsilon) == (
        0.9,
        0.99,
        0.01,
        1e-7,
    )
    assert (run.checkpointing_steps, run.checkpoints_total_limit) == (100, 3)
    assert (run.resume_from_checkpoint, run.mixed_precision, run.output_dir) == (
        "latest",
        "bf16",
        Path("sd-model"),
    )


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--logging_dir=logs", "unknown flag --logging_dir (here: tensorboard/ lies in --output-dir"),
        ("--network_dropout=0", "unknown flag --network_dropout (here: the LoRA has no dropout); see --help"),
        ("--num_train_epochs=3", "(here: --max-train-steps, a number of updates)"),
        ("--random_flip", "(here: images are not mirrored"),
        ("--updates=3", "(here: --max-train-steps)"),
    ],
)
def test_flags_of_other_scripts_get_a_sentence(
    flag: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune import refl

    assert words in refused(capsys, [flag], refl.Config)


@pytest.mark.parametrize("program", ["eval.grid", "eval.compare_methods", "data_build.generate"])
def test_flags_of_sampling_have_one_name_in_all_programs(program: str) -> None:
    """--sample.guidance-scale as in training; without --sample where nothing else could be meant."""
    module = importlib.import_module(program)
    flags = {"--methods": ["a=finetune/refl.py"]} if program == "eval.compare_methods" else {}
    if program == "data_build.generate":
        flags = {"--model": ["x"], "--prompts": ["x"], "--output-dir": ["x"]}
    given = [word for flag, values in flags.items() for word in (flag, *values)]
    values = {
        "guidance-scale": "3",
        "num-inference-steps": "4",
        "solver": "ddim",
        "resolution": "64",
        "batch-size": "5",
    }
    long = cli.parse(module.Config, [*given, *(f"--sample.{name}={value}" for name, value in values.items())])
    short = cli.parse(
        module.Config, [*given, *(word for name, value in values.items() for word in (f"--{name}", value))]
    )
    bare = cli.parse(module.Config, given)
    samplings = [
        (config.models if program == "eval.grid" else config).sample for config in (short, long, bare)
    ]
    assert samplings[0] == samplings[1] != Sampling()
    assert samplings[2] == Sampling()


def test_a_short_name_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    """refl has its own steps, and --batch-size could be that of training."""
    from finetune import refl

    parsed = cli.parse(
        refl.Config, ["--model", "x", "--prompts", "x", "--pretraining", "off", "--num-inference-steps", "45"]
    )
    assert (parsed.num_inference_steps, parsed.validation.sample.num_inference_steps) == (45, None)
    assert "unknown flag --batch-size" in refused(capsys, ["--batch-size", "2"], refl.Config)


def test_every_flag_that_is_named_as_a_remedy_exists() -> None:
    from data_build import generate
    from eval import grid
    from finetune import refl, reward_model
    from preftune.cli.other_scripts import ALIASES, ELSEWHERE

    known = {name for driver in (refl, reward_model) for name in leaves_of(driver.Config)}
    others = {name for program in (generate, grid) for name in leaves_of(program.Config)}
    named = {
        word.removeprefix("--").replace("-", "_")
        for text in ELSEWHERE.values()
        for word in re.findall(r"--[\w.-]*\w", text)
    }
    assert (
        named - {"num_processes", "train_text_encoder", "cache_latents", "config", "help"} <= known | others
    )
    assert set(ALIASES.values()) <= known
    assert not known & (set(ELSEWHERE) | set(ALIASES)), "a flag that exists needs no advice"
