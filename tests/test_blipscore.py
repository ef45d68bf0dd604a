"""BLIP score: the authors' numbers at full size, recorded ones at toy size, and its file format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import rewards
from golden_weights import BLIP, FOLDER, SHARED, fill
from rewards import CARDS
from rewards.blipscore import BlipScore, load
from rewards.imagereward import FULL_SIZE, VOCAB
from rewards.pixels import from_pil

CARD = CARDS["blipscore"]
TOLERANCE = 1e-6
GOLDEN = json.loads((FOLDER / "blipscore_tiny.json").read_text(encoding="utf-8"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The recorded model in the authors' layout: ImageReward's towers under their names there, and the rest of the file."""
    state = fill(towers(), GOLDEN["weights_seed"])
    rest = {"temp": torch.ones(()), "text_queue": torch.ones(2), "visual_encoder_m.cls_token": torch.ones(1)}
    torch.save({"model": state | rest, "config": {"vit": "large"}, "epoch": 19}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def towers() -> dict[str, list[int]]:
    shapes = {name: shape for name, shape in BLIP["shapes"].items() if name.startswith("blip.")}
    return {name.removeprefix("blip."): shape for name, shape in shapes.items()}


def build(file: Path) -> BlipScore:
    return load(CARD, file, replace(FULL_SIZE, **BLIP["config"])).eval().requires_grad_(False)


def scores(scorer: BlipScore) -> torch.Tensor:
    images = torch.stack([from_pil(Image.open(FOLDER / name), CARD.preprocess) for name in BLIP["images"]])
    return torch.stack([scorer(images, [prompt] * len(images)) for prompt in BLIP["prompts"]])


def test_scores_stay_what_they_were(file: Path) -> None:
    """Recorded from this code when its full-size scores were within 1e-7 of the authors'."""
    assert (scores(build(file)) - torch.tensor(GOLDEN["scores"])).abs().max() < TOLERANCE


def test_record_notices_another_network(file: Path) -> None:
    scorer = build(file)
    for module in scorer.blip.vision_model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    assert (scores(scorer) - torch.tensor(GOLDEN["scores"])).abs().max() > 4 * TOLERANCE


def test_a_prompt_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = build(file)
    first = scores(scorer)
    monkeypatch.setattr(scorer.blip, "text_model", None)
    assert torch.equal(scores(scorer), first)


def test_a_file_in_part_is_refused(file: Path) -> None:
    state = fill(towers(), 0)
    del state["vision_proj.bias"]
    torch.save({"model": state | {"cls_head.weight": torch.zeros(1)}}, file)
    with pytest.raises(
        ValueError,
        match=r"towers of blipscore; missing: vision_proj\.bias; unexpected: blip\.cls_head\.weight",
    ):
        build(file)


def test_what_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file.parent))
    monkeypatch.setattr("rewards.weights.ROOT", file.parent)
    with pytest.raises(ValueError, match=r"put model_large\.pth of storage\.googleapis\.com.* into weights/"):
        rewards.check("blipscore")
    with pytest.raises(ValueError, match=r"lacks model_large\.pth"):
        rewards.check("blipscore", file.parent)
    assert rewards.check("blipscore", file) == (file, VOCAB)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/golden")
def test_full_size_scores_equal_the_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 36 scores from files; a minute on one core, 4 GB of memory and 1.8 GB of disk."""
    monkeypatch.syspath_prepend(SHARED / "golden")
    import recipe

    table = json.loads((SHARED / "golden" / "blipscore.json").read_text(encoding="utf-8"))
    state = recipe.fill_state_dict(table["state_dict"]["keys"], table["weights_seed"])
    torch.save({table["state_dict"]["wrapper"]: state}, tmp_path / "filled.pth")
    del state
    scorer = rewards.load("blipscore", weights=tmp_path / "filled.pth")
    (tmp_path / "filled.pth").unlink()
    files = [SHARED / "golden" / "inputs" / image for image in table["images"]]
    images = torch.stack([from_pil(Image.open(file), CARD.preprocess) for file in files])
    with torch.no_grad():
        values = torch.stack([scorer(images, [prompt] * len(files)) for prompt in table["prompts"]])
    assert (values - torch.tensor(table["scores"])).abs().max() < TOLERANCE
