"""eval/preference_accuracy.py: a whole small evaluation with real scorers, damaged images, views, and what users get wrong."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import rewards
from eval import preference_accuracy, view_scores
from eval.agreement import (
    ACCURACIES,
    ACCURACY,
    AS_IS,
    CHANGES,
    INVERSION,
    MEAN,
    OTHERS,
    PER_PROMPT,
    RankedSet,
)
from eval.agreement_table import Measurement, agreement_table
from eval.preference_plots import equal_accuracies, percent
from eval.rankings import read_ranked_images, without_rejected
from preftune import cli
from preftune.records import read_jsonl, write_jsonl
from rewards.pixels import from_pil
from rewards.shapes import SIZE, parse_caption
from rewards.shapes_rendering import place, render, to_bytes

PLAIN = "a red circle on a white background"
LEFT = "a red circle left of a blue square on a grey background"
RIGHT = "a red circle right of a blue square on a grey background"
SCORERS = ["--rewards", "imagereward-tiny=1", "shapes=1", "brightness=1"]


def ranked(prompt: str, names: list[str], ranks: list[int], source: str) -> dict[str, object]:
    return {"prompt": prompt, "generations": names, "ranking": ranks, "source": source}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greys, which two annotators list and rank differently; a scene and its mirror image; four damaged or useless files."""
    folder = tmp_path_factory.mktemp("data")
    for level in (0, 100, 200):
        Image.new("RGB", (SIZE, SIZE), (level,) * 3).save(folder / f"{level}.png")
    rng = np.random.default_rng(0)
    scene = parse_caption(LEFT)
    rendered = Image.fromarray(to_bytes(render(place(scene, rng), scene.background, rng, {})))
    rendered.save(folder / "right.png")
    ImageOps.mirror(rendered).save(folder / "wrong.png")
    whole = (folder / "right.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "<b>empty.png").touch()
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (32, 32)).save(folder / "small.png")
    write_jsonl(
        folder / "rankings.jsonl",
        [
            ranked(PLAIN, ["0.png", "100.png", "200.png", "cut.png"], [3, 2, 1, 4], "a"),
            ranked(PLAIN, ["200.png", "cut.png", "100.png", "0.png"], [1, 4, 3, 2], "b"),
            ranked(LEFT, ["right.png", "wrong.png", "<b>empty.png"], [1, 2, 3], "a"),
            ranked(LEFT, ["right.png", "small.png", "text.png"], [3, 2, 1], "a"),
        ],
    )
    return folder


def run(data: Path, output: Path, *more: str) -> int:
    return preference_accuracy.main(
        cli.parse(preference_accuracy.Config, ["--data", str(data), "--output-dir", str(output), *more])
    )


