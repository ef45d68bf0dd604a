"""--report-to: tensorboard's scalars and images, accelerate's trackers, resumed runs in them, and what they may not do to a run.

FileTracker is a tracker in accelerate's sense, which writes lines into a file: what a tracker is given, in its order. Those of
wandb, trackio and mlflow themselves are tested where the packages are installed, without a network.
"""

import importlib.util
import io
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import record_trajectories as recorded
from drivers import toy
from finetune import pretrain, refl
from preftune.cli import parse
from preftune.training import report_to, trackers
from preftune.training.run import RunConfig, check

ROOT = Path(__file__).parent.parent
LATEST = {"resume_from_checkpoint": "latest"}

pytestmark = pytest.mark.usefixtures("cpu")


class FileTracker(GeneralTracker):
    """Writes what it is given into the file that $FILE_TRACKER names, a line for each call."""

    name = "file"
    requires_logging_directory = False
    fails_at, hangs_at = -1, -1

    def __init__(self, project: str, **_: Any) -> None:
        super().__init__()
        self.project = project

    def start(self) -> None:
        self.file = Path(os.environ["FILE_TRACKER"]).open("a", buffering=1)  # noqa: SIM115

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"project": self.project, "flags": values}) + "\n")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is gone")
        if step == self.hangs_at:
            time.sleep(60)
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        sizes = {name: [image.size for image in images] for name, images in values.items()}
        self.file.write(json.dumps({"step": step, "images": sizes}) + "\n")

    def finish(self) -> None:
        self.file.write('"finished"\n')
        self.file.close()


@pytest.fixture
def file_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of FileTracker, which is a name of --report-to here."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "file", FileTracker)
    monkeypatch.setattr(report_to, "TRACKERS", (*report_to.TRACKERS, "file"))
    monkeypatch.setattr(report_to, "_is_installed", lambda name: True)
    monkeypatch.setenv("FILE_TRACKER", str(tmp_path / "tracked"))
    return tmp_path / "tracked"


def train(output: Path, driver: dict[str, Any] | None = None, **changes: Any) -> int:
    few = {"max_train_steps": 6, "gradient_accumulation_steps": 1, "checkpointing_steps": 2, "threads": 1}
    config = RunConfig(output_dir=output, **few | changes)
    return toy.main(toy.Config(run=config, **driver or {}))


def tracked(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    """The steps of the rows that a tracker has, in its order."""
    return [line["step"] for line in tracked(path) if "loss" in line]


def events_of(output: Path) -> EventAccumulator:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("wandv",), "--report-to wandv is no tracker (did you mean wandb?); there are aim, clearml"),
        (("TensorBoard",), "(did you mean tensorboard?)"),
        (("wandb,aim",), "--report-to wandb,aim is no tracker (did you mean wandb aim?); there are"),
        (("none", "wandb"), "--report-to none wandb names no trackers"),
        (("none", "all"), "names no trackers"),
        ((), "names no trackers; give none, all"),
    ],
)
def test_a_wrong_name_gets_a_sentence(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match="report-to") as error:
        RunConfig(output_dir=tmp_path, report_to=names)
    assert words in str(error.value)


def test_a_missing_package_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "wandb_of_another_name"
    monkeypatch.setattr(report_to, "TRACKERS", (*report_to.TRACKERS, missing))
    config = RunConfig(output_dir=tmp_path / "run", report_to=("tensorboard", missing))
    (tmp_path / missing).mkdir()  # such as the folder wandb/ that wandb makes in the working directory
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"pip install {missing}, or .* --report-to tensorboard$"):
        check(config)
    assert not (tmp_path / "run").exists()


def test_names_are_those_of_accelerate() -> None:
    assert set(report_to.TRACKERS) <= LOGGER_TYPE_TO_CLASS.keys()
    assert report_to.chosen(["none"]) == ()
    assert report_to.chosen(["wandb", "tensorboard", "wandb"]) == ("wandb", "tensorboard")
    installed = {name for name in report_to.TRACKERS if importlib.util.find_spec(name)}
    assert set(report_to.chosen(["all"])) == installed >= {"tensorboard"}


# ---------------------------------------------------------------- tensorboard


