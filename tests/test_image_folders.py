"""Captioned folders of images as people have them, and what of them is set aside before a training."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from preftune import image_check
from preftune.image_check import check_images
from preftune.image_folders import Columns
from preftune.records import read_captioned, read_imagefolder
from preftune.training import data

TEXTS = {"a.png": "a green star", "sub/b.jpg": "ein gr\u00fcner Stern, 2"}
Make = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images without captions."""
    for name in TEXTS:
        image(tmp_path / "data" / name)
    return tmp_path / "data"


def image(path: Path, side: int = 16, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((side, side), 60).convert("RGB").save(path, **options)


def lines(*rows: object, image: str = "file_name", text: str = "text", bom: bool = False) -> Make:
    """A metadata.jsonl of TEXTS under these names, and more rows."""

    def make(folder: Path) -> None:
        every = [{image: name, text: caption} for name, caption in TEXTS.items()]
        content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in [*every, *rows])
        (folder / "metadata.jsonl").write_text(content + "\n", encoding="utf-8-sig" if bom else "utf-8")

    return make


def csv(header: str, *, place: str = ".", bom: bool = False) -> Make:
    def make(folder: Path) -> None:
        rows = [f'{name},"{caption}",{number}' for number, (name, caption) in enumerate(TEXTS.items())]
        (folder / place).mkdir(exist_ok=True, parents=True)
        path = folder / place / "metadata.csv"
        path.write_text("\r\n".join([header, *rows]), encoding="utf-8-sig" if bom else "utf-8")

    return make


def parquet(folder: Path) -> None:
    table = pyarrow.table({"file_name": list(TEXTS), "caption": list(TEXTS.values())})
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")


def pairs(suffix: str, encoding: str = "utf-8") -> Make:
    def make(folder: Path) -> None:
        for name, text in TEXTS.items():
            (folder / name).with_suffix(suffix).write_text(f"\n{text} \nmore\n", encoding=encoding)

    return make


def moved_to_train(folder: Path) -> None:
    """All below train/, as `datasets` lays it out; file names are beside the table."""
    (folder / "train").mkdir()
    for name in ("a.png", "sub"):
        (folder / name).rename(folder / "train" / name)
    lines()(folder / "train")


@pytest.mark.parametrize(
    "make",
    [
        lines(),
        lines(text="prompt", image="image"),
        lines(text="Caption", image="File_Name", bom=True),
        lines("", "  ", {"file_name": "a.png", "text": "x"}),
        csv("file_name,text,score"),
        csv("image,prompt,n", bom=True),
        csv("path,caption,n", place="data"),  # beside the table there is none, below the folder there is
        parquet,
        pairs(".txt"),
        pairs(".caption", "utf-8-sig"),
        moved_to_train,
    ],
    ids=[
        "jsonl",
        "names",
        "bom",
        "blank",
        "csv",
        "csv-bom",
        "csv-data",
        "parquet",
        "txt",
        "caption",
        "train",
    ],
)
def test_what_people_have(make: Make, folder: Path) -> None:
    make(folder)
    samples, skipped = read_captioned(folder, Columns())
    assert not skipped
    assert [sample.text for sample in samples][:2] == list(TEXTS.values())
    assert [sample.path.name for sample in samples][:2] == ["a.png", "b.jpg"]
    assert all(sample.path.is_file() and sample.place for sample in samples)


