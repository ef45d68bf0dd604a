"""eval/compare_reward_models.py: the arithmetic of a comparison by hand, and a whole small one from the command line."""

import csv
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
from eval import compare_reward_models as comparing
from eval.agreement import (
    ACCURACY,
    ANNOTATORS,
    AS_IS,
    CHANGES,
    FLIPPED,
    INVERSION,
    JUDGE,
    MEAN,
    ONE,
    RankedSet,
    references,
)
from eval.agreement_table import measurements
from preftune import cli
from preftune.records import read_jsonl, write_jsonl
from rewards.pixels import from_pil

pytestmark = pytest.mark.usefixtures("cpu")

SETS = [  # two prompts, three and two images, one annotator each
    RankedSet(prompt=0, rows=np.array([0, 1, 2]), ranks=np.array([[1.0, 2.0, 3.0]])),
    RankedSet(prompt=1, rows=np.array([3, 4]), ranks=np.array([[1.0, 2.0]])),
]
GOLD = np.array([0.9, 0.5, 0.7, 0.2, 0.8])
"""The judge puts image 2 before 1, and 4 before 3."""


def test_sums_by_hand() -> None:
    as_it_is, cropped = [3.0, 2.0, 1.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0, 1.0]
    said = references(SETS, GOLD)
    found = comparing.sums_of("x", np.array([as_it_is, cropped]), SETS, said, [AS_IS, "crop"], 2)
    assert {name for name, *_ in found} == {"x"}
    sums = {key[1:]: pair for key, pair in found.items()}
    assert sums[ANNOTATORS, AS_IS, ACCURACY].tolist() == [[3, 0], [3, 1]]
    assert sums[JUDGE, AS_IS, ACCURACY].tolist() == [[2, 1], [3, 1]]
    assert sums[ANNOTATORS, "crop", ACCURACY].tolist() == [[2, 0], [3, 1]]
    assert sums[ANNOTATORS, "crop", CHANGES[ACCURACY]].tolist() == [[-1, 0], [3, 1]]
    assert sums[JUDGE, "crop", CHANGES[ACCURACY]].tolist() == [[1, 0], [3, 1]]
    assert sums[ANNOTATORS, "crop", FLIPPED].tolist() == [[1, 0], [3, 1]]


def test_seeds_are_pooled_and_held_against_the_first_method() -> None:
    rest = (ANNOTATORS, AS_IS, ACCURACY)
    plain, other = ("plain", *rest), ("other", *rest)
    sums = {
        (ONE, *rest): np.array([[2.0, 1.0], [4.0, 2.0]]),
        **comparing.pooled(
            [{plain: np.array([[2.0, 0.0], [3.0, 1.0]])}, {plain: np.array([[1.0, 1.0], [3.0, 1.0]])}]
        ),
        **comparing.pooled([{other: np.array([[3.0, 1.0], [3.0, 1.0]])}] * 2),
    }
    rows = measurements(comparing.with_differences(sums, "plain"))
    values = {(row.rater, row.metric): row.value for row in rows}
    assert values == {
        (ONE, ACCURACY): pytest.approx(0.5),
        ("plain", ACCURACY): pytest.approx(4 / 8),
        ("other", ACCURACY): pytest.approx(1.0),
        ("other", comparing.OVER[ACCURACY]): pytest.approx(0.5),
    }
    over = next(row for row in rows if row.metric == comparing.OVER[ACCURACY])
    assert over.low == pytest.approx(0.5), "both prompts gain a half: no resample tells them apart"
    assert over.high == pytest.approx(0.5)
    assert "    +50.0  [+50.0, +50.0]" in comparing.to_text({"x": rows})


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    rows = measurements({("x", ANNOTATORS, AS_IS, ACCURACY): np.array([[2.0, 0.0], [4.0, 0.0]])})
    assert comparing.to_text({"d": rows}).endswith("50.0")
    comparing.plot_accuracies({"d": rows}, tmp_path / "accuracy.png")
    comparing.write_report({"d": rows}, [], tmp_path)
    assert (tmp_path / "table.csv").read_text().endswith(",0.5,,\n")


