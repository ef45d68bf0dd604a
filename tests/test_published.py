"""Published preference data: a file in each layout, written here from its published schema, is read back equal."""

import csv
import hashlib
import io
import json
import random
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_build import published_rows
from data_build.published import (
    ASPECTS,
    LAYOUTS,
    Aspect,
    Layout,
    PublishedImage,
    PublishedRanking,
    Repeats,
    SetAside,
    dense,
    read_published,
)
from data_build.published_rows import SchemaError

SHARED = Path(__file__).parents[2] / "shared/data/prompts/imagereward"


def in_json(path: Path, rows: Sequence[object]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def in_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def in_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def in_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def in_zip(path: Path, rows: Sequence[object], images: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}.json", json.dumps(rows))
        for name, content in images.items():
            archive.writestr(name, content)
    return path


def webp(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "WEBP")
    return buffer.getvalue()


def facts(entry: PublishedRanking | SetAside) -> tuple[object, ...]:
    """What a ranking says: prompt, names, ranks, source, weight."""
    assert isinstance(entry, PublishedRanking)
    names = [image.name for image in entry.images]
    return entry.prompt, names, list(entry.ranks), entry.source, entry.weight


def set_aside(entry: PublishedRanking | SetAside, place: str, words: str, reason: str = "bad row") -> None:
    """Assert that it is a row of this place that was set aside for this reason, with these words in its detail."""
    assert isinstance(entry, SetAside)
    assert (entry.place.rpartition("/")[2], entry.reason) == (place, reason)
    assert words in entry.detail


def facts_of(layout: Layout, path: Path, aspect: Aspect = "mean") -> list[tuple[object, ...]]:
    return [facts(entry) for entry in read_published(layout, path, aspect)]


def pickapic(**changes: object) -> dict[str, Any]:
    """A row of Pick-a-Pic with all its columns."""
    return {
        "are_different": True,
        "best_image_uid": "aa-0",
        "caption": "a cat",
        "created_at": None,
        "has_label": True,
        "image_0_uid": "aa-0",
        "image_0_url": "gone",
        "image_1_uid": "bb-1",
        "image_1_url": "gone",
        "jpg_0": webp(0),
        "jpg_1": webp(1),
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "m",
        "model_1": "m",
        "ranking_id": 7,
        "user_id": 3,
        "num_example_per_prompt": 1,
        "__index_level_0__": 0,
    } | changes


def db(name: str, rank: int, prompt: str = "000001-0001", **changes: object) -> dict[str, Any]:
    """A row of ImageRewardDB."""
    return {
        "image_path": f"images/train/train_1/{name}.webp",
        "prompt_id": prompt,
        "prompt": f"p {prompt}",
        "classification": "People",
        "image_amount_in_total": 2,
        "rank": rank,
        "overall_rating": 4,
        "image_text_alignment_rating": 3,
        "fidelity_rating": 4,
    } | changes


# ---------------------------------------------------------------- the layouts


def test_the_table_holds_every_layout() -> None:
    assert set(LAYOUTS) == set(get_args(Layout))
    assert {"mean", *ASPECTS} == set(get_args(Aspect))


def test_imagereward(tmp_path: Path) -> None:
    """Ranks stay as they are: with ties, with gaps, not from 1."""
    rows = [
        {"id": "1-1", "prompt": "a", "generations": ["x/0.webp", "x/1.webp", "x/2.webp"], "ranking": [5, 2, 2]},
        {"id": "1-2", "prompt": "caf\u00e9", "generations": ["y/0.webp", "y/1.webp"], "ranking": [1, 2]},
    ]  # fmt: skip
    path = in_json(tmp_path / "train.json", rows)
    assert facts_of("imagereward", path) == [
        ("a", ["x/0.webp", "x/1.webp", "x/2.webp"], [5, 2, 2], "", 1.0),
        ("caf\u00e9", ["y/0.webp", "y/1.webp"], [1, 2], "", 1.0),
    ]
    first = next(read_published("imagereward", path))
    assert isinstance(first, PublishedRanking)
    assert first.place == f"{path} element 1"
    assert first.images[0] == PublishedImage(name="x/0.webp", content=None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/prompts/imagereward")
def test_the_published_test_set() -> None:
    entries = [*read_published("imagereward", SHARED / "test.json")]
    pairs = [pair for entry in entries for pair in combinations(facts(entry)[2], 2)]
    assert len(entries) == 466
    assert sum(a != b for a, b in pairs) == 6399
    assert sum(a == b for a, b in pairs) == 831
    rows = json.loads((SHARED / "test.json").read_text(encoding="utf-8"))
    assert [facts(entry)[:3] for entry in entries] == [
        (row["prompt"], row["generations"], row["ranking"]) for row in rows
    ]


def test_imagerewarddb(tmp_path: Path) -> None:
    """The rows of a prompt need not be neighbours; zip files and tables say the same."""
    other = "000001-0002"
    rows = [db("a", 1), db("c", 2, other), db("b", 1), db("d", 1, other)]
    stem = "images/train/train_1"
    expected = [
        ("p 000001-0001", [f"{stem}/a.webp", f"{stem}/b.webp"], [1, 1], "", 1.0),
        ("p 000001-0002", [f"{stem}/c.webp", f"{stem}/d.webp"], [2, 1], "", 1.0),
    ]
    archive = in_zip(tmp_path / "train_1.zip", rows, {"a.webp": webp(0)})
    assert facts_of("imagerewarddb", archive) == expected
    assert facts_of("imagerewarddb", in_json(tmp_path / "train_1.json", rows)) == expected
    assert facts_of("imagerewarddb", in_parquet(tmp_path / "metadata-train.parquet", rows)) == expected
    for number, row in enumerate(rows):  # as the datasets library writes it
        del row["image_path"]
        row["image"] = {"bytes": webp(number), "path": f"{number}.webp"}
    entries = [*read_published("imagerewarddb", in_parquet(tmp_path / "1k.parquet", rows))]
    assert [facts(entry)[1:3] for entry in entries] == [
        (["0.webp", "2.webp"], [1, 1]),
        (["1.webp", "3.webp"], [2, 1]),
    ]
    assert isinstance(entries[0], PublishedRanking)
    assert [image.content for image in entries[0].images] == [webp(0), webp(2)]


def imaged(folder: Path, order: Sequence[int], *, group: int, size: int) -> Path:
    """A table of images of so many bytes in this order, four of each prompt and so many in a row group."""
    rows = [
        db("x", 1 + number % 4, f"{number // 4}")
        | {"image": {"bytes": bytes([number]) * size, "path": f"{number}.webp"}}
        for number in order
    ]
    for row in rows:
        del row["image_path"]
    schema = pyarrow.Table.from_pylist(rows).schema
    path = folder / "images.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(0, len(rows), group):  # pages end with row groups, so that arrow holds little, too
            writer.write_table(pyarrow.Table.from_pylist(rows[start : start + group], schema=schema))
    return path


@pytest.mark.parametrize("group", [1, 3, 7, 40])
def test_images_of_a_prompt_that_are_scattered(tmp_path: Path, group: int) -> None:
    """Each image keeps its name, rank and prompt; prompts come in the order of their first."""
    order = random.Random(0).sample(range(40), 40)
    entries = [*read_published("imagerewarddb", imaged(tmp_path, order, group=group, size=3))]
    firsts = [*dict.fromkeys(f"p {number // 4}" for number in order)]
    assert [facts(entry)[0] for entry in entries] == firsts
    for entry in entries:
        assert isinstance(entry, PublishedRanking)
        numbers = [int(image.name.removesuffix(".webp")) for image in entry.images]
        assert sorted(numbers, key=order.index) == numbers
        assert {f"p {number // 4}" for number in numbers} == {entry.prompt}
        assert entry.ranks == tuple(1 + number % 4 for number in numbers)
        assert [image.content for image in entry.images] == [bytes([number]) * 3 for number in numbers]


@pytest.mark.parametrize("shuffled", [False, True])
def test_only_the_images_of_one_prompt_are_held(tmp_path: Path, shuffled: bool) -> None:
    """Of 120 images of 100 kB, which are 12 MB, never more than two prompts' and what arrow unpacks at a time."""
    size, order = 100_000, random.Random(0).sample(range(120), 120) if shuffled else range(120)
    path = imaged(tmp_path, order, group=8, size=size)
    next(read_published("imagerewarddb", path))  # what is made once
    elsewhere = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        count, held = 0, 0
        for entry in read_published("imagerewarddb", path):
            assert isinstance(entry, PublishedRanking)
            count += sum(len(image.content or b"") for image in entry.images)
            held = max(held, pyarrow.total_allocated_bytes() - elsewhere)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 120 * size
    assert peak < 15 * size
    assert held < 40 * size


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([*range(20)], [20]),
        ([0, 1, 2, *range(4, 13), 3, *range(13, 20)], [3, 1, 20]),  # over two row groups to row 12, and back to 3
    ],
)  # fmt: skip
def test_images_are_read_once_unless_the_way_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int], expected: list[int]
) -> None:
    passes: list[tuple[str, int]] = []
    unpack = pyarrow.parquet.ParquetFile.iter_batches

    def counted(table: Any, batch: int, *, columns: list[str], **given: Any) -> Iterator[Any]:
        passes.append((" ".join(columns), 0))
        for rows in unpack(table, batch, columns=columns, **given):
            passes[-1] = (" ".join(columns), passes[-1][1] + rows.num_rows)
            yield rows

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(published_rows, "BATCH", 1)
    assert len([*read_published("imagerewarddb", imaged(tmp_path, order, group=4, size=3))]) == 5
    assert passes == [("prompt_id prompt rank", 20), *(("image", rows) for rows in expected)]