def test_numbers_of_a_csv_are_numbers_and_captions_are_texts(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text,liking,words\na.png,007,0.5,12\nsub/b.jpg,x\ny,1\n")
    samples, skipped = read_captioned(folder, Columns())
    assert [(sample.text, sample.extra) for sample in samples] == [("007", {"liking": 0.5, "words": 12})]
    assert [row.reason.partition(": ")[2] for row in skipped] == ["2 values for 4 columns"] * 2
    samples, _ = read_captioned(folder, Columns(caption_column="words"))
    assert samples[0].text == "12"


def test_a_long_csv_with_captions_of_several_lines(folder: Path) -> None:
    """Longer than what is parsed at a time."""
    text = "a star\n" * 250
    (folder / "metadata.csv").write_text("file_name,text\n" + f'a.png,"{text}"\n' * 1_000)
    samples, skipped = read_captioned(folder, Columns())
    assert not skipped
    assert [sample.text for sample in samples] == [text] * 1_000


@pytest.mark.parametrize("cell", ["NaN", "nan", "None", "NULL", '"null"', "", '""'])
@pytest.mark.parametrize("head", ["file_name,text,n", "file_name,notes,n"])
def test_an_empty_cell_of_a_csv_is_no_caption(head: str, cell: str, folder: Path) -> None:
    """What pandas writes, and reads, for a missing value; a caption that only begins so is one."""
    (folder / "metadata.csv").write_text(
        f"{head}\na.png,{cell},1\nsub/b.jpg,None of them,2\n{cell},a star,3\n"
    )
    column = head.split(",")[1]
    samples, skipped = read_captioned(folder, Columns(caption_column="notes" if column == "notes" else None))
    assert [(sample.text, sample.extra) for sample in samples] == [("None of them", {"n": 2})]
    assert [row.reason.rpartition(": ")[2] for row in skipped] == [f"{column} is empty", "file_name is empty"]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_of_a_spreadsheet(delimiter: str, folder: Path) -> None:
    rows = [["File_Name", "Caption", "liking"], ["a.png", "12", "3"], ["sub/b.jpg", '"a star, 2"', "4"]]
    content = "\r\n".join(delimiter.join(row) for row in rows)
    (folder / "metadata.csv").write_text(content, encoding="utf-8-sig")
    samples, skipped = read_captioned(folder, Columns())
    assert not skipped
    assert [(sample.text, sample.extra["liking"]) for sample in samples] == [("12", 3), ("a star, 2", 4)]
    (folder / "metadata.csv").write_text(content.replace("Caption", "Titel").replace("File_Name", "Bild"))
    with pytest.raises(ValueError, match="--image-column names one of Bild, Titel, liking"):
        read_captioned(folder, Columns())
    samples, _ = read_captioned(folder, Columns(image_column="Bild", caption_column="Titel"))
    assert [sample.text for sample in samples] == ["12", "a star, 2"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("file_name,text\na.png,gr\u00fcn\n", "latin-1"),
        ("file_name,text,Gr\u00f6\u00dfe\na.png,x,1\n", "cp1252"),
        ("file_name,text,place\na.png,x,K\u00f6ln\n", "latin-1"),
        ("file_name,text\na.png,x\n", "utf-16"),
    ],
)
def test_a_csv_that_is_not_utf8_says_how_to_save_it(content: str, encoding: str, folder: Path) -> None:
    (folder / "metadata.csv").write_text(content, encoding=encoding)
    with pytest.raises(ValueError, match=r"metadata\.csv is not UTF-8 text; save it as UTF-8"):
        read_captioned(folder, Columns())


@pytest.mark.parametrize(
    ("column", "columns"), [("image_path", Columns()), ("Datei", Columns(image_column="Datei"))]
)
def test_a_parquet_of_file_names_under_other_names(column: str, columns: Columns, folder: Path) -> None:
    table = pyarrow.table(
        {column: pyarrow.array(list(TEXTS)).dictionary_encode(), "caption": list(TEXTS.values())}
    )
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    samples, skipped = read_captioned(folder, columns)
    assert not skipped
    assert [sample.text for sample in samples] == list(TEXTS.values())


def test_a_parquet_says_its_columns_or_how_to_unpack_it(folder: Path) -> None:
    path, texts = folder / "metadata.parquet", list(TEXTS.values())
    pyarrow.parquet.write_table(pyarrow.table({"Datei": list(TEXTS), "caption": texts}), path)
    with pytest.raises(ValueError, match="--image-column names one of Datei, caption"):
        read_captioned(folder, Columns())
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x", b"y"], "caption": texts}), path)
    with pytest.raises(ValueError, match=r"preftune unpack --data"):
        read_captioned(folder, Columns())


def test_a_table_that_is_no_file(folder: Path) -> None:
    table = folder / "metadata.jsonl"
    os.mkfifo(table)
    with pytest.raises(ValueError, match=r"metadata\.jsonl is a named pipe, not a file"):
        read_captioned(folder, Columns())
    with pytest.raises(ValueError, match=r"metadata\.jsonl is a named pipe, not a file"):
        data.read(folder, Columns(), captioned=False)
    table.unlink()
    table.symlink_to("gone")
    with pytest.raises(ValueError, match=r"cannot read .*metadata\.jsonl: No such file"):
        read_captioned(folder, Columns())
    table.unlink()
    pairs(".txt")(folder)
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    _, (skipped,) = read_captioned(folder, Columns())
    assert skipped.reason.endswith("a.txt is no file")


