"""The aesthetic predictor: its layers against the authors' numbers, its two files, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import rewards
from golden_weights import CLIP, FOLDER, SHARED, fill, tiny_card, unit_vectors
from rewards import CARDS
from rewards.aesthetic import Aesthetic, load_scorer
from rewards.pixels import from_pil

GOLDEN = json.loads((FOLDER / "aesthetic.json").read_text(encoding="utf-8"))
PUBLISHED = SHARED / "data/weights/aesthetic_mlp/sac+logos+ava1-l14-linearMSE.pth"
TINY_CLIP = tiny_card("clipscore").clip
assert TINY_CLIP is not None
TINY = replace(CARDS["aesthetic"], clip=replace(TINY_CLIP, embed=768))  # as wide as the layers want it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small CLIP under the name of clipscore's file, and layers by the formula."""
    shapes = CLIP["models"]["hpsv1"]["shapes"] | {"visual.proj": [64, 768]}
    save_file(fill(shapes, CLIP["weights_seed"]), tmp_path / "model.safetensors")
    torch.save(fill(GOLDEN["shapes"], GOLDEN["weights_seed"]), tmp_path / "layers.pth")
    return tmp_path


def load(folder: Path, layers: str = "layers.pth") -> Aesthetic:
    return load_scorer(TINY, folder / layers, "cpu", torch.float32)


def deviation(scorer: Aesthetic, recorded: str) -> float:
    """Largest distance of the layers from the recorded numbers."""
    expected = GOLDEN[recorded]
    with torch.no_grad():
        scores = scorer.layers(unit_vectors(6, 768, GOLDEN["weights_seed"])).squeeze(1)
        at_zero = scorer.layers(torch.zeros(768)).item()
    differences = (scores - torch.tensor(expected["unit_vectors"])).abs()
    return max(differences.max().item(), abs(at_zero - expected["zero_vector"]))


def test_layers_equal_the_authors(folder: Path) -> None:
    assert deviation(load(folder), "filled_mlp") < 1e-6


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs the published layers in ../shared")
def test_the_published_layers_equal_the_authors(folder: Path) -> None:
    (folder / PUBLISHED.name).write_bytes(PUBLISHED.read_bytes())
    scorer = load(folder, PUBLISHED.name)
    assert deviation(scorer, "official_mlp") < 1e-5
    score = scorer(torch.rand(1, 3, 300, 260, generator=torch.Generator().manual_seed(0)), [""])
    assert 1 < score.item() < 10


def test_golden_notices_activations(folder: Path) -> None:
    scorer = load(folder)
    scorer.layers[1] = nn.ReLU()
    assert deviation(scorer, "filled_mlp") > 1e-4


def test_a_score_is_the_layers_of_a_unit_vector(folder: Path) -> None:
    scorer = load(folder)
    pixels = from_pil(Image.open(FOLDER / "e_badge_131x97_rgba.png"), TINY.preprocess)[None]
    with torch.no_grad():
        vector = scorer.vision(pixels)
        assert vector.norm().item() == pytest.approx(1, abs=1e-6)
        assert scorer(pixels, ["read by nobody"]).item() == scorer.layers(vector).item()


def test_the_text_tower_is_not_needed(folder: Path) -> None:
    expected = load(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k.startswith("visual.")}, folder / "model.safetensors")
    again = load(folder).state_dict()
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_wrong_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = fill(GOLDEN["shapes"], 0)
    del wrong["layers.7.bias"]
    torch.save(wrong | {"layers.11.weight": torch.zeros(1)}, folder / "relu.pth")
    with pytest.raises(
        ValueError,
        match=r"does not hold the layers of aesthetic; missing: layers\.7\.bias; unexpected: layers\.11",
    ):
        load(folder, "relu.pth")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"image tower of clipscore; missing: visual_projection\.weight"):
        load(folder)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    with pytest.raises(ValueError, match=r"hf download openai/clip-vit-large-patch14 model\.safetensors"):
        rewards.check("aesthetic", folder / "layers.pth")
    monkeypatch.setattr("rewards.weights.ROOT", folder)
    with pytest.raises(
        ValueError, match=r"put sac\+logos\+ava1-l14-linearMSE\.pth of github.* into weights/"
    ):
        rewards.check("aesthetic")


def test_an_altered_published_file_is_refused(folder: Path) -> None:
    """The right size and one other byte."""
    assert CARDS["aesthetic"].num_bytes is not None
    (folder / PUBLISHED.name).write_bytes(bytes(CARDS["aesthetic"].num_bytes))
    with pytest.raises(ValueError, match="has SHA-256"):
        rewards.check("aesthetic", folder)
    (folder / PUBLISHED.name).write_bytes(b"too short")
    with pytest.raises(ValueError, match="has 9 bytes, the published file has 3714759"):
        rewards.check("aesthetic", folder)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/golden")
def test_full_size_scores_equal_the_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-L/14 by the formula below the published layers; 4 GB of memory and 1 GB of disk."""
    monkeypatch.syspath_prepend(SHARED / "golden")
    import recipe

    tables = {
        name: json.loads((SHARED / "golden" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("clipscore", "aesthetic")
    }
    clip, table = tables["clipscore"], tables["aesthetic"]
    state = recipe.fill_state_dict(clip["state_dict"]["keys"], clip["weights_seed"])
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / PUBLISHED.name).write_bytes(PUBLISHED.read_bytes())
    scorer = rewards.load("aesthetic", weights=tmp_path)
    (tmp_path / "model.safetensors").unlink()
    rule = CARDS["aesthetic"].preprocess
    files = [SHARED / "golden" / "inputs" / image for image in table["images"]]
    with torch.no_grad():
        scores = scorer(torch.stack([from_pil(Image.open(file), rule) for file in files]), [""] * len(files))
    assert (scores - torch.tensor(table["scores"]["official_mlp"]["scores"])).abs().max() < 1e-5
