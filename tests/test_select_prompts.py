"""Prompts chosen by vote-k: by hand, against a slow reference in fractions, and the files that come out."""

import itertools
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.sparse import csr_array

from data_build import select_prompts
from data_build.fragments import is_fragment
from preftune.cli import parse
from preftune.prompts import read_prompts
from preftune.records import read_jsonl

SHARED = Path(__file__).parents[2] / "shared/data/prompts/imagereward"


def config(output: Path, *files: Path, **changes: object) -> select_prompts.Config:
    settings = {"per_group": 3, "group_size": 20, "k": 4} | changes
    return select_prompts.Config(prompts=files, output_dir=output, **settings)  # type: ignore[arg-type]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def some_prompts(number: int) -> list[str]:
    """Prompts of a few words, all different, of which common words are in many."""
    rng = np.random.default_rng(7)
    words = np.array("red blue cat dog house river oil photo of a the in style portrait mountain".split())  # noqa: SIM905
    texts = [" ".join(words[rng.integers(0, len(words), rng.integers(2, 7))]) for _ in range(4 * number)]
    return [text for text in dict.fromkeys(texts) if not is_fragment(text)][:number]


# ---------------------------------------------------------------- the formula


def test_votes_by_hand() -> None:
    """0, 1, 2 and 5 have 3 among their nearest, 0 and 3 have 4, 4 and 5 have 0, 1 has 2.

    All votes are whole: 3 has four. Then s = 1/10 for 0, 1, 2, 5 and 3 votes no more: 0 has 1 + 1/10 (4 and 5), 4 has 1/10
    (0), 2 has 1/10 (1): 0. Then s(4) = 1/10 and s(5) = 1/100, 0 votes no more: 2 has 1/10 (1), 4 has nothing.
    """
    edges = [(0, 3), (1, 3), (2, 3), (5, 3), (0, 4), (3, 4), (4, 0), (5, 0), (1, 2)]
    graph = np.zeros((6, 6), np.int64)
    graph[tuple(zip(*edges, strict=True))] = 1
    chosen, scores = select_prompts.choose(csr_array(graph), 6)
    assert chosen == [3, 0, 2, 1, 4, 5]  # nobody votes for the last three: the first of equal ones
    assert scores == [4.0, 1.1, 0.1, 0.0, 0.0, 0.0]
    assert select_prompts.covered(csr_array(graph), [3]) == 5 / 6  # all but 4
    assert select_prompts.covered(csr_array(graph), [3, 4]) == 1


def slow(vectors: np.ndarray, k: int, count: int) -> tuple[list[int], list[float]]:
    """Equation 1 of the paper as it stands, in fractions, with all sets written out."""
    n = len(vectors)
    edges = set()
    for v in range(n):
        others = sorted((u for u in range(n) if u != v), key=lambda u: -float(vectors[v] @ vectors[u]))
        edges |= {(v, u) for u in others[:k]}
    chosen, scores = list[int](), list[float]()
    for _ in range(count):
        left = [u for u in range(n) if u not in chosen]
        s = {v: Fraction(1, 10 ** sum((v, one) in edges for one in chosen)) for v in left}
        score = {u: sum((s[v] for v in left if (v, u) in edges), Fraction(0)) for u in left}
        best = max(left, key=lambda u: (score[u], -u))
        chosen.append(best)
        scores.append(float(score[best]))
    return chosen, scores


