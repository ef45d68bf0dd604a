"""Tables and archives of images: webdataset's tar files scored, and what unpack.py writes of each kind."""

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_build import readers, unpack
from data_build.decode import ImageEntry
from preftune.records import read_imagefolder


def encoded(kind: str, level: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(content, kind)
    return content.getvalue()


SAMPLES = {
    "a": ("PNG", ".png", "a cat"),
    "b": ("JPEG", ".jpg", "un chat \u00e9l\u00e9gant"),
    "c": ("WEBP", ".webp", "a dog"),
}


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shard(kind: str) -> dict[str, bytes]:
    """The members of SAMPLES as img2dataset writes them: with a text, or with a JSON alone."""
    members: dict[str, bytes] = {}
    for number, (key, (kind_of_image, suffix, text)) in enumerate(SAMPLES.items()):
        if kind == "json":
            note = {"caption": text, "url": "x"}
            members[f"shard/{key}.json"] = json.dumps(note).encode()
        members[f"shard/{key}{suffix}"] = encoded(kind_of_image, 50 * number)
        if kind == "txt":
            members[f"shard/{key}.txt"] = f"{text}\n".encode()
            members[f"shard/{key}.json"] = b'{"caption": "not this"}'
    return members


def unpacked(data: Path, output: Path, **changes: str) -> list[tuple[str, str]]:
    """(text, suffix) of the images of the folder that unpack.py makes."""
    unpack.main(unpack.Config(data=data, output_dir=output, **changes))
    return [(sample.text, sample.path.suffix) for sample in read_imagefolder(output)]


EXPECTED = [(text, suffix) for _, suffix, text in SAMPLES.values()]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "data/0000.tgz"])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_webdataset(kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "in" / name, shard(kind))
    assert unpacked(tmp_path / "in", tmp_path / "out") == EXPECTED
    assert "3 written, 0 left out" in capsys.readouterr().out
    for sample, (kind_of_image, *_), level in zip(
        read_imagefolder(tmp_path / "out"), SAMPLES.values(), (0, 50, 100), strict=True
    ):
        assert sample.path.read_bytes() == encoded(kind_of_image, level), "copied byte for byte"
        assert sample.extra == {"source": name, "member": str(level // 50)}


def test_a_listing_of_an_archive_goes_on_from_any_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", shard("txt"))
    found = readers.find_data_set(path, prompted=True, prompt="", image_column=None, text_column=None)
    assert readers.survey(found)[1] == 3
    whole = list(readers.entries(found))
    for index in range(4):
        assert list(readers.entries(found, 0, index)) == whole[index:]
    for _, _, entry in whole:
        assert isinstance(entry, ImageEntry)
        assert readers.read_bytes(found, replace(entry, content=None)) == entry.content


def test_what_is_wrong_with_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = encoded("PNG", 9)
    members = {
        "0.img.png": png, "0.txt": b"fine",
        "1.png": png,
        "2.txt": b"no image",
        "3.png": png[:40], "3.txt": b"cut",
        "../4.png": png, "../4.txt": b"out",
        "5.png": png, "5.json": b'{"caption": 5}',
        "6.png": png, "6.json": b'{"caption": null}',
        "7.png": png, "7.txt": b"\xff",
        "8.png": png, "8.txt": b"fine too",
    }  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert [text for text, _ in unpacked(path, tmp_path / "out")] == ["fine", "fine too"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["member"]: row["reason"] for row in rows} == {
        "1": "no prompt", "2": "missing", "3": "undecodable", "4": "unsafe name", "5": "bad metadata", "6": "no prompt",
        "7": "bad metadata",
    }  # fmt: skip
    whole = path.read_bytes()
    at = whole.index(b"8.txt")
    path.write_bytes(whole[: at + 100])  # within a header
    assert [text for text, _ in unpacked(path, tmp_path / "broken")] == ["fine"]
    assert "1 broken file" in capsys.readouterr().out


def test_a_header_that_unpacks_to_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A long name of 200 MB in an archive of 200 kB; tarfile alone reads it as a whole."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
    with gzip.open(tmp_path / "x.tgz", "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(SystemExit):
        unpacked(tmp_path / "x.tgz", tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert "x.tgz 0 and all that follow: broken file, a header of 209715" in capsys.readouterr().err


def test_a_table_of_the_hub(tmp_path: Path) -> None:
    images = [{"bytes": encoded(kind, 1), "path": None} for kind, *_ in SAMPLES.values()]
    table = pyarrow.table({"image": images, "blip": [text for *_, text in SAMPLES.values()]})
    (tmp_path / "in" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "in" / "data" / "train-00000-of-00001.parquet")
    assert unpacked(tmp_path / "in", tmp_path / "out", caption_column="blip") == EXPECTED
    with pytest.raises(SystemExit) as stop:
        unpacked(tmp_path / "in", tmp_path / "none")
    assert stop.value.code == 2


def test_a_part_of_diffusiondb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "w") as archive:
        for key, (kind, suffix, _) in SAMPLES.items():
            archive.writestr(f"{key}{suffix}", encoded(kind, 1))
        notes = {f"{key}{suffix}": {"p": text} for key, (_, suffix, text) in SAMPLES.items()}
        archive.writestr("part-000001.json", json.dumps(notes))
    assert unpacked(tmp_path, tmp_path.parent / f"{tmp_path.name} out") == EXPECTED


def test_nothing_to_write_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": encoded("PNG", 1)})
    with pytest.raises(SystemExit) as stop:
        unpacked(tmp_path / "x.tar", tmp_path / "out")
    assert stop.value.code == 2
    assert "has no image to write, 1 left out; the first: x.tar 0: no prompt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        unpacked(tmp_path / "x.tar", tmp_path / "out")
    assert "exists already" in capsys.readouterr().err