def test_tensorboard_shows_images_and_scores_over_the_steps(root: Path, tmp_path: Path) -> None:
    flags = [
        *recorded.arguments("refl", root, tmp_path),
        *("--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "2"),
        *("--validation-steps", "2", "--sample.batch-size", "2"),
    ]
    assert refl.main(parse(refl.Config, flags)) == 0
    assert (
        refl.main(
            parse(refl.Config, [*flags, "--max-train-steps", "4", "--resume-from-checkpoint", "latest"])
        )
        == 0
    )
    events = events_of(tmp_path)
    assert sorted(events.Tags()["images"]) == ["before_after", "validation/00", "validation/01"]
    # -1: before the first update. 2 was the last step of the first run, 3 of the second.
    assert [image.step for image in events.Images("validation/00")] == [-1, 1, 2, 3]
    assert [point.step for point in events.Scalars("validation_proxy")] == [1, 2, 3]
    assert [point.step for point in events.Scalars("loss")] == [0, 1, 2, 3]
    assert [image.step for image in events.Images("before_after")] == [2, 3]
    shown = events.Images("validation/00")[-1]
    image = Image.open(io.BytesIO(shown.encoded_image_string), formats=["JPEG"])
    assert image.size == (shown.width, shown.height)
    assert image.height > image.width >= 192, "the caption is below the image"
    first = Image.open(tmp_path / "samples" / "step_000004" / "0000.png").resize((192, 192))
    left = (image.width - 192) // 2
    difference = sum(
        abs(a - b)
        for at in ((20, 20), (96, 96), (170, 30), (30, 170))
        for a, b in zip(first.getpixel(at), image.getpixel((left + at[0], at[1] + left)), strict=True)
    )
    assert difference < 12 * 25, "it is the image of that prompt"


def test_without_tensorboard_there_are_no_events(tmp_path: Path) -> None:
    assert train(tmp_path, report_to=("none",)) == 0
    assert not (tmp_path / "tensorboard").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "trackers.json").exists()


def test_pretrain_shows_its_images_too(root: Path, tmp_path: Path) -> None:
    flags = [*recorded.arguments("pretrain", root, tmp_path), "--num-validation-prompts", "1"]
    assert pretrain.main(parse(pretrain.Config, [*flags, "--max-train-steps", "1"])) == 0
    assert [image.step for image in events_of(tmp_path).Images("validation")] == [0]


# ---------------------------------------------------------------- any tracker of accelerate


def test_a_tracker_has_what_metrics_jsonl_has(tmp_path: Path, file_tracker: Path) -> None:
    names = ("file", "tensorboard")
    assert train(tmp_path / "a", report_to=names, tracker_project_name="mine", validation_steps=3) == 0
    begin, *lines, end = tracked(file_tracker)
    assert begin["project"] == "mine"
    assert begin["flags"]["max_train_steps"] == 6
    assert begin["flags"]["report_to"] == "('file', 'tensorboard')"  # the toy driver writes no lists
    assert lines == [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "sampled" in line] == [2, 5], (
        "a step's row comes once, complete"
    )
    assert end == "finished"


def test_a_resumed_run_repeats_nothing(tmp_path: Path, file_tracker: Path) -> None:
    """After a crash it has done steps again that a tracker knows already; after a signal the last row comes when it is complete."""
    output, names = tmp_path / "a", ("file",)
    with pytest.raises(FloatingPointError):
        train(output, {"nan_at": 3}, report_to=names)
    assert steps(file_tracker) == [0, 1, 2]
    assert train(output, {"signal_at": 4}, report_to=names, **LATEST) == 128 + signal.SIGTERM
    assert steps(file_tracker) == [0, 1, 2, 3], "2 was done twice, and the row of 4 may go on"
    assert train(output, report_to=names, max_train_steps=9, **LATEST) == 0
    assert steps(file_tracker) == list(range(9))
    assert sum("flags" in line for line in tracked(file_tracker) if line != "finished") == 1, "it is one run"
    before = len(tracked(file_tracker))
    assert train(output, report_to=names, overwrite_output_dir=True) == 0
    assert "flags" in tracked(file_tracker)[before], "a new run"
    assert steps(file_tracker)[9:] == list(range(6))


def test_another_folder_is_another_run(tmp_path: Path, file_tracker: Path) -> None:
    assert train(tmp_path / "a", report_to=("file",), max_train_steps=2) == 0
    source = tmp_path / "a" / "step_000002"
    assert train(tmp_path / "b", report_to=("file",), resume_from_checkpoint=source) == 0
    assert sum("flags" in line for line in tracked(file_tracker) if line != "finished") == 2
    assert steps(file_tracker) == list(range(6))