def test_imagerewarddb_group_and_pair(tmp_path: Path) -> None:
    groups = [
        {"prompt_id": "1", "prompt": "a", "classification": "x", "image": ["0.webp", "1.webp", "2.webp"], "rank": [2, 1, 2]},
        {"prompt_id": "2", "prompt": "b", "classification": "x", "image": ["3.webp", "4.webp"], "rank": [1, 2]},
    ]  # fmt: skip
    assert facts_of("imagerewarddb-group", in_parquet(tmp_path / "g.parquet", groups)) == [
        ("a", ["0.webp", "1.webp", "2.webp"], [2, 1, 2], "", 1.0),
        ("b", ["3.webp", "4.webp"], [1, 2], "", 1.0),
    ]
    cells = [{"bytes": webp(0), "path": None}, {"bytes": b"", "path": None}]
    pairs = [{"prompt_id": "1", "prompt": "a", "img_better": cells[0], "img_worse": cells[1]}]
    digest = hashlib.sha256(webp(0)).hexdigest()
    (entry,) = read_published("imagerewarddb-pair", in_parquet(tmp_path / "p.parquet", pairs))
    assert facts(entry)[2] == [1, 2]
    assert isinstance(entry, PublishedRanking)
    assert entry.images[0] == PublishedImage(name=f"{digest}.webp", content=webp(0))
    assert entry.images[1].content == b""  # set aside later, by name


