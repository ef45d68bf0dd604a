"""Labels of preference pairs: from rankings, choices, ratings and scores, of one rater or several, with and without ties."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from preftune.records import CaptionedImage, Ranking, write_jsonl
from preftune.training import labelled_pairs
from preftune.training.labelled_pairs import Pair, by_scores, check, label, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images that differ."""
    for index, name in enumerate("abcd"):
        Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def ranking(folder: Path, names: str, ranks: Sequence[int], source: str = "", weight: float = 1.0) -> Ranking:
    paths = tuple(folder / f"{name}.png" for name in names)
    return Ranking(prompt="p", paths=paths, ranks=tuple(ranks), source=source, weight=weight)


def shown(pairs: Sequence[Pair]) -> list[tuple[str, float, float]]:
    return [
        (f"{pair.first.stem}>{pair.second.stem}", round(pair.label, 6), round(pair.weight, 6))
        for pair in pairs
    ]


def test_a_ranking_gives_all_its_untied_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, skipped = label([ranking(folder, "abc", [2, 1, 2])], "each", "drop")
    assert shown(pairs) == [("b>a", 1, 1), ("b>c", 1, 1)], "a choice: the chosen one against each other"
    assert not skipped
    assert "2 pairs of 1 ranking, --labels each; 1 tie dropped" in capsys.readouterr().err
    pairs, _ = label([ranking(folder, "abc", [2, 1, 2])], "each", "half")
    assert shown(pairs) == [("b>a", 1, 1), ("a>c", 0.5, 1), ("b>c", 1, 1)]


def raters(folder: Path) -> list[Ranking]:
    """Of a and b three prefer a, one of them named twice as heavy, one prefers b and one sees none better."""
    return [
        ranking(folder, "ab", [1, 2], weight=2),
        ranking(folder, "ba", [2, 1]),
        ranking(folder, "ab", [2, 1]),
        ranking(folder, "ab", [1, 1]),
    ]


@pytest.mark.parametrize(
    ("labels", "ties", "expected"),
    [
        ("each", "drop", [("a>b", 1, 1.5), ("a>b", 1, 0.75), ("b>a", 1, 0.75)]),
        ("each", "half", [("a>b", 1, 1.6), ("a>b", 1, 0.8), ("b>a", 1, 0.8), ("a>b", 0.5, 0.8)]),
        ("majority", "drop", [("a>b", 1, 1)]),
        ("majority", "half", [("a>b", 1, 1)]),
        ("soft", "drop", [("a>b", 0.75, 1)]),
        ("soft", "half", [("a>b", 0.7, 1)]),
    ],
)
def test_several_raters(
    folder: Path, labels: str, ties: str, expected: list[tuple[str, float, float]]
) -> None:
    pairs, _ = label(raters(folder), labels, ties)  # type: ignore[arg-type]
    assert shown(pairs) == expected


def test_the_weights_of_pairs_with_few_and_many_raters(folder: Path) -> None:
    """A majority counts as one rater does, a soft label as all of them; overlapping rankings are joined pair by pair."""
    many = [ranking(folder, "ab", [2, 1])] * 3 + [ranking(folder, "abc", [2, 1, 3])]
    assert shown(label(many, "majority", "drop")[0]) == [("b>a", 1, 1), ("a>c", 1, 1), ("b>c", 1, 1)]
    assert shown(label(many, "soft", "drop")[0]) == [("b>a", 1, 2), ("a>c", 1, 0.5), ("b>c", 1, 0.5)]


def test_a_split_vote_is_a_tie(folder: Path) -> None:
    split = [ranking(folder, "ab", [1, 2]), ranking(folder, "ab", [2, 1]), ranking(folder, "cd", [1, 2])]
    for labels in ("majority", "soft"):
        assert shown(label(split, labels, "drop")[0]) == [("c>d", 1, 1)]  # type: ignore[arg-type]
    assert shown(label(split, "majority", "half")[0]) == [("a>b", 0.5, 1), ("c>d", 1, 1)]
    assert shown(label(split, "soft", "half")[0]) == [("a>b", 0.5, 1.333333), ("c>d", 1, 0.666667)]
    with pytest.raises(ValueError, match="none of 1 pair can be used: all are ties, from which --ties half"):
        label(split[:2], "soft", "drop")


def test_prompts_are_not_mixed(folder: Path) -> None:
    other = Ranking(prompt="q", paths=(folder / "a.png", folder / "b.png"), ranks=(2, 1), source="")
    pairs, _ = label([ranking(folder, "ab", [1, 2]), other], "soft", "drop")
    assert [(pair.prompt, pair.first.stem, pair.label) for pair in pairs] == [("p", "a", 1), ("q", "b", 1)]


