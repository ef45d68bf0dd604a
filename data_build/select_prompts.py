"""Select prompts to annotate: diverse and typical ones, as for ImageReward's data (arXiv 2304.05977,
appendix A.1).

Prompts are embedded, each is connected to its k = 150 nearest neighbours by cosine, and the prompt with the
highest score is selected repeatedly. The score is that of vote-k (Su et al. 2022, arXiv 2209.01975, section
2.1). With (v, u) an edge where u is one of v's nearest neighbours,

    score(u) = sum of s(v) over all v not yet chosen with (v, u) an edge,    s(v) = rho^-(edges from v to chosen ones),

rho = 10. The cost is quadratic, so prompts are shuffled into groups, and each group has its own graph.
ImageReward selected 100 prompts in each of 100 groups of about 20,000. Memory holds the vectors and the
graph of one group, and the texts of all.

    python data_build/select_prompts.py --prompts metadata.parquet --output-dir data/chosen
    python data_build/select_prompts.py --prompts refl_data.json more.txt --output-dir data/chosen --embedding sentence-transformers

Prompts without a word of their own ("the ") and short ones that are broken off ("a photo of") are no candidates and
have no vote: they are near to very many others (data_build/fragments.py). Writes `prompts.jsonl` (prompt, score when selected, group, order in the group; drivers read it with
--prompts) and `summary.json`. In it, `covered` is the share of prompts that are selected or have a selected
neighbour, compared with a random selection. ImageReward uses Sentence-BERT embeddings. The default here is
TF-IDF of words and word pairs, which needs no further library and no weights. It compares words, not
meaning, and does not work for languages without spaces; use Sentence-BERT for those. Hardware: one CPU
core, 760 prompts/s with TF-IDF, and 570 MB of memory besides the texts; Sentence-BERT needs a GPU. Left
out: the second stage of vote-k, which uses a language model.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import exit_on_user_error, parse

RHO = 10
"""What a vote loses by with each chosen neighbour."""
WHOLE = 10**12
"""A whole vote. Votes are counted in parts of it, so that sums are exact and equal scores are equal; what is less is
nothing.
"""
MODEL = "sentence-transformers/paraphrase-mpnet-base-v2"
"""The Sentence-BERT of the released code of vote-k."""
ROWS = 256
"""Prompts that are compared with their whole group at a time."""
METADATA = {"image_name", "part_id", "prompt"}
"""Columns that tell DiffusionDB's metadata from other tables."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Choose diverse and typical prompts by vote-k."""

    prompts: tuple[Path, ...]
    """Prompt files: txt, json, jsonl, csv, tsv or parquet, also DiffusionDB's metadata; duplicates are dropped.
    """
    output_dir: Path
    """Folder to create; it must not exist yet."""
    per_group: int = 100
    """Prompts to choose from each group."""
    group_size: int = 20_000
    """Maximum number of prompts in a group; memory and time per prompt grow with it."""
    k: int = 150
    """Number of nearest neighbours of each prompt."""
    embedding: Literal["tfidf", "sentence-transformers"] = "tfidf"
    """Embedding of the prompts."""
    model: str | None = None
    """sentence-transformers model, a folder or a cached hub name; None =
    paraphrase-mpnet-base-v2.
    """
    seed: int = 0
    """Seed of the assignment of prompts to groups."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("--prompts needs a file")
        for name in ("per_group", "group_size", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")
        if self.model is not None and self.embedding == "tfidf":
            raise ValueError("--model is for --embedding sentence-transformers; tfidf has none")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import numpy as np
import pyarrow.parquet
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tqdm import tqdm

from data_build.fragments import is_fragment
from preftune import seeds
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.prompts import read_rows
from preftune.records import write_jsonl, write_lines

# ---------------------------------------------------------------- prompts


def read_all(paths: Sequence[Path]) -> tuple[list[str], Counter[str]]:
    """Return the prompts of all files, each once and in their order, and how many were read, repeated, blank and fragments."""
    known: dict[str, None] = {}
    counts = Counter[str](read=0, repeated=0, blank=0, fragments=0)
    for path in paths:
        for texts in _metadata(path) if _is_metadata(path) else [_texts(path)]:
            sound = [text for text in texts if text and text.strip()]
            before = len(known)
            known.update(dict.fromkeys(sound))
            counts.update(read=len(texts), blank=len(texts) - len(sound))
            counts.update(repeated=len(sound) - (len(known) - before))
    prompts = [text for text in known if not is_fragment(text)]
    counts["fragments"] = len(known) - len(prompts)
    if not prompts:
        aside = f" but {counts['fragments']} fragments, such as {next(iter(known))!r}" if known else ""
        raise ValueError(f"--prompts {paths[0]} holds no prompts{aside}")
    return prompts, counts


def _is_metadata(path: Path) -> bool:
    """Whether a file is metadata.parquet of DiffusionDB, where some prompts are blank and most are there several times."""
    try:
        return path.suffix == ".parquet" and {*pyarrow.parquet.read_schema(path).names} >= METADATA
    except (OSError, pyarrow.ArrowException):
        return False  # read_prompts says what is wrong


def _texts(path: Path) -> list[str | None]:
    """The prompts of another file, blank ones included."""
    return [text for _, text in read_rows(path)]


def _metadata(path: Path) -> Iterator[list[str | None]]:
    """The prompts of DiffusionDB's metadata, a few at a time: one for each of its images."""
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["prompt"]):
            yield batch.column(0).to_pylist()


