"""Prompt files of every kind, and the order of prompts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preftune.prompts import read_prompts, read_rows

SHARED = Path(__file__).parents[2] / "shared/data/prompts"
BOTH = ["a red circle, ", 'the word "x"']


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", 'a red circle, \nthe word "x"'),
        ("p.txt", '\ufeffa red circle, \r\nthe word "x"\r\n\n \n'),
        ("p.json", json.dumps(BOTH)),
        ("p.json", json.dumps([{"text": BOTH[0], "image": "1"}, {"Prompt": BOTH[1]}])),
        ("p.jsonl", '{"caption": "a red circle, "}\n"the word \\"x\\""\n\n'),
        ("p.csv", 'id,text\n1,"a red circle, "\n2,"the word ""x"""\n'),
        ("p.tsv", 'Prompt\tCategory\na red circle, \tA\nthe word "x"\tB\n'),
        ("p.csv", '\ufeffid;text;n\r\n1;a red circle, ;1\r\n2;"the word ""x""";2\r\n'),
        ("p.csv", 'id\tCaption\n1\ta red circle, \n2\t"the word ""x"""\n3\tNaN\n4\tNone\n'),
        ("p.CSV", 'caption,prompt\nno,"a red circle, "\nno,"the word ""x"""\n'),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str) -> None:
    assert read_prompts(write(tmp_path / name, text)) == BOTH


def test_only_line_feeds_end_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.txt", "a\x0cb\u2028c\x85d\n")) == ["a\x0cb\u2028c\x85d"]


def test_csv_field_over_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'text\n"a\nb"\n""\n"c"\n')
    assert read_prompts(path) == ["a\nb", "c"]
    assert [place for place, _ in read_rows(path)] == ["line 3", "line 4", "line 5"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["no", "no"], "text": BOTH}), path)
    assert read_prompts(path) == BOTH
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert read_prompts(path) == ["a", "b"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, " "]}), path)
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"]}), path)
    with pytest.raises(ValueError, match="has no text, prompt or caption; it has image"):
        read_prompts(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="is not a parquet file"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '["a", 3]', "row 2 must be a text, not int"),
        ("p.json", '[{"image": "a"}]', "row 1 has no text, prompt or caption; it has image"),
        ("p.json", '{"text": "a"}', "must hold a list of prompts, not a dict"),
        ("p.json", '["a",\n"b"', "line 2 is not JSON"),
        ("p.json", "[" * 100_000, "nested too deep"),
        ("p.json", '["\\ud800"]', "row 1 holds half of a surrogate pair"),
        ("p.jsonl", '"a"\n{"text": "b"\n', "line 2 is not JSON"),
        ("p.jsonl", '{"text": null}', "holds no prompts"),
        ("p.jsonl", '{"text": ["a"]}', "line 1 must be a text, not list"),
        ("p.csv", "id,words\n1,a\n", "line 1 has no text, prompt or caption; it has id, words"),
        ("p.csv", "id,text\n1\n", "holds no prompts"),
        ("p.csv", 'text\n"a"b\n', "malformed after line 1"),
        ("p.csv", "", "line 1 has no text"),
        ("p.doc", "a", r"ends in \.doc; it must end in \.txt, \.json"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "number", "first"),
    [
        ("p.txt", 'a red circle, \n \n\t\nthe word "x"\n\n', 2, "line 2"),
        ("p.json", json.dumps([None, BOTH[0], "", {"text": BOTH[1]}]), 2, "row 1"),
        (
            "p.jsonl",
            '{"caption": "a red circle, "}\n\n{"caption": null}\n{"caption": NaN}\n"the word \\"x\\""\n',
            3,
            "line 2",
        ),
        ("p.tsv", 'Prompt\tN\na red circle, \t1\n \t2\nthe word "x"\t3\n', 1, "line 3"),
    ],
)
def test_blank_prompts_are_left_out_and_counted(
    tmp_path: Path, name: str, text: str, number: int, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_prompts(write(tmp_path / name, text)) == BOTH
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{number} blank prompt{'s' * (number > 1)} left out, the first at {first}" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat\n# 1 animals\n #2\na #dog\n", "2 lines begin with #"),
        ("id,prompt\n1,a cat\n2,a dog\n", "looks like a table: its first line is 'id,prompt'; all 3 lines"),
        ("caption\na cat\n", "rename it to p.csv"),
        ("n\tText\n1\ta cat, black\n", "rename it to p.tsv"),
        ('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "looks like JSON, and its 2 lines"),
        ("a cat\n" + "x" * 2_001 + "\n" + "y " * 5_000 + "\n", "2 prompts have more than 2,000 characters"),
    ],
)
def test_what_is_probably_not_meant_is_said(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = read_prompts(write(tmp_path / "p.txt", text))
    assert len(prompts) == len(text.splitlines()), "all lines are prompts all the same"
    (said,) = capsys.readouterr().err.splitlines()
    assert words in said


def test_nothing_is_said_of_plain_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "a text, in red, on a wall\nprompt engineering, a book\n" + "x" * 2_000 + "\n"
    read_prompts(write(tmp_path / "p.txt", plain))
    assert not capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    read_prompts(write(tmp_path / "p.txt", "a\n\nb"))
    assert not capsys.readouterr().err


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ValueError, match="is no file"):
        read_prompts(tmp_path / "d.txt")
    (tmp_path / "b.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text.* at byte 1"):
        read_prompts(tmp_path / "b.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published prompt files are not here")
def test_published_files() -> None:
    prompts = read_prompts(SHARED / "imagereward/refl_data.json")
    assert len(prompts) == 10_000
    assert prompts[0].startswith("brittle, abstract emotion, no faces.")
    assert len(read_prompts(SHARED / "imagereward/benchmark-prompts.json")) == 100
    parti = read_prompts(SHARED / "parti/PartiPrompts.tsv")
    assert len(parti) == 1632
    assert sum('"' in prompt for prompt in parti) > 5
    assert len(read_prompts(SHARED / "dpg_bench/dpg_bench_prompts.jsonl")) == 1065
    assert len(read_prompts(SHARED / "flow_grpo/pickscore_test.txt")) == 2048


def test_a_prompt_in_place_of_a_file_says_where_prompts_stand() -> None:
    with pytest.raises(
        ValueError,
        match=r"ends in nothing; it must end in .*\(a prompt of its own has several words, in quotes\)",
    ):
        read_prompts(Path("cat"))
