"""DiffusionDB to a filtered data set: against a slow reference, everything that can be wrong, filters, and being killed."""

import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageFilter

import children
import rewards
from data_build import diffusiondb, filters, selected_folder
from data_build.decode import made_of
from data_build.filters import Filters
from data_build.selection import Selection
from preftune import score_files
from preftune.cli import parse
from preftune.records import read_imagefolder, read_jsonl
from rewards import CARDS
from rewards.pixels import from_pil
from rewards.shapes_rendering import change_one_word, place, random_defects, random_scene, render, to_bytes

SCALE = 8.0
"""The judge's scores lie in [0, 1]: without it no image would stand out."""

Note = dict[str, Any]
Member = tuple[str, bytes, Note | None]


def encode(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    image.save(
        buffer, "WEBP" if suffix == "webp" else "PNG", **({"lossless": True} if suffix == "webp" else {})
    )
    return buffer.getvalue()


def members(part: int, prompts: range, each: int, suffix: str = "png") -> list[Member]:
    """`each` images of each prompt, some unlike it and some with defects, as a part holds them."""
    listed = []
    for number in prompts:
        scene = random_scene(np.random.default_rng((1, number)))
        for turn in range(each):
            rng = np.random.default_rng((2, part, number, turn))
            other = change_one_word(scene, rng) if turn % 3 == 2 else scene
            rendered = render(place(other, rng), other.background, rng, random_defects(rng, 0.5))
            name = hashlib.md5(repr((part, number, turn)).encode()).hexdigest() + f".{suffix}"
            note = {
                "p": scene.caption(),
                "se": rng.integers(1 << 31).item(),
                "c": 7.0,
                "st": 50,
                "sa": "k_lms",
            }
            listed.append((name, encode(Image.fromarray(to_bytes(rendered)), suffix), note))
    random.Random(part).shuffle(listed)
    return listed


def write_part(path: Path, images: list[Member], notes: object = None) -> None:
    """A part as published, or with another JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, _ in images:
            archive.writestr(name, content)
        about = {name: note for name, _, note in images if note is not None}
        archive.writestr(f"{path.stem}.json", json.dumps(about if notes is None else notes))


def write_parts(folder: Path) -> dict[tuple[str, str], str]:
    """Sound parts whose prompts overlap, and all that can be wrong between them; gives (file, member) -> reason."""
    wrong: dict[tuple[str, str], str] = {}
    write_part(folder / "part-000001.zip", members(1, range(0, 5), 4))
    write_part(folder / "part-000002.zip", members(2, range(3, 8), 3, "webp"))
    whole = (folder / "part-000001.zip").read_bytes()
    (folder / "part-000003.zip").write_bytes(whole[: len(whole) // 2])
    (folder / "part-000004.zip").touch()
    write_part(folder / "part-000005.zip", members(5, range(0, 1), 1), notes=["no", "object"])
    wrong |= {("part-000003.zip", ""): "broken file", ("part-000004.zip", ""): "broken file"}
    wrong[("part-000005.zip", "")] = "bad metadata"

    good = members(6, range(2, 6), 3)
    content, note = good[0][1:]
    assert note is not None
    bad: list[tuple[Member, str]] = [
        (("empty.png", b"", note), "no bytes"),
        (("cut.png", content[: len(content) // 2], note), "undecodable"),
        (("text.png", b"<html>", note), "undecodable"),
        (("../escape.png", content, note), "unsafe name"),
        (("/absolute.png", content, note), "unsafe name"),
        (("back\\slash.png", content, note), "unsafe name"),
        (("unlisted.png", content, None), "bad metadata"),
        (("number.png", content, note | {"p": 3}), "bad metadata"),
        (("blank.png", content, note | {"p": " "}), "no prompt"),
        (("other.png", content, note | {"p": "a photograph of a cat"}), "refused"),
        (("bomb.png", encode(Image.new("1", (9000, 9000)), "png"), note), "too large"),
    ]
    mixed = [*good[:5], *(member for member, _ in bad), *good[5:]]
    lost = {"lost.png": note}
    notes = {name: note for name, _, note in mixed if note is not None} | lost
    write_part(folder / "part-000006.zip", mixed, notes)
    wrong |= {("part-000006.zip", name): reason for (name, *_), reason in bad}
    wrong[("part-000006.zip", "lost.png")] = "missing"
    write_part(folder / "part-000007.zip", members(7, range(5, 9), 3))
    return wrong


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str]]:
    folder = tmp_path_factory.mktemp("parts") / "images"
    return folder, write_parts(folder)


def config(data: Path, output: Path, **changes: Any) -> diffusiondb.Config:
    """Settings of a small run; those of selection and filters may be given with all others."""
    chosen: dict[str, Any] = {"scale": SCALE}
    wanted: dict[str, Any] = {}
    others: dict[str, Any] = {"rewards": "shapes", "batch_size": 5, "workers": 0, "shown": 2}
    for name, value in changes.items():
        for group, fields in ((chosen, Selection), (wanted, Filters)):
            if name in fields.__dataclass_fields__:
                group[name] = value
                break
        else:
            others[name] = value
    return diffusiondb.Config(
        data=(str(data),),
        output_dir=output,
        selection=Selection(**chosen),
        filters=Filters(**wanted),
        **others,
    )


def run(data: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    diffusiondb.main(config(data, output, **changes))
    assert not output.with_name(f"{output.name}.building").exists()
    return read_jsonl(output / "metadata.jsonl")


def summary_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "summary.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ---------------------------------------------------------------- the result


def reference(
    folder: Path, wrong: dict[tuple[str, str], str], scale: float, name: str
) -> list[dict[str, Any]]:
    """What the data set must be, image by image, with none of the code under test."""
    score = rewards.load(name)
    groups: dict[str, list[dict[str, Any]]] = {}
    order = 0
    for path in sorted(folder.glob("*.zip")):
        if (path.name, "") in wrong:
            continue
        archive = zipfile.ZipFile(path)
        notes = json.loads(archive.read(f"{path.stem}.json"))
        for member in archive.namelist():
            if member.endswith(".json") or (path.name, member) in wrong:
                continue
            content = archive.read(member)
            pixels = from_pil(Image.open(io.BytesIO(content)), score.card.preprocess)[None]
            text = notes[member]["p"]
            value = score(pixels, [text]).item()
            row = {"text": text, "score": value, "source": path.name, "member": member}
            groups.setdefault(text, []).append(row | {"content": content, "order": order})
            order += 1
    taken = []
    for rows in groups.values():
        n = len(rows)
        for kind, sign in (("preferred", 1), ("non_preferred", -1)):
            powers = [math.exp(sign * scale * row["score"]) for row in rows]
            p = max(powers) / sum(powers)
            if n >= 4 and p > 2 / n:
                taken.append(
                    rows[powers.index(max(powers))] | {"kind": kind, "confidence": p, "group_size": n}
                )
    return sorted(taken, key=lambda row: int(row["order"]))


@pytest.mark.parametrize(("name", "scale"), [("shapes", SCALE), ("imagereward-tiny", 2.0)])
def test_the_data_set_is_that_of_a_slow_reference(
    name: str, scale: float, parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, wrong = parts
    if name != "shapes":  # it judges any caption
        wrong = {place: reason for place, reason in wrong.items() if reason != "refused"}
    rows = run(folder, tmp_path / "out", rewards=name, scale=scale)
    expected = reference(folder, wrong, scale, name)
    kinds = Counter(row["kind"] for row in expected)
    assert min(kinds["preferred"], kinds["non_preferred"]) >= 2
    for number, (row, other) in enumerate(zip(rows, expected, strict=True)):
        assert list(row) == [
            "file_name", "text", "kind", "score", "confidence", "group_size", "source", "member",
        ]  # fmt: skip
        for key in ("text", "kind", "group_size", "source", "member"):
            assert row[key] == other[key]
        assert row["score"] == pytest.approx(other["score"], abs=2e-6)
        assert row["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
        assert row["file_name"] == f"000/{number:06d}{Path(other['member']).suffix}"
        assert (tmp_path / "out" / row["file_name"]).read_bytes() == other["content"]
    assert len(read_imagefolder(tmp_path / "out")) == len(expected)

    found = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert {(row["file"], row["member"]): row["reason"] for row in found} == wrong
    assert len(found) == len(wrong)
    summary = summary_of(tmp_path / "out")
    assert summary["rejected"] == Counter(wrong.values())
    assert summary["filtered"] == {}
    assert summary["scored"] == 20 + 15 + 12 + 12 + (name != "shapes")
    assert {kind: row["count"] for kind, row in summary["selected"].items()} == kinds
    printed = capsys.readouterr().out
    assert f"preferred: {kinds['preferred']}, mean" in printed
    assert f"set aside: {len(wrong)} (" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000", "__report__", "job.json", "metadata.jsonl", "rejected.jsonl", "summary.json",
    ]  # fmt: skip


def test_workers_lists_and_patterns_change_nothing(
    parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path
) -> None:
    folder, _ = parts
    run(folder, tmp_path / "plain")
    run(folder, tmp_path / "workers", workers=2)
    pattern = replace(config(folder, tmp_path / "pattern"), data=(f"{folder}/part-00000[1-4].zip",))
    files = sorted(str(path) for path in folder.glob("*.zip"))
    pattern = replace(pattern, data=(*pattern.data, *reversed(files[4:])))
    diffusiondb.main(pattern)
    assert contents(tmp_path / "plain") == contents(tmp_path / "workers") == contents(tmp_path / "pattern")


def test_parts_of_two_folders(tmp_path: Path) -> None:
    """As the Large set has them; a prompt's images may lie in both."""
    for number in (1, 2):
        write_part(tmp_path / f"large-{number}" / f"part-00000{number}.zip", members(number, range(3), 3))
    large = replace(
        config(tmp_path, tmp_path / "out", rule="top-k"),
        data=(str(tmp_path / "large-2"), str(tmp_path / "large-1")),
    )
    diffusiondb.main(large)
    rows = read_jsonl(tmp_path / "out" / "metadata.jsonl")
    assert {row["group_size"] for row in rows} == {6}
    assert {row["source"] for row in rows} == {"large-1/part-000001.zip", "large-2/part-000002.zip"}


def test_other_rules_and_scorers(parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path) -> None:
    folder, _ = parts
    rows = run(folder, tmp_path / "top", rule="top-k", k=2)
    counts = Counter((row["text"], row["kind"]) for row in rows)
    assert set(counts.values()) == {2}
    rows = run(folder, tmp_path / "threshold", rule="threshold", high=0.8, low=0.2, min_group=1)
    assert rows
    assert all((row["score"] >= 0.8) == (row["kind"] == "preferred") for row in rows)
    assert all(row["score"] <= 0.2 or row["score"] >= 0.8 for row in rows)
    assert summary_of(tmp_path / "threshold")["rule"] == {
        "name": "threshold", "min_group": 1, "scale": SCALE, "high": 0.8, "low": 0.2,
    }  # fmt: skip


def test_cosines_are_multiplied_by_a_hundred(tmp_path: Path) -> None:
    cosines = {name for name, card in CARDS.items() if card.prompted and card.clip and not card.clip.scaled}
    assert {*diffusiondb.COSINES} == cosines | {"blipscore"}
    for name in CARDS:
        scale = config(tmp_path, tmp_path, rewards=name, scale=None).scale
        assert scale == (100 if name in diffusiondb.COSINES else 1)
    assert config(tmp_path, tmp_path, rewards="hpsv1", scale=3.0).scale == 3


def test_the_report_shows_what_was_selected(tmp_path: Path) -> None:
    """Self-contained, prompts escaped, pairs side by side; a prompt with one kind has a blank."""
    images = members(1, range(1), 6)
    hostile = '<script>alert("x")</script> & a cat'
    images = [(name, content, {**(note or {}), "p": hostile}) for name, content, note in images]
    write_part(tmp_path / "data" / "part-000001.zip", images)
    run(tmp_path / "data", tmp_path / "out", rewards="brightness", rule="top-k")
    page = (tmp_path / "out" / "__report__" / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; a cat" in page
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 3
    assert "http" not in page.replace("http-equiv", "")
    grid = Image.open(tmp_path / "out" / "__report__" / "best_worst.png")
    assert grid.width > 3 * selected_folder.CELL
    assert Image.open(tmp_path / "out" / "__report__" / "scores.png").width > 500
    assert sorted(path.name for path in (tmp_path / "out" / "__report__").iterdir()) == [
        "best_worst.png", "index.html", "scores.png",
    ]  # fmt: skip
    run(tmp_path / "data", tmp_path / "one", rewards="brightness", rule="threshold", low=2.0)
    assert "none taken" in (tmp_path / "one" / "__report__" / "index.html").read_text()


def test_nothing_to_score_is_a_failure_and_nothing_to_select_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part-000001.zip").write_bytes(b"no archive")
    write_part(tmp_path / "part-000002.zip", [])
    for name, aside in (("part-000001.zip", 1), ("part-000002.zip", 0)):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / name, tmp_path / f"{name} out")
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert "preferred: 0\n" in said.out
        assert f"no image was scored, {aside} set aside, 0 filtered" in said.err
    write_part(tmp_path / "part-000003.zip", members(3, range(3), 2))
    assert run(tmp_path / "part-000003.zip", tmp_path / "small") == []
    assert summary_of(tmp_path / "small")["scored"] == 6


# ---------------------------------------------------------------- filters


def test_each_filter(tmp_path: Path) -> None:
    """What each one takes away, by name; scored by brightness, which judges any size and caption."""
    images = members(1, range(1), 8)
    image = Image.open(io.BytesIO(images[0][1]))
    note = images[0][2] or {}
    blurred = encode(image.filter(ImageFilter.GaussianBlur(40)), "png")
    wide = encode(image.resize((96, 64)), "png")
    odd = [
        ("blurred.png", blurred, note | {"se": 1}),
        ("wide.png", wide, note | {"se": 2}),
        ("ddim.png", images[1][1], note | {"se": 3, "sa": "ddim"}),
        ("unsaid.png", images[1][1], {"p": note["p"], "se": 4}),
        ("again.png", images[1][1], dict(note)),
        ("again_wide.png", wide, dict(note)),
        ("spaced.png", images[1][1], note | {"p": f"  {note['p'].replace(' ', '   ')} \n"}),
    ]
    write_part(tmp_path / "data" / "part-000001.zip", images + odd)

    def left(**changes: Any) -> tuple[set[str], dict[str, int], int]:
        """Which odd images are left, what was filtered, and the number of prompts."""
        output = tmp_path / "out"
        settings = {"keep_blurred": True, "keep_duplicates": True} | changes
        rows = run(tmp_path / "data", output, rewards="brightness", rule="threshold", low=2.0, min_group=1, **settings)  # fmt: skip
        summary = summary_of(output)
        shutil.rmtree(output)
        assert len(rows) == summary["scored"] == len(images) + len(odd) - sum(summary["filtered"].values())
        return (
            {row["member"] for row in rows} & {name for name, *_ in odd},
            summary["filtered"],
            summary["prompts"],
        )

    everything = {name for name, *_ in odd}
    assert left() == (everything, {}, 2)
    assert left(keep_blurred=False) == (everything - {"blurred.png"}, {"blurred": 1}, 2)
    assert left(sizes=("64x64", "8x8")) == (everything - {"wide.png", "again_wide.png"}, {"size": 2}, 2)
    unwanted = everything - {"ddim.png", "unsaid.png"}
    assert left(samplers=("k_lms",)) == (unwanted, {"sampler": 2}, 2)
    # The same but for its size is another image, and so is one with another prompt.
    assert left(keep_duplicates=False) == (everything - {"again.png"}, {"duplicate": 1}, 2)
    unspaced = everything - {"again.png", "spaced.png"}
    assert left(keep_duplicates=False, normalise_prompts=True) == (unspaced, {"duplicate": 2}, 1)


def test_images_of_unknown_making_are_no_duplicates() -> None:
    known = [1, 7.0, 50, "k_lms", 64, 64]
    assert filters.identity("a", known) == filters.identity("a", [1, 7, 50, "k_lms", 64, 64]) != 0
    for at, other in enumerate([2, 7.5, 51, "ddim", 65, 65]):
        changed = [*known[:at], other, *known[at + 1 :]]
        assert filters.identity("a", changed) != filters.identity("a", known)
        assert filters.identity("a", [*known[:at], None, *known[at + 1 :]]) == 0


@pytest.mark.parametrize("hostile", [math.nan, math.inf, "\ud800", [[]], {"a": 1}, True, 10**400, None])
def test_hostile_settings_of_an_image(hostile: object, tmp_path: Path) -> None:
    images = [
        (name, content, {"p": "a", "se": hostile, "c": hostile, "st": hostile, "sa": hostile})
        for name, content, _ in members(1, range(1), 4)
    ]
    write_part(tmp_path / "data" / "part-000001.zip", images)
    run(tmp_path / "data", tmp_path / "out", rewards="brightness")
    assert summary_of(tmp_path / "out")["scored"] == 4


def test_what_is_said_of_the_making() -> None:
    assert made_of({"se": 1, "c": 7, "st": 50, "sa": "k_lms"}) == (1, 7, 50, "k_lms")
    assert made_of({"se": True, "c": "7", "st": 50.0, "sa": 3}) == (None,) * 4


def image_of(rows: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8)[:, :, None].repeat(3, 2))


