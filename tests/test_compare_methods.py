"""eval/compare_methods.py: drivers started as commands, the table by hand, and a whole small comparison."""

import csv
import math
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from conftest import run_here
from eval import compare_methods, trainings, win_rates
from eval.report_folder import write_record
from preftune import cli
from preftune.images import load_pixels
from preftune.statistics import bootstrap
from preftune.statistics.image_statistics import image_statistics

pytestmark = pytest.mark.usefixtures("cpu")


def test_wins_and_bootstrap_by_hand() -> None:
    """Two seeds, three prompts, one scorer."""
    base = np.array([[[0.0], [1.0], [2.0]]] * 2)
    other = np.array([[[1.0], [1.0], [1.0]], [[3.0], [1.0], [4.0]]])
    rows = win_rates.method_table({"base": base, "x": other}, ["gold"], {"base": 0, "x": 64})
    row = rows[1]
    assert (row.wins, row.ties, row.losses) == (3, 2, 1)
    assert row.win_rate == pytest.approx(0.75)
    assert row.change == pytest.approx((1 + 0 - 1 + 3 + 0 + 2) / 6)
    assert row.mean == pytest.approx(11 / 6)
    assert row.low == pytest.approx(0.0), "mean by prompt: 2, 0, 0.5; the least resample is all zeros"
    assert row.high == pytest.approx(2.0)
    assert math.isnan(rows[0].win_rate), "the base ties with itself"
    rates = win_rates.win_rates({"base": base, "x": other}, 0)
    assert rates[1, 0] == pytest.approx(0.75)
    assert rates[0, 1] == pytest.approx(0.25)
    assert np.isnan(rates.diagonal()).all()


def test_a_constant_change_has_no_width() -> None:
    change, low, high = bootstrap.mean(np.full(20, 0.25))
    assert change == low == high == 0.25


def test_one_prompt_has_no_interval() -> None:
    """However many seeds: an interval over prompts of width 0 would read as certainty."""
    change, low, high = bootstrap.mean(np.array([1.5]))
    assert change == 1.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert bootstrap.interval(low, high, "+.3f") == ""
    assert bootstrap.interval(-0.5, 1, "+.1f") == "[-0.5, +1.0]"
    scores = {"base": np.zeros((2, 1, 1)), "x": np.array([[[1.0]], [[2.0]]])}
    rows = win_rates.method_table(scores, ["gold"], {"base": 0, "x": 64})
    assert "nan" not in win_rates.to_text(rows)
    assert win_rates.to_csv(rows).splitlines()[-1] == "x,gold,1.5,1.5,,,2,0,0,1.0,64"