def test_a_named_column_wins_and_must_be_there(folder: Path) -> None:
    rows = [{"file_name": name, "text": "no", "notes": text, "copy": name} for name, text in TEXTS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, _ = read_captioned(folder, Columns(caption_column="notes", image_column="copy"))
    assert [sample.text for sample in samples] == list(TEXTS.values())
    assert samples[0].extra == {"file_name": "a.png", "text": "no"}
    with pytest.raises(
        ValueError, match=r"none of 2 rows .*has no alt; --caption-column names one of file_name, text"
    ):
        read_captioned(folder, Columns(caption_column="alt"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "a.png", "text": None}, "text is empty"),
        ({"file_name": "a.png", "text": " "}, "text is empty"),
        ('{"file_name": "a.png", "text": NaN}', "text is empty"),
        ({"file_name": "a.png", "text": ["x"]}, "text is a list"),
        ({"file_name": "a.png"}, "has no text, prompt or caption"),
        ({"file_name": "gone.png", "text": "x"}, "gone.png does not exist"),
        ({"file_name": None, "text": "x"}, "file_name is empty"),
        ("[1]", "must be an object"),
        ('{"file_name": "a.pn', "is not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_costs_one_row(
    row: object, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(row, '{"file_name": "a.png", "text": "last", "x": NaN, "y": -Infinity}')(folder)
    samples, (skipped,) = read_captioned(folder, Columns())
    assert [sample.text for sample in samples] == [*TEXTS.values(), "last"]
    assert skipped.place.endswith("line 3")
    assert reason in skipped.reason
    read_imagefolder(folder)
    assert "1 row left out; the first: " in capsys.readouterr().err


def test_an_image_without_its_caption_file_is_set_aside(folder: Path) -> None:
    pairs(".txt")(folder)
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    image(folder / "c.webp")
    (folder / "notes.txt").write_text("of no image")
    samples, skipped = read_captioned(folder, Columns())
    assert [sample.path.name for sample in samples] == ["b.jpg"]
    assert "a.txt is not UTF-8 text" in skipped[0].reason
    assert skipped[1].reason == "c.webp: caption is empty"
    (folder / "c.txt").symlink_to("/etc/hostname")
    (folder / "a.txt").write_bytes(b"x" * (2 << 20))
    _, skipped = read_captioned(folder, Columns())
    assert "bytes" in skipped[0].reason
    assert "c.webp: file name 'c.txt' is a link that leads out of the folder" in skipped[1].reason


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    """Its files, the table too, are links to blobs of the same repository, and to nothing else."""
    repository = tmp_path / "hub" / "datasets--me--stars"
    snapshot, blobs = repository / "snapshots" / "0a1b" / "train", repository / "blobs"
    snapshot.mkdir(parents=True)
    image(blobs / "f00", format="PNG")
    image(repository.parent / "datasets--other--x" / "blobs" / "f01", format="PNG")
    (blobs / "f02").write_text(
        "\n".join(json.dumps({"file_name": f"{n}.png", "prompt": f"star {n}"}) for n in range(3))
    )
    for name, target in (("0.png", blobs / "f00"), ("metadata.jsonl", blobs / "f02")):
        (snapshot / name).symlink_to(os.path.relpath(target, snapshot))
    (snapshot / "1.png").symlink_to("../../../../datasets--other--x/blobs/f01")
    (snapshot / "2.png").symlink_to("/etc/hostname")
    (tmp_path / "mine").symlink_to(snapshot.parent)
    for folder in (snapshot.parent, tmp_path / "mine"):
        samples, skipped = read_captioned(folder, Columns())
        assert [sample.text for sample in samples] == ["star 0"]
        assert ["leads out of the folder" in row.reason for row in skipped] == [True, True]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["x.tar", "y.tar"],
            r"holds images in x\.tar; .* `preftune unpack --data .* --output-dir FOLDER`",
        ),
        (["x.parquet"], r"`preftune unpack --data"),
        (["test/metadata.jsonl"], r"has no metadata\.jsonl, but test/ has one; give .*/test"),
        (["a.png", "readme.txt"], "it holds 1 image without captions; captions are in"),
        ([], "it holds no images"),
    ],
)
def test_a_folder_without_captions_says_what_to_do(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=words):
        read_captioned(tmp_path, Columns())