def test_blurred_by_hand() -> None:
    """The greatest rise from a pixel to its right neighbour is what counts, not a fall, and not a column's."""
    assert filters.is_blurred(image_of([[0, 9, 18, 9], [0, 9, 18, 27]]))
    assert not filters.is_blurred(image_of([[0, 0, 0, 0], [0, 9, 19, 27]]))
    assert filters.is_blurred(image_of([[200, 100, 0, 9]]))
    assert filters.is_blurred(image_of([[0, 5], [200, 205]]))
    assert filters.is_blurred(image_of([[7], [200]]))
    green = np.zeros((1, 2, 3), np.uint8)
    green[0, 1, 1] = 10
    assert not filters.is_blurred(Image.fromarray(green))


def write_metadata(path: Path, rows: list[tuple[str, int, float | None, float | None]]) -> Path:
    """The columns of metadata.parquet that matter, and one that does not, with its types."""
    names, numbers, images, prompts = (list(column) for column in zip(*rows, strict=True))
    columns = {
        "image_name": pyarrow.array(names, pyarrow.string()),
        "prompt": pyarrow.array(["x"] * len(rows)),
        "part_id": pyarrow.array(numbers, pyarrow.uint16()),
        "image_nsfw": pyarrow.array(images, pyarrow.float32()),
        "prompt_nsfw": pyarrow.array(prompts, pyarrow.float32()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_nsfw_figures_of_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "ROWS", 2)
    images = members(4, range(1), 8)
    write_part(tmp_path / "data" / "part-000004.zip", images)
    names = [name for name, *_ in images]
    figures: list[tuple[float | None, float | None]] = [
        (0.1, 0.1), (0.5, 0.1), (0.6, 0.1), (2.0, 0.9), (None, 0.1), (0.1, 0.9), (0.1, math.nan),
    ]  # fmt: skip
    rows = [(name, 4, *pair) for name, pair in zip(names, figures, strict=False)]
    rows += [(names[7], 5, 0.1, 0.1), ("other.png", 9, 0.1, 0.1)]  # another part's, of the same name
    random.Random(1).shuffle(rows)
    path = write_metadata(tmp_path / "metadata.parquet", rows)

    def left(**limits: float) -> tuple[list[int], dict[str, int]]:
        output = tmp_path / "out"
        settings = {
            "rule": "threshold",
            "low": 2.0,
            "min_group": 1,
            "rewards": "brightness",
            "metadata": path,
        }
        members = {row["member"] for row in run(tmp_path / "data", output, **settings, **limits)}
        counts = summary_of(output)["filtered"]
        shutil.rmtree(output)
        return [number for number, name in enumerate(names) if name in members], counts

    unknown = {"not in the metadata": 1}
    assert left(max_image_nsfw=0.5) == ([0, 1, 5, 6], {"image_nsfw": 3, **unknown})
    assert left(max_image_nsfw=1) == ([0, 1, 2, 5, 6], {"image_nsfw": 2, **unknown})
    assert left(max_prompt_nsfw=0.5) == ([0, 1, 2, 4], {"not in the metadata": 1, "prompt_nsfw": 3})
    both = {"image_nsfw": 3, "not in the metadata": 1, "prompt_nsfw": 2}
    assert left(max_image_nsfw=0.5, max_prompt_nsfw=0.5) == ([0, 1], both)


# ---------------------------------------------------------------- killed


def run_and_die(settings: diffusiondb.Config, writes: int) -> None:
    """Run, and be killed just before rename number `writes`, or before the last removal."""

    def dying(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def rename(self: Path, target: Path) -> Path:
            if next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, target)

        return rename

    remaining = iter(range(writes))
    Path.replace, Path.rename = dying(Path.replace), dying(Path.rename)  # type: ignore[method-assign, assignment]
    original = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if not options:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, **options)

    shutil.rmtree = rmtree  # type: ignore[assignment]
    diffusiondb.main(settings)