def split(count: int, size: int, seed: int) -> list[NDArray[np.intp]]:
    """Return the numbers below `count` in groups of at most `size`, as equal as can be, drawn from the seed."""
    order = seeds.rng(seed).permutation(count)
    return np.array_split(order, math.ceil(count / size))


# ---------------------------------------------------------------- vectors


def tfidf(texts: Sequence[str]) -> csr_array:
    """Return the sparse TF-IDF vectors of words and of pairs of neighbouring words, (N, terms), of length 1.

    (1 + ln tf) (1 + ln((1 + N) / (1 + df))), tf the number of times in the text and df the number of texts; no word: zeros.
    """
    columns: dict[str, int] = {}
    indices, ends, values = list[int](), [0], list[float]()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        terms = Counter([*words, *(" ".join(pair) for pair in itertools.pairwise(words))])
        indices += [columns.setdefault(term, len(columns)) for term in terms]
        values += [1 + math.log(times) for times in terms.values()]
        ends.append(len(indices))
    frequencies = np.bincount(indices, minlength=len(columns))
    rarities = 1 + np.log((1 + len(texts)) / (1 + frequencies))
    weights = np.array(values, np.float32) * rarities[indices].astype(np.float32)
    vectors = csr_array((weights, indices, ends), shape=(len(texts), max(len(columns), 1)))
    lengths = scipy.sparse.linalg.norm(vectors, axis=1)
    vectors.data /= np.repeat(np.where(lengths > 0, lengths, 1), np.diff(vectors.indptr))
    return vectors


def sentence_bert(model: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Return what makes vectors (N, D) of texts by Sentence-BERT; ValueError where library or weights are not here.

    As in the released code of vote-k the mean of all is taken away first; the length is 1 then.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            "--embedding sentence-transformers needs its library: pip install sentence-transformers; tfidf needs none"
        ) from error
    try:
        encoder = SentenceTransformer(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model} is neither a folder of sentence-transformers nor in the hub's cache"
        ) from error

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.asarray(encoder.encode([*texts], show_progress_bar=False), np.float32)
        vectors = vectors - vectors.mean(axis=0)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    return embed


# ---------------------------------------------------------------- graph and votes


