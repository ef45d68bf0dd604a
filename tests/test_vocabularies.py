"""The vocabularies in the package are the published ones, are installed with it, and are all that a tokenizer needs."""

import gzip
import hashlib
import tomllib
from pathlib import Path

import pytest

from golden_weights import SHARED
from rewards.clip_tokenizer import MERGES
from rewards.imagereward import VOCAB, VOCAB_SHA256

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", [MERGES, VOCAB], ids=lambda path: path.name)
def test_digests_are_those_of_the_licence_note(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [line for line in path.with_name("README.md").read_text().splitlines() if f"`{path.name}`" in line]
    assert len(rows) == 1
    assert f"`{digest}`" in rows[0]


def test_the_counts_are_the_published_ones() -> None:
    merges = MERGES.read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert len(merges) - 1 == 49408 - 2 * 256 - 2
    assert hashlib.sha256(VOCAB.read_bytes()).hexdigest() == VOCAB_SHA256
    assert len(VOCAB.read_text(encoding="utf-8").splitlines()) == 30522


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs OpenAI's file in ../shared")
def test_the_merges_are_the_first_of_openai_s_file() -> None:
    theirs = (SHARED / "data/weights/clip_bpe/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(theirs).decode().split("\n")
    assert MERGES.read_text(encoding="utf-8").split("\n")[1:-1] == lines[1 : 1 + 48894]


def test_they_are_installed_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["rewards"]
    found = {path for pattern in patterns for path in (ROOT / "rewards").glob(pattern)}
    assert {MERGES, VOCAB, MERGES.with_name("LICENSE_CLIP")} <= found
    assert "rewards/vocabularies/LICENSE_CLIP" in settings["project"]["license-files"]