def test_one_that_fails_does_not_end_the_run(
    tmp_path: Path, file_tracker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FileTracker, "fails_at", 2)
    assert train(tmp_path / "a", report_to=("file",)) == 0
    assert steps(file_tracker) == [0, 1, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("warning: file lacks some of the metrics (ConnectionError: the network is gone)") == 1
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 6


def test_one_that_hangs_does_not_keep_the_run(
    tmp_path: Path, file_tracker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FileTracker, "hangs_at", 2)
    monkeypatch.setattr(trackers, "HURRY", 0.5)
    monkeypatch.setattr("preftune.training.metrics.HURRY", 0.5)
    before = time.monotonic()
    assert train(tmp_path / "a", {"signal_at": 4}, report_to=("file",)) == 128 + signal.SIGTERM
    assert time.monotonic() - before < 20
    assert "file lacks some of the metrics (it has not finished in time)" in capsys.readouterr().err
    assert steps(file_tracker) == [0, 1]


def test_one_that_does_not_start(
    tmp_path: Path, file_tracker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new run is refused, and nothing in its folder is touched; one that goes on goes on without it, the same later."""
    threads = threading.active_count()
    assert train(tmp_path / "a", report_to=("file",), max_train_steps=2) == 0
    there = sorted((tmp_path / "a").rglob("*"))
    with monkeypatch.context() as broken:
        broken.setenv("FILE_TRACKER", str(tmp_path))
        with pytest.raises(ValueError, match=r"--report-to file did not start \(IsADirectoryError"):
            train(tmp_path / "a", report_to=("file",), overwrite_output_dir=True)
        assert sorted((tmp_path / "a").rglob("*")) == there
        assert train(tmp_path / "a", report_to=("file",), max_train_steps=4, **LATEST) == 0
        assert "warning: --report-to file did not start" in capsys.readouterr().err
    assert train(tmp_path / "a", report_to=("file",), max_train_steps=6, **LATEST) == 0
    assert steps(file_tracker) == [0, 1, 4, 5], "it is the run of before"
    assert threading.active_count() == threads


# ---------------------------------------------------------------- wandb, trackio, mlflow


def command(root: Path, output: Path, tracker: str, *flags: str) -> None:
    """Train ReFL as a command does, with validation images after steps 1 and 2."""
    own = [*recorded.arguments("refl", root, output), "--report-to", tracker, "--validation-steps", "2"]
    own += ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    program = str(ROOT / "finetune" / "refl.py")
    done = subprocess.run(
        [sys.executable, program, *own, *flags], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.replace("wandb: WARNING", "")


def test_mlflow(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    command(root, tmp_path / "a", "mlflow")
    command(root, tmp_path / "a", "mlflow", "--resume-from-checkpoint", "latest", "--max-train-steps", "5")
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    experiment = client.get_experiment_by_name("preftune")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a")
    assert run.data.params["solver"] == "ddpm"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [0, 1, 2, 3, 4]
    images = {path.path.split("+step+")[0] for path in client.list_artifacts(run.info.run_id, "images")}
    assert images == {"images/validation~00", "images/validation~01", "images/before_after"}


def test_trackio(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    command(root, tmp_path / "a", "trackio", "--tracker-project-name", "mine")
    more = ("--resume-from-checkpoint", "latest", "--max-train-steps", "5")
    command(root, tmp_path / "a", "trackio", "--tracker-project-name", "mine", *more)
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (flags,) = base.execute("select config from configs").fetchone()
    assert json.loads(flags)["solver"] == "ddpm"
    assert len({run for run, *_ in found}) == 1
    assert found[0][0].startswith("a-")
    rows = [(step, json.loads(text)) for _, step, text in found]
    assert [step for step, row in rows if "loss" in row] == [0, 1, 2, 3, 4]
    assert [step for step, row in rows if "validation/00" in row] == [0, 1, 2, 3, 4]
    captions = [row["validation/00"]["caption"] for _, row in rows if "validation/00" in row]
    assert captions[0].startswith((root / "prompts.txt").read_text().splitlines()[0])
    assert "proxy 0." in captions[0]


def test_wandb(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    command(root, tmp_path / "a", "wandb")
    command(root, tmp_path / "a", "wandb", "--resume-from-checkpoint", "latest", "--max-train-steps", "5")
    run = json.loads((tmp_path / "a" / "trackers.json").read_text())["wandb"]
    (first,), (second,) = (
        sorted(folder.glob("*.wandb")) for folder in sorted((tmp_path / "a" / "wandb").glob("offline-run-*"))
    )
    assert first.stem == second.stem == f"run-{run}", "both are parts of one run"
    rows, more = wandb_rows(first), wandb_rows(second)
    assert [int(row["_step"]) for row in rows + more] == [0, 1, 2, 3, 4]
    assert all("loss" in row for row in rows + more)
    shown = [int(row["_step"]) for row in rows + more if "validation/captions" in row]
    assert shown == [0, 1, 2, 3, 4], "before, after 2, the last of 3, 4 and the last of 5"
    captions = json.loads(rows[1]["validation/captions"])
    assert [text.splitlines()[0] for text in captions] == (root / "prompts.txt").read_text().splitlines()[:2]
    assert [name for name in rows[2] if name.startswith("before_after")]


def wandb_rows(path: Path) -> list[dict[str, str]]:
    """What a file of wandb's has of each step, as JSON texts. It is a log of LevelDB: records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            items = record.history.item if record.WhichOneof("record_type") == "history" else ()
            row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            rows += [row] if row else []
            whole = b""
    return rows


def test_wandb_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    flags = ["--report-to", "wandb", "--output-dir", str(tmp_path / "a")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "finetune" / "refl.py"), "--config", "finetune/configs/refl/tiny.yaml", *flags],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error: --report-to wandb cannot log in" in last
    assert "WANDB_MODE=offline" in last
    assert not (tmp_path / "a").exists()