@pytest.fixture(scope="module")
def report(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, from the command line; the first training is launched, the others run in this process."""
    output = tmp_path_factory.mktemp("compare") / "out"
    common = "--resolution 32 --max-train-steps 2 --train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-2 --threads 1 --sample.num-inference-steps 2 --sample.resolution 32"
    methods = [
        f"refl=finetune/refl.py --prompts {root}/prompts.txt --rewards brightness=1 --pretraining off --num-inference-steps 3"
        f" --window 1 1 --reward-scale 1 {common}",
        f"weird=finetune/weird_lora.py --data {root}/images --lora.rank 4 --checkpointing-steps 1 --checkpoints-total-limit 0 {common}",
        "early=weird@1",
    ]
    argv = ["--methods", *methods, "--model", str(root / "pipeline"), "--prompts", str(root / "prompts.txt")]
    argv += [
        "--seeds",
        "0",
        "1",
        "--count",
        "5",
        "--rewards",
        "brightness=1",
        "--negatives",
        "weird=Weird image. ",
    ]
    argv += [
        "--sample.num-inference-steps",
        "2",
        "--sample.resolution",
        "32",
        "--output-dir",
        str(output),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        first = iter([subprocess.run])
        launch = SimpleNamespace(run=lambda *a, **k: next(first, run_here)(*a, **k), STDOUT=subprocess.STDOUT)
        patch.setattr(trainings, "subprocess", launch)
        assert compare_methods.main(cli.parse(compare_methods.Config, argv)) == 0
        before = (output / "table.csv").read_bytes()
        kept = [*(output / "runs").rglob("*.safetensors"), *(output / "images").rglob("*.png")]
        times = {path: path.stat().st_mtime_ns for path in kept}
        assert len(list((output / "images").rglob("*.png"))) == (1 + 3 * 2) * 5
        assert compare_methods.main(cli.parse(compare_methods.Config, argv)) == 0
        assert (output / "table.csv").read_bytes() == before
        assert {path: path.stat().st_mtime_ns for path in times} == times, (
            "finished runs are not trained again, nor are their images generated again"
        )
    return output


def test_the_report(report: Path) -> None:
    rows = list(csv.DictReader((report / "table.csv").open()))
    assert [row["method"] for row in rows] == ["base", "refl", "weird", "early"]
    assert rows[3]["mean"] != rows[2]["mean"], "the checkpoint is generated with, not the end of the run"
    for row in rows[1:]:
        assert int(row["wins"]) + int(row["ties"]) + int(row["losses"]) == 2 * 5
        assert int(row["images"]) == (1 if row["method"] == "early" else 2) * 2 * 2
        assert float(row["low"]) <= float(row["change"]) <= float(row["high"])
    assert float(rows[1]["change"]) > 0, "ReFL on brightness makes images brighter"
    others = list(csv.DictReader((report / "measures.csv").open()))
    contrast = {row["model"]: float(row["value"]) for row in others if row["measure"] == "contrast"}
    assert list(contrast) == ["base", "refl", "weird", "early"]
    seen = [
        load_pixels(path)
        for seed in (0, 1)
        for path in sorted((report / "images" / f"refl-{seed}").glob("*.png"))
    ]
    assert contrast["refl"] == pytest.approx(float(image_statistics(torch.stack(seen))["contrast"].mean()))
    assert not [row for row in others if "within a prompt" in row["measure"]], (
        "two trainings are not one model"
    )
    page = (report / "report.html").read_text()
    assert "Diversity and pixels" in page
    assert "the change against base" in page
    lines = list(csv.DictReader((report / "scores.csv").open()))
    assert len(lines) == 4 * 2 * 5
    mean = {
        m: np.mean([float(line["brightness"]) for line in lines if line["method"] == m])
        for m in ("base", "refl")
    }
    assert mean["refl"] - mean["base"] == pytest.approx(float(rows[1]["change"]))
    of = {
        (line["method"], line["seed"]): line["brightness"]
        for line in lines
        if line["prompt"] == lines[0]["prompt"]
    }
    assert of["base", "0"] == of["base", "1"]
    assert of["refl", "0"] != of["refl", "1"], "each seed has its own run"
    for name in ("wins.png", "grid.png", "report.html"):
        assert (report / name).stat().st_size > 1000
    page = (report / "report.html").read_text()
    assert "weird=Weird image. " in page
    assert "<script" not in page
    assert {path.name for path in (report / "runs").iterdir() if path.is_dir()} == {
        "refl-0",
        "refl-1",
        "weird-0",
        "weird-1",
    }


@pytest.mark.usefixtures("trained_here")
def test_methods_of_stable_diffusion_xl(root: Path, tmp_path: Path) -> None:
    """Neither the drivers nor the comparison know which family they have."""
    model = tiny.pipeline_xl_folder(tmp_path / "xl")
    common = "--resolution 32 --max-train-steps 1 --train-batch-size 2 --learning-rate 1e-2 --threads 1 --sample.num-inference-steps 2 --sample.resolution 32"
    methods = [
        f"refl=finetune/refl.py --prompts {root}/prompts.txt --rewards brightness=1 --pretraining off --num-inference-steps 3 --window 1 1 {common}",
        f"weird=finetune/weird_lora.py --data {root}/images {common}",
    ]
    argv = ["--methods", *methods, "--model", str(model), "--prompts", str(root / "prompts.txt")]
    argv += ["--seeds", "0", "--count", "3", "--rewards", "brightness=1", "--sample.num-inference-steps", "2"]
    argv += ["--sample.resolution", "32", "--workers", "0", "--output-dir", str(tmp_path / "out")]
    assert compare_methods.main(cli.parse(compare_methods.Config, argv)) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["method"], row["images"]) for row in rows] == [("base", "0"), ("refl", "8"), ("weird", "8")]
    assert len({row["mean"] for row in rows}) == 3


DRIVER = "a=finetune/refl.py --learning-rate 1"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "a"], "'a' is not NAME=TEXT"),
        (["--methods", "../a=finetune/refl.py"], "is not NAME=TEXT with a name of letters"),
        (["--methods", DRIVER, DRIVER], "different names other than base, got a, a"),
        (["--methods", "base=finetune/refl.py"], "different names other than base"),
        (["--methods", "a=finetune/none.py"], "method a: finetune/none.py is no driver"),
        (["--methods", "a=rm -rf x"], "method a: rm is no driver"),
        (["--methods", "a=finetune/refl.py --seed 3"], "method a: --seed is set by the comparison"),
        (
            ["--methods", "a=finetune/refl.py --output-dir=x"],
            "method a: --output-dir is set by the comparison",
        ),
        (
            ["--methods", DRIVER, "b=c@3"],
            "method b is a checkpoint of c, which is no method that is trained; there are a",
        ),
        (["--methods", DRIVER, "--seeds", "1", "1"], "--seeds needs different numbers"),
        (["--methods", DRIVER, "--negatives", "b=x"], "--negatives names b, which is none of base, a"),
        (["--methods", DRIVER, "--rewards", "beauty=1"], "unknown scorer"),
        (["--methods", DRIVER, "--count", "0"], "--count must be at least 1"),
        (["--methods", DRIVER, "--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["--methods", DRIVER, "--model", "nowhere"], "nowhere"),
        (["--methods", DRIVER, "--sample.resolution", "128"], "the scorer shapes judges 64 x 64 images"),
        (
            ["--methods", DRIVER, "--negatives", "a=x", "--sample.guidance-scale", "1"],
            "--negatives do nothing at",
        ),
    ],
)
def test_wrong_flags(
    argv: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_methods, "train_all", lambda *_: pytest.fail("a driver was started"))
    with pytest.raises(SystemExit) as stop:
        compare_methods.main(
            cli.parse(compare_methods.Config, [*argv, "--output-dir", str(tmp_path / "out")])
        )
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("trained_here")
def test_a_failing_driver_says_where_to_look(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--methods",
        f"a=finetune/weird_lora.py --data {tmp_path}/none",
        "--model",
        str(root / "pipeline"),
    ]
    with pytest.raises(SystemExit) as stop:
        compare_methods.main(
            cli.parse(compare_methods.Config, [*argv, "--output-dir", str(tmp_path / "out")])
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "method a, seed 0 failed: weird_lora.py: error: " in error
    assert "a-0.log" in error


def test_a_checkpoint_that_was_not_kept(report: Path) -> None:
    assert compare_methods.checkpoint(report / "runs" / "weird-0", "early", 1).name == "step_000001"
    with pytest.raises(
        ValueError, match=r"method early: there is no .*step_000007; kept are step_000000, step_000001"
    ):
        compare_methods.checkpoint(report / "runs" / "weird-0", "early", 7)


def test_other_flags_are_not_the_same_run(
    root: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs of the report, asked for with another learning rate."""
    argv = ["--methods", "refl=finetune/refl.py --learning-rate 5", "--model", str(root / "pipeline")]
    argv += ["--output-dir", str(report)]
    before = {path: path.read_bytes() for path in report.iterdir() if path.is_file()}
    for more, words in (
        ([], "out holds another report, report.html (other methods, "),
        (["--overwrite-output-dir"], "refl-0 was begun by"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare_methods.main(cli.parse(compare_methods.Config, [*argv, *more]))
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in report.iterdir() if path.is_file()} == before


def test_a_report_of_other_settings_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is one without a record; a batch size is no other setting."""
    monkeypatch.setattr(compare_methods, "train_all", lambda *_: pytest.fail("a driver was started"))
    argv = ["--methods", DRIVER, "--sample.resolution", "64", "--output-dir", str(tmp_path)]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as stop:
            compare_methods.main(cli.parse(compare_methods.Config, [*argv, *more]))
        assert stop.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "report.html").write_text("mine")
    assert "holds another report, report.html (it has no comparison.json); add --overwrite" in refused()
    config = cli.parse(compare_methods.Config, argv)
    record = compare_methods.record_of(config, *compare_methods.check_inputs(config))
    write_record(tmp_path, compare_methods.RECORD, record)
    assert "(other seeds)" in refused("--seeds", "0", "5")
    assert "(other prompts)" in refused("--count", "3")
    assert "(other sampling settings)" in refused("--sample.num-inference-steps", "3")
    assert "(other grid rows)" in refused("--grid-rows", "2")
    same = cli.parse(compare_methods.Config, [*argv, "--sample.batch-size", "3"])
    assert compare_methods.record_of(same, *compare_methods.check_inputs(same)) == record
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were launched, without what is added. --stop leaves work and fails, --wrong fails before any."""
    found: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.py").touch()

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--output-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        own = command[command.index("d.py") : command.index("--no-overwrite-output-dir")]
        found.append(own)
        stopped = "--stop" in own and not (folder / "work").exists()
        if "--wrong" not in own:
            (folder / "work").touch()
        return subprocess.CompletedProcess(command, 2 * ("--wrong" in own or stopped))

    monkeypatch.setattr(trainings.subprocess, "run", run)
    return found


def test_a_stopped_run_is_no_other_commands(tmp_path: Path, launched: list[list[str]]) -> None:
    stopped, other = ["d.py", "--stop"], ["d.py", "--learning-rate", "1"]
    with pytest.raises(ValueError, match="method m, seed 0 failed"):
        trainings.train("m", stopped, 0, tmp_path)
    folder = tmp_path / "runs" / "m-0"
    with pytest.raises(
        ValueError,
        match=rf"was begun by 'd.py --stop', not 'd.py --learning-rate 1'; .* remove {folder}, {folder}.command$",
    ):
        trainings.train("m", other, 0, tmp_path)
    assert launched == [stopped], "the other was not started"
    assert trainings.train("m", stopped, 0, tmp_path) == folder
    assert trainings.train("m", stopped, 0, tmp_path) == folder
    assert launched == [stopped, stopped], "it goes on, and is then finished"
    with pytest.raises(ValueError, match=rf"remove {folder}, {folder}.command, {folder}.done$"):
        trainings.train("m", other, 0, tmp_path)
    trainings.train("m", other, 1, tmp_path)


def test_an_edited_config_is_another_command(tmp_path: Path, launched: list[list[str]]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("lr: 1\n")
    for command in (["d.py", "--config", str(config)], ["d.py", f"--config={config}"]):
        output = tmp_path / str(len(launched))
        trainings.train("m", command, 0, output)
        config.write_text("lr: 2\n")
        with pytest.raises(ValueError, match=r"was begun by .* with SHA-256 "):
            trainings.train("m", command, 0, output)
        config.write_text("lr: 1\n")
        trainings.train("m", command, 0, output)
    assert len(launched) == 2
    config.unlink()
    with pytest.raises(ValueError, match=f"cannot read the config file {config}: No such file"):
        trainings.train("m", command, 0, output)


def test_work_of_nobody_knows_whom(tmp_path: Path, launched: list[list[str]]) -> None:
    folder = tmp_path / "runs" / "m-0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=rf"there is no {folder}.command that says .* remove {folder}$"):
        trainings.train("m", ["d.py"], 0, tmp_path)
    assert not launched


def test_a_wrong_flag_may_be_mended(tmp_path: Path, launched: list[list[str]]) -> None:
    """Drivers make their folder before they look at the rest: an empty one holds nobody's work."""
    with pytest.raises(ValueError, match="method m, seed 0 failed"):
        trainings.train("m", ["d.py", "--wrong"], 0, tmp_path)
    trainings.train("m", ["d.py"], 0, tmp_path)
    assert len(launched) == 2


def test_a_run_that_was_removed_is_trained_again(tmp_path: Path, launched: list[list[str]]) -> None:
    """Where only the folder is gone; and where it then stops, it is not finished, whatever it was before."""
    command = ["d.py", "--stop"]
    folder = tmp_path / "runs" / "m-0"
    for _ in range(2):
        with pytest.raises(ValueError, match="failed"):
            trainings.train("m", command, 0, tmp_path)
        assert trainings.train("m", command, 0, tmp_path) == folder
        shutil.rmtree(folder)
    assert len(launched) == 4


def test_trainings_at_a_time(
    tmp_path: Path, launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time share the cores, and are in order; a failure leaves what runs alone and starts nothing more."""
    together, seen = threading.Barrier(2, timeout=10), dict[str, str]()
    run = trainings.subprocess.run

    def meet(command: list[str], **settings: object) -> object:
        together.wait()  # breaks unless two are started before one of them has ended
        seen[Path(command[command.index("--output-dir") + 1]).name] = " ".join(command).partition(
            "--threads "
        )[2]
        return run(command, **settings)

    monkeypatch.setattr(trainings, "cores", lambda: 8)
    monkeypatch.setattr(trainings.subprocess, "run", meet)
    commands = {"a": ["d.py"], "b": ["d.py", "--threads", "3"]}
    runs = trainings.train_all(commands, [1, 0], tmp_path, concurrency=2)
    assert list(runs) == [("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert runs["b", 0] == tmp_path / "runs" / "b-0"
    assert seen["a-0"] == seen["a-1"] == "4"
    assert seen["b-0"].startswith("3 "), "as the command says, once"
    assert "--threads" not in seen["b-0"]
    assert trainings.train_all(commands, [1, 0], tmp_path, concurrency=2) == runs
    assert len(launched) == 4, "finished runs are not repeated"

    monkeypatch.setattr(trainings.subprocess, "run", run)
    failing = {"c": ["d.py", "--wrong"], "d": ["d.py"], "e": ["d.py"], "f": ["d.py"], "g": ["d.py"]}
    with pytest.raises(ValueError, match="method c, seed 0 failed"):
        trainings.train_all(failing, range(50), tmp_path, concurrency=2)
    assert len(launched) < 4 + 20
    assert {path.stem for path in (tmp_path / "runs").glob("*.done")} >= {"d-0"}
