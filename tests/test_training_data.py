"""Drivers on data sets with rows and images that cannot be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import record_trajectories as recorded
from preftune import image_check

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def images(root: Path, tmp_path: Path) -> Path:
    """The drivers' data set: its second image is cut, the fourth is gone, the sixth has no caption, the eighth no score."""
    folder = Path(shutil.copytree(root / "images", tmp_path / "images"))
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03.png").unlink()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[5]["text"], rows[7]["liking"] = None, float("nan")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "driver", ["pretrain", "weird_lora", "reward_weighted", "refl", "autoencoder", "pretrain_scorer"]
)
def test_what_cannot_be_used_is_set_aside_before_the_first_update(
    driver: str, images: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(images), "--max-train-steps", "1"]
    assert recorded.train(driver, [*recorded.arguments(driver, root, tmp_path / "run"), *flags]) == 0
    lines = [row["place"].rpartition(" ")[2] for row in rows_of(tmp_path / "run" / "skipped.jsonl")]
    assert lines == ["4", "6", "2", *(["8"] if driver == "reward_weighted" else [])]
    said = capsys.readouterr().err
    assert "9 images used, 3 set aside" in said
    assert ("1 image without a score liking set aside" in said) == (driver == "reward_weighted")


def test_a_resumed_run_equals_an_uninterrupted_one(images: Path, root: Path, tmp_path: Path) -> None:
    def train(output: str, *flags: str) -> list[dict[str, Any]]:
        every = recorded.arguments("pretrain_scorer", root, tmp_path / output)
        assert recorded.train("pretrain_scorer", [*every, "--data", str(images), *flags]) == 0
        return [
            {"loss": row["loss"], "step": row["step"]} for row in rows_of(tmp_path / output / "metrics.jsonl")
        ]

    straight = train("straight")
    train("resumed", "--max-train-steps", "1")
    assert train("resumed", "--resume-from-checkpoint", "latest") == straight


def test_an_image_that_goes_while_training_is_one_sentence(
    images: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        image_check, "_look", lambda *_, **__: ("", 0, 0, 0)
    )  # it was sound when the run began
    with pytest.raises(SystemExit) as stop:
        recorded.train(
            "pretrain", [*recorded.arguments("pretrain", root, tmp_path / "run"), "--data", str(images)]
        )
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: cannot read the image" in said
    assert "Traceback" not in said


def test_no_usable_row_ends_the_program(
    images: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(images), "--caption-column", "alt"]
    with pytest.raises(SystemExit) as stop:
        recorded.train("refl", [*recorded.arguments("refl", root, tmp_path / "run"), *flags])
    assert stop.value.code == 2
    assert "none of 12 rows can be used" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*"))


def test_columns_and_pairs_reach_the_drivers(root: Path, tmp_path: Path) -> None:
    """kohya's pairs give the same training as the table with their captions under other names."""
    table, pairs = (Path(shutil.copytree(root / "images", tmp_path / name)) for name in ("table", "pairs"))
    rows = [json.loads(line) for line in (table / "metadata.jsonl").read_text().splitlines()]
    renamed = [{"picture": row["file_name"], "alt": row["text"], "text": "wrong"} for row in rows]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    for row in rows:
        (pairs / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (pairs / "metadata.jsonl").unlink()
    losses = []
    for folder, flags in (
        (root / "images", []), (table, ["--caption_column", "alt", "--image_column", "picture"]), (pairs, []),
    ):  # fmt: skip
        output = tmp_path / f"run {folder.name}"
        argv = [
            *recorded.arguments("pretrain_scorer", root, output),
            "--max-train-steps",
            "1",
            "--data",
            str(folder),
            *flags,
        ]
        assert recorded.train("pretrain_scorer", argv) == 0
        losses.append(rows_of(output / "metrics.jsonl")[0]["loss"])
        assert not (output / "skipped.jsonl").exists()
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("driver", ["reward_model", "dpo"])
def test_rankings_of_a_broken_image(
    driver: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(root / "rankings", tmp_path / "rankings"))
    (folder / "04.png").write_bytes(b"")
    with (folder / "rankings.jsonl").open("a") as file:
        file.write(
            '\n{"prompt": "x", "generations": ["00.png", "../secret.png"], "ranking": [1, 2]}\n{"prompt": "cut'
        )
    argv = [
        *recorded.arguments(driver, root, tmp_path / "run"),
        "--data",
        str(folder),
        "--max-train-steps",
        "1",
    ]
    assert recorded.train(driver, argv) == 0
    skipped = [row["reason"] for row in rows_of(tmp_path / "run" / "skipped.jsonl")]
    assert ["must be a relative path" in skipped[0], "is not JSON" in skipped[1], "04.png" in skipped[2]] == [
        True
    ] * 3
    assert "3 rankings used, 3 set aside" in capsys.readouterr().err