def test_equal_images_are_counted_and_set_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    pairs, skipped = label([ranking(folder, "abc", [1, 2, 3])], "each", "drop")
    assert [pair.second.stem for pair in pairs] == ["c", "c"]
    assert [row.reason for row in skipped] == [f"{folder}/a.png and {folder}/b.png are the same image"]
    assert "1 pair of equal images set aside" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"none of 1 pair can be used: .* are the same image"):
        label([ranking(folder, "ab", [1, 2])], "each", "drop")


def sample(folder: Path, name: str, text: str, **scores: object) -> CaptionedImage:
    return CaptionedImage(path=folder / f"{name}.png", text=text, extra=scores, place=f"line of {name}")


def test_scores_rank_the_images_of_a_caption(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        sample(folder, "a", "p", hps=0.2, ann=3),
        sample(folder, "b", "p", hps=0.3, ann=3),
        sample(folder, "c", "p", hps=None, ann=5),
        sample(folder, "d", "alone", hps=1.0),
    ]
    found, skipped = by_scores(rows, ["hps", "ann"])
    assert [(one.source, "".join(path.stem for path in one.paths), one.ranks) for one in found] == [
        ("hps", "ab", (2, 1)),
        ("ann", "abc", (2, 2, 1)),
    ]
    assert [row.place for row in skipped] == ["line of d"]
    assert "1 image without another to compare set aside: line of d" in capsys.readouterr().err
    assert shown(label(found, "majority", "drop")[0]) == [("b>a", 1, 1), ("c>a", 1, 1), ("c>b", 1, 1)]


@pytest.mark.parametrize("value", ["good", True, [1]])
def test_a_score_that_is_no_number(folder: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"line of a: --raters ann is .*, not a number"):
        by_scores([sample(folder, "a", "p", ann=value), sample(folder, "b", "p", ann=1)], ["ann"])


def write_rankings(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    write_jsonl(folder / "rankings.jsonl", rows)


def test_rankings_by_named_raters(folder: Path) -> None:
    both = {"prompt": "p", "generations": ["a.png", "b.png"]}
    write_rankings(
        folder,
        [
            {**both, "ranking": [1, 2], "source": "ann"},
            {**both, "ranking": [2, 1], "source": "bob"},
            {**both, "ranking": [2, 1]},
        ],
    )
    assert [one.source for one in read([folder], [])[0]] == ["ann", "bob", ""]
    assert [one.ranks for one in read([folder], ["bob"])[0]] == [(2, 1)]
    with pytest.raises(
        ValueError, match=r"--raters eve is neither a source of rankings nor .*; there are ann, bob"
    ):
        read([folder], ["ann", "eve"])


def test_two_kinds_of_folders_at_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    scored = tmp_path_factory.mktemp("scored")
    for name in "ab":
        Image.new("RGB", (16, 16), (0, ord(name), 0)).save(scored / f"{name}.png")
    write_jsonl(
        scored / "metadata.jsonl",
        [{"file_name": f"{n}.png", "text": "q", "hps": s} for n, s in (("a", 1), ("b", 2))],
    )
    write_rankings(
        folder, [{"prompt": "p", "generations": ["a.png", "b.png"], "ranking": [1, 2], "source": "ann"}]
    )
    check([folder, scored], ["ann", "hps"])
    found, skipped = read([folder, scored], ["ann", "hps"])
    assert [(one.prompt, one.source, one.ranks) for one in found] == [
        ("p", "ann", (1, 2)),
        ("q", "hps", (2, 1)),
    ]
    assert not skipped


def test_a_pair_with_one_side_missing_is_set_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three images, one gone: the row cannot be used; one that cannot be decoded, too."""
    (folder / "d.png").write_bytes(b"")
    rows = [["a.png", "b.png"], ["a.png", "gone.png"], ["c.png", "d.png"], ["a.png"]]
    lines = [
        json.dumps({"prompt": "p", "generations": row, "ranking": [*range(1, len(row) + 1)]}) for row in rows
    ]
    (folder / "rankings.jsonl").write_text("\n".join(lines))
    found, skipped = read([folder], [])
    assert len(found) == 1
    reasons = " | ".join(row.reason for row in skipped)
    assert "gone.png does not exist" in reasons
    assert "d.png" in reasons
    assert "1 generations and 1 ranks" in reasons
    assert "1 ranking used, 3 set aside" in capsys.readouterr().err


def test_many_unknown_raters_are_not_all_named(folder: Path) -> None:
    both = {"prompt": "p", "generations": ["a.png", "b.png"], "ranking": [1, 2]}
    write_rankings(folder, [{**both, "source": f"r{number}"} for number in range(labelled_pairs.SHOWN + 3)])
    with pytest.raises(ValueError, match=r"there are r0, .* and 3 more"):
        read([folder], ["eve"])
