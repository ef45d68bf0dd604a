"""What scorers pick from n images: by hand, and the program on folders of images and on rankings by people."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import selection, top_picks
from eval.top_picks import Picks, Pool
from eval.view_scores import PromptedImage
from preftune import cli
from preftune.images import save_image
from preftune.records import write_jsonl
from test_distribution import write_folder


def picks_of(scores: dict[str, list[list[float]]], judged: list[list[float]]) -> Picks:
    """Pools of the same size, each of another prompt; the judge's values are pools x images."""
    count, each = np.array(judged).shape
    return Picks(
        pools=[Pool(prompt=str(i), rows=tuple(range(i * each, (i + 1) * each))) for i in range(count)],
        images=[PromptedImage(path=Path(f"{i}.png"), prompt="") for i in range(count * each)],
        scores={name: np.concatenate(values) for name, values in scores.items()},
        quality=[top_picks.quality(np.array([one])) for one in judged],
        judge="gold",
    )


def test_quality_by_hand() -> None:
    """Of 1, 3, 3, 0 the first beats one of three; the 3s tie with each other and beat two."""
    assert top_picks.quality(np.array([[1.0, 3.0, 3.0, 0.0]])) == pytest.approx([1 / 3, 2.5 / 3, 2.5 / 3, 0])
    two = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert top_picks.quality(two) == pytest.approx([2 / 3, 1 / 3]), "three annotators"


JUDGED = [[0.0, 1.0, 2.0], [5.0, 3.0, 4.0]]
PROXY = [[0.0, 2.0, 1.0], [2.0, 1.0, 0.0]]
"""It picks the middle image of the first pool, the best of the second."""


def test_the_table_by_hand() -> None:
    picks = picks_of({"proxy": PROXY, "worst": [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]}, JUDGED)
    proxy, worst = top_picks.table(picks, ["proxy", "worst"])
    assert (proxy.win_rate, proxy.low, proxy.high) == pytest.approx((0.75, 0.5, 1.0))
    assert (proxy.wins, proxy.losses, proxy.best, proxy.p_value) == (1, 0, 0.5, 1.0)
    assert (worst.win_rate, worst.wins, worst.losses, worst.best) == (0, 0, 2, 0)
    assert worst.p_value == 1.0, "(1/4 + 1/4), times two claims"
    assert top_picks.table(picks, ["worst"])[0].p_value == 0.5
    assert top_picks.against_each_other(picks)[0].tolist() == [0.5, 1.0]


def test_a_prompt_with_several_sets_counts_once() -> None:
    picks = picks_of({"proxy": [*PROXY, *PROXY[:1]]}, [*JUDGED, *JUDGED[:1]])
    pools = [*picks.pools[:2], Pool(prompt="0", rows=picks.pools[2].rows)]
    (row,) = top_picks.table(Picks(**{**vars(picks), "pools": pools}), ["proxy"])
    assert row.wins + row.losses == 1, "two prompts, one of them at half"
    assert row.win_rate == pytest.approx(2 / 3), "of three sets"


def test_the_curve_is_the_mean_over_all_choices() -> None:
    """Of two images of the first pool (0, 1, 2 by gold, order 0, 2, 1 by proxy) the proxy picks 1, 2, 1: quality .5, 1, .5."""
    found = top_picks.curve(picks_of({"proxy": PROXY}, JUDGED), "proxy")
    assert found == pytest.approx([0.5, ((0.5 + 1 + 0.5) / 3 + (1 + 1 + 0) / 3) / 2, 0.75])