@pytest.fixture(scope="module")
def report(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new"
    assert run(data, output, *SCORERS, "--crops", "0.9", "0.5", "--batch-size", "3", "--workers", "1") == 0
    return output


def values(report: Path) -> dict[tuple[str, str, str, str], float]:
    lines = csv.DictReader((report / "table.csv").open())
    return {
        (line["rater"], line["reference"], line["view"], line["metric"]): float(line["value"])
        for line in lines
    }


def scores(report: Path) -> dict[tuple[str, str], dict[str, str]]:
    lines = csv.DictReader((report / "scores.csv").open())
    return {(Path(line["image"]).name, line["view"]): line for line in lines}


def test_the_table_by_hand(report: Path) -> None:
    """Without the damaged images a ranks 200 100 0, b 200 0 100, and a ranks the scene over its mirror image."""
    found, read = values(report), scores(report)
    views = ("as it is", "flip + crop 0.9")
    greys = [("200.png", "100.png"), ("200.png", "0.png"), ("100.png", "0.png")]
    pairs = [*greys, ("right.png", "wrong.png")]
    said = [*greys, *greys[:2], ("0.png", "100.png"), pairs[-1]]

    def choice(name: str, view: str, pair: tuple[str, str]) -> float:
        one, other = (float(read[image, view][name]) for image in pair)
        return np.sign(one - other)

    for name in ("imagereward-tiny", "brightness"):
        first, cut = (np.mean([choice(name, view, pair) == 1 for pair in said]) for view in views)
        flipped = np.mean([choice(name, views[0], pair) != choice(name, views[1], pair) for pair in pairs])
        assert found[name, "annotators", views[0], "accuracy (ImageReward)"] == pytest.approx(first)
        assert found[name, "annotators", views[1], "accuracy (ImageReward)"] == pytest.approx(cut)
        assert found[name, "annotators", views[1], CHANGES[ACCURACY]] == pytest.approx(cut - first)
        assert found[name, "annotators", views[1], "flipped choices"] == pytest.approx(flipped)
    assert found["brightness", "annotators", views[0], "recall@1"] >= 2 / 3, "of three rankings"
    assert found["one annotator", "annotators", views[0], "accuracy (ImageReward)"] == pytest.approx(4 / 6)
    assert found["one annotator", OTHERS, views[0], "recall@1"] == 1, "200 is best for both"
    assert found["one annotator", OTHERS, views[0], ACCURACY] == pytest.approx(4 / 6)
    assert ("one annotator", MEAN, views[0], ACCURACY) not in found
    choices = [choice("brightness", view, pair) for view in views for pair in greys[:2]]
    inversions = [np.mean([*(one < 0 for one in choices[start : start + 2]), 0]) for start in (0, 2)]
    assert found["brightness", MEAN, views[0], INVERSION] == pytest.approx(1 - inversions[0])
    assert found["brightness", MEAN, views[1], CHANGES[INVERSION]] == pytest.approx(
        inversions[0] - inversions[1]
    )
    judge = [pair for pair in pairs if choice("shapes", views[0], pair)]
    right = [choice("brightness", views[0], pair) == choice("shapes", views[0], pair) for pair in judge]
    assert found["brightness", "judge", views[0], "accuracy (ImageReward)"] == pytest.approx(np.mean(right))


def test_scores_are_those_of_the_scorers(report: Path, data: Path) -> None:
    """Prepared as rewards.pixels does, with the caption that is true of the view."""
    found = scores(report)
    scorer = rewards.load("imagereward-tiny")
    with Image.open(data / "right.png") as image:
        views = list(view_scores.views_of(image, (0.9, 0.5)))
    for view, name, prompt in zip(
        views, ("as it is", "flip + crop 0.9", "flip + crop 0.5"), (LEFT, RIGHT, RIGHT), strict=True
    ):
        with torch.no_grad():
            expected = scorer(from_pil(view, scorer.card.preprocess)[None], [prompt]).item()
        assert float(found["right.png", name]["imagereward-tiny"]) == pytest.approx(expected, abs=1e-5)
        assert float(found["right.png", name]["brightness"]) == pytest.approx(
            from_pil(view).mean().item(), abs=1e-6
        )
    judge = {name: float(found[name, "as it is"]["shapes"]) for name in ("right.png", "wrong.png")}
    assert judge["right.png"] > judge["wrong.png"] + 0.05
    assert found["right.png", "flip + crop 0.9"]["shapes"] == "", "the judge reads whole images only"
    assert found["cut.png", "as it is"]["imagereward-tiny"] == ""


def test_damaged_images_are_set_aside_and_counted(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rejected = {Path(row["image"]).name: row["reason"] for row in read_jsonl(report / "rejected.jsonl")}
    assert set(rejected) == {"cut.png", "<b>empty.png", "text.png", "small.png"}
    assert "64 x 64" in rejected["small.png"]
    page = (report / "report.html").read_text()
    assert (
        "5 images of 2 prompts, 3 rankings with 7 untied pairs; 4 images set aside; 1 of 2 sets have a single annotator"
        in page
    )
    assert "&lt;b&gt;empty.png" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 5
    for name in ("accuracy", "buckets", "robustness", "interpolation", "correlation"):
        assert (report / f"{name}.png").stat().st_size > 1000


def test_one_scorer_without_views(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The least there is: two plots, no robustness, and images of any size where nobody minds; then again in one process."""
    assert run(data, tmp_path, "--rewards", "brightness=1", "--crops", "--workers", "0") == 0
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["accuracy", "buckets"]
    assert {view for _, _, view, _ in values(tmp_path)} == {"as it is"}
    assert len(read_jsonl(tmp_path / "rejected.jsonl")) == 3, "small.png is an image like any other"
    assert "3 images set aside" in capsys.readouterr().out


def test_count_takes_the_first_prompts(data: Path) -> None:
    config = cli.parse(preference_accuracy.Config, ["--data", str(data), "--count", "1"])
    ranked = read_ranked_images(config.data, config.count)
    assert ranked.prompts == [PLAIN]
    assert [image.path.name for image in ranked.images] == ["0.png", "100.png", "200.png", "cut.png"]
    (one,) = ranked.judged
    assert one.ranks.tolist() == [[3, 2, 1, 4], [2, 3, 1, 4]], "in one order, whatever that of the file"
    (less,) = without_rejected(ranked.judged, {1: "damaged"})
    assert less.rows.tolist() == [0, 2, 3]
    assert less.ranks.tolist() == [[3, 1, 4], [2, 1, 4]]
    assert without_rejected(ranked.judged, {1: "", 2: "", 3: ""}) == []


def test_a_source_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """a ranks the same images again, in another order and otherwise: skipped. Other images, prompts and nameless ones count."""
    for level in (0, 100, 200):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{level}.png")
    pair = ["0.png", "100.png"]
    lines = [
        ranked("p", pair, [1, 2], "a"),
        ranked("p", pair[::-1], [1, 2], "a"),
        ranked("p", pair, [1, 2], "b"),
        ranked("p", pair, [2, 1], ""),
        ranked("p", pair, [2, 1], ""),
        ranked("p", [*pair, "200.png"], [1, 2, 3], "a"),
        ranked("q", pair, [1, 2], "a"),
    ]
    write_jsonl(tmp_path / "rankings.jsonl", lines)
    found = read_ranked_images([tmp_path], None)
    assert found.repeated == 1
    assert [one.ranks.tolist() for one in found.judged] == [
        [[1, 2], [1, 2], [2, 1], [2, 1]],
        [[1, 2, 3]],
        [[1, 2]],
    ]
    assert run(tmp_path, tmp_path / "out", "--rewards", "brightness=1", "--crops", "--workers", "0") == 0
    said = "1 rankings skipped, whose source had ranked the same images before; 2 of 3 sets have a single annotator"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_counts_once(data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(data)
    for other, words in ((data, f"names {data} twice;"), (link, f"names {link} twice, first as {data};")):
        with pytest.raises(ValueError, match=words):
            preference_accuracy.Config(data=(data, other))


def test_rankings_of_ties_alone_have_a_report(tmp_path: Path) -> None:
    """No pair, so no accuracy and no change of it; one prompt, so no interval."""
    for name in "ab":
        Image.new("RGB", (8, 8), (ord(name),) * 3).save(tmp_path / f"{name}.png")
    write_jsonl(tmp_path / "rankings.jsonl", [ranked("p", ["a.png", "b.png"], [1, 1], "a")])
    output = tmp_path / "out"
    flags = ["--rewards", "brightness=1", "--crops", "0.9", "0.5", "--workers", "0"]
    assert run(tmp_path, output, *flags) == 0
    page = (output / "report.html").read_text()
    assert (output / "robustness.png").stat().st_size > 1000
    assert not (output / "buckets.png").exists(), "four bars of 50 per cent tell nothing"
    found = list(csv.DictReader((output / "table.csv").open()))
    assert ACCURACY not in {row["metric"] for row in found}
    assert {row["value"] for row in found if row["metric"] == INVERSION} == {"1.0"}
    assert {(row["low"], row["high"]) for row in found} == {("", "")}
    assert "<td>100.0</td>" in page, "a value without an interval"
    assert "nan" not in page.split("<body>")[1].split("base64")[0]


def test_equal_accuracies_are_drawn_once() -> None:
    """One annotator without ties: all four are equal. A scorer that ties has soft agreement of its own."""

    def groups(scores: list[float], *ranks: list[float]) -> list[list[str]]:
        judged = [RankedSet(prompt=n, rows=np.arange(3), ranks=np.array(ranks)) for n in range(2)]
        return equal_accuracies(agreement_table(judged, {"x": np.array([scores])}, [AS_IS], 2))

    assert groups([3.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == [[*ACCURACIES]]
    assert groups([2.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == [
        [ACCURACY, PER_PROMPT],
        [INVERSION],
        ["soft agreement"],
    ]
    assert [
        name for names in groups([3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) for name in names
    ] == [*ACCURACIES]


def test_a_change_of_nothing_has_no_minus() -> None:
    row = Measurement(
        rater="x", reference=MEAN, view="v", metric=CHANGES[ACCURACY], value=-1e-17, low=-0.0, high=2e-4, prompts=2, total=9.0
    )  # fmt: skip
    assert percent(row) == "+0.0 [+0.0, +0.0]"
    assert percent(replace(row, value=-0.02)) == "-2.0 [+0.0, +0.0]"


def test_ratings_with_ties_have_no_accuracy_of_a_person(tmp_path: Path) -> None:
    """Two people who rate in two steps, beside a scorer that never ties."""
    names = [f"{level}.png" for level in (0, 100, 200)]
    for name in names:
        Image.new("RGB", (8, 8), (int(name[:-4]),) * 3).save(tmp_path / name)
    rankings = [
        ranked(f"p {n}", names, ranks, who)
        for n in range(3)
        for who, ranks in (("a", [2, 1, 1]), ("b", [2, 2, 1]))
    ]
    write_jsonl(tmp_path / "rankings.jsonl", rankings)
    assert run(tmp_path, tmp_path / "out", "--rewards", "brightness=1", "--crops", "--workers", "0") == 0
    found = values(tmp_path / "out")
    assert found["one annotator", "annotators", "as it is", "ties of the rater"] == 0.5
    assert ("one annotator", "annotators", "as it is", ACCURACY) not in found
    assert found["brightness", "annotators", "as it is", ACCURACY] == 1
    assert found["one annotator", "annotators", "as it is", "soft agreement"] == pytest.approx(2 / 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<th>ties of the rater</th>" in page
    assert (tmp_path / "out" / "buckets.png").exists()


def test_another_report_is_not_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rewards", "brightness", "--crops", "--workers", "0"]
    assert run(data, tmp_path, *flags) == 0
    before = (tmp_path / "report.html").read_bytes()
    assert run(data, tmp_path, *flags) == 0, "the same again"
    with pytest.raises(SystemExit) as stop:
        run(data, tmp_path, *flags, "--count", "1")
    assert stop.value.code == 2
    assert (
        "holds another report, report.html (other count); add --overwrite-output-dir"
        in capsys.readouterr().err
    )
    assert (tmp_path / "report.html").read_bytes() == before
    assert run(data, tmp_path, *flags, "--count", "1", "--overwrite-output-dir") == 0
    assert (tmp_path / "report.html").read_bytes() != before


def test_help_says_what_rewards_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(preference_accuracy.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert (
        "Scorers, each NAME or NAME=WEIGHT; NAME is one that `preftune scorers` lists, or the folder" in said
    )
    assert "Each is reported by itself, so no weight but 1 is taken." in said


def test_views_are_mirrored_and_cut_in_the_middle() -> None:
    """Columns 0 to 9, so a crop of 0.8 keeps 1 to 8, from right to left; of an odd margin less is cut at the left."""
    image = Image.fromarray(np.tile(np.arange(10, dtype=np.uint8), (20, 1)))
    first, cut, odd = view_scores.views_of(image, (0.8, 0.5))
    assert first is image
    assert cut.size == (8, 16)
    assert np.asarray(cut)[0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert np.asarray(odd)[0].tolist() == [7, 6, 5, 4, 3]
    palette = image.convert("P")
    assert [view.mode for view in view_scores.views_of(palette, (0.5,))] == ["P", "P"]


@pytest.mark.parametrize(
    ("prompt", "other"), [(LEFT, RIGHT), (RIGHT, LEFT), (PLAIN, PLAIN), ("left of a door", "left of a door")]
)
def test_captions_of_mirror_images(prompt: str, other: str) -> None:
    assert view_scores.mirrored(prompt) == other


def test_a_thread_of_pixels_is_set_aside(tmp_path: Path) -> None:
    Image.new("L", (500, 2)).save(tmp_path / "thread.png")
    images = [view_scores.PromptedImage(path=tmp_path / "thread.png", prompt="p")]
    prepare = view_scores.PrepareImage(images=images, crops=(), judged=False)
    (place, why), views = prepare((0, ""), [None])
    assert (place, views) == (0, [])
    assert "500 x 2 pixels" in why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "--data needs at least one folder"),
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"crops": (0.9, 1.2)}, r"--crops must be different shares in \(0, 1\], got \(0.9, 1.2\)"),
        ({"crops": (0.9, 0.9)}, "--crops must be different shares"),
        ({"rewards": ("beauty=1",)}, "unknown scorer"),
        ({"reward_files": ("hpsv2=x.pt",)}, "which --rewards does not use"),
    ],
)
def test_wrong_settings(data: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_accuracy.Config(**{"data": (data,)} | changes)


def test_wrong_inputs_exit_with_code_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in "ab":
        (foreign / name).touch()
    write_jsonl(foreign / "rankings.jsonl", [ranked("a door", ["a", "b"], [1, 2], "")])
    for folder, output, flags, message in (
        (tmp_path / "none", tmp_path / "out", [], "does not exist"),
        (
            foreign,
            tmp_path / "out",
            ["--rewards", "shapes=1"],
            "the images of --data have the caption 'a door'",
        ),
        (
            foreign,
            tmp_path / "out",
            ["--rewards", "brightness=1"],
            "no ranking has two images left: 2 of 2",
        ),
        (data, tmp_path / "file", ["--rewards", "brightness=1"], "cannot be written"),
        (
            data,
            tmp_path / "out",
            ["--rewards", "hpsv2=1", "--reward-files", f"hpsv2={tmp_path}/x.pt"],
            "x.pt",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run(folder, output, *flags, "--workers", "0")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
