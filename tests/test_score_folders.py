"""Scoring folders of images as people have them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from data_build import score
from preftune.records import read_imagefolder

TEXTS = {"a.png": "a red circle on a white background", "sub/b.jpg": "a blue square on a black background"}
Make = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of different brightness, without captions."""
    for number, name in enumerate(TEXTS):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (50 + 100 * number,) * 3).save(path)
    return tmp_path / "data"


def run(data: Path, output: Path, *names: str, **changes: Any) -> dict[str, list[Any]]:
    """The columns of scores.parquet."""
    few = {"rewards": names or ("brightness",), "batch_size": 2, "chunk": 3, "workers": 0, "best": 0}
    score.main(score.Config(data=data, output_dir=output, **(few | changes)))
    return pyarrow.parquet.read_table(output / "scores.parquet").to_pydict()


def jsonl(folder: Path, *, column: str = "text", encoding: str = "utf-8", extra: str = "") -> None:
    rows = [json.dumps({"file_name": name, column: text}) for name, text in TEXTS.items()]
    (folder / "metadata.jsonl").write_text("\n".join([rows[0], "", *rows[1:]]) + extra, encoding=encoding)


def csv(folder: Path) -> None:
    rows = [f'"{name}",{text}' for name, text in TEXTS.items()]
    (folder / "metadata.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8-sig")


def pairs(folder: Path) -> None:
    for name, text in TEXTS.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n")


def in_train(folder: Path) -> None:
    (folder / "train").mkdir()
    for name in ("a.png", "sub"):
        (folder / name).rename(folder / "train" / name)
    jsonl(folder / "train")


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (jsonl, ""),
        (lambda folder: jsonl(folder, column="Prompt"), ""),
        (lambda folder: jsonl(folder, encoding="utf-8-sig"), ""),
        (csv, ""),
        (pairs, ""),
        (in_train, "train/"),
    ],
    ids=["blank", "prompt", "bom", "csv", "txt", "train"],
)
def test_captions_as_people_have_them(make: Make, prefix: str, folder: Path, tmp_path: Path) -> None:
    make(folder)
    columns = run(folder, tmp_path / "out", chunk=1, best=1)
    assert columns["file"] == [prefix + name for name in TEXTS]
    assert columns["text"] == list(TEXTS.values())
    assert columns["brightness"] == pytest.approx([50 / 255, 150 / 255], abs=0.01)


def test_a_hub_name_says_how_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(Path("me/stars"), tmp_path / "out")
    assert (
        "there is no data at me/stars; one of the hub is downloaded with `hf download"
        in capsys.readouterr().err
    )


def test_a_named_column_of_captions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": name, "text": "no", "alt": text} for name, text in TEXTS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = run(folder, tmp_path / "out", "imagereward-tiny", caption_column="alt")
    assert columns["text"] == list(TEXTS.values())
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "none", "imagereward-tiny", caption_column="long")
    assert stop.value.code == 2
    assert "has no long; --caption-column names one of file_name, text, alt" in capsys.readouterr().err


@pytest.mark.parametrize("prompted", [True, False])
def test_an_image_without_a_caption_is_scored_where_none_is_read(
    prompted: bool, folder: Path, tmp_path: Path
) -> None:
    pairs(folder)
    (folder / "sub" / "b.txt").unlink()
    columns = run(folder, tmp_path / "out", "imagereward-tiny" if prompted else "brightness")
    assert columns["file"] == ["a.png"] if prompted else list(TEXTS)