def test_a_hub_name_says_how_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download --repo-type dataset me/stars --local-dir me/stars"):
        read_captioned(Path("me/stars"), Columns())
    with pytest.raises(
        ValueError, match=r"there is no data at me/stars/train; --data is a folder of captioned images$"
    ):
        read_captioned(Path("me/stars/train"), Columns())


# ---------------------------------------------------------------- images


def broken(folder: Path) -> None:
    """Eight captioned images of several formats, three of them broken in different ways."""
    names = [
        f"{n}{suffix}"
        for n, suffix in enumerate((".png", ".jpg", ".webp", ".tif", ".jfif", ".gif", ".bmp", ".png"))
    ]
    for name in names:
        image(folder / name, 64, **({"format": "JPEG"} if name.endswith(".jfif") else {}))
    for name, keep in (("1.jpg", 0.9), ("2.webp", 0.5), ("7.png", 0.95)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    rows = [json.dumps({"file_name": name, "text": f"image {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("full", [10_000, 0], ids=["decoded", "checksums"])
def test_broken_images_are_set_aside(
    full: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_check, "FULL", full)
    broken(tmp_path)
    samples, skipped = data.read(tmp_path, Columns())
    assert [sample.path.name for sample in samples] == ["0.png", "3.tif", "4.jfif", "5.gif", "6.bmp"]
    assert [row.place.rpartition(" ")[2] for row in skipped] == ["2", "3", "8"]
    (said,) = capsys.readouterr().err.splitlines()
    assert "5 images used, 3 set aside: cannot read the image" in said
    data.write_report(tmp_path / "run", skipped)
    report = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in report] == [row.reason for row in skipped]
    data.write_report(tmp_path / "run", [])
    assert not list((tmp_path / "run").iterdir())


def test_no_image_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_text("a star")
    with pytest.raises(
        ValueError, match=r"none of 1 image can be read; the first: cannot read the image .*a\.png"
    ):
        data.read(tmp_path, Columns())


def test_what_is_said_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image(tmp_path / "turned.jpg", exif=exif)
    image(tmp_path / "turned.png", exif=exif)
    image(tmp_path / "dot.png", 1)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    image(tmp_path / "plain.tiff")
    (tmp_path / "raw.heic").touch()
    for path in tmp_path.glob("*.*"):
        path.with_suffix(".txt").write_text("x" * (2_001 if path.suffix == ".tiff" else 9))
    samples, skipped = data.read(tmp_path, Columns())
    said = capsys.readouterr().err
    assert (len(samples), skipped) == (5, [])
    assert "2 images are turned as the EXIF data say" in said
    assert "1 image is less than 8 pixels high or wide" in said
    assert "1 image is animated" in said
    assert "1 caption has more than 2,000 characters" in said
    assert "2 files are not read as images and passed over: 1 .heic, 1 .txt" in said
    assert len(said.splitlines()) == 5


def test_captions_are_not_needed_where_none_is_read(folder: Path) -> None:
    samples, _ = data.read(folder, Columns(), captioned=False)
    assert [(sample.path.name, sample.text) for sample in samples] == [("a.png", ""), ("b.jpg", "")]
    with pytest.raises(ValueError, match="2 images without captions"):
        data.read(folder, Columns())


def test_a_large_data_set_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check, "KEPT", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken(tmp_path)
    paths = sorted(path for path in tmp_path.iterdir() if path.suffix not in (".jsonl", ""))
    first = check_images(paths)
    assert sorted(first.unreadable) == [1, 2, 7]
    with monkeypatch.context() as patch:
        patch.setattr(image_check, "_check", lambda _: pytest.fail("checked again"))
        assert check_images(paths) == first
    (record,) = (tmp_path / "cache").rglob("*.json")
    record.write_text("{")  # damaged: as if it were not there
    assert check_images(paths) == first
    before = paths[1].stat().st_mtime_ns
    image(paths[1])
    os.utime(paths[1], ns=(before, before))
    assert sorted(check_images(paths).unreadable) == [2, 7], "another file is another data set"
    monkeypatch.setenv("XDG_CACHE_HOME", str(paths[0] / "no folder"))
    assert sorted(check_images(paths).unreadable) == [2, 7], "without a cache"
