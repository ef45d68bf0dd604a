"""Captioned and ranked images on disk."""

import json
import math
import re
from pathlib import Path

import pytest

from preftune.image_folders import Columns
from preftune.json_values import json_value
from preftune.records import (
    CaptionedImage,
    Ranking,
    read_captioned,
    read_imagefolder,
    read_jsonl,
    read_rankings,
    write_jsonl,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set folder with two images (empty files suffice) and one file outside it."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for name in ("images/a.png", "b.png"):
        (data / name).touch()
    (tmp_path / "secret.png").touch()
    return data


def ranking(**changes: object) -> dict[str, object]:
    return {
        "prompt": "p",
        "generations": ["images/a.png", "b.png"],
        "ranking": [2, 1],
        "source": "s",
    } | changes


def test_samples(folder: Path) -> None:
    rows = [
        {"file_name": "images/a.png", "text": "caf\u00e9", "score": 0.5},
        {"file_name": "./b.png", "text": "b"},
    ]
    write_jsonl(folder / "metadata.jsonl", rows)
    assert read_imagefolder(folder) == [
        CaptionedImage(path=folder / "images/a.png", text="caf\u00e9", extra={"score": 0.5}),
        CaptionedImage(path=folder / "b.png", text="b", extra={}),
    ]


def test_rankings(folder: Path) -> None:
    unsourced = ranking(ranking=[1, 1], weight=0.25)
    del unsourced["source"]
    write_jsonl(folder / "rankings.jsonl", [ranking(), unsourced])
    paths = (folder / "images/a.png", folder / "b.png")
    assert read_rankings(folder) == [
        Ranking(prompt="p", paths=paths, ranks=(2, 1), source="s", weight=1.0),
        Ranking(prompt="p", paths=paths, ranks=(1, 1), source="", weight=0.25),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "images/../../secret.png",
        "..\\secret.png",
        "C:/x.png",
        "a\0b",
        "",
        "~/../x",
    ],
)
def test_hostile_names(folder: Path, name: str) -> None:
    write_jsonl(
        folder / "metadata.jsonl", [{"file_name": "b.png", "text": "x"}, {"file_name": name, "text": "x"}]
    )
    samples, (skipped,) = read_captioned(folder, Columns())
    assert [sample.path for sample in samples] == [folder / "b.png"]
    assert re.search(r"line 2: file name .* must be a relative path", skipped.reason)
    write_jsonl(folder / "rankings.jsonl", [ranking(generations=["b.png", name])])
    with pytest.raises(ValueError, match=r"line 1: file name .* must be a relative path"):
        read_rankings(folder)


def test_a_link_out_of_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "link.png", "text": "x"}])
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_imagefolder(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "c.png", "text": "x"}', r"line 1: .*c\.png does not exist"),
        ('{"file_name": "images", "text": "x"}', "images is no file"),
        ('{"file_name": "b.png"}', "line 1 has no text"),
        ('{"text": "x"}', "line 1 has no file_name"),
        ('{"file_name": "b.png", "text": " "}', "line 1: text is empty"),
        ('{"file_name": 3, "text": "x"}', "file_name is a int; it must be a str"),
        ('["b.png"]', "line 1 must be an object, not a list"),
        ('{"file_name": "b.png", "te', "line 1 is not JSON"),
        ("", "holds no samples"),
    ],
)
def test_wrong_samples(folder: Path, line: str, words: str) -> None:
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        read_imagefolder(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranking": [1]}, "2 generations and 1 ranks"),
        ({"generations": ["b.png"], "ranking": [1]}, "two or more"),
        ({"ranking": [0, 1]}, "whole numbers from 1"),
        ({"ranking": [True, 1]}, "whole numbers from 1"),
        ({"ranking": [1.0, 2.0]}, "whole numbers from 1"),
        ({"generations": [1, 2]}, "must be file names"),
        ({"generations": ["b.png", "b.png"]}, r"line 1: 'b\.png' is there more than once"),
        ({"generations": ["b.png", "./b.png"]}, r"line 1: 'b\.png' is there more than once"),
        ({"generations": ["images//a.png", "images/a.png"]}, r"line 1: 'images/a\.png' is there more than"),
        ({"prompt": ""}, "prompt is empty"),
        ({"source": 3}, "source is a int"),
        ({"weight": 0}, "weight is 0; it must be a finite number above 0"),
        ({"weight": -0.5}, "finite number above 0"),
        ({"weight": True}, "finite number above 0"),
        ({"weight": "1"}, "finite number above 0"),
        ({"weight": None}, "finite number above 0"),
    ],
)
def test_wrong_rankings(folder: Path, changes: dict[str, object], words: str) -> None:
    write_jsonl(folder / "rankings.jsonl", [ranking(**changes)])
    with pytest.raises(ValueError, match=words):
        read_rankings(folder)


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_a_weight_is_finite(folder: Path, weight: str) -> None:
    line = json.dumps(ranking(weight="W")).replace('"W"', weight)
    (folder / "rankings.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1: weight is .*finite number above 0"):
        read_rankings(folder)


def test_jsonl_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read_jsonl(path)
    path.write_text('\ufeff{"a": 1}\n \n{"a": 2}\n\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"cannot read .*n\.jsonl: No such file"):
        read_jsonl(tmp_path / "n.jsonl")
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.jsonl"
    write_jsonl(path, [{"a": "caf\u00e9\u2028"}])
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "caf\u00e9\u2028"}
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(path, [{"a": 1}, {"a": float("nan")}])
    assert read_jsonl(path) == [{"a": "caf\u00e9\u2028"}]
    assert [file.name for file in path.parent.iterdir()] == ["m.jsonl"]


def test_what_json_has_no_number_for() -> None:
    """A reader that knows JSON alone reads it; what has a number stays as it is."""
    value = {"a": [math.nan, 1.5, (math.inf, -math.inf)], "b": True, "c": "nan", "d": 3}
    found = {"a": [None, 1.5, ["inf", "-inf"]], "b": True, "c": "nan", "d": 3}
    assert json.loads(json.dumps(json_value(value), allow_nan=False)) == found
