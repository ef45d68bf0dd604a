"""Scoring a data set: every kind of data, everything that can be wrong with it, and being killed at any moment."""

import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import children
import rewards
from data_build import readers, score, score_folder, scoring, shapes
from data_build.decode import ImageEntry, UnusableError, decode
from golden_weights import tiny_card
from preftune import prepared_images, score_files
from preftune.cli import parse
from preftune.records import read_imagefolder, read_jsonl, write_jsonl
from rewards import CARDS
from rewards.clip import ClipVision
from rewards.pixels import from_pil
from rewards.terms import units

ROOT = Path(__file__).parents[1]
COUNT = 7


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of the shapes world."""
    folder = tmp_path_factory.mktemp("rendered") / "data"
    shapes.main(shapes.Config(output_dir=folder, count=COUNT, seed=5))
    return folder


@pytest.fixture
def data(rendered: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(rendered, tmp_path / "data"))


@pytest.fixture(scope="module")
def expected(rendered: Path) -> dict[str, list[float]]:
    """Scores of the images one by one, without any of the code under test."""
    scorers = [rewards.load(name) for name in ("shapes", "brightness", "imagereward-tiny")]
    columns: dict[str, list[float]] = {}
    for sample in read_imagefolder(rendered):
        for scorer in scorers:
            pixels = from_pil(Image.open(sample.path), scorer.card.preprocess)[None]
            columns.setdefault(scorer.card.name, []).append(scorer(pixels, [sample.text]).item())
    return columns


def config(data: Path, output: Path, *names: str, **changes: Any) -> score.Config:
    few = {"rewards": names or ("shapes", "brightness"), "batch_size": 2, "chunk": 3, "workers": 0, "best": 0}
    return score.Config(data=data, output_dir=output, **(few | changes))


def run(data: Path, output: Path, *names: str, **changes: Any) -> dict[str, list[Any]]:
    """The columns of scores.parquet."""
    score.main(config(data, output, *names, **changes))
    return pyarrow.parquet.read_table(output / "scores.parquet").to_pydict()


def rejected(output: Path) -> dict[tuple[str, str], str]:
    """(file, member) -> reason; none is there twice but by intention, which Counter tells apart."""
    rows = read_jsonl(output / "rejected.jsonl")
    assert all(list(row) == ["file", "member", "reason", "detail"] and row["detail"] for row in rows)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["rejected"] == Counter(row["reason"] for row in rows)
    return {(row["file"], row["member"]): row["reason"] for row in rows}


# ---------------------------------------------------------------- columns and files


def test_columns_equal_images_scored_one_by_one(
    rendered: Path, expected: dict[str, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("imagereward-tiny", "shapes", "brightness")
    columns = run(rendered, tmp_path / "out", *names, best=2)
    assert list(columns) == ["file", "member", "text", *names]
    samples = read_imagefolder(rendered)
    assert columns["file"] == [sample.path.relative_to(rendered).as_posix() for sample in samples]
    assert columns["text"] == [sample.text for sample in samples]
    assert columns["member"] == [""] * COUNT
    for name in names:
        assert columns[name] == pytest.approx(expected[name], abs=0 if name != "imagereward-tiny" else 2e-6)
    schema = pyarrow.parquet.read_schema(tmp_path / "out" / "scores.parquet")
    assert all(schema.field(name).type == pyarrow.float32() for name in names)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["count"], summary["rejected"], list(summary["scores"])) == (COUNT, {}, list(names))
    values = np.array(columns["shapes"])
    assert summary["scores"]["shapes"] == pytest.approx(
        {
            "mean": values.mean(), "std": values.std(), "min": values.min(), "q25": np.sort(values)[1:3].mean(),
            "median": np.sort(values)[3], "q75": np.sort(values)[4:6].mean(), "max": values.max(),
        }
    )  # fmt: skip
    table = capsys.readouterr().out
    assert f"{COUNT} scored, 0 set aside" in table
    assert f"{values.mean():.4g}" in next(line for line in table.splitlines() if " shapes " in line)
    mean = summary["scores"]["imagereward-tiny"]["mean"]
    assert units([CARDS["imagereward-tiny"]], "dataset", tmp_path / "out" / "summary.json")[0][0] == mean
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "best_worst.png", "job.json", "rejected.jsonl", "scores.parquet", "summary.json",
    ]  # fmt: skip


def test_workers_change_nothing(rendered: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        run(rendered, tmp_path / f"{workers}", "imagereward-tiny", "brightness", workers=workers, best=2)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_workers_open_archives_anew(rendered: Path, tmp_path: Path) -> None:
    """One that this process has open is not shared with them: they would move each other's place in it."""
    (tmp_path / "data").mkdir()
    write_part(tmp_path / "data" / "part-000001.zip", encoded(rendered))
    found = readers.find_data_set(
        tmp_path / "data", prompted=True, prompt="", image_column=None, text_column=None
    )
    entry = next(entry for *_, entry in readers.entries(found) if isinstance(entry, ImageEntry))
    readers.read_bytes(found, entry)
    assert readers._open.cache_info().currsize == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(archives_open) == 0
    assert archives_open() == 1