@pytest.mark.parametrize(("k", "rows"), [(1, 256), (7, 16), (80, 256)])
def test_dense_vectors_against_a_slow_reference(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are compared at a time; k = 80 of 60 joins all, so that the order alone decides."""
    monkeypatch.setattr(select_prompts, "ROWS", rows)
    vectors = np.random.default_rng(k).normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    graph = select_prompts.nearest(vectors, k)
    assert (np.diff(graph.indptr) == min(k, 59)).all()
    assert not graph.diagonal().any()
    chosen, scores = slow(vectors, k, 12)
    assert select_prompts.choose(graph, 12) == (chosen, pytest.approx(scores, abs=1e-11))


def test_tfidf_by_hand() -> None:
    """`a cat` in two of three texts: a, cat and their pair weigh 1 + ln(4/3), the rest 1 + ln 2; A is a, twice 1 + ln 2."""
    vectors = select_prompts.tfidf(["a cat", "A cat a", "!?"]).toarray()
    common, rare = 1 + math.log(4 / 3), 1 + math.log(2)
    first = np.array([common, common, common, 0])
    second = np.array([common * (1 + math.log(2)), common, common, rare])  # a, cat, "a cat", "cat a"
    expected = [first / np.linalg.norm(first), second / np.linalg.norm(second), [0, 0, 0, 0]]
    assert vectors == pytest.approx(np.array(expected), abs=1e-6)


def test_sparse_and_dense_graphs_agree_and_strangers_are_not_joined() -> None:
    texts = [*some_prompts(40), "zebra", "!?"]
    vectors = select_prompts.tfidf(texts)
    graph = select_prompts.nearest(vectors, 5)
    assert (graph != select_prompts.nearest(vectors.toarray(), 5)).nnz == 0
    cosines = (vectors @ vectors.T).toarray()
    for v, u in zip(*graph.nonzero(), strict=True):
        others = np.delete(cosines[v], v)
        assert 0 < cosines[v, u] >= np.sort(others)[-5] - 1e-6
    assert np.diff(graph.indptr)[-2:].tolist() == [0, 0], "whoever shares no word has no neighbours"
    assert not graph.toarray()[:, -2:].any()


# ---------------------------------------------------------------- files


def test_files_of_all_kinds_groups_and_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = some_prompts(50)
    write(tmp_path / "a.txt", texts[:20])
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts[10:30]]))
    table = {
        "image_name": ["x.png"] * 32,
        "prompt": pyarrow.array([*texts[20:], None, "  "], pyarrow.string()),
        "part_id": [1] * 32,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    files = [tmp_path / name for name in ("a.txt", "b.json", "metadata.parquet")]
    select_prompts.main(config(tmp_path / "out", *files))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {key: summary[key] for key in ("read", "repeated", "blank", "prompts", "groups", "chosen")} == {
        "read": 72, "repeated": 20, "blank": 2, "prompts": 50, "groups": 3, "chosen": 9,
    }  # fmt: skip
    rows = read_jsonl(tmp_path / "out" / "prompts.jsonl")
    assert [list(row) for row in rows] == [["prompt", "score", "group", "order"]] * 9
    assert [(row["group"], row["order"]) for row in rows] == [(g, o) for g in range(3) for o in range(3)]
    assert len({row["prompt"] for row in rows} & set(texts)) == 9
    assert read_prompts(tmp_path / "out" / "prompts.jsonl") == [row["prompt"] for row in rows]
    assert all(one["score"] >= other["score"] for one, other in itertools.pairwise(rows) if other["order"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.json", "metadata.parquet", "out"]


def test_blank_prompts_of_a_text_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n \na cat\n")
    texts, counts = select_prompts.read_all([tmp_path / "p.txt"])
    assert texts == ["a cat", "a dog"]
    assert counts == {"read": 5, "repeated": 1, "blank": 2, "fragments": 0}


def test_each_group_is_chosen_from_as_if_alone(tmp_path: Path) -> None:
    texts = some_prompts(41)
    select_prompts.main(config(tmp_path / "out", write(tmp_path / "a.txt", texts), seed=3))
    groups = select_prompts.split(41, 20, 3)
    assert sorted(len(group) for group in groups) == [13, 14, 14]
    assert sorted(np.concatenate(groups).tolist()) == list(range(41))
    rows = read_jsonl(tmp_path / "out" / "prompts.jsonl")
    for group, numbers in enumerate(groups):
        mine = [texts[number] for number in numbers]
        chosen, _ = select_prompts.choose(select_prompts.nearest(select_prompts.tfidf(mine), 4), 3)
        assert [row["prompt"] for row in rows if row["group"] == group] == [mine[place] for place in chosen]


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", some_prompts(60))
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        select_prompts.main(config(tmp_path / name, source, seed=seed))
    one, again, two = ((tmp_path / name / "prompts.jsonl").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


def test_real_prompts_are_better_covered_than_by_chance(tmp_path: Path) -> None:
    """One that many others resemble is chosen before one that nobody does."""
    if not SHARED.is_dir():
        pytest.skip("the prompts of ../shared are not here")
    select_prompts.main(
        config(tmp_path / "out", SHARED / "refl_data.json", group_size=2500, per_group=25, k=50)
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["prompts"] + summary["repeated"] + summary["fragments"] == summary["read"] == 10_000
    assert 5 <= summary["fragments"] <= 10, "`the `, `you`, `polaroid photo of ` and the like"
    assert summary["covered"] > summary["covered_by_random"] + 0.2


# ---------------------------------------------------------------- Sentence-BERT


def test_sentence_bert_on_a_tiny_one(tmp_path: Path) -> None:
    """Equal to the mean of the token vectors, centred over the group and of length 1."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "cat", "dog"]
    write(tmp_path / "vocab.txt", words)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    library.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "model"))
    texts = ["red cat", "blue dog cat", "dog"]
    found = select_prompts.sentence_bert(str(tmp_path / "model"))(texts)
    with torch.no_grad():
        means = [
            bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
            for text in texts
        ]
    expected = np.stack(means) - np.mean(means, axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "the ",
        "The",
        "you",
        "as above, so below",
        "...",
        "polaroid photo of ",
        "cottage inside with",
        "a picture of the",
        "palette with a",
    ],
)
def test_fragments(text: str) -> None:
    assert is_fragment(text)


