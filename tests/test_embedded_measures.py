"""The programs beside the embedded models that measure them: tables, pair accuracy, and blind comparisons with the judge."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from preftune.images import save_image
from preftune.records import write_jsonl
from test_layout import ROOT

PROMPTS = [
    f"a {colour} circle on a white background" for colour in ("red", "green", "blue", "yellow", "orange")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("model") / "pipeline")


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "assets/tiny" / f"{name}.py"))


def start(name: str, *argv: object, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(ROOT / "assets/tiny" / f"{name}.py")
    monkeypatch.setattr("sys.argv", [file, *map(str, argv)])
    runpy.run_path(file, run_name="__main__")


def disc(colour: tuple[int, int, int]) -> Image.Image:
    """A disc of this colour on white, as the world draws one."""
    ys, xs = np.mgrid[:64, :64]
    part = np.clip(15.5 - np.hypot(xs - 31.5, ys - 31.5), 0, 1)[..., None]
    return Image.fromarray((255 + part * (np.array(colour) - 255)).round().astype(np.uint8))


RED, BLUE = (217, 26, 36), (26, 77, 217)


def folder_of(path: Path, images: list[tuple[str, Image.Image]]) -> Path:
    for k, (_, image) in enumerate(images):
        save_image(image, path / f"{k}.png")
    write_jsonl(
        path / "metadata.jsonl",
        [{"file_name": f"{k}.png", "text": text} for k, (text, _) in enumerate(images)],
    )
    return path


def test_the_table_and_the_picture(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, picture = tmp_path / "prompts.txt", tmp_path / "picture.png"
    prompts.write_text("\n".join(PROMPTS))
    flags = f"--model {model} --prompts {prompts} --count 2 --guidance-scales 1 3 --step-counts 1 2 --picture {picture}"
    start("measure", *flags.split(), "--picture-count", "9", "--picture-steps", "1", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["guidance_scale"], row["steps"]) for row in rows] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert {row["count"] for row in rows} == {2}
    assert lines[-4].split(" | ")[1:] == ["1 steps", "2 steps |"]
    assert lines[-1].startswith("| guidance_scale 3 | ")
    assert lines[-1].endswith("{gold:.3f} ({alignment:.2f}, {fidelity:.2f}) |".format(**rows[3]))
    with Image.open(picture) as image:
        assert image.width > 5 * 192  # all there are
        assert image.height > 192


def test_near_misses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge notices nearly every wrong word of clean renderings; brightness, which reads no caption, ties and so none."""
    start("near_misses", "--scorers", "shapes", "brightness", "--count", "40", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    cells = {tuple(line.split(" | ")[:2]): line.strip("| ").split(" | ")[2:] for line in lines[2:]}
    assert len(cells) == 12
    numbers: dict[str, list[tuple[float, int]]] = {"| shapes": [], "| brightness": []}
    for (scorer, word), row in cells.items():
        assert (row[0] == "-") == (word == "relation"), "one thing has no relation"
        found = [cell.split(" (") for cell in row if cell != "-"]
        numbers[scorer] += [(float(share), int(count.rstrip(")"))) for share, count in found]
    assert {share for share, _ in numbers["| brightness"]} == {0.0}
    assert min(share for share, _ in numbers["| shapes"]) > 0.85
    assert sum(count for _, count in numbers["| shapes"]) > 40 * 3, (
        "a shape, a colour and a background of each, and more"
    )


def test_pair_accuracy_by_hand(tmp_path: Path) -> None:
    measure = program("measure")
    right = {"scorer": np.array([1, 0, 1, 1, 1], bool), "annotator": np.array([0, 0, 1, 0, 1], bool)}
    found = measure["accuracies"](np.array([0.01, 0.04, 0.1, 0.2, 0.9], np.float32), right)
    assert found == {
        "all": {"pairs": 5, "scorer": 0.8, "annotator": 0.4},
        "0-0.05": {"pairs": 2, "scorer": 0.5, "annotator": 0.0},
        "0.05-0.15": {"pairs": 1, "scorer": 1.0, "annotator": 1.0},
        "0.15-0.3": {"pairs": 1, "scorer": 1.0, "annotator": 0.0},
        ">0.3": {"pairs": 1, "scorer": 1.0, "annotator": 1.0},
    }


def test_scorers_against_the_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge agrees with itself, an annotator who ranks upside down never does, and brightness ties are wrong."""
    images = [(PROMPTS[0], disc(RED)), (PROMPTS[0], disc(BLUE)), (PROMPTS[0], Image.new("RGB", (64, 64)))]
    folder = folder_of(tmp_path / "rankings", images)
    row = {"prompt": PROMPTS[0], "generations": ["0.png", "1.png", "2.png"], "ranking": [3, 2, 1]}
    write_jsonl(folder / "rankings.jsonl", [row])
    constant = tmp_path / "constant.py"
    constant.write_text("def same(pixels, prompts):\n    return pixels.mean((1, 2, 3)) * 0\n")
    flags = ("--guidance-scales", "--rankings", folder, "--scorers", "shapes", f"{constant}:same")
    start("measure", *flags, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[0])
    assert found["all"] == {"pairs": 3, "shapes": 1.0, f"{constant}:same": 0.0, "annotator": 0.0}
    assert out.splitlines()[-1].endswith("| 1.000 | 0.000 | 0.000 |")


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("measure", {"count": 0}, "--count must be at least 1"),
        ("measure", {"step_counts": (0,)}, "--step-counts must be at least 1"),
        ("measure", {"picture": Path("a.jpg")}, "must end in .png"),
        ("measure", {"rankings": (Path("a"),), "scorers": ("nobody",)}, "unknown scorer"),
        ("blind_pairs", {"output_dir": Path("a"), "count": 0}, "--count must be at least 1"),
    ],
)
def test_bad_flags_are_named(name: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        program(name)["Config"](**flags)


def test_equal_sources_are_refused() -> None:
    blind = program("blind_pairs")
    with pytest.raises(ValueError, match="same source"):
        blind["Config"](output_dir=Path("a"), first=blind["Source"](), second=blind["Source"]())


def test_blind_pairs_of_folders_and_what_the_judge_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key tells where each image went; choosing the right image agrees with the judge, the wrong one does not."""
    prompts = [f"a {size}red circle on a white background" for size in ("", "large ", "small ")]
    good = folder_of(tmp_path / "good", [(text, disc(RED)) for text in (*prompts, "a red square")])
    bad = folder_of(tmp_path / "bad", [(text, disc(BLUE)) for text in reversed(prompts)])
    blind = tmp_path / "blind"
    flags = ("--output-dir", blind, "--first.folder", good, "--second.folder", bad, "--seed", "2")
    start("blind_pairs", *flags, monkeypatch=monkeypatch)
    key = json.loads((blind / "key.json").read_text())
    assert sorted(pair["prompt"] for pair in key["pairs"]) == sorted(prompts)
    assert {pair["left"] for pair in key["pairs"]} == {"first", "second"}, "the order is random"
    red = {}
    for pair in key["pairs"]:
        with Image.open(blind / pair["files"]["L"]) as image:
            left = "first" if image.getpixel((32, 32)) == RED else "second"
        assert left == pair["left"]
        red[pair["number"]] = "L" if left == "first" else "R"
    wrong = "R" if red[3] == "L" else "L"
    choices = tmp_path / "choices.txt"
    choices.write_text(f"1 {red[1]}\n\n2 = # alike\n3 {wrong.lower()}\n")
    capsys.readouterr()
    start("blind_agreement", "--folder", blind, "--choices", choices, monkeypatch=monkeypatch)
    found = json.loads((blind / "agreement.json").read_text())
    assert {name: found[name] for name in ("pairs", "answered", "clear_choices", "judge_agrees", "chosen")} == {
        "pairs": 3, "answered": 3, "clear_choices": 2, "judge_agrees": 0.5, "chosen": {"first": 1, "second": 1},
    }  # fmt: skip
    assert found["by_difference_of_gold"]["0.3-1"] == {"pairs": 2, "judge_agrees": 0.5}
    (row,) = found["disagreements"]
    assert (row["number"], row["choice"]) == (3, wrong)
    assert row[red[3]]["gold"] > row[wrong]["gold"] + 0.3


def test_blind_pairs_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command writes the same; the number of pages is that of the pairs; a folder that exists is left alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join((ROOT / "assets/tiny/held_out.txt").read_text().splitlines(keepends=True)[:25])
    )
    flags = f"--prompts {prompts} --first.model {model} --second.model {model} --first.num-inference-steps 1 --second.num-inference-steps 1"
    for name in ("one", "two"):
        start("blind_pairs", "--output-dir", tmp_path / name, *flags.split(), monkeypatch=monkeypatch)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two
    assert {str(path) for path in one if path.suffix == ".png" and path.parent == Path()} == {
        "page_01.png",
        "page_02.png",
    }
    assert len(one) == 2 + 1 + 2 * 25
    assert len({content for path, content in one.items() if path.parent.name == "images"}) == 50, "two seeds"
    with pytest.raises(SystemExit) as stop:
        start("blind_pairs", "--output-dir", tmp_path / "one", *flags.split(), monkeypatch=monkeypatch)
    assert stop.value.code == 2
    prompts.write_text("a cat\n")  # the judge could not read it
    with pytest.raises(SystemExit) as stop:
        start("blind_pairs", "--output-dir", tmp_path / "three", *flags.split(), monkeypatch=monkeypatch)
    assert stop.value.code == 2


@pytest.mark.parametrize("line", ["x L", "1", "1 X", "1 L R", "9 L", "2 L\n2 R", "² L"])
def test_choices_that_cannot_be_read(line: str) -> None:
    read: Callable[..., Any] = program("blind_agreement")["read_choices"]
    with pytest.raises(ValueError, match=f"--choices line {line.count(chr(10)) + 1}"):
        read(line, [1, 2])


def test_equal_golds_count_as_a_half() -> None:
    compare = program("blind_agreement")["compare"]
    sides = {side: {"alignment": 1.0, "fidelity": 0.5, "gold": 0.7} for side in "LR"}
    pairs = [{"number": 1, "prompt": "a", "left": "second", "right": "first"}]
    found = compare(pairs, {1: "L"}, {1: sides})
    assert (found["judge_agrees"], found["chosen"]) == (0.5, {"first": 0, "second": 1})
    assert compare(pairs, {}, {})["judge_agrees"] is None