def test_hpdv1(tmp_path: Path) -> None:
    """The chosen one before all others."""
    names = [f"preference_images/00001_{i}.jpg" for i in range(3)]
    row = {
        "human_preference": 2,
        "prompt": "a",
        "id": 1,
        "file_path": names,
        "user_hash": "u",
        "contain_name": False,
    }
    path = in_json(tmp_path / "preference_train.json", [row, row | {"human_preference": 0}])
    assert facts_of("hpdv1", path) == [("a", names, [2, 2, 1], "u", 1.0), ("a", names, [1, 2, 2], "u", 1.0)]


def test_hpdv2_train(tmp_path: Path) -> None:
    names = ["00000001.jpg", "00000002.jpg"]
    rows = [{"prompt": "a", "file_path": names, "human_preference": mark} for mark in ([1, 0], [0, 1])]
    assert facts_of("hpdv2-train", in_json(tmp_path / "train.json", rows)) == [
        ("a", names, [1, 2], "", 1.0),
        ("a", names, [2, 1], "", 1.0),
    ]


def test_hpdv2_test(tmp_path: Path) -> None:
    """Annotators where they are known, else their averaged ranks as whole ones."""
    names = ["0.jpg", "1.jpg", "2.jpg"]
    notes = [{"rank": [3, 1, 2], "user_hash": "u"}, {"rank": [2, 1, 3], "user_hash": "v"}]
    known = {"prompt": "a", "image_path": names, "rank": [2.5, 1, 2.5], "raw_annotations": notes}
    older = {"prompt": "b", "image_path": names, "rank": [2.5, 1, 2.5]}
    assert facts_of("hpdv2-test", in_json(tmp_path / "test.json", [known, older])) == [
        ("a", names, [3, 1, 2], "u", 1.0),
        ("a", names, [2, 1, 3], "v", 1.0),
        ("b", names, [2, 1, 2], "", 1.0),
    ]


def test_pickapic(tmp_path: Path) -> None:
    rows = [
        pickapic(num_example_per_prompt=4),
        pickapic(label_0=0.0, label_1=1.0, user_id=9),
        pickapic(label_0=0.5, label_1=0.5),
        pickapic(has_label=False, label_0=None, label_1=None),
    ]
    path = in_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    *judged, unlabelled = read_published("pickapic", path)
    names = ["aa/aa-0.jpg", "bb/bb-1.jpg"]
    assert [facts(entry) for entry in judged] == [
        ("a cat", names, [1, 2], "3", 0.25),
        ("a cat", names, [2, 1], "9", 1.0),
        ("a cat", names, [1, 1], "3", 1.0),
    ]
    assert isinstance(judged[0], PublishedRanking)
    assert [image.content for image in judged[0].images] == [webp(0), webp(1)]
    assert unlabelled == SetAside(place=f"{path} row 4", reason="no label", detail="has_label is false")
    for row in rows:  # pickapic_v2_no_images
        del row["jpg_0"], row["jpg_1"]
    bare = [*read_published("pickapic", in_parquet(tmp_path / "bare.parquet", rows))]
    assert [facts(entry) for entry in bare[:3]] == [facts(entry) for entry in judged]
    assert isinstance(bare[0], PublishedRanking)
    assert bare[0].images[0].content is None


