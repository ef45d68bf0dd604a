"""Published preference data on disk: what is kept, what is set aside and why, and that nothing half done looks whole."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_build import preferences, simulate_rankings
from data_build.preferences import Config
from preftune.images import load_pixels
from preftune.records import Ranking, read_jsonl, read_rankings

ROOT = Path(__file__).parents[1]


def image(level: int, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def hpd(folder: Path, names: list[str], **changes: object) -> dict[str, Any]:
    """A row of HPD v2's test.json; images that are not there yet are written."""
    for number, name in enumerate(names):
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(10 * number))
    return {"prompt": "a", "image_path": names, "rank": list(range(1, len(names) + 1))} | changes


def config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    (folder / "test.json").write_text(json.dumps(rows))
    given: dict[str, Any] = {"layout": "hpdv2-test", "input": (folder / "test.json",)} | changes
    return Config(output_dir=folder.parent / "out", **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """What the program prints where it ends with one sentence; it leaves nothing."""
    before = sorted(config.output_dir.parent.iterdir())
    with pytest.raises(SystemExit) as stop:
        preferences.main(config)
    assert stop.value.code == 2
    assert sorted(config.output_dir.parent.iterdir()) == before
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    return printed


def test_a_folder_of_rankings(folder: Path) -> None:
    """Images that several rankings share are there once, as the same file; all is read back by the trainer's reader."""
    notes = [{"rank": [2, 1, 2], "user_hash": "u"}, {"rank": [1, 2, 3], "user_hash": "v"}]
    shared = hpd(folder, ["0.jpg", "sub/1.jpg", "2.jpg"], raw_annotations=notes)
    preferences.main(config(folder, [shared, hpd(folder, ["2.jpg", "3.jpg"], prompt="b")]))
    output = folder.parent / "out"
    paths = {name: output / "images" / name for name in ("0.jpg", "sub/1.jpg", "2.jpg", "3.jpg")}
    first = (paths["0.jpg"], paths["sub/1.jpg"], paths["2.jpg"])
    assert read_rankings(output) == [
        Ranking(prompt="a", paths=first, ranks=(2, 1, 2), source="u"),
        Ranking(prompt="a", paths=first, ranks=(1, 2, 3), source="v"),
        Ranking(prompt="b", paths=(paths["2.jpg"], paths["3.jpg"]), ranks=(1, 2), source=""),
    ]
    for name, path in paths.items():
        assert path.samefile(folder / name)
    assert summary(output) == {
        "layout": "hpdv2-test",
        "rankings": 3,
        "images": 4,
        "untied_pairs": 6,
        "ties": 1,
        "rejected": {},
    }
    assert read_jsonl(output / "rejected.jsonl") == []
    assert sorted(path.name for path in output.iterdir()) == [
        "images", "rankings.jsonl", "rejected.jsonl", "summary.json",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith("out")] == ["out"]


def test_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", fails)
    preferences.main(config(folder, [hpd(folder, ["0.jpg", "1.jpg"])]))
    copy = folder.parent / "out/images/0.jpg"
    assert copy.read_bytes() == (folder / "0.jpg").read_bytes()
    assert not copy.samefile(folder / "0.jpg")


def test_bad_images_are_set_aside(folder: Path) -> None:
    """Each defect is reported once, and the ranking keeps its other images with their ranks."""
    bad = {
        "empty.jpg": (b"", "no bytes"),
        "cut.jpg": (image(1)[:-30], "undecodable"),
        "text.jpg": (b"hello", "undecodable"),
        "thread.jpg": (image(1, size=(2000, 1)), "too large"),
        "../secret.jpg": (image(1), "unsafe name"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    names = ["good.jpg", *bad, "link.jpg", "gone.jpg", "x" * 300, "fine.jpg"]
    hpd(folder, ["good.jpg", "fine.jpg"])
    row = {"prompt": "a", "image_path": names, "rank": list(range(1, len(names) + 1))}
    preferences.main(config(folder, [row, row | {"prompt": "b"}]))
    output = folder.parent / "out"
    assert [ranking.ranks for ranking in read_rankings(output)] == [(1, len(names))] * 2
    found = {line["name"]: line["reason"] for line in read_jsonl(output / "rejected.jsonl")}
    expected = {name: reason for name, (_, reason) in bad.items()}
    expected |= {"link.jpg": "unsafe name", "gone.jpg": "missing", "x" * 300: "unsafe name"}
    assert found == expected
    assert len(read_jsonl(output / "rejected.jsonl")) == len(expected)
    assert summary(output)["rejected"] == {
        "missing": 1, "no bytes": 1, "too large": 1, "undecodable": 2, "unsafe name": 3,
    }  # fmt: skip
    assert sorted(path.name for path in (output / "images").iterdir()) == ["fine.jpg", "good.jpg"]


def test_rankings_that_say_nothing_any_more_are_set_aside(folder: Path) -> None:
    (folder / "gone.jpg").touch()
    names = ["0.jpg", "1.jpg", "gone.jpg"]
    rows = [
        hpd(folder, names, rank=[1, 1, 1]),  # still the tie that it was
        hpd(folder, names, rank=[2, 2, 1]),  # the choice is lost
        hpd(folder, ["0.jpg", "gone.jpg"]),
        hpd(folder, ["0.jpg", "1.jpg"], rank=[1]),
    ]
    preferences.main(config(folder, rows))
    output = folder.parent / "out"
    assert [ranking.ranks for ranking in read_rankings(output)] == [(1, 1)]
    assert summary(output)["ties"] == 1
    assert [(row["name"].rpartition("/")[2], row["reason"]) for row in read_jsonl(output / "rejected.jsonl")] == [
        ("gone.jpg", "no bytes"),
        ("test.json element 2", "only ties left"),
        ("test.json element 3", "too few images"),
        ("test.json element 4", "bad row"),
    ]  # fmt: skip


def test_images_in_the_rows(folder: Path) -> None:
    """Pick-a-Pic: a uid is one image, weights are written, and a uid with two images keeps the first."""

    def row(zero: str, one: str, count: int, **changes: object) -> dict[str, Any]:
        return {
            "caption": "a", "has_label": True, "image_0_uid": zero, "image_1_uid": one, "jpg_0": contents[zero],
            "jpg_1": contents[one], "label_0": 0.5, "label_1": 0.5, "user_id": 1, "num_example_per_prompt": count,
        } | changes  # fmt: skip

    contents = {
        uid: image(level, "JPEG")
        for level, uid in enumerate(("aaa", "bbb", "ccc", "../x", "aaa.jpg/d", "eee.jpg/f", "eee"))
    }
    rows = [
        row("aaa", "bbb", 1),
        row("bbb", "ccc", 8, label_0=0.0, label_1=1.0),
        row("aaa", "bbb", 1, has_label=False),
        row("aaa", "../x", 1),
        row("aaa", "ccc", 1, jpg_1=b""),
        row("aaa", "bbb", 1, jpg_1=image(99)),
        row("aaa", "bbb", 2),  # as good as before
        row("aaa", "aaa.jpg/d", 1),
        row("eee.jpg/f", "eee", 1),
    ]
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    output = folder.parent / "out"
    preferences.main(Config(layout="pickapic", input=(path,), output_dir=output))
    found = [
        ([place.relative_to(output).as_posix() for place in one.paths], one.ranks, one.weight, one.source)
        for one in read_rankings(output)
    ]
    assert found == [
        (["images/aa/aaa.jpg", "images/bb/bbb.jpg"], (1, 1), 1.0, "1"),
        (["images/bb/bbb.jpg", "images/cc/ccc.jpg"], (2, 1), 0.125, "1"),
        (["images/aa/aaa.jpg", "images/bb/bbb.jpg"], (1, 1), 0.5, "1"),
    ]
    assert "weight" not in read_jsonl(output / "rankings.jsonl")[0]
    assert (output / "images/cc/ccc.jpg").read_bytes() == contents["ccc"]
    assert not (folder.parent / "x.jpg").exists()
    assert [(row["name"].rpartition("/")[2], row["reason"]) for row in read_jsonl(output / "rejected.jsonl")] == [
        ("train.parquet row 3", "no label"),
        ("x.jpg", "unsafe name"),
        ("train.parquet row 4", "too few images"),
        ("ccc.jpg", "bad metadata"),
        ("train.parquet row 5", "too few images"),
        ("bbb.jpg", "bad metadata"),
        ("train.parquet row 6", "too few images"),
        ("d.jpg", "unsafe name"),
        ("train.parquet row 8", "too few images"),
        ("eee.jpg", "unsafe name"),
        ("train.parquet row 9", "too few images"),
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "train_1/"])
def test_images_in_zip_files(folder: Path, prefix: str) -> None:
    """ImageRewardDB as published, with members in a folder or not; an empty image; nothing is unpacked."""
    stem = "images/train/train_1"
    contents = {f"{name}.webp": image(level, "WEBP") for level, name in enumerate("abc")} | {"zero.webp": b""}
    rows = [
        {"image_path": f"{stem}/{name}", "prompt_id": "1-1", "prompt": "a", "rank": rank}
        for rank, name in enumerate([*contents, "gone.webp"], 1)
    ]
    (folder / "images/train").mkdir(parents=True)
    archive = folder / f"{stem}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{prefix}train_1.json", json.dumps(rows))
        for name, content in contents.items():
            file.writestr(prefix + name, content)
    table = folder / "metadata-train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for name, path in (("zip", archive), ("table", table)):
        output = folder.parent / name
        preferences.main(Config(layout="imagerewarddb", input=(path,), output_dir=output, images=folder))
        (ranking,) = read_rankings(output)
        assert ranking.ranks == (1, 2, 3)
        assert [place.read_bytes() for place in ranking.paths] == [*contents.values()][:3]
        assert [(row["name"], row["reason"]) for row in read_jsonl(output / "rejected.jsonl")] == [
            (f"{stem}/zero.webp", "no bytes"),
            (f"{stem}/gone.webp", "missing"),
        ]


def test_a_name_that_an_archive_has_twice(folder: Path) -> None:
    """Which image was judged is not known, so neither is taken; a folder is no second image."""
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images/part.zip", "w") as file:
        file.mkdir("part")
        file.mkdir("0.png")
        for level, name in enumerate(("part/0.png", "part/1.png", "part/2.png", "thumbs/2.png", "3.png")):
            file.writestr(name, image(level))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("3.png", image(9))
    names = [f"images/part/{number}.png" for number in range(4)]
    row = {"prompt": "a", "image_path": names, "rank": [4, 3, 2, 1]}
    preferences.main(config(folder, [row]))
    output = folder.parent / "out"
    (ranking,) = read_rankings(output)
    assert ranking.ranks == (4, 3)
    assert [place.read_bytes() for place in ranking.paths] == [image(0), image(1)]
    assert read_jsonl(output / "rejected.jsonl") == [
        {"name": name, "reason": "unsafe name", "detail": "the name is in the archive more than once"}
        for name in names[2:]
    ]


def test_shards_that_begin_within_a_prompt(folder: Path) -> None:
    """The last image of a prompt whose others are in the file before costs itself alone."""
    rows = [
        {"prompt_id": f"{prompt}", "prompt": f"p {prompt}", "rank": rank}
        | {"image": {"bytes": image(9 * prompt + rank), "path": f"{prompt}-{rank}.png"}}
        for prompt in range(2)
        for rank in (1, 2, 3)
    ]
    paths = (folder / "train-0.parquet", folder / "train-1.parquet")
    for path, part in zip(paths, (rows[:2], rows[2:]), strict=True):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
    output = folder.parent / "out"
    preferences.main(Config(layout="imagerewarddb", input=paths, output_dir=output))
    assert [(one.prompt, one.ranks) for one in read_rankings(output)] == [("p 0", (1, 2)), ("p 1", (1, 2, 3))]
    assert [path.read_bytes() for path in read_rankings(output)[1].paths] == [
        image(9 + rank) for rank in (1, 2, 3)
    ]
    (lonely,) = read_jsonl(output / "rejected.jsonl")
    assert lonely["name"] == f"{paths[1]} row 1"
    assert lonely["reason"] == "too few images"


def test_an_archive_outside_is_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(folder.parent / "secret.zip", "w") as file:
        for number in range(2):
            file.writestr(f"{number}.png", image(number))
    (folder / "part.zip").symlink_to(folder.parent / "secret.zip")
    row = {"prompt": "a", "image_path": ["part/0.png", "part/1.png"], "rank": [1, 2]}
    assert "{'too few images': 1, 'unsafe name': 2}" in refused(config(folder, [row]), capsys)


def test_an_image_that_unpacks_to_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "MAX_BYTES", 1000)
    with zipfile.ZipFile(folder / "part.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(2):
            file.writestr(f"{number}.png", image(number))
        file.writestr("bomb.png", b"\0" * 1001)
    names = ["part/0.png", "part/1.png", "part/bomb.png"]
    preferences.main(config(folder, [{"prompt": "a", "image_path": names, "rank": [1, 2, 3]}]))
    (row,) = read_jsonl(folder.parent / "out/rejected.jsonl")
    assert (row["name"], row["reason"], row["detail"]) == (
        "part/bomb.png",
        "too large",
        "1001 bytes; at most 1000",
    )


def test_aspects(folder: Path) -> None:
    hpd(folder, ["0.png", "1.png"])
    scores = ({"prompt_following": 5, "aesthetics": 1}, {"prompt_following": 4, "aesthetics": 4})
    images = [
        {"image_id": f"{i}.png", "fidelity": 3, "harmlessness": 5} | row for i, row in enumerate(scores)
    ]
    (folder / "v.jsonl").write_text(json.dumps({"prompt": "a", "images": images}) + "\n")
    for aspect, ranks in (
        (None, (2, 1)),
        ("mean", (2, 1)),
        ("prompt_following", (1, 2)),
        ("fidelity", (1, 1)),
    ):
        output = folder.parent / f"out-{aspect}"
        given: dict[str, Any] = {"layout": "aspects", "input": (folder / "v.jsonl",), "aspect": aspect}
        preferences.main(Config(output_dir=output, **given))
        assert [ranking.ranks for ranking in read_rankings(output)] == [ranks]


def test_the_shapes_world(tmp_path: Path) -> None:
    """Our own folder comes through with all its rankings and the same pixels."""
    made = tmp_path / "made"
    simulate_rankings.main(simulate_rankings.Config(output_dir=made, count=2, images=3, annotators=2))
    preferences.main(Config(layout="rankings", input=(made / "rankings.jsonl",), output_dir=tmp_path / "out"))
    before, after = read_rankings(made), read_rankings(tmp_path / "out")
    assert [(one.prompt, one.ranks, one.source) for one in before] == [
        (one.prompt, one.ranks, one.source) for one in after
    ]
    for one, other in zip(before, after, strict=True):
        for path, copy in zip(one.paths, other.paths, strict=True):
            assert load_pixels(path).equal(load_pixels(copy))


def test_wrong_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--aspect is for --layout aspects; hpdv2-test has one ranking"):
        config(folder, [], aspect="fidelity")
    with pytest.raises(ValueError, match="--input needs at least one file"):
        config(folder, [], input=())
    link = folder / "link"
    link.symlink_to("test.json")
    twice = (folder / "test.json", link)
    with pytest.raises(
        ValueError, match=r"link twice, first as .*test\.json; its rankings would count twice"
    ):
        config(folder, [], input=twice)
    good = [hpd(folder, ["0.jpg", "1.jpg"])]
    assert "--images nowhere is no folder" in refused(config(folder, good, images=Path("nowhere")), capsys)
    assert "element 1 has no image_path" in refused(config(folder, [{"prompt": "a"}]), capsys)
    printed = refused(config(folder, good, input=(folder / "test.json", folder / "more.json")), capsys)
    assert "cannot read" in printed
    assert "reading: " not in printed  # the progress bar, which the first ranking would draw
    lost = config(folder, [{"prompt": "a", "image_path": ["x", "y"], "rank": [1, 2]}])
    assert "no ranking is left; set aside: {'missing': 2, 'too few images': 1}" in refused(lost, capsys)
    assert "; first x: there is neither" in refused(lost, capsys)
    assert "set aside: nothing" in refused(config(folder, []), capsys)
    alien = config(folder, [good[0] | {"rank": ["nan"]}, good[0] | {"rank": [1]}])
    assert 'rank is ["nan"]; it must hold finite numbers' in refused(alien, capsys)
    alien = config(folder, [good[0] | {"rank": [1]}] * 3)
    printed = refused(alien, capsys)
    assert (
        f"set aside: {{'bad row': 3}}; first {folder / 'test.json'} element 1: 2 images and 1 ranks"
        in printed
    )
    (folder.parent / "out").mkdir()
    assert "out exists already" in refused(config(folder, good), capsys)


def test_a_file_that_breaks_off_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = config(folder, [hpd(folder, ["0.jpg", "1.jpg"])] * 3)
    (folder / "test.json").write_text((folder / "test.json").read_text()[:-40])
    assert "element 3 is not JSON" in refused(broken, capsys)


def test_a_killed_run_leaves_nothing_that_looks_complete(folder: Path) -> None:
    rows = [hpd(folder, ["0.jpg", "1.jpg"]), hpd(folder, ["0.jpg", "2.jpg"])] * 20_000
    given = config(folder, rows)
    command = [sys.executable, "data_build/preferences.py", "--layout", given.layout, "--input", str(given.input[0]), "--output-dir", str(given.output_dir)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(folder.parent.glob(".out.tmp-*/images/0.jpg")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not given.output_dir.exists()
    (left,) = folder.parent.glob(".out.tmp-*")
    assert not (left / "rankings.jsonl").exists()
    with pytest.raises(ValueError, match=r"has no rankings\.jsonl"):
        read_rankings(left)
    (folder / "test.json").write_text(json.dumps(rows[:2]))
    preferences.main(given)
    assert len(read_rankings(given.output_dir)) == 2


def test_a_rating_file_that_was_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cut row and the person with one rating are set aside; a repeated rating follows the rule, and is counted."""
    for name in ("0.jpg", "1.jpg"):
        (folder / name).write_bytes(image(int(name[0])))
    lines = ["a,0.jpg,x,1", "a,1.jpg,x,2", "a,0.jpg,x,3", "b,0.jpg,y,1", '"a, not']
    (folder / "r.csv").write_text("prompt,image,rater,score\n" + "\n".join(lines))
    given = {"layout": "ratings", "input": (folder / "r.csv",)}
    preferences.main(Config(**given, output_dir=folder.parent / "out"))  # type: ignore[arg-type]
    found = summary(folder.parent / "out")
    assert (found["rankings"], found["repeated_ratings"]) == (1, 1)
    assert found["rejected"] == {"bad row": 1, "too few images": 1}
    assert read_rankings(folder.parent / "out")[0].ranks == (1, 2), "the last rating counts"
    preferences.main(Config(**given, output_dir=folder.parent / "mean", repeated_ratings="mean"))  # type: ignore[arg-type]
    assert read_rankings(folder.parent / "mean")[0].ranks == (1, 1)
    with pytest.raises(SystemExit) as stop:
        preferences.main(Config(**given, output_dir=folder.parent / "none", repeated_ratings="refuse"))  # type: ignore[arg-type]
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "'bad row': 2, 'too few images': 1" in said
    assert "'0.jpg' is rated more than once by the same person" in said
    with pytest.raises(ValueError, match="--repeated-ratings is for --layout ratings; hpdv1 has none"):
        Config(layout="hpdv1", input=(folder / "r.csv",), output_dir=folder, repeated_ratings="mean")