def test_killed_at_any_write_and_resumed(
    parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path
) -> None:
    """Before each file and folder gets its name, and before the last removal: it ends as if nothing had happened."""
    folder, _ = parts
    run(folder, tmp_path / "straight", shown=1)
    straight = contents(tmp_path / "straight")
    for writes in range(100):
        settings = config(folder, tmp_path / "killed", shown=1)
        assert children.end(children.begin(run_and_die, settings, writes)) == -signal.SIGKILL
        chunks = settings.output_dir.with_name("killed.building") / "chunks"
        assert len(list(chunks.glob("*.jsonl"))) == min(max(writes - 1, 0), 7)
        complete = settings.output_dir.exists()
        diffusiondb.main(settings)
        assert contents(settings.output_dir) == straight, writes
        assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "straight"]
        if complete:
            break
        shutil.rmtree(settings.output_dir)
    assert (
        writes == 1 + 7 + 3 + 1 + 2 + 1 + 1 + 1
    )  # job, parts, three files, grid, thumbnails, page, job, folder


def killed_at_random(data: Path, output: Path, kills: int) -> None:
    """Kill the builder `kills` times after any time, each time going on; then let it end."""
    settings = config(data, output, batch_size=1)
    start = time.monotonic()
    run(data, output.with_name("straight"), batch_size=1)
    took, times, done = time.monotonic() - start, random.Random(kills), 0
    for kill in range(kills):
        worked = replace(settings, workers=kill % 2)
        process = children.begin(diffusiondb.main, worked)
        time.sleep(times.uniform(0, took if kill % 2 else took / 3))
        process.kill()
        done += children.end(process) == 0
        if output.exists():
            assert contents(output) == contents(output.with_name("straight"))
            shutil.rmtree(output)
    assert done <= kills // 2, "it was hardly ever killed before its end"
    diffusiondb.main(settings)
    assert contents(output) == contents(output.with_name("straight"))