def archives_open() -> int:
    return readers._open.cache_info().currsize


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_half_precision_towers(rendered: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    columns = run(rendered, tmp_path / "out", "imagereward-tiny", precision="bf16")
    distance = np.abs(np.subtract(columns["imagereward-tiny"], expected["imagereward-tiny"])).max()
    assert 1e-6 < distance < 0.1


def test_each_image_is_decoded_once_and_prepared_once_for_each_rule(
    rendered: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP score, aesthetic and HPS v1 want images alike, HPS v2 does not; the first two share their tower."""
    calls: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    names = ("clipscore", "aesthetic", "hpsv1", "hpsv2")
    for name in names:
        monkeypatch.setitem(CARDS, name, tiny_card(name))
    files = {name: clips / f"{name}.pt" for name in names} | {"clipscore": clips / "model.safetensors"}
    scorers = [rewards.load(name, weights=files[name]) for name in names]
    changed = torch.load(files["hpsv1"])["state_dict"]
    changed["visual.ln_post.bias"] += 1e-3  # else HPS v1 would share the tower, too
    torch.save(changed, clips / "changed.pt")
    files["hpsv1"] = clips / "changed.pt"
    scorers[2] = rewards.load("hpsv1", weights=files["hpsv1"])
    for owner, name in ((scoring, "decode"), (prepared_images, "packed_from_pil"), (ClipVision, "forward")):
        counted(owner, name)
    terms = tuple(f"{name}={path}" for name, path in files.items())
    columns = run(rendered, tmp_path / "out", *names, reward_files=terms, chunk=100, batch_size=4)
    assert calls == {"decode": COUNT, "packed_from_pil": 2 * COUNT, "forward": 2 * 3}
    monkeypatch.undo()
    for scorer in scorers:
        by_hand = [
            scorer(from_pil(Image.open(sample.path), scorer.card.preprocess)[None], [sample.text]).item()
            for sample in read_imagefolder(rendered)
        ]
        assert columns[scorer.card.name] == pytest.approx(by_hand, abs=2e-6)


def test_the_best_and_the_worst_are_shown(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}
    original = score_folder.captioned_grid

    def grid(rows: Any, **texts: Any) -> Image.Image:
        shown.update(texts, rows=rows)
        return original(rows, **texts)

    monkeypatch.setattr(score_folder, "captioned_grid", grid)
    columns = run(rendered, tmp_path / "out", best=2)
    assert Image.open(tmp_path / "out" / "best_worst.png").size[0] > 4 * score_folder.CELL
    assert shown["row_captions"] == ["shapes", "brightness"]
    assert shown["column_titles"] == ["best 1", "best 2", "worst 2", "worst 1"]
    order = np.argsort(columns["brightness"])[::-1]
    chosen = [*order[:2], *order[-2:]]
    assert shown["cell_captions"][1] == [
        f"{columns['brightness'][i]:.4g}\n{columns['text'][i]}" for i in chosen
    ]
    for i, image in zip(chosen, shown["rows"][1], strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(rendered / columns["file"][i])))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_and_hostile_prompts_are_shown(count: int, data: Path, tmp_path: Path) -> None:
    rows = read_jsonl(data / "metadata.jsonl")[:count]
    texts = ["\x00\u202e\U0001f600" + "w" * 5000, "a\nb\r\tc", "<b>" * 99]
    write_jsonl(
        data / "metadata.jsonl", [row | {"text": text} for row, text in zip(rows, texts, strict=False)]
    )
    columns = run(data, tmp_path / "out", "imagereward-tiny", best=4)
    assert columns["text"] == texts[:count]
    assert (tmp_path / "out" / "best_worst.png").is_file()


def test_scores_go_into_the_metadata(data: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    """Lines that were set aside stay as they are, whatever they are; to do it again changes nothing."""
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "metadata.jsonl").write_text(
        "\n".join([lines[0], "{broken", *lines[1:]]) + "\n", encoding="utf-8"
    )
    columns = run(data, tmp_path / "out")
    before = (data / "metadata.jsonl").read_bytes()
    score.main(config(data, tmp_path / "out", add_to_metadata=True))  # the job is done: this scores nothing
    written = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert written.pop(1) == "{broken"
    for index, (line, old) in enumerate(zip(written, lines, strict=True)):
        new = {name: columns[name][index] for name in ("shapes", "brightness")}
        assert json.loads(line) == json.loads(old) | new
        assert new == {name: pytest.approx(expected[name][index], abs=1e-7) for name in new}
    again = (data / "metadata.jsonl").read_bytes()
    assert again != before
    score.main(config(data, tmp_path / "out", add_to_metadata=True))
    assert (data / "metadata.jsonl").read_bytes() == again
    assert sorted(path.name for path in data.iterdir()) == ["000", "metadata.jsonl"]


# ---------------------------------------------------------------- kinds of data


def encoded(rendered: Path) -> list[tuple[str, bytes, str]]:
    """Name, file and caption of each image; every other one as lossless WebP."""
    listed = []
    for index, sample in enumerate(read_imagefolder(rendered)):
        content = sample.path.read_bytes()
        if index % 2:
            buffer = io.BytesIO()
            Image.open(sample.path).save(buffer, "WEBP", lossless=True)
            content = buffer.getvalue()
        listed.append((f"{index}.{'webp' if index % 2 else 'png'}", content, sample.text))
    return listed


def write_part(path: Path, images: list[tuple[str, bytes, str]], notes: object = None) -> None:
    """A zip file of DiffusionDB as published, or with another JSON."""
    about = {name: {"p": text, "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for name, _, text in images}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, _ in images:
            archive.writestr(name, content)
        archive.writestr(f"{path.stem}.json", json.dumps(about if notes is None else notes))


def write_table(
    path: Path, rows: list[tuple[object, object]], kind: pyarrow.DataType, group: int = 2
) -> None:
    """A parquet table of (image, text) in small row groups."""
    images, texts = (list(column) for column in zip(*rows, strict=True))
    columns = {"image": pyarrow.array(images, kind), "text": pyarrow.array(texts, pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def as_struct(images: list[tuple[str, bytes, str]]) -> list[tuple[object, object]]:
    return [({"bytes": content, "path": name}, text) for name, content, text in images]


def write_kind(kind: str, folder: Path, images: list[tuple[str, bytes, str]]) -> Path:
    """The images as a data set of a kind."""
    folder.mkdir()
    if kind == "folder":
        for number, (name, content, _) in enumerate(images):
            place = folder / "deep" / "er" if number % 2 else folder
            place.mkdir(parents=True, exist_ok=True)
            (place / name.upper()).write_bytes(content)
        (folder / "notes.txt").write_text("no image")
    elif kind == "table of structs":
        write_table(folder / "a.parquet", as_struct(images), STRUCT)
        return folder / "a.parquet"
    elif kind == "tables of bytes":
        rows: list[tuple[object, object]] = [(content, text) for _, content, text in images]
        write_table(folder / "a.parquet", rows[:3], pyarrow.binary())
        write_table(folder / "b.parquet", rows[3:], pyarrow.large_binary(), group=20)
    elif kind == "archive":
        write_part(folder / "part-000007.zip", images)
        return folder / "part-000007.zip"
    else:
        write_part(folder / "part-000001.zip", images[:2])
        write_part(folder / "part-000002.zip", images[2:])
    return folder


PLACES = {
    "table of structs": [("a.parquet", str(i)) for i in range(COUNT)],
    "tables of bytes": [("a.parquet", str(i)) for i in range(3)] + [("b.parquet", str(i)) for i in range(COUNT - 3)],
    "archive": [("part-000007.zip", f"{i}.{'webp' if i % 2 else 'png'}") for i in range(COUNT)],
    "archives": [
        (f"part-00000{1 + (i >= 2)}.zip", f"{i}.{'webp' if i % 2 else 'png'}") for i in range(COUNT)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_captioned_kinds(
    kind: str, chunk: int, rendered: Path, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """Batches and chunks cross from one file to the next; the best and worst are read again from where they are."""
    path = write_kind(kind, tmp_path / "data", encoded(rendered))
    columns = run(path, tmp_path / "out", chunk=chunk, best=1 if chunk == 3 else 0)
    assert list(zip(columns["file"], columns["member"], strict=True)) == PLACES[kind]
    assert columns["text"] == [sample.text for sample in read_imagefolder(rendered)]
    assert columns["shapes"] == pytest.approx(expected["shapes"], abs=1e-7)
    assert columns["brightness"] == pytest.approx(expected["brightness"], abs=1e-7)
    assert rejected(tmp_path / "out") == {}


def test_a_folder_of_images(rendered: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    """Without captions: scorers that read none, or one prompt for all."""
    path = write_kind("folder", tmp_path / "data", encoded(rendered))
    columns = run(path, tmp_path / "out", "brightness")
    names = {f"{'deep/er/' if i % 2 else ''}{i}.{'WEBP' if i % 2 else 'PNG'}": i for i in range(COUNT)}
    assert columns["file"] == sorted(names)
    assert set(columns["text"]) == {""}
    assert columns["brightness"] == pytest.approx([expected["brightness"][names[n]] for n in columns["file"]])
    prompt = "a red circle on a white background"
    columns = run(path, tmp_path / "prompted", "shapes", prompt=prompt)
    assert set(columns["text"]) == {prompt}
    images = [from_pil(Image.open(path / name)) for name in columns["file"]]
    assert columns["shapes"] == rewards.load("shapes")(torch.stack(images), [prompt] * COUNT).tolist()


def test_captions_are_not_needed_where_nobody_reads_them(rendered: Path, tmp_path: Path) -> None:
    table = pyarrow.table(
        {"image": [content for _, content, _ in encoded(rendered)], "n": list(range(COUNT))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    columns = run(tmp_path / "a.parquet", tmp_path / "out", "brightness", image_column="image")
    assert columns["text"] == [""] * COUNT
    lines = [
        {"file_name": sample.path.relative_to(rendered).as_posix()} for sample in read_imagefolder(rendered)
    ]
    data = Path(shutil.copytree(rendered, tmp_path / "data"))
    write_jsonl(data / "metadata.jsonl", lines)
    assert run(data, tmp_path / "folder", "brightness")["brightness"] == columns["brightness"]


@pytest.mark.parametrize("kind", [*PLACES, "imagefolder", "broken table"])
def test_a_listing_goes_on_from_any_place(kind: str, rendered: Path, tmp_path: Path) -> None:
    """What is listed from an entry on is the end of the whole list, and each image can be read again by its name."""
    path = (
        rendered
        if kind == "imagefolder"
        else write_kind(
            "tables of bytes" if kind == "broken table" else kind, tmp_path / "data", encoded(rendered)
        )
    )
    if kind == "broken table":
        path = path / "a.parquet"
        write_table(path, as_struct(encoded(rendered)), STRUCT, group=3)
        break_row_group(path, 1)
    found = readers.find_data_set(path, prompted=True, prompt="", image_column=None, text_column=None)
    whole = list(readers.entries(found))
    assert len(whole) == (5 if kind == "broken table" else COUNT)
    for index, (source, number, entry) in enumerate(whole):
        assert list(readers.entries(found, source, number)) == whole[index:]
        assert list(readers.entries(found, source, number + 1)) == whole[index + 1 :]
        if isinstance(entry, ImageEntry):
            pixels = np.asarray(decode(readers.read_bytes(found, replace(entry, content=None))))
            original = next(sample for sample in read_imagefolder(rendered) if sample.text == entry.text)
            assert np.array_equal(pixels, np.asarray(Image.open(original.path)))


def break_row_group(path: Path, group: int) -> None:
    """Overwrite a row group's images."""
    column = pyarrow.parquet.read_metadata(path).row_group(group).column(0)
    start, length = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + b"\xee" * length + whole[start + length :])


# ---------------------------------------------------------------- what is wrong with data


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def bad_images(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Name -> (file, reason)."""
    return {
        "empty.png": (b"", "no bytes"),
        "cut.png": (good[: len(good) // 2], "undecodable"),
        "text.png": (b"<html>not found</html>", "undecodable"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        "pixels.png": (png(8193, 8192, "1"), "too large"),
        "header.png": (huge_header(), "too large"),
        "thin.png": (png(1, 101), "too large"),
    }


def test_a_decoded_image_is_read_to_its_end(rendered: Path) -> None:
    good = encoded(rendered)[0][1]
    assert decode(good).size == (64, 64)
    for name, (content, reason) in bad_images(good).items():
        with pytest.raises(UnusableError) as refusal:
            decode(content)
        assert refusal.value.reason == reason, name


def huge_header() -> bytes:
    """A PNG of a few bytes that claims 4 billion pixels."""
    content = png(8, 8)
    ihdr = b"IHDR" + struct.pack(">II", 65535, 65535) + content[24:29]
    return content[:12] + ihdr + struct.pack(">I", zipfile.crc32(ihdr)) + content[33:]  # type: ignore[attr-defined]


def test_bad_images_of_an_archive(rendered: Path, tmp_path: Path) -> None:
    good = encoded(rendered)[0][1]
    bad = bad_images(good)
    caption = "a red circle on a white background"
    odd = {
        "../escape.png": "unsafe name",
        "/absolute.png": "unsafe name",
        "back\\slash.png": "unsafe name",
        "twice.png": "unsafe name",
        "readme.txt": "undecodable",
        "unlisted.png": "bad metadata",
        "number.png": "bad metadata",
        "list.png": "bad metadata",
        "half.png": "bad metadata",
        "blank.png": "no prompt",
        "none.png": "no prompt",
        "crc.png": "undecodable",
        "locked.png": "undecodable",
        "lying.png": "undecodable",
        "method.png": "undecodable",
    }
    notes: dict[str, object] = {
        name: {"p": caption} for name in [*bad, *odd, "fine.png", "zeros.png", "lost.png"]
    }
    notes |= {
        "number.png": {"p": 7},
        "list.png": [caption],
        "half.png": {"p": "a \ud800"},
        "blank.png": {"p": " \n"},
        "none.png": {"p": None},
    }
    del notes["unlisted.png"]
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (content, _) in bad.items():
            archive.writestr(name, content)
        for name in odd:
            archive.writestr(name, good, zipfile.ZIP_BZIP2 if name == "method.png" else None)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("twice.png", good)
        archive.writestr("zeros.png", bytes(2 << 20))
        archive.writestr("folder/", b"")
        archive.writestr("fine.png", good)
        archive.writestr("part-000001.json", json.dumps(notes))
        archive.getinfo("locked.png").flag_bits |= 1
        archive.getinfo("lying.png").file_size = 50
        archive.getinfo("crc.png").CRC ^= 1
    columns = run(tmp_path / "part-000001.zip", tmp_path / "out")
    assert columns["member"] == ["fine.png"]
    wanted = (
        {name: reason for name, (_, reason) in bad.items()}
        | odd
        | {"zeros.png": "too large", "lost.png": "missing"}
    )
    assert {member: reason for (_, member), reason in rejected(tmp_path / "out").items()} == wanted
    rows = [row["member"] for row in read_jsonl(tmp_path / "out" / "rejected.jsonl")]
    assert Counter(rows)["twice.png"] == 2


def test_a_member_is_unpacked_no_further_than_it_announces(tmp_path: Path) -> None:
    """40 MiB in 40 KB that call themselves 99 bytes."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(40 << 20))
        archive.writestr("bomb.json", '{"a.png": {"p": "zeros"}}')
        archive.getinfo("a.png").file_size = 99
    tracemalloc.start()
    with pytest.raises(SystemExit):
        run(tmp_path / "bomb.zip", tmp_path / "out", "brightness")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert rejected(tmp_path / "out") == {("bomb.zip", "a.png"): "undecodable"}


def test_broken_archives(rendered: Path, tmp_path: Path) -> None:
    images = encoded(rendered)
    (tmp_path / "data").mkdir()
    parts = [tmp_path / "data" / f"part-00000{number}.zip" for number in range(7)]
    write_part(parts[0], images[:2])
    whole = parts[0].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2])
    parts[2].write_bytes(b"")
    write_part(parts[3], images[:2], notes=["no", "object"])
    with zipfile.ZipFile(parts[4], "w") as archive:
        archive.writestr("a.png", images[0][1])
    with zipfile.ZipFile(parts[5], "w") as archive:
        archive.writestr("a.json", b"\xff{")
    write_part(parts[6], images[2:4])
    columns = run(tmp_path / "data", tmp_path / "out")
    assert columns["member"] == [name for name, _, _ in images[:4]]
    reasons = {1: "broken file", 2: "broken file", 3: "bad metadata", 4: "bad metadata", 5: "bad metadata"}
    assert rejected(tmp_path / "out") == {(parts[i].name, ""): reason for i, reason in reasons.items()}