@pytest.mark.parametrize(
    "text",
    ["cat", "the cat", "Vitamin A", "\U0001f98a", "des graines qui valent de l'or", "\u732b", "boots and \U0001f454", "42",
     "a very long description of a castle on a hill with a dragon and"],
)  # fmt: skip
def test_no_fragments(text: str) -> None:
    assert not is_fragment(text)


def test_a_fragment_is_not_typical(tmp_path: Path) -> None:
    """`the ` shares its one word with all, and was taken first; it has no vote either."""
    texts = [
        f"the {animal} of the {place}"
        for animal in ("cat", "dog", "fox")
        for place in ("hill", "sea", "wood", "town")
    ]
    write(tmp_path / "a.txt", ["the ", *texts, "photo of the"])
    graph = select_prompts.nearest(select_prompts.tfidf(["the ", *texts]), 4)
    assert select_prompts.choose(graph, 12)[0].count(0) == 1, "it would be chosen"
    select_prompts.main(config(tmp_path / "out", tmp_path / "a.txt", per_group=12))
    chosen = [row["prompt"] for row in read_jsonl(tmp_path / "out" / "prompts.jsonl")]
    assert sorted(chosen) == sorted(texts)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["read"], summary["fragments"], summary["prompts"]) == (14, 2, 12)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts", "TMP/gone.txt"], "gone.txt does not exist"),
        (["--prompts", "TMP/gone.parquet"], "gone.parquet does not exist"),
        (["--prompts", "TMP/blank.parquet"], "--prompts TMP/blank.parquet holds no prompts"),
        (["--prompts", "TMP/the.txt"], "the.txt holds no prompts but 2 fragments, such as 'the'"),
        (["--output-dir", "TMP"], "exists already; remove it or choose another --output-dir"),
        (["--per-group", "0"], "--per-group must be at least 1, got 0"),
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--group-size", "0"], "--group-size must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--per-group", "6"], "--per-group 6 is more than a group of 5 has; 5 prompts are in 1 groups"),
        (["--group-size", "2", "--per-group", "2"], "--per-group 2 is more than a group of 1 has"),
        (["--model", "x"], "--model is for --embedding sentence-transformers; tfidf has none"),
        (["--embedding", "sentence-transformers"], "pip install sentence-transformers"),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    source = write(tmp_path / "a.txt", some_prompts(5))
    write(tmp_path / "the.txt", ["the", "photo of"])
    table = {"image_name": ["x"], "prompt": [" "], "part_id": [1]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "blank.parquet")
    base = {"--prompts": str(source), "--output-dir": str(tmp_path / "out"), "--per-group": "1"}
    unsaid = [word for flag, value in base.items() if flag not in flags for word in (flag, value)]
    given = [flag.replace("TMP", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        select_prompts.main(parse(select_prompts.Config, [*unsaid, *given]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words.replace("TMP", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
