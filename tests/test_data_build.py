"""The data sets on disk: their layout, that they are a function of their seed, and that their stated shares are met."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
from data_build import shapes, simulate_rankings
from preftune import families
from preftune.images import load_pixels
from preftune.records import read_imagefolder, read_jsonl, read_rankings
from preftune.sampling import Sampling, sample
from rewards.shapes import Scene, Thing, in_world, parse_caption
from rewards.shapes_judge import judge

# ---------------------------------------------------------------- shapes


def test_a_folder_of_shapes(tmp_path: Path) -> None:
    """An imagefolder: PNG files and metadata.jsonl with file_name first."""
    shapes.main(shapes.Config(output_dir=tmp_path / "data", count=6, seed=3))
    samples = read_imagefolder(tmp_path / "data")
    assert [sample.path.relative_to(tmp_path / "data").as_posix() for sample in samples] == [
        f"000/{i:06d}.png" for i in range(6)
    ]
    assert in_world([sample.text for sample in samples])
    for i, read in enumerate(samples):
        image, row = shapes.render_image(i, shapes.Config(output_dir=tmp_path, seed=3))
        assert np.array_equal(np.asarray(Image.open(read.path)), image)
        assert {"text": read.text, **read.extra} == row
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *(f"{i:06d}.png" for i in range(6)),
        "metadata.jsonl",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_image_i_depends_on_the_seed_and_i_alone(tmp_path: Path) -> None:
    for name, count, seed in (("few", 3, 0), ("many", 5, 0), ("other", 3, 1)):
        shapes.main(shapes.Config(output_dir=tmp_path / name, count=count, seed=seed))
    few, many, other = (read_imagefolder(tmp_path / name) for name in ("few", "many", "other"))
    for one, same in zip(few, many[:3], strict=True):
        assert (one.text, one.extra) == (same.text, same.extra)
        assert one.path.read_bytes() == same.path.read_bytes()
    assert [one.text for one in few] != [one.text for one in other]
    assert len({one.path.read_bytes() for one in many}) == 5


def differences(one: str, other: str) -> int:
    """In how many things two captions differ. A group ("two red circles") has no place for a relation or a size."""
    a, b = parse_caption(one), parse_caption(other)
    groups = [len(scene.things) > 1 and len(set(scene.things)) == 1 for scene in (a, b)]
    number = int(a.background != b.background)
    if not any(groups):
        number += a.relation != b.relation
    if len(a.things) == len(b.things):
        pairs = set(zip(a.things, b.things, strict=True))
        return number + sum(
            (x.colour != y.colour) + (x.shape != y.shape) + (x.size != y.size) for x, y in pairs
        )
    fewer, more = sorted((Counter(map(unsized, scene.things)) for scene in (a, b)), key=Counter.total)
    return number + 1 + (not fewer <= more)


def unsized(thing: Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def test_the_stated_shares_are_met(tmp_path: Path) -> None:
    """Within four binomial deviations of 1000 rows."""
    config = shapes.Config(output_dir=tmp_path, wrong_share=0.15, weird_share=0.35, seed=1)
    rows = [shapes.render_image(i, config)[1] for i in range(1000)]
    wrong = [row for row in rows if row["text"] != row["rendered"]]
    assert len(wrong) == pytest.approx(150, abs=45)
    assert sum(bool(row["defects"]) for row in rows) == pytest.approx(350, abs=60)
    for row in wrong:
        assert differences(str(row["text"]), str(row["rendered"])) == 1, row
    for row in rows:
        for miss in row["near_misses"]:
            assert differences(miss, str(row["rendered"])) == 1, row
            assert miss != row["rendered"]
        scene, hard = parse_caption(str(row["rendered"])), parse_caption(row["near_misses"][0])
        kept = [(thing.colour, thing.size) for thing in hard.things]
        assert kept == [(thing.colour, thing.size) for thing in scene.things], (
            "a shape or the relation is wrong"
        )
        assert hard.background == scene.background


def test_shares_of_none_and_all(tmp_path: Path) -> None:
    none = shapes.Config(output_dir=tmp_path, wrong_share=0, weird_share=0)
    for i in range(100):
        row = shapes.render_image(i, none)[1]
        assert row["text"] == row["rendered"]
        assert row["defects"] == {}
    everything = shapes.Config(output_dir=tmp_path, wrong_share=1, weird_share=1)
    for i in range(300):
        row = shapes.render_image(i, everything)[1]
        assert row["text"] != row["rendered"]
        assert row["defects"]


def test_captions_that_name_defects(tmp_path: Path) -> None:
    config = shapes.Config(output_dir=tmp_path, wrong_share=0, weird_share=0.5, name_defects=True)
    rows = [shapes.render_image(i, config)[1] for i in range(1000)]
    about_defects = kept_plain = degrees = 0
    for row in rows:
        named = str(row["text"]).removeprefix(str(row["rendered"])).removeprefix(", with ")
        truth = {
            ("tint" if name == "off_palette" else name): ("slight " * (s < 0.4) + "strong " * (s >= 0.7))
            for name, s in row["defects"].items()
        }
        assert named == " and ".join(truth[name] + name for name in sorted(truth))
        for miss in row["near_misses"]:
            assert miss != row["text"]
            scene, _, said = miss.partition(", with ")
            if scene == row["rendered"]:
                about_defects += 1
                kept_plain += not said
                degrees += bool(said) and set(truth) == {defect.split()[-1] for defect in said.split(" and ")}
            else:
                assert differences(scene, str(row["rendered"])) == 1
                assert said == named, "wrong about one matter at a time"
    assert about_defects == pytest.approx(500, abs=63)  # four deviations of half of the 1000 second ones
    assert kept_plain == pytest.approx(500 * 0.5 * 0.4, abs=38)
    assert degrees == pytest.approx(500 * 0.5 * 0.35, abs=36)


def test_what_was_drawn_is_what_the_judge_sees(tmp_path: Path) -> None:
    config = shapes.Config(output_dir=tmp_path, wrong_share=1, weird_share=0)
    rendered = [shapes.render_image(i, config) for i in range(60)]
    pixels = torch.from_numpy(np.stack([image for image, _ in rendered])).permute(0, 3, 1, 2).float() / 255
    right = judge(pixels, [str(row["rendered"]) for _, row in rendered]).alignment
    wrong = judge(pixels, [str(row["text"]) for _, row in rendered]).alignment
    assert right.mean() > 0.97
    assert wrong.mean() < 0.9


@pytest.mark.parametrize("program", [shapes, simulate_rankings])
def test_an_existing_folder_is_left_alone(
    program: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        program.main(program.Config(output_dir=tmp_path, count=2))
    assert stop.value.code == 2
    assert f"{tmp_path} exists already; remove it or choose another --output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("program", [shapes, simulate_rankings])
def test_nothing_half_written(program: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted program leaves no folder of that name, and the next one is not disturbed by what it left."""
    name = {shapes: "render_image", simulate_rankings: "rendered_image"}[program]
    original = getattr(program, name)
    calls = itertools.count()

    def fail(*arguments: object) -> object:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    config = program.Config(output_dir=tmp_path / "deep" / "data", count=8)
    monkeypatch.setattr(program, name, fail)
    with pytest.raises(KeyboardInterrupt):
        program.main(config)
    assert not config.output_dir.exists()
    monkeypatch.undo()
    program.main(config)
    assert [path.name for path in config.output_dir.parent.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda path: shapes.Config(output_dir=path, count=0), "--count must be at least 1, got 0"),
        (lambda path: shapes.Config(output_dir=path, wrong_share=1.5), r"--wrong-share must lie in \[0, 1\], got 1.5"),
        (lambda path: shapes.Config(output_dir=path, weird_share=float("nan")), "--weird-share .* got nan"),
        (lambda path: simulate_rankings.Config(output_dir=path, images=1), "--images at least 2, got 1000 and 1"),
        (lambda path: simulate_rankings.Config(output_dir=path, annotators=0), "--annotators must be at least 1, got 0"),
        (lambda path: simulate_rankings.Config(output_dir=path, annotator_noise=-1), "--annotator-noise .* got -1"),
        (lambda path: simulate_rankings.Config(output_dir=path, guidance_scales=()), "--guidance-scales must be at least 0 and --step-counts at least 1"),
        (lambda path: simulate_rankings.Config(output_dir=path, step_counts=(0,)), "--guidance-scales must be at least 0 and --step-counts at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(build: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(tmp_path)


# ---------------------------------------------------------------- rankings


def images_of(paths: tuple[Path, ...]) -> Tensor:
    return torch.stack([load_pixels(path) for path in paths])


def assert_ranks_follow(ranks: tuple[int, ...], golds: list[float]) -> None:
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if abs(golds[i] - golds[j]) > 1e-3:  # the file rounds to four decimals
            assert (ranks[i] < ranks[j]) == (golds[i] > golds[j]), (ranks, golds)


def test_rendered_rankings(tmp_path: Path) -> None:
    """Without noise the ranks are the judge's; the gold in the file is that of the images in the files."""
    simulate_rankings.main(simulate_rankings.Config(output_dir=tmp_path / "data", count=4, annotator_noise=0))
    rows = read_jsonl(tmp_path / "data" / "rankings.jsonl")
    read = read_rankings(tmp_path / "data")
    assert len(read) == 4
    for ranking, row in zip(read, rows, strict=True):
        assert (ranking.source, row["images"]) == ("annotator 0", "rendered")
        assert len(ranking.paths) == 4
        assert_ranks_follow(ranking.ranks, row["gold"])
        gold = judge(images_of(ranking.paths), [ranking.prompt] * 4).gold
        torch.testing.assert_close(torch.tensor(row["gold"]), gold, rtol=0, atol=1e-4)
    summary = json.loads((tmp_path / "data" / "summary.json").read_text())
    assert summary["gold_mean"] == pytest.approx(np.mean([row["gold"] for row in rows]), abs=1e-4)
    assert summary["annotator_agrees_with_judge"] > 0.9  # ties alone count a half


def test_annotators_err_and_are_seeded(tmp_path: Path) -> None:
    for name, count, noise in (("short", 4, 0.2), ("long", 6, 0.2), ("exact", 4, 0.0), ("wild", 6, 50.0)):
        simulate_rankings.main(
            simulate_rankings.Config(output_dir=tmp_path / name, count=count, annotator_noise=noise)
        )
    short, long, exact, wild = (
        [(row["prompt"], row["gold"], row["ranking"]) for row in read_jsonl(tmp_path / name / "rankings.jsonl")]
        for name in ("short", "long", "exact", "wild")
    )  # fmt: skip
    assert short == long[:4]
    assert [row[:2] for row in short] == [
        row[:2] for row in exact
    ]  # noise changes what is said, not what is seen
    assert [row[2] for row in wild] != [row[2] for row in long]
    first = sorted((tmp_path / "short").rglob("*.png"))[0]
    assert first.read_bytes() == (tmp_path / "long" / first.relative_to(tmp_path / "short")).read_bytes()


def test_annotators_see_the_same_and_err_apart(tmp_path: Path) -> None:
    for name, number in (("one", 1), ("three", 3)):
        simulate_rankings.main(
            simulate_rankings.Config(
                output_dir=tmp_path / name, count=5, annotators=number, annotator_noise=0.3
            )
        )
    one, three = (read_jsonl(tmp_path / name / "rankings.jsonl") for name in ("one", "three"))
    assert three[::3] == one, "the first annotator does not depend on how many there are"
    for index in range(5):
        same = three[3 * index : 3 * index + 3]
        assert [row["source"] for row in same] == ["annotator 0", "annotator 1", "annotator 2"]
        assert len({json.dumps([row["prompt"], row["generations"], row["gold"]]) for row in same}) == 1
    assert any(a["ranking"] != b["ranking"] for a, b in zip(three[::3], three[1::3], strict=True))


def test_rendered_images_are_right_or_nearly(tmp_path: Path) -> None:
    """Half of them show the caption; the other half is off by a word or two, so that alignment can be learned."""
    scene = Scene(
        things=(Thing(colour="red", shape="circle"), Thing(colour="blue", shape="square")),
        relation="above",
        background="white",
    )
    rng = np.random.default_rng(0)
    pixels = torch.stack([simulate_rankings.rendered_image(scene, rng) for _ in range(150)])
    assert pixels.shape == (150, 3, 64, 64)
    alignment = judge(pixels, [scene.caption()] * 150).alignment
    right = (alignment > 0.93).float().mean().item()
    assert 0.3 < right < 0.62  # half less those that defects blur
    assert alignment.std() > 0.1


def test_people_disagree_as_much_and_gold_has_all_levels(tmp_path: Path) -> None:
    """Two annotators agree on 65 % of rendered pairs, as people do, and neither bad nor good images crowd the others out."""
    simulate_rankings.main(simulate_rankings.Config(output_dir=tmp_path / "data", count=60, images=8))
    summary = json.loads((tmp_path / "data" / "summary.json").read_text())
    assert summary["annotator_agrees_with_annotator"] == pytest.approx(0.65, abs=0.025)
    rows = read_jsonl(tmp_path / "data" / "rankings.jsonl")
    gold = np.array([row["gold"] for row in rows])
    assert (gold < 0.1).mean() < 0.25
    assert (np.histogram(gold, np.linspace(0, 1, 6))[0] / gold.size > 0.04).all()
    i, j = np.triu_indices(8, 1)
    right = gold > 0.4  # no error: what is left is quality
    assert (right[:, i] & right[:, j]).mean() > 0.15


def test_generated_rankings(tmp_path: Path) -> None:
    """Image k of ranking i is the pipeline's for the caption of ranking i and the seed of its row."""
    model = tiny.pipeline_folder(tmp_path / "model")
    config = simulate_rankings.Config(
        output_dir=tmp_path / "data",
        count=3,
        images=2,
        model=str(model),
        guidance_scales=(2.0,),
        step_counts=(2,),
        annotator_noise=0,
    )
    simulate_rankings.main(config)
    read = read_rankings(tmp_path / "data")
    rows = read_jsonl(tmp_path / "data" / "rankings.jsonl")
    assert [row["images"] for row in rows] == ["generated"] * 3
    assert [ranking.prompt for ranking in read] == [
        simulate_rankings.scene_of(index, config)[0].caption() for index in range(3)
    ]
    for ranking, row in zip(read, rows, strict=True):
        assert_ranks_follow(ranking.ranks, row["gold"])
    sampling = Sampling(num_inference_steps=2, guidance_scale=2.0, solver="ddim", resolution="64")
    prompts = [ranking.prompt for ranking in read for _ in range(2)]
    batches = sample(families.load(model), prompts, [1_000_003 + row for row in range(6)], sampling)
    expected = torch.cat([*batches])
    pixels = torch.cat([images_of(ranking.paths) for ranking in read])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.01 / 255)
    assert (pixels[0] - pixels[1]).abs().max() > 0.01


