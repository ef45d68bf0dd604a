"""eval/compare_scorers.py: the arithmetic of a comparison by hand, and a whole small one from the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest

from eval import compare_scorers as comparing
from eval.agreement import ACCURACY, ANNOTATORS, AS_IS, CHANGE, FLIPPED, JUDGE, ONE, Judged, rows_of
from preftune import cli

pytestmark = pytest.mark.usefixtures("cpu")

SETS = [  # two prompts, three and two pictures, one annotator each
    Judged(prompt=0, rows=np.array([0, 1, 2]), ranks=np.array([[1.0, 2.0, 3.0]])),
    Judged(prompt=1, rows=np.array([3, 4]), ranks=np.array([[1.0, 2.0]])),
]
GOLD = np.array([0.9, 0.5, 0.7, 0.2, 0.8])
"""The judge puts picture 2 before 1, and 4 before 3."""


def test_sums_by_hand() -> None:
    as_it_is, cropped = [3.0, 2.0, 1.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0, 1.0]
    found = comparing.sums_of("x", np.array([as_it_is, cropped]), GOLD, SETS, [AS_IS, "crop"], 2)
    assert {name for name, *_ in found} == {"x"}
    sums = {key[1:]: pair for key, pair in found.items()}
    assert sums[ANNOTATORS, AS_IS, ACCURACY].tolist() == [[3, 0], [3, 1]]
    assert sums[JUDGE, AS_IS, ACCURACY].tolist() == [[2, 1], [3, 1]]
    assert sums[ANNOTATORS, "crop", ACCURACY].tolist() == [[2, 0], [3, 1]]
    assert sums[ANNOTATORS, "crop", CHANGE].tolist() == [[-1, 0], [3, 1]]
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
    rows = rows_of(comparing.with_differences(sums, "plain"))
    values = {(row.rater, row.metric): row.value for row in rows}
    assert values == {
        (ONE, ACCURACY): pytest.approx(0.5),
        ("plain", ACCURACY): pytest.approx(4 / 8),
        ("other", ACCURACY): pytest.approx(1.0),
        ("other", comparing.OVER): pytest.approx(0.5),
    }
    over = next(row for row in rows if row.metric == comparing.OVER)
    assert over.low == pytest.approx(0.5), "both prompts gain a half: no resample tells them apart"
    assert over.high == pytest.approx(0.5)
    assert "+50.0" in comparing.to_text({"x": rows})


def test_a_whole_comparison(root: Path, tmp_path: Path) -> None:
    common = (
        f"finetune/reward_model.py --model {root}/scorer --data {root}/rankings --valid-share 0.25 --updates 2 --batch 2"
        " --accumulation 1 --lr 1e-2 --threads 1"
    )
    methods = [f"plain={common}", f"both={common} --stable.views 1 --stable.weighting two-stage"]
    argv = ["--methods", *methods, "--data", str(root / "rankings"), "--seeds", "0", "--crops", "0.9"]
    argv += ["--output", str(tmp_path)]
    assert comparing.main(cli.parse(comparing.Config, argv)) == 0
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["method"], row["reference"], row["view"], row["metric"]) for row in rows}
    for name in ("plain", "both"):
        assert {(name, ANNOTATORS, AS_IS, ACCURACY), (name, JUDGE, AS_IS, ACCURACY)} <= found
        assert (name, ANNOTATORS, "flip + crop 0.9", FLIPPED) in found
    assert ("both", JUDGE, AS_IS, comparing.OVER) in found
    assert ("plain", JUDGE, AS_IS, comparing.OVER) not in found
    assert (ONE, JUDGE, AS_IS, ACCURACY) in found
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    with (tmp_path / "seeds.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"0"}
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "a"], "'a' is not NAME=TEXT"),
        (["--methods", "a=finetune/none.py"], "method a: finetune/none.py is no driver"),
        (["--methods", "a=finetune/reward_model.py --seed 1"], "method a: --seed is set by the comparison"),
        (["--methods", "a=finetune/reward_model.py", "--data", "nowhere"], "nowhere"),
        (["--methods", "a=finetune/reward_model.py", "--seeds", "1", "1"], "--seeds needs different numbers"),
        (["--methods", "a=finetune/reward_model.py", "--crops", "1.5"], "--crops must be different shares"),
    ],
)
def test_wrong_flags(
    argv: list[str], words: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in argv else ["--data", str(root / "rankings")]
    with pytest.raises(SystemExit) as stop:
        comparing.main(cli.parse(comparing.Config, [*argv, *data, "--output", str(tmp_path)]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
