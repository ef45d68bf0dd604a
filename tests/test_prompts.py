"""Prompt files of every kind, and the order of prompts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preftune.prompts import read_prompts

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
        ("p.CSV", 'caption,prompt\nno,"a red circle, "\nno,"the word ""x"""\n'),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str) -> None:
    assert read_prompts(write(tmp_path / name, text)) == BOTH


def test_only_line_feeds_end_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.txt", "a\x0cb\u2028c\x85d\n")) == ["a\x0cb\u2028c\x85d"]


def test_csv_field_over_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'text\n"a\nb"\n""\n')
    with pytest.raises(ValueError, match="line 4 is empty"):
        read_prompts(path)
    assert read_prompts(write(path, 'text\n"a\nb"\n')) == ["a\nb"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["no", "no"], "text": BOTH}), path)
    assert read_prompts(path) == BOTH
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2 must be a text, not null"):
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
        ("p.txt", "a\n\nb\n", "line 2 is empty"),
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '["a", " "]', "row 2 is empty"),
        ("p.json", '["a", 3]', "row 2 must be a text, not int"),
        ("p.json", '[{"image": "a"}]', "row 1 has no text, prompt or caption; it has image"),
        ("p.json", '{"text": "a"}', "must hold a list of prompts, not a dict"),
        ("p.json", '["a",\n"b"', "line 2 is not JSON"),
        ("p.json", "[" * 100_000, "nested too deep"),
        ("p.json", '["\\ud800"]', "row 1 holds half of a surrogate pair"),
        ("p.jsonl", '"a"\n{"text": "b"\n', "line 2 is not JSON"),
        ("p.jsonl", '"a"\n\n"b"\n', "line 2 is empty"),
        ("p.jsonl", '{"text": null}', "line 1 must be a text, not null"),
        ("p.csv", "id,words\n1,a\n", "line 1 has no text, prompt or caption; it has id, words"),
        ("p.csv", "id,text\n1\n", "line 2 must be a text, not null"),
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