def test_ties_alone_can_be_drawn(tmp_path: Path) -> None:
    judged = [RankedSet(prompt=0, rows=np.array([0, 1]), ranks=np.array([[1.0, 1.0]]))]
    columns, said = np.array([[1.0, 2.0]]), references(judged, None)
    for views in (1, 2):
        names = [AS_IS, "flip + crop 0.9"][:views]
        found = comparing.sums_of("x", columns.repeat(views, 0), judged, said, names, 1)
        comparing.plot_accuracies({"d": measurements(found)}, tmp_path / "accuracy.png")


@pytest.mark.usefixtures("trained_here")
def test_a_whole_comparison(root: Path, tmp_path: Path) -> None:
    common = (
        f"finetune/reward_model.py --model {root}/scorer --data {root}/rankings --validation-share 0.25 --max-train-steps 2 --train-batch-size 2"
        " --gradient-accumulation-steps 1 --learning-rate 1e-2 --threads 1"
    )
    methods = [
        f"plain={common}",
        f"both={common} --stable.views 1 --stable.weighting two-stage --stable.first-stage-steps 1",
    ]
    argv = ["--methods", *methods, "--data", str(root / "rankings"), "--seeds", "0", "--crops", "0.9"]
    argv += ["--output-dir", str(tmp_path)]
    assert comparing.main(cli.parse(comparing.Config, argv)) == 0
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["method"], row["reference"], row["view"], row["metric"]) for row in rows}
    for name in ("plain", "both"):
        assert {(name, ANNOTATORS, AS_IS, ACCURACY), (name, JUDGE, AS_IS, ACCURACY)} <= found
        assert (name, ANNOTATORS, "flip + crop 0.9", FLIPPED) in found
    assert ("both", JUDGE, AS_IS, comparing.OVER[ACCURACY]) in found
    assert ("plain", JUDGE, AS_IS, comparing.OVER[ACCURACY]) not in found
    assert (ONE, JUDGE, AS_IS, INVERSION) in found
    assert (ONE, JUDGE, AS_IS, ACCURACY) not in found, "the annotator ties a third of the pairs"
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    with (tmp_path / "seeds.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"0"}
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


@pytest.fixture
def held(root: Path, tmp_path: Path) -> Path:
    """Four prompts with three images each, which a and b ranked, the last one a alone; the second image is empty."""
    folder = tmp_path / "held"
    shutil.copytree(root / "rankings", folder)
    (folder / "01.png").write_bytes(b"")
    lines = [
        {**row, "ranking": ranks, "source": source}
        for number, row in enumerate(read_jsonl(folder / "rankings.jsonl"))
        for source, ranks in (("a", [1, 2, 3]), ("b", [1, 3, 2]))
        if (number, source) != (3, "b")
    ]
    write_jsonl(folder / "rankings.jsonl", [*lines, lines[0]])
    return folder


@pytest.fixture
def trained(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was trained, in its order; a training is the shipped scorer with noise on its weights."""
    order: list[tuple[str, int]] = []

    def train(name: str, command: list[str], seed: int, output: Path) -> Path:
        folder = output / "runs" / f"{name}-{seed}"
        if folder.exists():
            return folder
        order.append((name, seed))
        shutil.copytree(root / "scorer", folder / "scorer")
        path = folder / "scorer" / "model.safetensors"
        noise = torch.Generator().manual_seed(len(order))
        weights = {
            key: value + 0.3 * torch.randn(value.shape, generator=noise)
            if value.is_floating_point()
            else value
            for key, value in load_file(path).items()
        }
        save_file(weights, path)
        return folder

    monkeypatch.setattr(comparing, "train", train)
    return order


METHODS = ["--methods", "plain=finetune/reward_model.py", "both=finetune/reward_model.py --learning-rate 1"]


def accuracy_by_hand(scorer_folder: Path, held: Path) -> float:
    """Pooled pairs of all rankings but the repeated one, without those of the empty image."""
    scorer = rewards.load(str(scorer_folder))

    def score(name: str, prompt: str) -> float:
        with Image.open(held / name) as image, torch.no_grad():
            return scorer(from_pil(image, scorer.card.preprocess)[None], [prompt]).item()

    right = []
    for row in read_jsonl(held / "rankings.jsonl")[:-1]:
        said = [
            (rank, score(name, row["prompt"]))
            for name, rank in zip(row["generations"], row["ranking"], strict=True)
            if name != "01.png"
        ]
        right += [(one[0] < other[0]) == (one[1] > other[1]) for one, other in combinations(said, 2)]
    return float(np.mean(right))


def test_seeds_are_runs_of_their_own_and_damaged_images_are_said(
    held: Path, tmp_path: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    argv = [*METHODS, "--data", str(held), "--seeds", "0", "1", "--crops", "0.9", "--output-dir", str(output)]
    assert comparing.main(cli.parse(comparing.Config, argv)) == 0
    assert trained == [("plain", 0), ("both", 0), ("plain", 1), ("both", 1)], (
        "each method within the first seed"
    )
    with (output / "seeds.csv").open() as file:
        seeds = {
            (row["method"], int(row["seed"])): float(row["value"])
            for row in csv.DictReader(file)
            if (row["reference"], row["view"], row["metric"]) == (ANNOTATORS, AS_IS, ACCURACY)
        }
    assert seeds == {
        (name, seed): pytest.approx(accuracy_by_hand(output / "runs" / f"{name}-{seed}" / "scorer", held))
        for name, seed in trained
    }
    weights = [output / "runs" / f"plain-{seed}" / "scorer" / "model.safetensors" for seed in (0, 1)]
    assert weights[0].read_bytes() != weights[1].read_bytes()  # of few pairs, both may order as many
    with (output / "table.csv").open() as file:
        table = {
            (row["method"], row["reference"], row["view"], row["metric"]): float(row["value"])
            for row in csv.DictReader(file)
        }
    assert table["plain", ANNOTATORS, AS_IS, ACCURACY] == pytest.approx(
        (seeds["plain", 0] + seeds["plain", 1]) / 2
    )
    gain = table["both", ANNOTATORS, AS_IS, ACCURACY] - table["plain", ANNOTATORS, AS_IS, ACCURACY]
    assert table["both", ANNOTATORS, AS_IS, comparing.OVER[ACCURACY]] == pytest.approx(gain)
    assert table[ONE, ANNOTATORS, AS_IS, ACCURACY] == pytest.approx((2 + 2 * 2 + 2 * 2) / (2 + 6 + 6))
    assert (ONE, MEAN, AS_IS, INVERSION) not in table
    assert ("plain", MEAN, "flip + crop 0.9", CHANGES[INVERSION]) in table
    (rejected,) = read_jsonl(output / "rejected.jsonl")
    assert rejected["data"] == "held"
    assert Path(rejected["image"]).name == "01.png"
    printed = capsys.readouterr().out
    said = (
        "held: 11 images of 4 prompts, 7 rankings with 17 untied pairs; 1 images set aside; 1 rankings skipped, whose"
        " source had ranked the same images before; 1 of 4 sets have a single annotator"
    )
    assert printed.count(said) == 2, "before the training and at the end"
    lines = {tuple(line[start:end].strip() for start, end in COLUMNS) for line in printed.splitlines()}
    assert ("plain", MEAN, AS_IS, INVERSION) in lines, "as HPD v2 has it"
    assert ("plain", MEAN, AS_IS, ACCURACY) not in lines


def test_rankings_of_ties_alone_leave_no_accuracy(
    held: Path, tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    """Against the annotators there is no pair, and so neither a row nor a number; the judge has pairs."""
    lines = [{**row, "ranking": [1, 1, 1]} for row in read_jsonl(held / "rankings.jsonl")]
    write_jsonl(held / "rankings.jsonl", lines)
    argv = [*METHODS, "--data", str(held), "--seeds", "0", "--crops", "--output-dir", str(tmp_path / "out")]
    assert comparing.main(cli.parse(comparing.Config, argv)) == 0
    for name in ("seeds", "table"):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            found = {(row["reference"], row["metric"]): row["value"] for row in csv.DictReader(file)}
        assert (ANNOTATORS, ACCURACY) not in found
        assert found[ANNOTATORS, INVERSION] == "1.0"
        assert (JUDGE, ACCURACY) in found


def test_other_tables_are_not_overwritten(
    held: Path, tmp_path: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command may run again; other settings need to be told to, before anything is trained or written."""
    output = tmp_path / "out"
    argv = [*METHODS, "--data", str(held), "--crops", "--output-dir", str(output)]

    def run(*more: str) -> int:
        return comparing.main(cli.parse(comparing.Config, [*argv, *more]))

    assert run("--seeds", "0") == run("--seeds", "0", "--batch-size", "5") == 0
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for more, words in ((["--seeds", "1"], "seeds"), (["--seeds", "0", "--count", "2"], "count")):
        done = len(trained)
        with pytest.raises(SystemExit) as stop:
            run(*more)
        assert stop.value.code == 2
        assert f"holds another report, table.csv (other {words}); add --overwrite" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
        assert len(trained) == done
    assert run("--seeds", "0", "--count", "2", "--overwrite-output-dir") == 0
    assert (output / "table.csv").read_bytes() != before[output / "table.csv"]


COLUMNS = ((17, 37), (38, 54), (55, 72), (73, 111))
"""Where method, reference, view and measure are printed."""


def test_a_driver_without_a_scorer_is_said_at_once(
    held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []

    def train(name: str, command: list[str], seed: int, output: Path) -> Path:
        order.append((name, seed))
        return output / "runs" / f"{name}-{seed}"

    monkeypatch.setattr(comparing, "train", train)
    with pytest.raises(SystemExit) as stop:
        comparing.main(
            cli.parse(
                comparing.Config, [*METHODS, "--data", str(held), "--output-dir", str(tmp_path / "out")]
            )
        )
    assert stop.value.code == 2
    assert "method plain, seed 0 left no scorer to measure: " in capsys.readouterr().err
    assert order == [("plain", 0)]


def test_held_out_images_are_read_before_any_training(
    held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "train", lambda *_: pytest.fail("a driver was started"))
    for path in held.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        comparing.main(
            cli.parse(
                comparing.Config, [*METHODS, "--data", str(held), "--output-dir", str(tmp_path / "out")]
            )
        )
    assert stop.value.code == 2
    assert "no ranking has two images left: 12 of 12 were set aside, the first because" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "a"], "'a' is not NAME=TEXT"),
        (["--methods", "a=finetune/none.py"], "method a: finetune/none.py is no driver"),
        (["--methods", "a=finetune/reward_model.py --seed 1"], "method a: --seed is set by the comparison"),
        (["--methods", "a=finetune/reward_model.py", "--data", "nowhere"], "nowhere"),
        (["--methods", "a=finetune/reward_model.py", "--seeds", "1", "1"], "--seeds needs different numbers"),
        (["--methods", "a=finetune/reward_model.py", "--crops", "1.5"], "--crops must be different shares"),
        (
            ["--methods", "a=finetune/reward_model.py", "--batch-size", "-1"],
            "--batch-size must be at least 1, got -1",
        ),
        (["--methods", "a=finetune/reward_model.py", "--count", "0"], "--count must be at least 1, got 0"),
        (
            ["--methods", "a=finetune/reward_model.py --config none.yaml"],
            "cannot read the config file none.yaml",
        ),
        (["--methods", "a=finetune/reward_model.py", "--data", "x", "./x"], "--data names x twice"),
        (["--methods", "a=finetune/reward_model.py", "--data", "x", "y/x"], "different names, got x, y/x"),
    ],
)
def test_wrong_flags(
    argv: list[str], words: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in argv else ["--data", str(root / "rankings")]
    with pytest.raises(SystemExit) as stop:
        comparing.main(cli.parse(comparing.Config, [*argv, *data, "--output-dir", str(tmp_path)]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