def nearest(vectors: NDArray[np.float32] | csr_array, k: int) -> csr_array:
    """Return the graph (N, N) of vectors (N, D) of length 1: row v has 1 at v's k nearest by cosine, but not at itself.

    Whose cosine is exactly 0, no word in common, has no neighbour: else the first of the group would be the neighbour
    of all.
    """
    count = vectors.shape[0]
    k = min(k, count - 1)
    indices, ends = [np.zeros(0, np.intp)], [0]
    others = vectors.T.tocsr() if isinstance(vectors, csr_array) else vectors.T
    for start in range(0, count, ROWS):
        products = vectors[start : start + ROWS] @ others
        cosines = torch.from_numpy(products.toarray() if isinstance(products, csr_array) else products)
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -math.inf
        best = cosines.topk(k)
        linked = (best.values != 0).numpy()
        indices.append(best.indices.numpy()[linked])
        ends += (ends[-1] + linked.sum(axis=1).cumsum()).tolist()
    joined = np.concatenate(indices)
    return csr_array((np.ones(len(joined), np.int64), joined, ends), shape=(count, count))


def choose(graph: csr_array, count: int) -> tuple[list[int], list[float]]:
    """Return the vertices that vote-k takes, in order, and the score of each when it was taken; of equal ones the first.

    graph (N, N): 1 at (v, u) where u is one of v's nearest.
    """
    voters = graph.T.tocsr()
    weights = np.full(voters.shape[0], WHOLE)  # s(v), and 0 of those that are chosen
    chosen, scores = list[int](), list[float]()
    for _ in range(count):
        sums = voters @ weights
        sums[chosen] = -1
        best = int(sums.argmax())
        chosen.append(best)
        scores.append(int(sums[best]) / WHOLE)
        weights[voters.indices[voters.indptr[best] : voters.indptr[best + 1]]] //= RHO
        weights[best] = 0
    return chosen, scores


def covered(graph: csr_array, chosen: Sequence[int]) -> float:
    """Return the share of vertices that are chosen or have an edge to a chosen one."""
    marks = np.zeros(graph.shape[0], np.int64)
    marks[chosen] = 1
    return float((marks + graph @ marks > 0).mean())


@one_writer
def main(config: Config) -> None:
    """Choose from each group, write the folder under a temporary name, and rename it."""
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        embed = tfidf if config.embedding == "tfidf" else sentence_bert(config.model or MODEL)
        prompts, counts = read_all(config.prompts)
        groups = split(len(prompts), config.group_size, config.seed)
        if config.per_group > min(map(len, groups)):
            raise ValueError(
                f"--per-group {config.per_group} is more than a group of {min(map(len, groups))} has; {len(prompts)} prompts"
                f" are in {len(groups)} groups"
            )
    rows, shares = list[dict[str, Any]](), list[tuple[float, float]]()
    for group, numbers in enumerate(tqdm(groups, desc="choosing", unit="group")):
        texts = [prompts[number] for number in numbers]
        graph = nearest(embed(texts), config.k)
        chosen, scores = choose(graph, config.per_group)
        for order, (place, score) in enumerate(zip(chosen, scores, strict=True)):
            rows.append({"prompt": texts[place], "score": score, "group": group, "order": order})
        shares.append((covered(graph, chosen), covered(graph, range(len(chosen)))))  # they are shuffled
    summary = {
        **counts, "prompts": len(prompts), "groups": len(groups), "chosen": len(rows),
        "k": config.k, "embedding": config.embedding, "seed": config.seed,
        **dict(zip(("covered", "covered_by_random"), np.mean(shares, axis=0).round(4).tolist(), strict=True)),
    }  # fmt: skip
    with replacing(config.output_dir) as partial:
        write_jsonl(partial / "prompts.jsonl", rows)
        write_lines(partial / "summary.json", json.dumps(summary, indent=2).splitlines())
    show(f"{json.dumps(summary)}\n{config.output_dir}")


if __name__ == "__main__":
    main(CONFIG)