def test_generated_settings_are_mixed_and_independent_of_the_count(tmp_path: Path) -> None:
    model = tiny.pipeline_folder(tmp_path / "model")
    found = []
    for count in (2, 3):
        config = simulate_rankings.Config(
            output_dir=tmp_path, count=count, images=3, guidance_scales=(1.0, 3.0), step_counts=(1, 2)
        )
        folder = tmp_path / str(count)
        simulate_rankings.write_generated(config, model, folder)
        found.append(images_of(sorted(folder.rglob("*.png"))))
    short, long = found
    assert len(long) == 9
    torch.testing.assert_close(short, long[:6], rtol=0, atol=1.01 / 255)


def test_a_folder_that_is_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        simulate_rankings.main(
            simulate_rankings.Config(output_dir=tmp_path / "data", count=1, model=str(tmp_path))
        )
    assert stop.value.code == 2
    assert "model_index.json" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_ranks_share_places() -> None:
    assert simulate_rankings.rank([0.3, 0.9, 0.3, 0.1]) == [2, 1, 2, 4]
    assert simulate_rankings.rank([1.0, 1.0]) == [1, 1]


def test_agreement_by_hand() -> None:
    """A pair one apart and noise 1: right with p = Phi(1 / sqrt 2) = 0.760250."""
    found = simulate_rankings.agreement(np.array([[0.0, 1.0]], np.float32), 1.0)
    assert found["annotator_agrees_with_judge"] == pytest.approx(0.760250, abs=1e-5)
    assert found["annotator_agrees_with_annotator"] == pytest.approx(0.760250**2 + 0.239750**2, abs=1e-5)
    assert found["gold_mean"] == 0.5
    assert found["gold_std_within_ranking"] == 0.5
    exact = simulate_rankings.agreement(np.array([[0.0, 1.0, 0.5]], np.float32), 0.0)
    assert exact["annotator_agrees_with_judge"] == 1
    assert exact["annotator_agrees_with_annotator"] == 1