def test_bad_lines_of_an_imagefolder(data: Path, tmp_path: Path) -> None:
    sample = read_imagefolder(data)[0]
    for name, (content, _) in bad_images(sample.path.read_bytes()).items():
        (data / name).write_bytes(content)
    (tmp_path / "secret.png").write_bytes(sample.path.read_bytes())
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    text = sample.text
    good = {"file_name": "000/000000.png", "text": text}
    odd: list[tuple[object, tuple[str, str], str]] = [
        ("{", ("metadata.jsonl", "line 2"), "bad metadata"),
        (["000/000000.png"], ("metadata.jsonl", "line 3"), "bad metadata"),
        ({"file_name": 3, "text": text}, ("metadata.jsonl", "line 4"), "bad metadata"),
        ({"file_name": "../secret.png", "text": text}, ("../secret.png", ""), "unsafe name"),
        ({"file_name": "link.png", "text": text}, ("link.png", ""), "unsafe name"),
        ({"file_name": "gone.png", "text": text}, ("gone.png", ""), "missing"),
        ({"file_name": "g" * 300, "text": text}, ("g" * 300, ""), "missing"),
        ({"file_name": "\ud800.png", "text": text}, ("\\ud800.png", ""), "unsafe name"),
        ({"file_name": "000", "text": text}, ("000", ""), "missing"),
        ({"file_name": "000/000001.png"}, ("000/000001.png", ""), "bad metadata"),
        ({"file_name": "000/000002.png", "text": None}, ("000/000002.png", ""), "no prompt"),
        ({"file_name": "000/000003.png", "text": ""}, ("000/000003.png", ""), "no prompt"),
        ({"file_name": "000/000004.png", "text": "a cat"}, ("000/000004.png", ""), "refused"),
        ({"file_name": "000/000005.png", "text": "a" * 20_001}, ("000/000005.png", ""), "bad metadata"),
    ]
    odd += [
        ({"file_name": name, "text": text}, (name, ""), reason)
        for name, (_, reason) in bad_images(b"" * 9 + sample.path.read_bytes()).items()
    ]
    lines = [
        row if isinstance(row, str) else json.dumps(row) for row in [good, *(row for row, _, _ in odd), good]
    ]
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    columns = run(data, tmp_path / "out")
    assert columns["file"] == ["000/000000.png"] * 2
    assert rejected(tmp_path / "out") == {place: reason for _, place, reason in odd}


