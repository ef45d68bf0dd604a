"""Distributions of scores by hand, and the program on folders of images."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import distribution, score_distribution
from preftune import cli
from preftune.images import save_image
from preftune.records import write_jsonl
from preftune.statistics import best_of_n

PROMPTS = ("a red circle", "a blue <cross>", "a cat")


def write_folder(folder: Path, levels: Sequence[Sequence[float]], prompts: Sequence[str] = PROMPTS) -> Path:
    """A folder of grey images, whose brightness is the level: a row for each prompt, the seeds falling."""
    rows = []
    for i, (prompt, some) in enumerate(zip(prompts, levels, strict=True)):
        for k, level in enumerate(some):
            name = f"{i}-{k}.png"
            save_image(torch.full((3, 16, 16), level), folder / name)
            rows.append({"file_name": name, "text": prompt, "seed": 10 * i + len(some) - k})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def test_worth_by_hand() -> None:
    """Pools (0, 2) and (1, 3): best of 1 is 1.5, of 2 is 2.5; 2 is half way in log n."""
    base = np.array([[2.0, 0.0], [1.0, 3.0]])
    n, low, high = score_distribution.worth(base, np.array([[1.5], [2.5]]))
    assert n == pytest.approx(math.sqrt(2))
    assert (low, high) == pytest.approx((math.sqrt(2), math.sqrt(2))), (
        "each prompt gains half of what two images do"
    )
    assert score_distribution.worth(base, base)[0] == 1
    assert score_distribution.worth(base, base + 5) == (math.inf, math.inf, math.inf)
    n, low, high = score_distribution.worth(base, base - 5)
    assert (math.isnan(n), low, high) == (True, 0, 0)
    assert np.isnan(score_distribution.worth(base[:, :1], base)).all(), "one image is no pool"


def test_normal_scores_are_worth_what_they_say() -> None:
    """A gain of the mean of the best of 4 normals."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(400, 16))
    n, low, high = score_distribution.worth(base, rng.normal(size=(400, 4)) + best_of_n.normal_maximum(4))
    assert 3.4 < n < 4.6
    assert low < 4 < high
    assert high - low < 2


def test_the_table_by_hand() -> None:
    """The base's means are 1 and 3, with deviation sqrt(2); the other is 1 better at one prompt and 2 at the other."""
    base, other = np.array([[0.0, 2.0], [2.0, 4.0]])[..., None], np.array([[2.0], [5.0]])[..., None]
    first, second = score_distribution.table({"base": base, "tuned": other}, ["x"])
    assert (first.change, first.n, first.kl) == (0, 1, 0)
    assert second.change == pytest.approx(1.5 / math.sqrt(2))
    assert (second.low, second.high) == pytest.approx((1 / math.sqrt(2), math.sqrt(2)))
    assert second.quantiles[2] == pytest.approx(1.5 / math.sqrt(2)), "median of (2 - 2) and (5 - 2)"
    assert second.n == math.inf, "best of 2 scores 3, the other 3.5"
    assert second.to_json()["n"] == "inf"


def test_correlations_by_hand() -> None:
    """Two prompts far apart: within each the scorers disagree, over all images they agree."""
    first = np.array([[0.0, 1.0], [10.0, 11.0]])
    scores = np.stack([first, np.array([[1.0, 0.0], [11.0, 10.0]])], axis=2)
    found = score_distribution.scorer_correlations({"base": scores})
    assert list(found) == ["images of a prompt"]
    assert found["images of a prompt"][0, 1] == pytest.approx(-1)
    models = {name: scores[:, :1] + 5 * number for number, name in enumerate("abc")}
    assert score_distribution.scorer_correlations(models)["models"][0, 1] == pytest.approx(1)
    assert list(score_distribution.scorer_correlations({"base": scores[:, :1]})) == ["images"]


def test_what_a_row_says() -> None:
    def row(change: float, low: float, high: float) -> score_distribution.ModelRow:
        return score_distribution.ModelRow(
            model="tuned", scorer="x", images=4, mean=0.0, change=change, low=low, high=high, quantiles=(),
            n=3.41, n_low=0.0, n_high=math.inf, kl=0.5,
        )  # fmt: skip

    said = score_distribution.sentence(row(0.5, 0.2, 0.8), "base", 8)
    assert said == (
        "By x, tuned is 0.50 standard deviations better than base [+0.20, +0.80]: more than chance. One of its images is worth"
        " best of 3.4 [<1, >8]."
    )
    assert ": which may be chance." in score_distribution.sentence(row(-0.5, -1, 0.1), "base", 1)
    assert "0.50 standard deviations worse" in score_distribution.sentence(row(-0.5, -1, -0.1), "base", 1)
    assert "nothing can be said of tuned" in score_distribution.sentence(
        row(math.nan, math.nan, math.nan), "base", 1
    )


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Run the program as from the command line; returns its folder."""

    def start(*words: str) -> Path:
        argv = [*words, "--rewards", "brightness", "--workers", "0", "--output-dir", str(tmp_path / "out")]
        assert distribution.main(cli.parse(distribution.Config, argv)) == 0
        return tmp_path / "out"

    return start


def test_the_program_on_folders(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_folder(tmp_path / "base", [[0.2, 0.4], [0.4, 0.6], [0.6, 0.8]])
    tuned = write_folder(tmp_path / "images", [[0.9, 0.0], [0.5], [0.3]], PROMPTS[::-1])
    folder = run("--folders", str(base), f"tuned={tuned}")
    assert "1 images left out, so that each prompt has 1" in " ".join(capsys.readouterr().err.split())
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["images"]) for row in rows] == [("base", "6"), ("tuned", "3")]
    # The last seed is the lowest: of "a cat" the image of level 0. Means .3, .5, .7 against .3, .5, 0.
    assert float(rows[1]["change"]) == pytest.approx(-0.7 / 3 / 0.2, abs=0.02)
    page = (folder / "report.html").read_text()
    assert "tuned is 1.17 standard deviations worse than base" in page
    assert "http" not in page.replace("http-equiv", "")
    results = json.loads((folder / "results.json").read_text())
    assert results["rows"][1]["n"] is None
    assert all((folder / name).stat().st_size > 1000 for name in distribution.PLOTS)


@pytest.mark.filterwarnings("error")
def test_a_base_that_scores_all_alike_has_no_unit(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_folder(tmp_path / "base", [[0.5, 0.5]] * 3)
    other = write_folder(tmp_path / "other", [[0.2], [0.4], [0.6]])
    folder = run("--folders", str(base), str(other))
    assert "nan" not in capsys.readouterr().out
    with (folder / "table.csv").open() as file:
        row = list(csv.DictReader(file))[1]
    assert (row["change"], row["low"], row["q50"]) == ("", "", "")
    assert "By brightness nothing can be said of other" in (folder / "report.html").read_text()


def test_titles_are_escaped(run: Callable[..., Path], tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", [[0.2], [0.4], [0.6]])
    page = (run("--folders", str(base), f"<script>={base}") / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folders"], "--folders is empty"),
        (["--folders", "a", "b/a"], "two folders with the title a"),
        (["--folders", "=a"], "is not TITLE=FOLDER"),
        (["--folders", "a", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--folders", "a", "--rewards"], "--rewards is empty"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(distribution.Config, words)
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_other_prompts_are_refused(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_folder(tmp_path / "base", [[0.2], [0.4], [0.6]])
    other = write_folder(tmp_path / "other", [[0.2], [0.4]], PROMPTS[:2])
    with pytest.raises(SystemExit) as stop:
        run("--folders", str(base), str(other))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{base} has images of 'a cat' and {other} has none" in said
