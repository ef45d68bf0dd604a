"""Scorers that share a tower score as they do alone, bit for bit, and the tower runs once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewards
from golden_weights import tiny_card
from rewards import CARDS, Scorer
from rewards.aesthetic import Aesthetic
from rewards.clip import ClipScorer, ClipVision
from rewards.clip_tokenizer import MERGES
from rewards.mix import Mix
from rewards.shared_towers import load_all, score_all, share_towers

NAMES = ("clipscore", "hpsv1", "aesthetic", "brightness", "hpsv2")
PROMPTS = ["a red circle", "two blue squares", ""]


@pytest.fixture
def files(clips: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Small models: CLIP score and the aesthetic predictor stand on the same file, HPS v1 on one with another bias."""
    for name in ("clipscore", "hpsv1", "aesthetic", "hpsv2"):
        monkeypatch.setitem(CARDS, name, tiny_card(name))
    state = torch.load(clips / "hpsv1.pt")["state_dict"]
    state["visual.ln_post.bias"] = state["visual.ln_post.bias"] + 1e-3
    torch.save(state, clips / "other.pt")
    return {
        "clipscore": clips / "model.safetensors",
        "aesthetic": clips / "aesthetic.pt",
        "hpsv1": clips / "other.pt",
        "hpsv2": clips / "hpsv2.pt",
    }


def load(names: Sequence[str], files: dict[str, Path], dtype: torch.dtype = torch.float32) -> list[Scorer]:
    return [rewards.load(name, weights=files.get(name), dtype=dtype) for name in names]


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(3, 3, 240, 250, generator=torch.Generator().manual_seed(0))


def towers(scorers: Sequence[Scorer]) -> list[ClipVision]:
    return [scorer.vision for scorer in scorers if isinstance(scorer, ClipScorer | Aesthetic)]


def runs(scorers: Sequence[Scorer], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the batch size whenever a tower runs."""
    seen: list[int] = []
    forward = ClipVision.forward

    def counted(self: ClipVision, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(ClipVision, "forward", counted)
    return seen


def test_columns_equal_separate_scorers(
    files: dict[str, Path], pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [scorer(pixels, PROMPTS) for scorer in load(NAMES, files)]
    scorers = load_all(NAMES, files=files, device="cpu", dtype=torch.float32)
    clipscore, hpsv1, aesthetic, hpsv2 = towers(scorers)
    assert clipscore is aesthetic
    assert len({id(tower) for tower in (clipscore, hpsv1, hpsv2)}) == 3, "other weights, another tower"
    seen = runs(scorers, monkeypatch)
    columns = score_all(scorers, pixels, PROMPTS)
    assert seen == [3, 3, 3]
    for found, alone in zip(columns, expected, strict=True):
        assert torch.equal(found, alone)
    assert len({tuple(column.tolist()) for column in columns}) == len(NAMES)


def test_gradients_add_up(files: dict[str, Path], pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mix of scorers on one tower has the gradient of the sum of separate ones; in float64."""
    names, weights = (
        ("clipscore", "aesthetic", "brightness"),
        {"clipscore": 2.0, "aesthetic": -0.5, "brightness": 1.0},
    )

    def doubled(dtype: torch.dtype = torch.float64) -> list[Scorer]:
        return [s.to(dtype) if isinstance(s, torch.nn.Module) else s for s in load(names, files)]

    pixels = pixels.double().requires_grad_()
    parts = [weights[s.card.name] * s(pixels, PROMPTS) for s in doubled()]
    (expected,) = torch.autograd.grad(torch.stack(parts).sum(), pixels)
    mix = Mix(doubled(), weights, "none")
    seen = runs(mix.scorers, monkeypatch)
    (found,) = torch.autograd.grad(mix(pixels, PROMPTS).rewards.sum(), pixels)
    assert seen == [3]
    assert expected.abs().max() > 1e-4
    # the scores themselves are float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_a_mix_of_separately_loaded_scorers_shares(
    files: dict[str, Path], pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers = load(("aesthetic", "clipscore"), files)
    expected = torch.stack([scorer(pixels, PROMPTS) for scorer in scorers], dim=1)
    mix = Mix(scorers, {"clipscore": 1.0, "aesthetic": 1.0}, "card")
    seen = runs(mix.scorers, monkeypatch)
    assert torch.equal(mix(pixels, PROMPTS).scores, expected)
    assert seen == [3]


def test_another_precision_or_preparation_is_another_tower(files: dict[str, Path]) -> None:
    full, half = load(("clipscore",), files)[0], load(("aesthetic",), files, torch.bfloat16)[0]
    share_towers([full, half])
    assert len({id(tower) for tower in towers([full, half])}) == 2
    first, second = load(("clipscore", "aesthetic"), files)
    towers([second])[0].preprocess = tiny_card("hpsv2").preprocess  # type: ignore[assignment]
    share_towers([first, second])
    assert len({id(tower) for tower in towers([first, second])}) == 2


def test_as_many_prompts_as_images(files: dict[str, Path], pixels: Tensor) -> None:
    """Also for scorers that read none."""
    with pytest.raises(ValueError, match="3 images need as many prompts, got 2"):
        score_all(load(("aesthetic",), files), pixels, PROMPTS[:2])


def test_check_names_the_files_that_make_a_score(files: dict[str, Path], clips: Path) -> None:
    assert rewards.check("aesthetic", files["aesthetic"]) == (
        clips / "aesthetic.pt",
        clips / "model.safetensors",
    )
    assert rewards.check("clipscore", files["clipscore"]) == (
        clips / "model.safetensors",
        MERGES,
    )
    assert [path.name for path in rewards.check("imagereward-tiny")] == [
        "model.safetensors",
        "vocab.txt",
        "config.json",
    ]
    assert rewards.check("brightness") == ()
