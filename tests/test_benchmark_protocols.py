"""eval/benchmark.py: the table by hand, what cannot be compared, killed and started again, and the page in a browser."""

import csv
import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import children
import tiny
from benchmarks import benchmark_protocol
from eval import benchmark, folder_scores
from eval.benchmark_table import conclusions, group_rows, part_means, table_rows
from eval.compared_folders import read_folder, side_by_side, with_groups
from preftune import cli
from preftune.images import load_pixels, save_image
from preftune.records import write_jsonl
from rewards import CARDS
from test_trained_scorers import build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert(1)</script> \"quoted\" & 'so' </td>"


def make(
    folder: Path,
    levels: list[float],
    *,
    texts: list[str] | None = None,
    seeds: list[int] | None = None,
    side: int = 8,
    each: int = 1,
    **more: list[str],
) -> Path:
    """A folder of grey images of these levels, as any tool may write it: brightness scores them by their level."""
    texts = texts or [f"prompt {index // each}" for index in range(len(levels))]
    rows = []
    for index, level in enumerate(levels):
        save_image(torch.full((3, side, side), level), folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "text": texts[index]}
        row |= {"seed": seeds[index]} if seeds else {}
        rows.append(row | {name: values[index] for name, values in more.items()})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def run(argv: list[str]) -> None:
    """The program in this process, also as a child that may be killed."""
    assert benchmark.main(cli.parse(benchmark.Config, argv)) == 0


def flags(output: Path, *folders: Path | str, more: str = "") -> list[str]:
    given = [*more.split(), "--folders", *map(str, folders)]
    rewards = [] if "--rewards" in more or "--protocol" in more else ["--rewards", "brightness"]
    return [*rewards, "--workers", "0", "--output-dir", str(output), *given]