def test_aspects(tmp_path: Path) -> None:
    """Each aspect orders in its own way, and the mean in another."""
    scores = ((5, 1, 2, 4), (4, 2, 2, 5), (3, 5, 1, 4))
    images = [{"image_id": f"{i}.png"} | dict(zip(ASPECTS, row, strict=True)) for i, row in enumerate(scores)]
    path = in_jsonl(tmp_path / "v.jsonl", [{"prompt_id": 1, "prompt": "a", "images": images}])
    expected: dict[Aspect, list[int]] = {
        "prompt_following": [1, 2, 3],
        "aesthetics": [3, 2, 1],
        "fidelity": [1, 1, 2],
        "harmlessness": [2, 1, 2],
        "mean": [2, 1, 1],  # 12, 13, 13
    }
    for aspect, ranks in expected.items():
        assert facts_of("aspects", path, aspect) == [
            ("a", ["0.png", "1.png", "2.png"], ranks, "", 1.0),
        ]


def test_ratings(tmp_path: Path) -> None:
    """A ranking for each rater of a prompt, whatever the order of the lines."""
    rows = [
        {"prompt": prompt, "image": image, "rater": rater, "score": score}
        for prompt, image, rater, score in (
            ("a, with comma", "0.png", "x", "3"),
            ("a, with comma", "0.png", "y", "1.5"),
            ("b", "2.png", "x", "1"),
            ("a, with comma", "1.png", "x", "10"),
            ("a, with comma", "1.png", "y", "1.50"),
            ("b", "3.png", "x", "0"),
        )
    ]
    assert facts_of("ratings", in_csv(tmp_path / "r.csv", rows)) == [
        ("a, with comma", ["0.png", "1.png"], [2, 1], "x", 1.0),
        ("a, with comma", ["0.png", "1.png"], [1, 1], "y", 1.0),
        ("b", ["2.png", "3.png"], [1, 2], "x", 1.0),
    ]


def test_our_own_rankings(tmp_path: Path) -> None:
    row = {"prompt": "a", "generations": ["000/0.png", "000/1.png"], "ranking": [2, 1], "gold": [0.1, 0.2]}
    path = in_jsonl(tmp_path / "rankings.jsonl", [row | {"source": "annotator 0", "weight": 0.5}, row])
    assert facts_of("rankings", path) == [
        ("a", ["000/0.png", "000/1.png"], [2, 1], "annotator 0", 0.5),
        ("a", ["000/0.png", "000/1.png"], [2, 1], "", 1.0),
    ]


def test_dense() -> None:
    assert dense([2.5, 1.1, 2.5, 9]) == (2, 1, 2, 3)
    assert dense([]) == ()


# ---------------------------------------------------------------- what does not fit

IR = {"prompt": "a", "generations": ["0", "1"], "ranking": [1, 2]}
V1 = {"prompt": "a", "file_path": ["0", "1"], "human_preference": 0, "user_hash": "u"}
TRAIN = {"prompt": "a", "file_path": ["0", "1"], "human_preference": [1, 0]}
TEST = {"prompt": "a", "image_path": ["0", "1"], "rank": [1, 2]}
RATING = {"prompt": "a", "image": "0", "rater": "x", "score": "1"}
RATED: dict[str, Any] = {
    "prompt": "a",
    "images": [{"image_id": f"{number}"} | dict.fromkeys(ASPECTS, number) for number in range(2)],
}


