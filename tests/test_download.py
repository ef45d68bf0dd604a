"""Scorers' weights are downloaded when they are missing and can be, after all checks; else one sentence names all that lack."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewards
from golden_weights import tiny_card, write_clip
from hub_server import Hub
from preftune.training.config import RewardConfig
from rewards import CARDS
from rewards.shared_towers import load_all

ROOT = Path(__file__).parents[1]


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.weights.ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, nothing: Path) -> dict[str, dict[str, bytes]]:
    """HPS v2 and PickScore with few weights, as repositories."""
    repos: dict[str, dict[str, bytes]] = {}
    for name in ("hpsv2", "pickscore"):
        card = replace(tiny_card(name), file="weights.pt")
        monkeypatch.setitem(CARDS, name, card)
        repos[str(card.repo)] = {"weights.pt": write_clip(name, nothing).read_bytes()}
    return repos


def test_all_missing_weights_are_named_in_one_sentence(nothing: Path) -> None:
    with pytest.raises(ValueError, match="the weights of") as error:
        rewards.check_all(["imagereward", "hpsv1", "brightness", "aesthetic"], {})
    text = str(error.value)
    assert len(text.splitlines()) == 1
    for part in (
        "the weights of imagereward, hpsv1, aesthetic, clipscore are not here",
        "imagereward: run `hf download zai-org/ImageReward ImageReward.pt` (1.8 GB)",
        "hpsv1: put hpc.pt of github.com/tgxs002/align_sd (OneDrive) (about 1.7 GB) into weights/",
        "(3.7 MB) into weights/, as `curl -L --create-dirs -o weights/sac+logos+ava1-l14-linearMSE.pth https://",
        "clipscore: run `hf download openai/clip-vit-large-patch14 model.safetensors` (about 1.7 GB)",
    ):
        assert part in text
    with pytest.raises(
        ValueError, match=r"hpsv2\.1: run .*; pickscore: run .* \(HF_HUB_OFFLINE=1 forbids a download\)"
    ):
        RewardConfig(rewards=("hpsv2.1=1", "pickscore=0.1")).check()


def test_what_stands_beside_given_weights_is_not_missing(nothing: Path) -> None:
    layers = nothing / "mine.pth"
    layers.write_bytes(b"layers")
    with pytest.raises(ValueError, match="the weights of clipscore are not here"):
        rewards.check("aesthetic", layers)
    (nothing / "model.safetensors").write_bytes(b"tower")
    assert rewards.check("aesthetic", layers) == (layers, nothing / "model.safetensors")


def test_missing_weights_are_downloaded_before_the_first_is_read(
    small: dict[str, dict[str, bytes]],
    nothing: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Hub(small, lfs=("*.pt",)) as server, server.in_use(monkeypatch, nothing / "cache"):
        found = rewards.check_all(["hpsv2", "pickscore"], {}, download=False)
        assert found == {}, "both wait for a download"
        assert not server.requests
        scorers = load_all(["hpsv2", "pickscore"], files={}, device="cpu", dtype=torch.float32)
        said = capsys.readouterr().err
        assert "downloading weights.pt of xswu/HPSv2" in said
        assert "downloading weights.pt of yuvalkirstain/PickScore_v1" in said
        assert f"({len(small['xswu/HPSv2']['weights.pt']):,} bytes)" in said
        assert scorers[0](torch.rand(1, 3, 224, 224), ["a cat"]).isfinite().all()
        asked = len(server.requests)
        assert set(rewards.check_all(["hpsv2", "pickscore"], {}, download=False)) == {"hpsv2", "pickscore"}
        rewards.load("hpsv2")
        assert len(server.requests) == asked, "the cache is used"


def test_a_scorer_with_other_bytes_is_refused(
    small: dict[str, dict[str, bytes]], nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest that the card knows counts, also where the hub names another."""
    monkeypatch.setitem(CARDS, "hpsv2", replace(CARDS["hpsv2"], sha256="0" * 64))
    with (
        Hub(small, lfs=("*.pt",)) as server,
        server.in_use(monkeypatch, nothing / "cache"),
        pytest.raises(
            ValueError,
            match=r"weights\.pt of xswu/HPSv2 arrived with SHA-256 .*; besides, the weights of pickscore",
        ),
    ):
        load_all(["hpsv2", "pickscore"], files={}, device="cpu", dtype=torch.float32)


def test_nothing_is_downloaded_where_a_person_must_fetch_one(
    small: dict[str, dict[str, bytes]], nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(small, lfs=("*.pt",)) as server, server.in_use(monkeypatch, nothing / "cache"):
        with pytest.raises(ValueError, match="the weights of hpsv2, hpsv1 are not here"):
            rewards.check_all(["hpsv2", "hpsv1"], {})
        assert not server.requests


FETCH = """
import sys
from dataclasses import replace
from rewards.download import obtain
from rewards import CARDS
obtain([replace(CARDS["hpsv2"], file="weights.pt")])
"""


def test_of_two_processes_one_downloads(small: dict[str, dict[str, bytes]], nothing: Path) -> None:
    with Hub(small, lfs=("*.pt",)) as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(nothing / "cache"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", FETCH],
                env=environment | {"LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
        transfers = [
            path for method, path, _ in server.requests if method == "GET" and path.startswith("/cdn/")
        ]
    assert len(transfers) == 1
    assert "downloading" not in said[1], "one process speaks"