def test_bad_rows_of_a_table(rendered: Path, tmp_path: Path) -> None:
    images = encoded(rendered)
    bad = bad_images(images[0][1])
    caption = images[0][2]
    rows = as_struct(images[:1])
    odd: list[tuple[object, object, str]] = [
        (None, caption, "missing"),
        ({"bytes": None, "path": "/etc/passwd"}, caption, "missing"),
        ({"bytes": images[0][1], "path": None}, None, "no prompt"),
        *(({"bytes": content, "path": name}, caption, reason) for name, (content, reason) in bad.items()),
    ]
    rows += [(image, text) for image, text, _ in odd] + as_struct(images[1:2])
    write_table(tmp_path / "a.parquet", rows, STRUCT, group=4)
    columns = run(tmp_path / "a.parquet", tmp_path / "out")
    assert columns["member"] == ["0", str(len(rows) - 1)]
    reasons = {str(number): reason for number, (_, _, reason) in enumerate(odd, 1)}
    assert {member: reason for (_, member), reason in rejected(tmp_path / "out").items()} == reasons


def test_a_caption_that_is_no_utf8(rendered: Path, tmp_path: Path) -> None:
    """Parquet readers believe what a file says of its strings."""
    images = encoded(rendered)[:3]
    texts = pyarrow.array([b"\xff\xfe", *(text.encode() for _, _, text in images[1:])], pyarrow.binary())
    column = texts.view(pyarrow.string())
    table = pyarrow.table({"image": [content for _, content, _ in images], "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out")["member"] == ["1", "2"]
    assert rejected(tmp_path / "out") == {("a.parquet", "0"): "bad metadata"}


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_broken_tables(chunk: int, rendered: Path, tmp_path: Path) -> None:
    """A table that is none, one cut off, one that lacks a column, and one with a broken row group in its middle."""
    images = encoded(rendered)
    folder = tmp_path / "data"
    folder.mkdir()
    write_table(folder / "a.parquet", as_struct(images[:6]), STRUCT)
    whole = (folder / "a.parquet").read_bytes()
    break_row_group(folder / "a.parquet", 1)
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "c.parquet").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"image": [images[0][1]]}), folder / "d.parquet")
    write_table(folder / "e.parquet", as_struct(images[6:]), STRUCT)
    columns = run(folder, tmp_path / "out", chunk=chunk)
    places = [
        ("a.parquet", "0"),
        ("a.parquet", "1"),
        ("a.parquet", "4"),
        ("a.parquet", "5"),
        ("e.parquet", "0"),
    ]
    assert list(zip(columns["file"], columns["member"], strict=True)) == places
    broken = [("a.parquet", "2 to 3"), ("b.parquet", ""), ("c.parquet", ""), ("d.parquet", "")]
    assert rejected(tmp_path / "out") == dict.fromkeys(broken, "broken file")