def test_scores_go_into_a_table_with_everything_else_as_it_was(folder: Path, tmp_path: Path) -> None:
    odd = '\n{"file_name": "a.png", "text": null, "x": NaN}\nno JSON\n\n'
    jsonl(folder, column="caption", encoding="utf-8-sig", extra=odd)
    table = folder / "metadata.jsonl"
    first = '{"file_name": "a.png", "caption": "first", "aesthetic": NaN, "y": [-Infinity, 1e400]}'
    table.write_text(table.read_text(encoding="utf-8-sig") + first, encoding="utf-8-sig")
    run(folder, tmp_path / "out", "imagereward-tiny", add_to_metadata=True)
    lines = table.read_text(encoding="utf-8").split("\n")
    assert lines[1] == lines[5] == ""
    assert lines[3:5] == ['{"file_name": "a.png", "text": null, "x": NaN}', "no JSON"]
    assert [("imagereward-tiny" in line) for line in lines[:7]] == [
        True,
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert '"aesthetic": NaN, "y": [-Infinity, Infinity], "imagereward-tiny": ' in lines[6]
    samples = read_imagefolder(folder)
    assert [sample.text for sample in samples] == [*TEXTS.values(), "first"]
    assert all(isinstance(sample.extra["imagereward-tiny"], float) for sample in samples)


def test_scores_go_into_the_table_of_train(folder: Path, tmp_path: Path) -> None:
    in_train(folder)
    run(folder, tmp_path / "out", add_to_metadata=True)
    assert [sample.extra["brightness"] > 0 for sample in read_imagefolder(folder)] == [True, True]


def test_a_snapshot_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """Images, a table of images, and the table of captions as links to the blobs of their repository."""
    jsonl(folder)
    snapshot = tmp_path / "hub" / "datasets--me--x" / "snapshots" / "0f"
    blobs = snapshot.parents[1] / "blobs"
    for directory in (snapshot / "sub", blobs):
        directory.mkdir(parents=True)
    for number, name in enumerate([*TEXTS, "metadata.jsonl"]):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert run(snapshot, tmp_path / "out")["file"] == list(TEXTS)
    (snapshot / "metadata.jsonl").unlink()
    assert run(snapshot, tmp_path / "plain")["file"] == list(TEXTS)
    table = pyarrow.table({"jpg": [(blobs / "0").read_bytes()], "caption": ["x"]})
    (snapshot / "data").mkdir()
    pyarrow.parquet.write_table(table, blobs / "9")
    (snapshot / "data" / "train-0.parquet").symlink_to("../../../blobs/9")
    columns = run(snapshot, tmp_path / "table")
    assert (columns["file"], columns["text"]) == (["data/train-0.parquet"], ["x"])


FORMATS = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".tif": "TIFF",
    ".TIFF": "TIFF",
    ".avif": "AVIF",
    ".gif": "GIF",
    ".ppm": "PPM",
}


def test_a_plain_folder_in_all_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    for suffix, kind in FORMATS.items():
        Image.new("RGB", (16, 16), (90,) * 3).save(tmp_path / "data" / f"image{suffix}", kind)
    for name in ("a.heic", "b.heic", "Thumbs.db", ".DS_Store"):
        (tmp_path / "data" / name).touch()
    columns = run(tmp_path / "data", tmp_path / "out")
    assert {Path(name).suffix for name in columns["file"]} == set(FORMATS)
    assert columns["brightness"] == pytest.approx([90 / 255] * len(FORMATS), abs=0.02)
    assert "3 files are not read as images and passed over: 2 .heic, 1 .db" in capsys.readouterr().err


def test_images_are_turned_as_exif_says_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny learned scorer sees the same pixels, whether an image is stored upright or not."""
    image = Image.linear_gradient("L").resize((32, 48)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "data").mkdir()
    image.save(tmp_path / "data" / "a.png")
    image.rotate(180).save(tmp_path / "data" / "b.png", exif=exif)
    image.rotate(180).save(tmp_path / "data" / "c.png")
    columns = run(tmp_path / "data", tmp_path / "out", "imagereward-tiny", prompt="x", best=2)
    first, second, third = columns["imagereward-tiny"]
    assert first == second != third
    assert "3 scored, 0 set aside; 1 turned as their EXIF data say" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["exif_turned"] == 1