@pytest.mark.parametrize(
    ("layout", "row", "words"),
    [
        ("imagereward", TRAIN, "element 1 has no generations"),
        ("imagereward", IR | {"ranking": ["1", "2"]}, r'ranking is \["1", "2"\]; it must hold finite numbers'),
        ("imagereward", IR | {"generations": [0, 1]}, "generations must hold file names"),
        ("imagereward", IR | {"prompt": ["a"]}, "prompt is a list; it must be a str"),
        ("imagereward", IR | {"source": 3}, "source is a int; it must be a str"),
        ("imagereward", IR | {"weight": "1"}, r'weight is \["1"\]; it must hold finite numbers'),
        ("imagereward", "x", "element 1 must be an object, not a str"),
        ("imagerewarddb", IR, "element 1 has no prompt_id"),
        ("imagerewarddb", db("a", 1, prompt_id=[1]), "prompt_id is a list; it must be a str"),
        ("hpdv1", TRAIN, "human_preference is a list; it must be a int"),
        ("hpdv1", V1 | {"file_path": [0, 1]}, "file_path must hold file names"),
        ("hpdv2-train", V1, "human_preference is a int; it must be a list"),
        ("hpdv2-train", TRAIN | {"prompt": 3}, "prompt is a int; it must be a str"),
        ("hpdv2-test", TRAIN, "has no image_path"),
        ("hpdv2-test", TEST | {"rank": ["1", "2"]}, "rank is .*finite numbers"),
        ("hpdv2-test", TEST | {"raw_annotations": [[1, 2]]}, "raw_annotations must hold objects"),
        ("hpdv2-test", TEST | {"raw_annotations": [{"rank": [1, 2]}]}, "has no user_hash"),
    ],
)  # fmt: skip
def test_a_list_of_another_layout(tmp_path: Path, layout: Layout, row: object, words: str) -> None:
    """The first row says so, whatever the others are."""
    path = in_json(tmp_path / "x.json", [row, IR, IR, V1, V1, TRAIN, TRAIN, TEST, TEST])
    with pytest.raises(ValueError, match=words):
        next(read_published(layout, path))