def test_agreement_against_simulated_annotators() -> None:
    rng = np.random.default_rng(0)
    golds = rng.uniform(0, 1, (40, 4)).astype(np.float32)
    found = simulate_rankings.agreement(golds, 0.2)
    i, j = np.triu_indices(4, 1)
    said = golds + rng.normal(0, 0.2, (2, 2000, 40, 4))
    order = said[..., i] > said[..., j]
    with_judge = (order == (golds[:, i] > golds[:, j])).mean()
    assert found["annotator_agrees_with_judge"] == pytest.approx(with_judge, abs=0.004)
    assert found["annotator_agrees_with_annotator"] == pytest.approx((order[0] == order[1]).mean(), abs=0.004)


def test_the_share_of_single_scenes(tmp_path: Path) -> None:
    def singles(share: float) -> int:
        config = shapes.Config(output_dir=tmp_path, single_share=share, wrong_share=0)
        rows = (shapes.render_image(i, config)[1] for i in range(400))
        return sum(len(parse_caption(str(row["rendered"])).things) == 1 for row in rows)

    assert singles(1) == 400
    assert singles(0.4) == pytest.approx(400 * (0.4 + 0.6 * 0.25), abs=40)  # four deviations
    assert singles(0) == pytest.approx(100, abs=35)