def test_killed_at_random_and_resumed(parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path) -> None:
    killed_at_random(parts[0], tmp_path / "killed", 2)


def wait_for_ever(settings: diffusiondb.Config, sign: Path) -> None:
    """Run, and wait in the first scoring."""

    def wait(*_: Any) -> None:
        sign.touch()
        time.sleep(60)

    score_files._score = wait  # type: ignore[assignment]
    diffusiondb.main(settings)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_worker_outlives_a_killed_builder(
    parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path
) -> None:
    """Also one that waits to hand over images."""
    settings = config(parts[0], tmp_path / "out", workers=1)
    process = children.begin(wait_for_ever, settings, tmp_path / "waits")
    until((tmp_path / "waits").exists)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 1
    time.sleep(1)  # the pipe fills
    process.kill()
    children.end(process)
    until(lambda: not any(Path(f"/proc/{worker}/fd").exists() for worker in workers))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(
    parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path
) -> None:
    killed_at_random(parts[0], tmp_path / "killed", 20)


def test_what_is_scored_is_not_scored_again(
    parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Neither in a complete data set, nor in one that was killed while it was written, also with another rule."""
    folder, _ = parts
    run(folder, tmp_path / "out")
    before, printed = contents(tmp_path / "out"), capsys.readouterr().out
    monkeypatch.setattr(selected_folder, "write_data_set", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusiondb.main(config(folder, tmp_path / "other"))
    monkeypatch.undo()
    monkeypatch.setattr(diffusiondb, "load_all", lambda *_, **__: pytest.fail("a scorer was loaded"))
    diffusiondb.main(config(folder, tmp_path / "out"))
    assert capsys.readouterr().out == printed
    assert contents(tmp_path / "out") == before
    assert len(run(folder, tmp_path / "other", rule="top-k")) > len(
        read_jsonl(tmp_path / "out" / "metadata.jsonl")
    )


# ---------------------------------------------------------------- what is refused


BAD = [
    (["--rewards", "shape"], "unknown scorer 'shape' (did you mean shapes?); one of brightness, shapes"),
    (["--rewards", "hpsv1"], "hpsv1"),
    (["--reward-files", "hpsv1=x"], "names hpsv1, which --rewards does not use"),
    (["--data", "TMP/gone"], "there is no data at "),
    (["--data", "TMP/empty"], "there is no data at "),
    (["--data", "TMP/gone/*.zip"], "there is no data at "),
    (["--data", "TMP/a.txt"], "is no zip file; for other data see preftune score"),
    (["--data", "DATA", "DATA/part-000002.zip"], "part-000002.zip twice"),
    (["--output-dir", "TMP/empty"], "exists already; remove it or choose another --output-dir"),
    (["--output-dir", "TMP/a.txt"], "exists already"),
    (["--output-dir", "TMP/begun"], "exists and holds no scores"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--workers", "-1"], "--workers must be at least 0, got -1"),
    (["--shown", "0"], "--shown must be at least 1, got 0"),
    (["--alpha", "0"], "--alpha must be a positive number, got 0"),
    (["--alpha", "nan"], "--alpha must be a positive number, got nan"),
    (["--min-group", "0"], "--min-group must be at least 1, got 0"),
    (["--rule", "threshold"], "--rule threshold needs --high, --low or both"),
    (["--rule", "best"], "--rule"),
    (["--sizes", "512"], "--sizes must be like 512x512, got '512'"),
    (["--max-image-nsfw", "0.5"], "--max-image-nsfw needs --metadata"),
    (["--max-prompt-nsfw", "2", "--metadata", "TMP/m.parquet"], "--max-prompt-nsfw must lie in [0, 1], got 2"),
    (["--metadata", "TMP/m.parquet"], "--metadata is read for --max-image-nsfw and --max-prompt-nsfw"),
    (["--metadata", "TMP/gone", "--max-image-nsfw", "1"], "TMP/gone"),
    (["--metadata", "TMP/a.txt", "--max-image-nsfw", "1"], "is no metadata of DiffusionDB"),
    (["--metadata", "TMP/t.parquet", "--max-image-nsfw", "1"], "has no column image_name"),
    (["--metadata", "TMP/m.parquet", "--max-image-nsfw", "1"], "knows no image of part-000001.zip"),
    (["--metadata", "TMP/m.parquet", "--max-image-nsfw", "1", "--data", "TMP/odd.zip"], "odd.zip is not named part-NNNNNN.zip"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU; use fp32 or bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_one_sentence_before_anything_loads(
    flags: list[str], words: str, parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun.building").mkdir()
    (tmp_path / "begun.building" / "mine.txt").touch()
    (tmp_path / "a.txt").touch()
    write_part(tmp_path / "odd.zip", members(1, range(1), 1))
    write_metadata(tmp_path / "m.parquet", [("a.png", 9, 0.1, 0.1)])
    pyarrow.parquet.write_table(pyarrow.table({"part_id": [1]}), tmp_path / "t.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(diffusiondb, "load_all", lambda *_, **__: pytest.fail("a scorer was loaded"))
    base = {"--data": [str(parts[0])], "--output-dir": [str(tmp_path / "out")], "--rewards": ["shapes"]}
    given = [flag.replace("TMP", str(tmp_path)).replace("DATA", str(parts[0])) for flag in flags]
    unsaid = [word for flag, values in base.items() if flag not in flags for word in (flag, *values)]
    with pytest.raises(SystemExit) as stop:
        diffusiondb.main(parse(diffusiondb.Config, [*unsaid, *given]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words.replace("TMP", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.building").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"normalise_prompts": True}, "normalise_prompts"), ({"precision": "bf16"}, "precision")],
)
def test_another_job_in_the_same_folder_is_refused(
    changes: dict[str, Any], words: str, parts: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(selected_folder, "write_data_set", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusiondb.main(config(parts[0], tmp_path / "out"))
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run(parts[0], tmp_path / "out", **changes)
    assert f"was begun with {words}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(diffusiondb, "digests", lambda *_: {"shapes": {"model.pt": "another"}})
        with pytest.raises(SystemExit):
            run(parts[0], tmp_path / "out")
    assert "was begun with weights" in capsys.readouterr().err
    run(parts[0], tmp_path / "out")
    with pytest.raises(SystemExit):
        run(parts[0], tmp_path / "out", **changes)
    assert "exists already" in capsys.readouterr().err