@pytest.mark.parametrize(
    ("layout", "good", "changes", "words"),
    [
        ("imagereward", IR, {"ranking": [1.5, 2]}, "ranking is [1.5, 2]; it must hold whole numbers"),
        ("imagereward", IR, {"ranking": [0, 1]}, "ranking is [0, 1]; it must hold whole numbers from 1"),
        ("imagereward", IR, {"ranking": [1]}, "2 images and 1 ranks"),
        ("imagereward", IR, {"generations": ["0", "0"]}, "'0' is there more than once"),
        ("imagereward", IR, {"generations": None}, "generations is empty"),
        ("imagereward", IR, {"prompt": " "}, "prompt is empty"),
        ("imagereward", IR, {"prompt": "\ud83d"}, "half of a surrogate pair"),
        ("imagereward", IR, {"weight": 0}, "weight is 0; it must be a finite number above 0"),
        ("hpdv1", V1, {"human_preference": 2}, "human_preference is 2; it must be a place in file_path, 0 to 1"),
        ("hpdv1", V1, {"human_preference": -1}, "human_preference is -1"),
        ("hpdv2-train", TRAIN, {"human_preference": [2, 1]}, "human_preference is [2, 1]"),
        ("hpdv2-train", TRAIN, {"human_preference": [1]}, "2 images and 1 ranks"),
        ("hpdv2-train", TRAIN, {"prompt": ""}, "prompt is empty"),
        ("hpdv2-test", TEST, {"rank": [1, float("nan")]}, "rank is [1, NaN]; it must hold finite numbers"),
        ("hpdv2-test", TEST, {"rank": [1, None]}, "rank is [1, null]; it must hold finite numbers"),
        ("hpdv2-test", TEST, {"rank": [1, 10**400]}, "it must hold finite numbers"),
        ("hpdv2-test", TEST, {"raw_annotations": []}, "raw_annotations must hold objects"),
        ("pickapic", pickapic(), {"label_0": 0.7}, "label_0 and label_1 are 0.7 and 0; they must be 1 and 0,"),
        ("pickapic", pickapic(), {"label_0": None}, "label_0 is [null]; it must hold finite"),
        ("pickapic", pickapic(), {"num_example_per_prompt": 0}, "num_example_per_prompt is 0"),
        ("pickapic", pickapic(), {"caption": None}, "caption is empty"),
        ("pickapic", pickapic(), {"image_1_uid": "aa-0"}, "'aa/aa-0.jpg' is there more than once"),
        ("aspects", RATED, {"images": []}, "images must hold objects"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_value_is_set_aside_wherever_it_stands(
    tmp_path: Path, layout: Layout, good: dict[str, Any], changes: dict[str, Any], words: str, place: int
) -> None:
    rows = [good, good]
    rows[place] = good | changes
    writers = {"pickapic": in_parquet, "aspects": in_jsonl}
    kind = {"pickapic": "row", "aspects": "line"}.get(layout, "element")
    entries = [*read_published(layout, writers.get(layout, in_json)(tmp_path / "x", rows))]
    assert len(entries) == 2
    assert isinstance(entries[1 - place], PublishedRanking)
    set_aside(entries[place], f"x {kind} {place + 1}", words)


def test_a_table_of_another_type(tmp_path: Path) -> None:
    path = in_parquet(tmp_path / "x.parquet", [pickapic(has_label="yes"), pickapic(has_label="no")])
    with pytest.raises(SchemaError, match=r"x\.parquet row 1: has_label is a str; it must be a bool"):
        next(read_published("pickapic", path))


@pytest.mark.parametrize(
    ("layout", "row", "column"),
    [
        ("pickapic", {key: value for key, value in pickapic().items() if key != "has_label"}, "has_label"),
        ("imagerewarddb", {"prompt_id": "1", "prompt": "a"}, "rank"),
        ("imagerewarddb-group", {"prompt": "a", "rank": [1, 2]}, "image"),
        ("imagerewarddb-pair", {"prompt": "a", "img_better": "0"}, "img_worse"),
        ("ratings", {"prompt": "a", "image": "0", "score": "1"}, "rater"),
    ],
)
def test_a_table_without_a_column(tmp_path: Path, layout: Layout, row: dict[str, Any], column: str) -> None:
    path = (
        in_csv(tmp_path / "x.csv", [row])
        if layout == "ratings"
        else in_parquet(tmp_path / "x.parquet", [row])
    )
    with pytest.raises(ValueError, match=f"has no column {column}; it has .*prompt"):
        list(read_published(layout, path))


def test_wrong_cells(tmp_path: Path) -> None:
    """A column of another type, or without any, is refused; a cell that holds nothing is set aside."""
    bare = {key: value for key, value in db("a", 1).items() if key != "image_path"}
    for layout, row, words in (
        ("imagerewarddb", bare, "row 1 has no image_path"),
        ("imagerewarddb", db("a", 1, image=3), "image is a int; it must be a file name, or hold bytes"),
        ("imagerewarddb-pair", {"prompt": "a", "img_better": 3, "img_worse": "1"}, "img_better is a int"),
        ("imagerewarddb-group", {"prompt": "a", "image": [3, 4], "rank": [1, 2]}, "image is a int"),
    ):  # fmt: skip
        path = in_parquet(tmp_path / "x.parquet", [row, row])
        with pytest.raises(SchemaError, match=words):
            next(read_published(layout, path))
    good = {"prompt": "a", "image": ["0", "1"], "rank": [1, 2]}
    empty, whole = read_published(
        "imagerewarddb-group", in_parquet(path, [good | {"image": [None, None]}, good])
    )
    set_aside(empty, "x.parquet row 1", "image is empty")
    assert isinstance(whole, PublishedRanking)


@pytest.mark.parametrize("score", ["", "good", "nan", "1e999"])
def test_a_rating_that_is_no_number(tmp_path: Path, score: str) -> None:
    other = RATING | {"rater": "y"}
    rows = [RATING, RATING | {"image": "1", "score": score}, other, other | {"image": "1"}]
    bad, good = read_published("ratings", in_csv(tmp_path / "r.csv", rows))
    set_aside(bad, "r.csv line 2", f"line 3: score is '{score}'; it must be a finite number")
    assert facts(good)[3] == "y"


@pytest.mark.parametrize(
    ("firsts", "words"),
    [
        ([",0,x,1", ",1,x,2"], "prompt is empty"),
        (["a,0"], "score is None; it must be a finite number"),
    ],
)
def test_the_first_rater_is_judged_as_the_others_are(tmp_path: Path, firsts: list[str], words: str) -> None:
    lines = [*firsts, "a,0,y,3", "a,1,y,4", *(line.replace("x", "z") for line in firsts)]
    (tmp_path / "r.csv").write_text("\n".join(["prompt,image,rater,score", *lines]) + "\n")
    first, good, last = read_published("ratings", tmp_path / "r.csv")
    assert facts(good)[1:4] == (["0", "1"], [2, 1], "y")
    set_aside(first, "r.csv line 2", words)
    set_aside(last, f"r.csv line {4 + len(firsts)}", words)


def test_one_rating_is_too_few_images(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,image,rater,score\na,0,x,1\na,0,y,3\na,1,y,4\n")
    alone, good = read_published("ratings", tmp_path / "r.csv")
    set_aside(alone, "r.csv line 2", "one image, '0'; a ranking needs two or more", "too few images")
    assert facts(good)[3] == "y"
    for layout, row in (
        ("imagereward", {"prompt": "a", "generations": ["0"], "ranking": [1]}),
        ("imagerewarddb", db("c", 1, "2")),
    ):
        (other,) = read_published(layout, in_json(tmp_path / "x.json", [row]))  # type: ignore[arg-type]
        set_aside(other, "x.json element 1", "a ranking needs two or more", "too few images")
    (other,) = read_published(
        "aspects", in_jsonl(tmp_path / "x.jsonl", [RATED | {"images": RATED["images"][:1]}])
    )
    set_aside(other, "x.jsonl line 1", "a ranking needs two or more", "too few images")


@pytest.mark.parametrize(("rule", "ranks"), [("last", [1, 2]), ("mean", [2, 1])])
def test_repeated_ratings_follow_a_rule(tmp_path: Path, rule: Repeats, ranks: list[int]) -> None:
    """0.png has 1 and later 5, a mean of 3; 1.png has 4."""
    (tmp_path / "r.csv").write_text("prompt,image,rater,score\na,0,x,1\na,1,x,4\na,0,x,5\n")
    (found,) = read_published("ratings", tmp_path / "r.csv", repeats=rule)
    assert isinstance(found, PublishedRanking)
    assert facts(found)[1:3] == (["0", "1"], ranks)
    assert found.repeated == 1
    (refused,) = read_published("ratings", tmp_path / "r.csv", repeats="refuse")
    set_aside(refused, "r.csv line 2", "'0' is rated more than once by the same person")


RATINGS = "prompt,image,rater,score\n" + "".join(f"p {n},{i},x,{i}\n" for n in range(150) for i in "01")


@pytest.mark.parametrize(
    ("cut", "reason", "words"),
    [
        ("p 150,0", "bad row", "score is None"),
        ('"p 150, and', "bad row", "line 302 is no row of a CSV file: unexpected end of data"),
        ('"p 15"0,0,x,1\n', "bad row", "line 302 is no row of a CSV file: ',' expected after"),
        ("p 150,0,x,", "bad row", "score is ''"),
        ("p 150,0,x,0", "too few images", "one image, '0'"),
    ],
)
def test_a_cut_last_line_costs_one_row(tmp_path: Path, cut: str, reason: str, words: str) -> None:
    (tmp_path / "r.csv").write_text(RATINGS + cut)
    *good, last = read_published("ratings", tmp_path / "r.csv")
    assert len(good) == 150
    assert all(isinstance(one, PublishedRanking) for one in good)
    set_aside(last, "r.csv line 302", words, reason)


def test_a_quote_that_is_never_closed_is_named_with_its_line(tmp_path: Path) -> None:
    """It would take the rows behind it along in silence."""
    text = RATINGS.replace("p 3,0", '"p 3,0')
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(
        ValueError, match=r"r\.csv line 8 is no row of a CSV file, and takes the 293 lines after it along"
    ):
        list(read_published("ratings", tmp_path / "r.csv"))


def test_a_broken_line_of_json_lines_costs_itself(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", "generations": ["0", "1"], "ranking": [1, 2]})
    path = tmp_path / "rankings.jsonl"
    path.write_text(f"{row}\n{row[:20]}\n{row}\n{row[:-9]}")
    first, bad, second, cut = read_published("rankings", path)
    assert facts(first) == facts(second)
    set_aside(bad, "rankings.jsonl line 2", "line 2 is not JSON")
    set_aside(cut, "rankings.jsonl line 4", "line 4 is not JSON")
    path.write_text(f"{row[:20]}\n{row}\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(read_published("rankings", path))


def test_bad_groups_of_imagerewarddb_are_set_aside(tmp_path: Path) -> None:
    """The first prompt, too: shards begin with the last image of one; and an id has one prompt, or says nothing."""
    good = [db(name, 1) | {"prompt_id": 1, "prompt": "p 1"} for name in "ab"]  # a number will do
    other = db("d", 2, "2") | {"prompt": "q"}
    for bad, words in (
        ([db("c", 0, "2"), db("d", 1, "2")], "rank is 0; it must be 1, the best, or more"),
        ([db("c", 1, "2"), db("c", 2, "2")], "c.webp' is there more than once"),
        ([db("c", 1, "2"), other], "element 2: prompt_id '2' must have one prompt, not 'p 2' and 'q'"),
    ):
        path = in_json(tmp_path / "x.json", bad + good)
        first, whole = read_published("imagerewarddb", path)
        set_aside(first, "x.json element 1", words)
        assert facts(whole)[0] == "p 1"
        whole, last = read_published("imagerewarddb", in_json(path, good + bad))
        set_aside(last, "x.json element 3", words.replace("element 2", "element 4"))
        assert facts(whole)[0] == "p 1"


def test_rows_without_a_prompt_id_are_no_group(tmp_path: Path) -> None:
    """In the first row it is a fault of the file, in others of the row: nothing says whose images those are."""
    good = [db("a", 1), db("b", 2)]
    bare = [{key: value for key, value in db(name, 1).items() if key != "prompt_id"} for name in "cd"]
    for path in (in_json(tmp_path / "x.json", bare + good), in_zip(tmp_path / "x.zip", bare + good, {})):
        with pytest.raises(SchemaError, match=r"x\.json element 1 has no prompt_id"):
            next(read_published("imagerewarddb", path))
    judged, *others = read_published("imagerewarddb", in_json(tmp_path / "x.json", good + bare))
    assert facts(judged)[2] == [1, 2]
    for number, entry in enumerate(others, 3):
        set_aside(entry, f"x.json element {number}", "has no prompt_id")
    assert len(others) == 2
    nulls = [db(name, 1, prompt_id=None) for name in "cd"]
    first, second, judged = read_published("imagerewarddb", in_parquet(tmp_path / "x.parquet", nulls + good))
    assert facts(judged)[2] == [1, 2]
    set_aside(first, "x.parquet row 1", "prompt_id is empty")
    set_aside(second, "x.parquet row 2", "prompt_id is empty")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([1, 2], "images must hold objects"),
        ([{"image_id": "0", "fidelity": 1}, {"image_id": "1"}], "has no fidelity"),
        ([{"image_id": "0", "fidelity": "5"}, {"image_id": "1", "fidelity": 1}], "fidelity is .*finite"),
        ([{"fidelity": 2}, {"image_id": "1", "fidelity": 1}], "has no image_id"),
    ],
)
def test_aspects_of_another_layout(tmp_path: Path, images: list[object], words: str) -> None:
    path = in_jsonl(tmp_path / "v.jsonl", [{"prompt": "a", "images": images}, RATED])
    with pytest.raises(SchemaError, match=words):
        next(read_published("aspects", path, "fidelity"))


def test_later_rows_that_do_not_fit_are_set_aside(tmp_path: Path) -> None:
    rows = [IR, IR | {"ranking": [1]}, {"prompt": "a"}, IR]
    path = in_json(tmp_path / "x.json", rows)
    first, short, bare, last = read_published("imagereward", path)
    assert facts(first) == facts(last)
    set_aside(short, "x.json element 2", "1 ranks")
    set_aside(bare, "x.json element 3", "has no generations")


# ---------------------------------------------------------------- broken files


def test_a_list_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements and numbers are cut anywhere by reading."""
    rows = [IR | {"prompt": "x" * count, "weight": 0.125} for count in range(1, 40)]
    path = in_json(tmp_path / "x.json", rows)
    expected = facts_of("imagereward", path)
    assert len(expected) == 39
    for chunk in (1, 2, 7, 1000):
        monkeypatch.setattr(published_rows, "CHUNK", chunk)
        assert facts_of("imagereward", path) == expected
    (tmp_path / "indented.json").write_text(json.dumps(rows, indent=2) + "\n")
    assert facts_of("imagereward", tmp_path / "indented.json") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps([IR, IR])[:-9].encode(), "element 2 is not JSON"),
        (json.dumps([IR])[:-1].encode(), "element 2 is not JSON"),
        (json.dumps([IR])[:-1].encode() + b" oops]", "element 2 is not JSON"),
        (b'{"prompt": "a"}', "must hold a JSON list of objects"),
        (b"", "must hold a JSON list of objects"),
        (b"[" + b'{"a":' * 100_000, "element 1 is not JSON"),
        (b"[\xff]", "is not UTF-8 text"),
    ],
)
def test_a_broken_list(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json.*{words}"):
        list(read_published("imagereward", tmp_path / "x.json"))


def test_an_element_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_rows, "MAX_ROW", 100_000)
    (tmp_path / "x.json").write_text('[{"a": "' + "x" * 300_000 + '"}]')
    with pytest.raises(ValueError, match="element 1 is not JSON"):
        list(read_published("imagereward", tmp_path / "x.json"))


def test_a_json_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_rows, "MAX_JSON", 100)
    path = in_zip(tmp_path / "x.zip", [db("a", 1), db("b", 2)], {})
    with pytest.raises(ValueError, match=r"x\.zip: x\.json has \d+ bytes; at most 100"):
        list(read_published("imagerewarddb", path))


def test_broken_tables_and_archives(tmp_path: Path) -> None:
    table = in_parquet(tmp_path / "x.parquet", [pickapic()])
    table.write_bytes(table.read_bytes()[:-20])
    archive = in_zip(tmp_path / "x.zip", [db("a", 1)], {})
    archive.write_bytes(archive.read_bytes()[:-20])
    for layout, path in (("pickapic", table), ("imagerewarddb", archive)):
        with pytest.raises(ValueError, match=rf"{path.name} is broken, or of another kind"):
            list(read_published(layout, path))
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=r"cannot read \S*nowhere: .*No such file"):
            list(read_published(layout, tmp_path / "nowhere"))
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as bare:
        bare.writestr("a.webp", b"")
    with pytest.raises(ValueError, match="holds 0 JSON files; a part of ImageRewardDB has one"):
        list(read_published("imagerewarddb", tmp_path / "none.zip"))