def test_nothing_to_score_is_an_error_that_gives_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    for _ in range(2):  # also where the job is complete
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "a.zip", tmp_path / "out", best=3)
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert "0 scored, 1 set aside: 1 broken file" in said.out
        assert said.err.splitlines()[-1].endswith(f"all are listed in {tmp_path / 'out' / 'rejected.jsonl'}")
        assert "no image of" in said.err.splitlines()[-1]
    assert rejected(tmp_path / "out") == {("a.zip", ""): "broken file"}


def test_a_score_that_is_no_number_stops_the_job(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names scorer and image; what was finished before is kept, and nothing is called complete."""
    original = score_files.score_all

    def wrong(scorers: Any, pixels: torch.Tensor, prompts: list[str]) -> list[torch.Tensor]:
        columns = original(scorers, pixels, prompts)
        return [column.where(torch.tensor("cross" not in prompts[0]), math.nan) for column in columns]

    monkeypatch.setattr(score_files, "score_all", wrong)
    first = next(i for i, sample in enumerate(read_imagefolder(rendered)) if "cross" in sample.text)
    with pytest.raises(SystemExit) as stop:
        run(rendered, tmp_path / "out", chunk=1)
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: shapes gave nan for 000/00000{first}\.png  with the prompt '.*cross", said)
    assert len(list((tmp_path / "out" / "chunks").iterdir())) == first
    assert not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.undo()
    assert len(run(rendered, tmp_path / "out", chunk=1)["shapes"]) == COUNT


# ---------------------------------------------------------------- killed


def mixed_archives(rendered: Path, folder: Path) -> Path:
    """Two archives and a broken one, with a bad image among the good ones."""
    folder.mkdir()
    images = encoded(rendered)
    write_part(folder / "part-000001.zip", [*images[:3], ("bad.png", b"bad", "a bad one")])
    (folder / "part-000002.zip").write_bytes(b"broken")
    write_part(folder / "part-000003.zip", images[3:])
    return folder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(settings: score.Config, writes: int) -> None:
    """Run, and be killed just before file number `writes` gets its name, or at the very end."""
    original, remaining = Path.replace, iter(range(writes))

    def rename(self: Path, target: Path) -> Path:
        if next(remaining, None) is None:
            die()
        return original(self, target)

    Path.replace = rename  # type: ignore[assignment, method-assign]
    shutil.rmtree = lambda *_, **__: die()  # type: ignore[assignment]
    score.main(settings)


def test_killed_at_any_write_and_resumed(rendered: Path, tmp_path: Path) -> None:
    """Before each file that is written and before the last cleaning; the folder ends as if nothing had happened."""
    data = mixed_archives(rendered, tmp_path / "data")
    score.main(config(data, tmp_path / "straight", chunk=2, best=1))
    straight = contents(tmp_path / "straight")
    written = 1 + 5 + 4  # the job, 9 entries in chunks of 2, the table and its company
    for writes in range(written + 1):
        output = tmp_path / f"killed{writes}"
        settings = config(data, output, chunk=2, best=1)
        assert children.end(children.begin(run_and_die, settings, writes)) == -signal.SIGKILL
        assert len(list(output.glob("chunks/0*"))) == min(max(writes - 1, 0), 5)
        score.main(replace(settings, workers=writes % 2))
        assert contents(output) == straight, writes


def test_killed_again_and_again(rendered: Path, tmp_path: Path) -> None:
    """One folder, killed whenever it has written two files more; what is done is not read again."""
    data = mixed_archives(rendered, tmp_path / "data")
    score.main(config(data, tmp_path / "straight", chunk=1, best=1))
    settings = config(data, tmp_path / "killed", chunk=1, best=1)
    for kills in range(1, 5):
        assert children.end(children.begin(run_and_die, settings, 2)) == -signal.SIGKILL
        assert score_folder.progress(settings.output_dir)[0] == 2 * kills - 1  # the first file is the job
    number, place = score_folder.progress(settings.output_dir)
    found = readers.find_data_set(data, prompted=True, prompt="", image_column=None, text_column=None)
    assert len(list(readers.entries(found, *place))) == 9 - number
    score.main(settings)
    assert contents(settings.output_dir) == contents(tmp_path / "straight")


def command(settings: score.Config) -> list[str]:
    return [
        sys.executable, str(ROOT / "data_build" / "score.py"), "--data", str(settings.data), "--output-dir", str(settings.output_dir),
        "--rewards", *settings.rewards, "--batch-size", "2", "--chunk", "1", "--workers", "1", "--best", "1",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_resumes(rendered: Path, tmp_path: Path) -> None:
    """The program itself, with a worker process and a learned scorer."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = config(rendered, tmp_path / "killed", "imagereward-tiny", "brightness", chunk=1, best=1)
    with subprocess.Popen(command(settings), env=environment, stderr=subprocess.DEVNULL) as process:
        for _ in waiting():
            if (settings.output_dir / "chunks" / "000001.jsonl").exists():
                break
            assert process.poll() is None, "ended before it was killed"
        process.kill()
    assert not (settings.output_dir / "summary.json").exists()
    done = subprocess.run(command(settings), env=environment, capture_output=True, text=True, check=True)
    assert f"{COUNT} scored, 0 set aside" in done.stdout
    torch.set_num_threads(1)
    score.main(replace(settings, output_dir=tmp_path / "straight"))
    assert contents(settings.output_dir) == contents(tmp_path / "straight")


def waiting() -> Iterator[None]:
    """Turns of a loop that gives up after a while."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        yield
        time.sleep(0.005)
    raise TimeoutError


def test_a_complete_job_is_not_done_again(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(rendered, tmp_path / "out")
    before, table = contents(tmp_path / "out"), capsys.readouterr().out
    monkeypatch.setattr(score, "load_all", lambda *_, **__: pytest.fail("a scorer was loaded"))
    score.main(config(rendered, tmp_path / "out"))
    assert capsys.readouterr().out == table
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": ("brightness",)}, "with rewards ['shapes', 'brightness'], not ['brightness']"),
        ({"rewards": ("brightness", "shapes")}, "with rewards"),
        ({"precision": "bf16"}, "with precision fp32, not bf16"),
        ({"chunk": 2}, "with chunk 3, not 2; go on with --chunk 3, choose another"),
        ({"precision": "bf16"}, "with precision fp32, not bf16; go on with --precision fp32, choose another"),
        ({"data": "other"}, "with data "),
        ({"data": "renamed"}, "with data "),
    ],
)
def test_another_job_in_the_same_folder_is_refused(
    changes: dict[str, Any], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path / "out")
    if "data" in changes:
        rows = read_jsonl(data / "metadata.jsonl")
        rows[-1] |= {"text": "a cat"} if changes["data"] == "other" else {"file_name": rows[0]["file_name"]}
        write_jsonl(data / "metadata.jsonl", rows)
        changes = {}
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path / "out", **changes)
    assert stop.value.code == 2
    assert f"was begun {words}" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_job_that_scored_nothing_gives_way(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that turn out to be wrong are named with other ones the next time."""

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("the weights are damaged")

    monkeypatch.setattr(score, "load_all", fail)
    with pytest.raises(SystemExit):
        run(rendered, tmp_path / "out", "brightness")
    assert list(contents(tmp_path / "out")) == ["job.json"]
    monkeypatch.undo()
    assert len(run(rendered, tmp_path / "out", "shapes")["shapes"]) == COUNT


def test_other_weights_are_another_job(
    rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(ROOT / "assets/tiny/imagereward", tmp_path / "weights"))
    term = (f"imagereward-tiny={copy}",)
    run(rendered, tmp_path / "out", "imagereward-tiny")
    run(
        rendered, tmp_path / "out", "imagereward-tiny", reward_files=term
    )  # the same ones elsewhere are the same
    config_file = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config_file | {"mean": 1.0}))
    with pytest.raises(SystemExit):
        run(rendered, tmp_path / "out", "imagereward-tiny", reward_files=term)
    assert "was begun with weights" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["a byte", "a part more"])
