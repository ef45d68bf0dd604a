"""Prompts without style words: each rule by hand, real prompts, the files and the page."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from data_build import clean_prompts
from data_build.clean_prompts import Config, frequencies, parts_left, pieces
from data_build.prompt_rules import (
    KINDS,
    PLACES,
    TABLE,
    Table,
    clean,
    key_of,
    read_table,
    unspaced,
    without_syntax,
)
from preftune.cli import parse
from preftune.prompts import read_prompts
from preftune.records import read_jsonl

SHARED = Path(__file__).parents[2] / "shared/data/prompts"


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table(TABLE)


# ---------------------------------------------------------------- rules by hand


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        # what is to be seen stays
        ("a red cube left of two blue balls on a wooden table", None),
        ("surrounded by flowers, a house by the lake, lit by candles", None),
        ("by the river a house stands", None),
        ("a photo of a cat", None),
        ("oil painting of a dog with a hat", None),
        ("three cats, a kitchen blender and a magic lamp", None),
        ("a portrait of greg rutkowski", None),
        ("warhammer 40k soldier", None),
        ("a film still from rear window (1954)", None),
        ("Mr. Bean eats. A dog sleeps!", None),
        ("The face is highly detailed", None),
        ("a dark and highly detailed city", None),
        ("driven by robots", None),
        ("A face with a knife:  the end - or not", "A face with a knife: the end - or not"),
        ("the end - or not", "the end-or not"),
        # DiffusionDB's spaces
        ("new york in 1 9 8 7 , sci - fi car", "new york in 1987, sci-fi car"),
        ("the 1 9 5 0 s, 3 d letter", "the 1950s, 3d letter"),
        ("Taylor Swift - pop art", "Taylor Swift"),
        ("Taylor Swift - a concert", None),
        # tails and words inside
        ("a cat, highly detailed, 8 k, octane render, trending on artstation", "a cat"),
        ("a castle 8 k octane render trending on artstation", "a castle"),
        ("highly detailed portrait of a woman with intricate details", "portrait of a woman"),
        ("a photo-realistic dog. Sharp Focus! Wallpaper", "a dog"),
        ("a cat, 4k uhd, ultra-detailed, h.r. giger, smooth, red eyes", "a cat, red eyes"),
        ("a robot | cinematic | blue", "a robot | blue"),
        ("a cat, (highly detailed), cinematic lighting and bokeh", "a cat"),
        # artists
        ("a dog by greg rutkowski", "a dog"),
        ("a dog by unknown person", "a dog"),
        ("a dog, art by unknown and another with a hat", "a dog, with a hat"),
        ("a dog by Somebody in the rain", "a dog in the rain"),
        ("a dog painted by somebody", "a dog"),
        ("a dog, by Craig Mullins, Chie Yoshii, Casey Weldon, a red Hat", "a dog, a red Hat"),
        ("a dog, artgerm, and greg rutkowski and sakimichan", "a dog"),
        ("a dog reimagined by industrial light and magic", "a dog"),
        ("new york, edward hopper - style painting, night", "new york, night"),
        ("a cat in the style of van gogh with a hat", "a cat with a hat"),
        ("a cat in pixel art style", "a cat"),
        # syntax of interfaces
        ("a (frog head:1.2) with ((red)) [shoes] --ar 16:9 --v 4", "a frog head with red shoes"),
        ("rainbow poppies::13 dark ground ::2 <lora:x:0.8>", "rainbow poppies, dark ground"),
        ("((a (b:1.1) c:0.9)) --no text, logo", "a b c"),
        ("[--height 512] a forest", "a forest"),
    ],
)  # fmt: skip
def test_rules(text: str, prompt: str | None, table: Table) -> None:
    found = clean(text, table)
    assert found.prompt == (text if prompt is None else prompt)
    assert not found.only_style
    assert clean(found.prompt, table).prompt == found.prompt, "a second time changes nothing"
    assert bool(found.removed) == (prompt is not None and key_of(prompt) != key_of(text))


def test_what_was_removed_is_told(table: Table) -> None:
    found = clean("(a cat:1.3), 8 k, octane render, by greg rutkowski, artgerm, bokeh, oil painting", table)
    assert [(one.kind, one.text) for one in found.removed] == [
        ("syntax", "(:1.3)"), ("resolution", "8k"), ("engine", "octane render"), ("artist", "by greg rutkowski"),
        ("artist", "artgerm"), ("camera", "bokeh"), ("medium", "oil painting"),
    ]  # fmt: skip


def test_nothing_but_style_keeps_its_first_words(table: Table) -> None:
    for text, left in (
        ("concept art, 8k", "concept art"), ("painting by greg rutkowski, ruan jia", "painting"), ("greg rutkowski", "greg rutkowski"),
        (", !", ", !"), ("by artgerm", "by artgerm"),
    ):  # fmt: skip
        found = clean(text, table)
        assert (found.prompt, found.only_style) == (left, True)


def test_kinds_can_stay(tmp_path: Path) -> None:
    text = "a (cat:1.2), oil painting, bokeh, 8k, by greg rutkowski, art by somebody"
    for kept, left in (
        (("medium", "camera"), "a cat, oil painting, bokeh"),
        (("resolution", "syntax"), "a (cat:1.2), 8k"),
        (("artist",), "a cat, by greg rutkowski, art by somebody"),
    ):
        assert clean(text, read_table(TABLE, kept), kept).prompt == left


def test_phrases_are_found_however_they_are_written(table: Table) -> None:
    for text in ("photorealistic", "photo realistic", "Photo-Realistic", "photo - realistic"):
        assert [(one.start, one.end) for one in table.find(f"a {text} cat")] == [(2, 2 + len(text))]
    assert [one.key for one in table.find("unreal engine 5 and 24mm lens, f/1.8")] == [
        "unrealengine#",
        "#mmlens",
        "f#",
    ]
    assert next(iter(table.find("photo, realistic"))).key == "photo"
    assert not [*table.find("xphotorealistic 8kx")]


def test_spaces_of_diffusiondb() -> None:
    for text, result in (
        ("1 9 8 7", "1987"), ("8 k", "8k"), ("16 K", "16K"), ("3 d", "3d"), ("a 3 d ring", "a 3d ring"), ("1 9 5 0 s", "1950s"),
        ("sci - fi", "sci-fi"), ("Sci - fi", "Sci - fi"), ("2 cats 3 dogs", "2 cats 3 dogs"), ("d & d", "d&d"),
        ("1.5 2", "1.5 2"), ("4 5 year old", "45 year old"), ("( cyber )", "(cyber)"), ("9 king", "9 king"),
    ):  # fmt: skip
        assert unspaced(text) == result


def test_syntax_of_hostile_prompts_ends() -> None:
    for text in (
        "(" * 9_000,
        "(a:1" * 4_000,
        "<a:" * 4_000,
        "--a " * 4_000,
        "by " * 4_000,
        "[" + "x" * 20_000,
        ":: " * 6_000,
    ):
        assert len(without_syntax(text)[0]) <= 2 * len(text)


def test_long_prompts_end(table: Table) -> None:
    for text in (
        "by " * 1_000,
        "a, " * 2_000,
        "in the style of " * 500,
        "art and " * 1_000,
        "8k " * 1_500,
        "x" * 20_000,
        "!" * 20_000 + "x",
        ":" * 20_000,
    ):
        assert clean(text, table).prompt


# ---------------------------------------------------------------- the table


def test_the_table_is_sound() -> None:
    rows = [
        line.split("\t")
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if not line.startswith("# ")
    ]
    keys = [key_of(row[2]) for row in rows]
    assert all(len(row) == 3 and row[0] in KINDS and row[1] in PLACES for row in rows)
    assert len(set(keys)) == len(keys) > 1_000
    assert rows == sorted(rows)


@pytest.mark.parametrize(
    "line",
    [
        "quality anywhere x",
        "kind\tanywhere\tx",
        "quality\tthere\tx",
        "quality\talone\t-",
        "quality\talone\ta b c d e f g h i",
    ],
)
def test_a_wrong_table(line: str, tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text(f"# words\nquality\talone\tfine\n\n{line}\n")
    with pytest.raises(ValueError, match=r"words.tsv line 4"):
        read_table(path)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("style\tanywhere\tin claymation\n")
    own = read_table(path)
    assert clean("a cat in claymation, 8k", own).prompt == "a cat, 8k"
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no phrases"):
        read_table(path)


# ---------------------------------------------------------------- counts


def test_frequencies_by_hand(table: Table) -> None:
    texts = ["a cat, 8 k, 8k, Sharp-Focus", "sharp focus", "a dog"]
    assert frequencies(texts, table) == {("resolution", "8k"): 1, ("quality", "sharp focus"): 2}
    assert parts_left(["a, b, b , c", "b, C"]) == {"b": 1, "c": 2}


def test_pieces_say_both() -> None:
    assert pieces("a 8 k cat , hd", "a 8k cat") == [
        ("same", "a"), ("gone", " 8 k"), ("new", " 8k"), ("same", " cat"), ("gone", " , hd"),
    ]  # fmt: skip
    assert pieces("(a red car:1.3), hd", "a red car") == [
        ("gone", "("), ("same", "a red car"), ("gone", ":1.3), hd"),
    ]  # fmt: skip
    assert pieces("cat on mat, 8k", "a cat on mat") == [
        ("new", "a"),
        ("same", " cat on mat"),
        ("gone", ", 8k"),
    ]
    assert pieces("A cat", "The cat") == [("gone", "A"), ("new", " The"), ("same", " cat")]


# ---------------------------------------------------------------- the program


def run(folder: Path, *texts: str, **changes: Any) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    given: dict[str, Any] = {"prompts": (folder / "prompts.txt",), "output_dir": folder / "out"} | changes
    clean_prompts.main(Config(**given))
    found: dict[str, Any] = json.loads((folder / "out/summary.json").read_text(encoding="utf-8"))
    return found


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a cat, 8 k, artgerm", "a cat", "", "a dog, 8k", "8k, hd"]
    found = run(tmp_path, *texts)
    assert read_jsonl(tmp_path / "out/prompts.jsonl") == [
        {"prompt": "a cat", "original": texts[0], "removed": [["resolution", "8k"], ["artist", "artgerm"]], "only_style": False},
        {"prompt": "a cat", "original": texts[1], "removed": [], "only_style": False},
        {"prompt": "a dog", "original": texts[3], "removed": [["resolution", "8k"]], "only_style": False},
        {"prompt": "8k", "original": texts[4], "removed": [["resolution", "8k"], ["resolution", "hd"]], "only_style": True},
    ]  # fmt: skip
    assert found == {
        "cleaner": "rules", "kept": [], "prompts": 4, "changed": 3, "only_style": 1, "became_equal_to_others": 1,
        "words_before": 3.0, "words_after": 1.75, "removed_from_share": {"artist": 0.25, "resolution": 0.75},
        "style_words": {"resolution 8k": [3, 1], "artist artgerm": [1, 0], "resolution hd": [1, 0]},
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "resolution 8k    75.00% ->  25.00%" in said
    assert read_prompts(tmp_path / "out/prompts.jsonl") == ["a cat", "a cat", "a dog", "8k"], (
        "drivers read it"
    )


def test_inputs_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a cat, 8k"}]))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption"], ["a dog, artgerm"]])
    config = parse(
        Config,
        [
            "--prompts",
            str(tmp_path / "a.json"),
            str(tmp_path / "b.csv"),
            "--output-dir",
            str(tmp_path / "out"),
        ],
    )
    clean_prompts.main(config)
    assert [row["prompt"] for row in read_jsonl(tmp_path / "out/prompts.jsonl")] == ["a cat", "a dog"]


def test_the_page_escapes(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    run(
        tmp_path,
        f'{script} a cat, 8k, "><img src=x onerror=alert(1)>',
        f"{script}, artgerm, {script}, {'x' * 9_000}, 8k",
    )
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert len(page) < 60_000


def test_the_page_shows_some(tmp_path: Path) -> None:
    run(tmp_path, *(f"cat {number}, 8k" for number in range(50)), shown=7)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert 5 <= page.count("<del>") <= 7
    assert "<h2>7 of the prompts that changed</h2>" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"prompts": ()}, "--prompts needs"), ({"prompts": (Path("a"),) * 2}, "--prompts names a twice;"), ({"shown": -1}, "--shown must be")],
)  # fmt: skip
def test_wrong_flags(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**{"prompts": (tmp_path / "a.txt",), "output_dir": tmp_path / "out"} | changes)


def test_wrong_inputs_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.tsv").write_text("x\n")
    for changes, words in (
        ({}, "exists already"),
        ({"output_dir": tmp_path / "new", "prompts": (tmp_path / "empty.txt",)}, "holds no prompts"),
        ({"output_dir": tmp_path / "new", "table": tmp_path / "bad.tsv"}, "must be a kind"),
        ({"output_dir": tmp_path / "new", "table": tmp_path / "none.tsv"}, "none.tsv"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "a cat", **changes)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- real prompts


@pytest.mark.skipif(not SHARED.is_dir(), reason="the prompts are not in the repository")
def test_real_prompts_lose_style_and_keep_words(table: Table) -> None:
    """The most frequent tails of DiffusionDB's prompts; compositional prompts, which have no style, are left alone."""
    texts = [row["text"] for row in json.loads((SHARED / "imagereward/refl_data.json").read_text())][:2_000]
    cleaned = [clean(text, table).prompt for text in texts]
    for words in ("greg rutkowski", "artstation", "8k", "octane render", "sharp focus", "highly detailed"):
        before, after = (sum(words in unspaced(text).lower() for text in some) for some in (texts, cleaned))
        assert after < 0.06 * before > 6, words
    plain = (SHARED / "geneval/generation_prompts.txt").read_text().splitlines()
    assert [clean(text, table).prompt for text in plain] == plain