def table(output: Path, name: str = "table") -> list[dict[str, str]]:
    with (output / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_of_six_prompts_by_hand() -> None:
    """One seed; the first scorer has four wins, a tie and a loss, the second six wins."""
    base = np.zeros((6, 1, 2))
    other = np.array([[1, 1], [2, 1], [1, 1], [2, 1], [-1, 1], [0, 1]], dtype=float)[:, None]
    rows = table_rows({"base": base, "x": other}, "base", ["s", "t"], [1.0, 100.0])
    assert [(row.model, row.scorer) for row in rows] == [("base", "s"), ("base", "t"), ("x", "s"), ("x", "t")]
    s, t = rows[2:]
    assert (s.wins, s.ties, s.losses) == (4, 1, 1)
    assert s.win_rate == pytest.approx(4.5 / 6)
    assert s.change == s.mean == pytest.approx(5 / 6)
    assert s.p == pytest.approx(2 * (1 + 5) / 2**5), "one of five or none are losses, on either side"
    assert t.p == pytest.approx(2 / 2**6)
    assert (s.p_holm, t.p_holm) == pytest.approx((0.375, 0.0625)), "the smaller one counts twice"
    assert (t.change, t.low, t.high) == (100, 100, 100)
    assert s.verdict == t.verdict == "not shown"
    assert math.isnan(t.standardised), "the base scores all prompts alike"
    seven = table_rows({"base": np.zeros((7, 1, 1)), "x": np.ones((7, 1, 1))}, "base", ["s"], [1.0])[1]
    assert (seven.p, seven.verdict) == (pytest.approx(2 / 2**7), "better")
    assert conclusions([seven], "base") == [
        "x is better than base by s (+1.000 [+1.000, +1.000], wins 100 %, p 0.016)."
    ]


def test_several_images_of_a_prompt_are_one_observation() -> None:
    base = np.zeros((2, 3, 1))
    other = np.array([[3.0, -1.0, 1.0], [0.0, 2.0, 1.0]])[..., None]
    row = table_rows({"base": base, "x": other}, "base", ["s"], [1.0])[1]
    assert (row.wins, row.ties, row.losses) == (2, 0, 0), "prompts"
    assert row.win_rate == pytest.approx((2 / 3 + 2.5 / 3) / 2), "images, a tie half"
    assert row.best == pytest.approx((3 + 2) / 2)
    assert row.mean == pytest.approx(1)


def test_groups_of_hps_v2_on_a_list_of_800() -> None:
    """Ten means of 80 in file order: 39.5, 119.5, ...; their population deviation is 80 sqrt((100 - 1) / 12)."""
    values = np.arange(800.0)
    means = part_means(values, 80)
    assert means.tolist() == [39.5 + 80 * part for part in range(10)]
    found = group_rows({"m": np.tile(values, 4)[:, None, None] / 100}, ["a"] * 800 + ["b"] * 800 + ["c"] * 800 + ["d"] * 800, ["s"], [100.0], 80)  # fmt: skip
    assert [row.group for row in found] == ["a", "b", "c", "d", "average"]
    assert found[3].mean == pytest.approx(399.5)
    assert found[3].std == pytest.approx(80 * math.sqrt(99 / 12))
    assert found[3].parts == 10
    assert math.isnan(found[4].std)


def test_the_whole_program_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of another tool, in another order; a level of 0.2 is 51 of 255, so scores are exact."""
    base = make(tmp_path / "base", [0.2, 0.4, 0.6], seeds=[5, 6, 7])
    order = ["prompt 2 ", " prompt  0", "prompt 1"]  # spaces are no other prompt
    tuned = make(tmp_path / "new", [0.8, 0.4, 0.4], texts=order, seeds=[7, 5, 6])
    output = tmp_path / "out"
    run(flags(output, base, f"tuned={tuned}"))
    rows = table(output)
    assert [(row["model"], float(row["mean"])) for row in rows] == [
        ("base", pytest.approx(0.4)),
        ("tuned", pytest.approx(1.6 / 3)),
    ]
    assert (rows[1]["wins"], rows[1]["ties"], rows[1]["losses"]) == ("2", "1", "0")
    assert float(rows[1]["win_rate"]) == pytest.approx(2.5 / 3)
    assert float(rows[1]["p"]) == 0.5
    scores = table(output, "scores")
    assert [(row["seed"], row["file_name"]) for row in scores[3:]] == [
        ("5", "1.png"),
        ("6", "2.png"),
        ("7", "0.png"),
    ]
    results = json.loads((output / "results.json").read_text())
    assert results["paired by"] == "prompt and seed"
    assert results["table"][1]["verdict"] == "not shown"
    assert "Weights and sampling settings are not known of base, tuned." in capsys.readouterr().out
    files = {
        path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.suffix != ".png"
    }
    run(flags(output, base, f"tuned={tuned}"))
    assert {path: path.read_bytes() for path in files} == files, "started again, the same files"
    with pytest.raises(SystemExit):
        run(flags(output, base))
    assert (
        "holds another report, report.html (other folders); add --overwrite-output-dir"
        in capsys.readouterr().err
    )


def test_without_seeds_the_order_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make(tmp_path / "base", [0.2, 0.4, 0.6, 0.8], each=2)
    tuned = make(tmp_path / "tuned", [0.4, 0.6, 0.6, 0.6], each=2, seeds=[1, 2, 3, 4])
    run(flags(tmp_path / "out", base, tuned, more="--base tuned"))
    rows = table(tmp_path / "out")
    assert [row["model"] for row in rows] == ["tuned", "base"]
    assert float(rows[1]["win_rate"]) == pytest.approx(1.5 / 4)
    assert float(rows[1]["best"]) == pytest.approx((0.4 + 0.8) / 2)
    assert "paired by prompt and order, not by noise" in capsys.readouterr().out


def test_one_prompt_is_no_evidence(tmp_path: Path) -> None:
    """A single prompt has no interval and no verdict, and nothing says nan."""
    folders = [make(tmp_path / "base", [0.2, 0.2], each=2), make(tmp_path / "tuned", [0.8, 0.8], each=2)]
    run(flags(tmp_path / "out", *folders))
    row = table(tmp_path / "out")[1]
    assert (row["low"], row["high"], row["standardised"], row["verdict"]) == ("", "", "", "not shown")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "tuned is not shown to differ from base by brightness (+0.600, wins 100 %, p 1.000)" in page
    assert not re.search(r">[^<]*\bnan\b", page)
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)


def test_images_of_a_prompt_are_paired_by_seed(tmp_path: Path) -> None:
    base = make(tmp_path / "base", [0.2, 0.4, 0.6, 0.8], each=2, seeds=[1, 2, 1, 2])
    tuned = make(tmp_path / "tuned", [0.6, 0.4, 0.6, 0.8], each=2, seeds=[2, 1, 1, 2])
    run(flags(tmp_path / "out", base, tuned))
    assert float(table(tmp_path / "out")[1]["win_rate"]) == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    lines = [row for row in table(tmp_path / "out", "scores") if row["model"] == "tuned"]
    assert [(row["seed"], row["file_name"]) for row in lines[:2]] == [("1", "1.png"), ("2", "0.png")]


def test_examples_are_gains_middle_and_losses_by_the_first_scorer(tmp_path: Path) -> None:
    """Of nine prompts whose change is prompt number / 10 - 0.4; the second scorer would turn the order round."""
    (tmp_path / "dark.py").write_text("def dark(pixels, prompts):\n    return 1 - pixels.mean((1, 2, 3))\n")
    base = make(tmp_path / "base", [0.4] * 9)
    tuned = make(tmp_path / "tuned", [index / 10 for index in range(9)])
    more = f"--rewards brightness {tmp_path / 'dark.py'}:dark --examples 3"
    run(flags(tmp_path / "out", base, tuned, more=more))
    found = re.findall(
        r'note">(.*): tuned (.*) by brightness<', (tmp_path / "out" / "report.html").read_text()
    )
    assert found == [("largest gain", "+0.400"), ("middle", "+0.000"), ("largest loss", "-0.400")]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"texts": ["prompt 0", "prompt 1", "mine"]},
            "differ in their prompts: 'prompt 2' has 0 images in the first and 1 in",
        ),
        (
            {"levels": [0.1, 0.2]},
            "differ in their prompts: 'prompt 2' has 0 images in the first and 1 in the second",
        ),
        (
            {"seeds": [5, 8, 7]},
            "differ in their seeds: 'prompt 1' has seed 8 in the first and 6 in the second",
        ),
        ({"side": 16}, "0.png is 16 x 16 pixels, and "),
    ],
)
def test_what_differs_is_refused_and_says_where(
    other: dict[str, list[float]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make(tmp_path / "base", [0.2, 0.4, 0.6], seeds=[5, 6, 7])
    settings = {"levels": [0.2, 0.4, 0.6], "seeds": [5, 6, 7]} | other
    levels = settings.pop("levels")
    settings["seeds"] = settings["seeds"][: len(levels)]
    tuned = make(tmp_path / "tuned", levels, **settings)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stop:
        run(flags(tmp_path / "out", base, tuned))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(tuned) in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_incomplete_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make(tmp_path / "base", [0.2, 0.4])
    shutil.copytree(base, tmp_path / "lost")
    (tmp_path / "lost" / "1.png").unlink()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "generated.json").write_text('{"seeds": [0, 1, 2]}')
    uneven = make(tmp_path / "uneven", [0.1] * 5, texts=["a", "a", "b", "b", "c"])
    for folder, words in (
        ("lost", "1 row of .*lost cannot be used, the first: .*1.png does not exist"),
        ("begun", "begun is not complete: it has 0 of 3 images; start its `preftune benchmark-images` again"),
        ("nowhere", "nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            read_folder("x", tmp_path / folder, None)
    with pytest.raises(
        ValueError, match=r"uneven has 1 image of 'c', and 2 of most prompts; give each prompt as many"
    ):
        side_by_side([read_folder("x", uneven, None)])


def test_a_prompt_that_is_in_the_list_twice_is_two_prompts(tmp_path: Path) -> None:
    """The second "a" belongs to the second group; the folder is in another order than the list."""
    texts = ["b", "a", "a", "c"]
    model = read_folder("x", make(tmp_path / "x", [0.1, 0.2, 0.3, 0.4], texts=texts), None)
    placed = with_groups(model, {"one": ["a", "b"], "two": ["c", "a"]}, "mine")
    assert [(row.text, row.group, row.path.name) for row in placed.rows] == [
        ("a", "one", "1.png"), ("b", "one", "0.png"), ("c", "two", "3.png"), ("a", "two", "2.png"),
    ]  # fmt: skip
    assert side_by_side([placed]).groups == ["one", "one", "two", "two"]
    twice = read_folder("x", make(tmp_path / "z", [0.1, 0.2, 0.3, 0.4], texts=["a", "b", "a", "c"]), None)
    order = [paths[0].name for paths in side_by_side([twice]).files["x"]]
    assert order == [f"{index}.png" for index in range(4)], "parts keep the order"
    named = read_folder("x", make(tmp_path / "y", [0.1, 0.2], texts=["a", "a"], group=["two", "one"]), None)
    assert [row.path.name for row in with_groups(named, {"one": ["a"], "two": ["a"]}, "mine").rows] == [
        "1.png",
        "0.png",
    ]
    with pytest.raises(
        ValueError, match=r"0.png is of a prompt that is not one of mine: 'b'; leave --protocol out"
    ):
        with_groups(model, {"one": ["a", "c"]}, "mine")


PROTOCOL = """
follows: nobody
prompt_files: [old=old.json, new=new.json]
source: my disk
num_prompts: 4
part_size: 2
factor: 100
rewards: [brightness]
"""


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """Two groups of four prompts in parts of two."""
    (tmp_path / "mine.yaml").write_text(PROTOCOL)
    for name in ("old", "new"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} {index}" for index in range(4)]))
    return tmp_path / "mine.yaml"


def test_a_protocol_on_the_layout_of_hps_v2(
    protocol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FOLDER/GROUP/00000.jpg without a table; a missing image is refused, and not passed over."""
    for group, start in (("old", 0), ("new", 4)):
        for index in range(4):
            save_image(
                torch.full((3, 8, 8), (start + index) / 15), tmp_path / "m" / group / f"{index:05d}.png"
            )
    run(flags(tmp_path / "out", tmp_path / "m", more=f"--protocol {protocol}"))
    rows = table(tmp_path / "out", "groups")
    assert [row["group"] for row in rows] == ["old", "new", "average"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([150 / 15, 550 / 15, 350 / 15], rel=1e-5)
    assert float(rows[0]["std"]) == pytest.approx(100 / 15, rel=1e-5), (
        "parts: 0.5 and 2.5, so 1 from the middle"
    )
    assert rows[2]["std"] == ""
    assert "10.000 \u00b1 6.667" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert (
        "2 groups (old, new) of 4 prompts, 1 image a prompt, 8 images a model; means of parts of 2 prompts"
        in said
    )
    assert "do not compare with published tables" not in said
    (tmp_path / "m" / "new" / "00002.png").unlink()
    with pytest.raises(SystemExit):
        run(flags(tmp_path / "out2", tmp_path / "m", more=f"--protocol {protocol}"))
    assert "new has no image 00002 (.jpg or .png) of prompt 3 of 4" in capsys.readouterr().err


def test_part_of_a_protocol_says_so(
    protocol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["new 0", "old 1", "old 0", "new 1"]
    folder = make(tmp_path / "m", [0.8, 0.2, 0.4, 0.6], texts=texts)
    run(flags(tmp_path / "out", folder, more=f"--protocol {protocol}"))
    assert (
        "4 prompts with 1 images each, 4 of the protocol's 8 images: do not compare"
        in capsys.readouterr().out
    )
    rows = table(tmp_path / "out", "groups")
    assert [float(row["mean"]) for row in rows] == pytest.approx([30, 70, 50])


def test_groups_without_lists_come_from_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """HPS v2's lists do not come with the package; folders that say their groups need none."""
    styles = ["anime", "concept-art", "paintings", "photo"]
    folder = make(tmp_path / "m", [0.2, 0.4, 0.6, 0.8], group=styles)
    run(flags(tmp_path / "out", folder, more="--protocol hpsv2 --rewards brightness"))
    said = capsys.readouterr().out
    assert "The images were not checked against the protocol's prompts" in said
    assert "4 of the protocol's 3,200 images" in said
    rows = table(tmp_path / "out", "groups")
    assert [row["group"] for row in rows] == [*styles, "average"]
    assert float(rows[0]["mean"]) == pytest.approx(0.2), (
        "brightness is no scorer of the protocol: not times 100"
    )
    with pytest.raises(SystemExit):
        run(
            flags(
                tmp_path / "out2", make(tmp_path / "n", [0.1]), more="--protocol hpsv2 --rewards brightness"
            )
        )
    assert "has no group of anime, concept-art, paintings, photo in " in capsys.readouterr().err


def begin(argv: list[str], chunk: int) -> None:
    """The program with small chunks, as a child."""
    folder_scores.CHUNK = chunk
    run(argv)


def test_killed_and_started_again_the_table_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    folders = [make(tmp_path / name, rng.random(48).tolist()) for name in ("base", "tuned")]
    monkeypatch.setattr(folder_scores, "CHUNK", 4)
    more = "--batch-size 2 --rewards brightness"
    run(flags(tmp_path / "whole", *folders, more=more))
    argv = flags(tmp_path / "out", *folders, more=more)
    for chunks in (1, 20):
        child = children.begin(begin, argv, 4)
        end = time.monotonic() + children.WAIT
        while len(list((tmp_path / "out").rglob("0*.npz"))) < chunks and child.is_alive():
            assert time.monotonic() < end
            time.sleep(0.001)
        child.kill()
        child.join()
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*.npz")}
        assert len(kept) >= chunks
    run(argv)
    for name in ("table.csv", "scores.csv", "measures.csv", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was scored is not scored again"
    assert not list((tmp_path / "out").rglob(".*tmp*"))
    save_image(torch.ones(3, 8, 8), tmp_path / "tuned" / "0.png")
    run([*argv, "--overwrite-output-dir"])
    assert (tmp_path / "out" / "scores.csv").read_bytes() != (tmp_path / "whole" / "scores.csv").read_bytes()


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a model whose images are red, and of grey ones, with a hostile prompt and title."""
    root = tmp_path_factory.mktemp("page")
    texts = [HOSTILE, *(f"prompt {index}" for index in range(11))]
    base = make(root / "base", [0.1] * 12, texts=texts, side=64)
    red = make(root / "red", [0.5] * 12, texts=texts, side=64)
    for path in red.glob("*.png"):
        save_image(torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 64, 64), path)
    run(flags(root / "out", base, f"<b>red</b>={red}"))
    return root / "out" / "report.html"


def test_the_page_asks_for_nothing_and_escapes(page: Path) -> None:
    tags = Tags(page.read_text(encoding="utf-8")).tags
    assert "script" not in {tag for tag, _ in tags}
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 1 + 2 * 6
    assert all(str(image["src"]).startswith("data:image/") for image in images)
    assert not [attributes for tag, attributes in tags if "href" in attributes or tag == "link"]
    assert HOSTILE in {str(image["alt"]).partition(": ")[2] for image in images}
    text = page.read_text(encoding="utf-8")
    assert (
        "&lt;b&gt;red&lt;/b&gt; is better than base by brightness (+0.231 [+0.231, +0.231], wins 100 %, p &lt; 0.001)"
        in text
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is checked as text only")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(page: Path, width: int, tmp_path: Path) -> None:
    """Both images of an example stand side by side at both widths."""
    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    switches = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    size = f"--window-size={width},3000"
    subprocess.run(
        [CHROMIUM, *switches, size, "--hide-scrollbars", f"--screenshot={shot}", f"file://{page}"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    red = ((load_pixels(shot) - torch.tensor([1.0, 0, 0])[:, None, None]).abs() < 0.03).all(0)
    columns = red.sum(0).nonzero()
    assert red.sum() > 2 * 128 * 128
    assert columns.min() > 128, "the grey image is left of it"
    assert columns.max() < width


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--folders", "a", "a"], "--folders has two folders with the title a; write TITLE=FOLDER for one"),
        (["--folders", "=a"], "--folders '=a' is not TITLE=FOLDER"),
        (["--folders", "a", "--base", "b"], "--base is b; it must be one of a"),
        (["--folders", "nowhere"], "--folders nowhere does not exist"),
        (["--folders", "a", "--prompts", "x.txt"], "--prompts x.txt is for a --protocol"),
        (["--folders", "a", "--protocol", "x"], "there is no protocol x; name one of hpsv2"),
        (["--folders", "a", "--rewards", "beauty"], "unknown scorer"),
        (["--folders", "a", "--examples", "0"], "--examples must be at least 1, got 0"),
    ],
)
def test_wrong_flags(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([*argv, "--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_diversity_by_a_clip_among_the_scorers(tmp_path: Path) -> None:
    """Equal images of a prompt have no distance, and a Vendi score of 1."""
    tiny.tokenizer(tmp_path / "pipeline" / "tokenizer")
    build(tmp_path).save(tmp_path / "clip")
    varied, equal = np.random.default_rng(0).random(8).tolist(), [0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]
    folders = [make(tmp_path / "varied", varied, each=2), make(tmp_path / "equal", equal, each=2)]
    run(flags(tmp_path / "out", *folders, more=f"--rewards {tmp_path / 'clip'}"))
    found = {(row["model"], row["measure"]): row for row in table(tmp_path / "out", "measures")}
    distance = "pairwise distance within a prompt"
    assert float(found["equal", distance]["value"]) == pytest.approx(0, abs=1e-6)
    assert float(found["equal", distance]["high"]) < 0, "it is less diverse, and the interval says so"
    assert float(found["equal", "Vendi score within a prompt"]["value"]) == pytest.approx(1, abs=1e-5)
    assert float(found["varied", "Vendi score within a prompt"]["value"]) > 1
    assert 1 <= float(found["varied", "Vendi score across prompts"]["value"]) <= 4
    assert found["equal", "Vendi score across prompts"]["low"] == ""
    assert float(found["equal", "contrast"]["value"]) == pytest.approx(0, abs=1e-6)


COUNTS = """
import gc
import torch

def alive(pixels, prompts):
    shown = {t.data_ptr(): t.numel() for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape[-2:] == (32, 32)}
    with open(__file__ + ".txt", "a") as file:
        file.write(f"{sum(shown.values()) // (3 * 32 * 32)}\\n")
    return pixels.mean((1, 2, 3))
"""


def test_images_are_in_memory_a_batch_at_a_time(tmp_path: Path) -> None:
    """Counted by a scorer: images of which there are pixels while it scores, in batches of four."""
    (tmp_path / "counts.py").write_text(COUNTS)
    most = {}
    for number in (12, 48):
        folder = make(tmp_path / f"m{number}", [0.5] * number, side=32)
        reward = f"--rewards {tmp_path / 'counts.py'}:alive --batch-size 4"
        run(flags(tmp_path / f"out{number}", folder, more=reward))
        counted = [int(line) for line in (tmp_path / "counts.py.txt").read_text().splitlines()]
        assert len(counted) >= number // 4
        most[number] = max(counted)
        (tmp_path / "counts.py.txt").unlink()
    assert 4 <= most[48] == most[12] < 24  # what other tests of the process have left counts too


def test_operations_of_vit_h_by_hand() -> None:
    """32 layers of width 1280 with 257 tokens: about 2 operations for each of 629 million weights and token, and attention."""
    clip = CARDS["hpsv2"].clip
    assert clip is not None
    image, text = benchmark_protocol.operations(clip)
    assert image == 32 * (24 * 1280**2 * 257 + 4 * 1280 * 257**2)
    assert text == 24 * (24 * 1024**2 * 77 + 4 * 1024 * 77**2)
    assert image == pytest.approx(2 * 167.4e9, rel=0.02), (
        "open_clip's table says 167.4 G multiply-adds for the image tower"
    )


@pytest.mark.slow
def test_the_protocol_of_hps_v2_in_miniature(tmp_path: Path) -> None:
    """Eight programs are started, two of them killed: two minutes."""
    argv = f"--workdir {tmp_path / 'box'} --per-style 10 --kills 2 --num-inference-steps 1 --output {tmp_path / 'found.json'}"
    benchmark_protocol.main(cli.parse(benchmark_protocol.Config, argv.split()))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["files that differ after it"] == []
    assert found["images"] == 80
    assert found["starts of the killed run"] >= 2