def test_what_a_row_says() -> None:
    (row,) = top_picks.table(picks_of({"proxy": PROXY}, JUDGED), ["proxy"])
    said = top_picks.sentence(row, "gold")
    assert (
        said
        == "By gold, what proxy picks is better than a random image in 75.0 % of cases [50.0, 100.0]: which may be chance."
    )


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Run the program as from the command line; returns its folder."""

    def start(*words: str) -> Path:
        argv = [*words, "--workers", "0", "--output-dir", str(tmp_path / "out")]
        assert selection.main(cli.parse(selection.Config, argv)) == 0
        return tmp_path / "out"

    return start


DARKNESS = "def score(pixels, prompts):\n    return 1 - pixels.mean((1, 2, 3))\n"


def test_a_judge_on_a_folder(run: Callable[..., Path], tmp_path: Path) -> None:
    """The judge likes dark images, the scorer bright ones: its picks are the worst."""
    images = write_folder(tmp_path / "images", [[0.2, 0.4, 0.9], [0.6, 0.5, 0.1], [0.3, 0.1, 0.2]])
    (tmp_path / "own.py").write_text(DARKNESS)
    judge = f"{tmp_path / 'own.py'}:score"
    folder = run("--data", str(images), "--rewards", "brightness", "--judge", judge)
    with (folder / "picks.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = {(row["prompt"], row["scorer"]): Path(row["image"]).name for row in rows}
    assert chosen["a red circle", "brightness"] == "0-2.png"
    assert chosen["a blue <cross>", "brightness"] == "1-0.png"
    assert chosen["a cat", judge] == "2-1.png"
    results = json.loads((folder / "results.json").read_text())
    assert [row["scorer"] for row in results["rows"]] == ["brightness"]
    assert results["rows"][0]["win_rate"] == 0
    assert results["curves"][judge] == pytest.approx([0.5, (1 + 1 + 0.5) / 3, 1.0])
    page = (folder / "report.html").read_text()
    assert "worse than random choice" in page
    assert "http" not in page.replace("http-equiv", "")


def test_people_judge_rankings(run: Callable[..., Path], tmp_path: Path) -> None:
    """Two annotators, who disagree on the brightest image; rank 1 is the best."""
    for number, level in enumerate((0.1, 0.5, 0.9)):
        save_image(torch.full((3, 16, 16), level), tmp_path / "data" / f"{number}.png")
    names = ["0.png", "1.png", "2.png"]
    rows = [
        {"prompt": "a cat", "generations": names, "ranking": ranks, "source": source}
        for source, ranks in (("one", [3, 2, 1]), ("two", [1, 2, 2]))
    ]
    write_jsonl(tmp_path / "data" / "rankings.jsonl", rows)
    folder = run("--data", str(tmp_path / "data"), "--rewards", "brightness")
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert row["win_rate"] == (1 + 0.25) / 2, (
        "the best for one; for the other it ties with one image and loses to one"
    )
    assert row["low"] is None, "a single prompt"
    assert "By the annotators" in (folder / "report.html").read_text()


def test_without_a_judge_there_are_picks(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "images", [[0.2, 0.4, 0.9], [0.6, 0.5, 0.1], [0.3, 0.1, 0.2]])
    folder = run(
        "--data", str(images), "--rewards", "brightness", "--count", "2", "--num-images-per-prompt", "2"
    )
    assert "nobody judges the picks" in capsys.readouterr().out
    assert not (folder / "selection.png").exists()
    with (folder / "picks.csv").open() as file:
        picked = [(Path(row["image"]).name, row["preferred"]) for row in csv.DictReader(file)]
    assert picked == [("0-2.png", ""), ("1-1.png", "")], "of the two lowest seeds, which are the last"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-images-per-prompt", "1"], "--num-images-per-prompt must be at least 2, got 1"),
        (["--rewards", "shapes", "--judge", "shapes"], "--judge shapes is one of --rewards"),
        (["--rewards"], "--rewards is empty"),
        (["--judge", "shpes"], "unknown scorer 'shpes' (did you mean shapes?)"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(selection.Config, ["--data", "x", *words])
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_is_not_there(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--data", "nowhere")
    assert "--data nowhere does not exist; name a folder with rankings.jsonl" in capsys.readouterr().err


def test_nothing_to_choose_from(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "images", [[0.2, 0.4], [0.6, 0.5], [0.3]])
    with pytest.raises(SystemExit) as stop:
        run("--data", str(images), "--rewards", "brightness")
    assert stop.value.code == 2
    assert "has one image of 'a cat', and nothing to choose from" in " ".join(capsys.readouterr().err.split())