def test_other_archives_are_another_job(change: str, rendered: Path, tmp_path: Path) -> None:
    data = mixed_archives(rendered, tmp_path / "data")
    run(data, tmp_path / "out")
    if change == "a byte":
        images = encoded(rendered)[3:]
        write_part(data / "part-000003.zip", [(n, c[:-1] + b"\0", t) for n, c, t in images])
    else:
        write_part(data / "part-000009.zip", encoded(rendered))
    with pytest.raises(SystemExit):
        run(data, tmp_path / "out")


BAD = [
    (["--rewards", "shape"], "unknown scorer 'shape' (did you mean shapes?); one of brightness, shapes"),
    (["--rewards", "shapes", "shapes"], "repeats shapes; name each scorer once"),
    (["--rewards", "clipscore"], "the weights of clipscore are not here; run `hf download"),
    (["--reward-files", "clipscore=x"], "names clipscore, which --rewards does not use"),
    (["--data", "TMP/gone"], "there is no data at "),
    (["--data", "TMP/empty"], "is no data set: it has no metadata.jsonl, .zip, .parquet or .tar, and no images"),
    (["--data", "TMP/a.txt"], "is a file; data is a folder, a .zip of DiffusionDB, a .parquet table or"),
    (["--data", "TMP/both"], "holds both .zip and .parquet files"),
    (["--data", "TMP/bare"], "holds images without captions (no metadata.jsonl), and a scorer reads the prompt"),
    (["--data", "TMP/bare", "--prompt", " "], "give --prompt, or scorers that read none"),
    (["--prompt", "a cat"], "--prompt is for images without captions"),
    (["--data", "TMP/none"], "holds no images"),
    (["--data", "TMP/photo", "--prompt", "a dog"], "photo/0.png and others have the caption 'a dog'; leave it out"),
    (["--data", "TMP/photo", "--prompt", "a red circle on a white background"], "and others have 96 x 70 pixels"),
    (["--data", "TMP/latin"], "is not UTF-8 text"),
    (["--data", "TMP/t.parquet", "--caption-column", "text"], "no column text; name one of image, caption with --caption-column"),
    (["--data", "TMP/t.parquet", "--image-column", "img"], "name one of image, caption with --image-column"),
    (["--data", "TMP/t.parquet", "--image-column", "caption", "--text-column", "caption"], "holds string, not images"),
    (["--output-dir", "TMP/bare"], "exists and holds no scores; choose another --output-dir"),
    (["--output-dir", "TMP/a.txt"], "exists and holds no scores"),
    (["--output-dir", "DATA/scores"], "lies in the data set; choose a folder beside it"),
    (["--data", "TMP/bare", "--prompt", "x", "--add-to-metadata"], "--add-to-metadata needs a metadata.jsonl"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--workers", "-1"], "--workers must be at least 0, got -1"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU; use fp32 or bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_one_sentence_before_anything_loads(
    flags: list[str], words: str, rendered: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write_wrong_data(rendered, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(score, "load_all", lambda *_, **__: pytest.fail("a scorer was loaded"))
    base = {"--data": [str(rendered)], "--output-dir": [str(tmp_path / "out")], "--rewards": ["shapes"]}
    given = [flag.replace("TMP", str(tmp_path)).replace("DATA", str(rendered)) for flag in flags]
    unsaid = [word for flag, values in base.items() if flag not in flags for word in (flag, *values)]
    with pytest.raises(SystemExit) as stop:
        score.main(parse(score.Config, [*unsaid, *given]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def write_wrong_data(rendered: Path, folder: Path) -> None:
    for name in ("empty", "both", "none", "latin", "bare"):
        (folder / name).mkdir()
    (folder / "a.txt").touch()
    for name in ("a.zip", "b.parquet"):
        (folder / "both" / name).touch()
    shutil.copy(read_imagefolder(rendered)[0].path, folder / "bare" / "a.png")
    (folder / "none" / "metadata.jsonl").touch()
    (folder / "latin" / "metadata.jsonl").write_bytes(b"\xff")
    table = pyarrow.table({"image": [b"x"], "caption": ["x"]})
    pyarrow.parquet.write_table(table, folder / "t.parquet")
    (folder / "photo").mkdir()
    for number in range(2):
        Image.new("RGB", (96, 70), (number, 90, 20)).save(folder / "photo" / f"{number}.png")
