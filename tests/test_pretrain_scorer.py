"""Pre-training of scorers that goes on from an earlier one."""

from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import record_trajectories as recorded
from finetune.pretrain_scorer import Config, Sizes, build_imagereward
from preftune.images import load_pixels
from rewards.clip import ClipScorer
from rewards.image_tower import take_image_tower
from rewards.imagereward import ImageReward
from rewards.training import load_trainable

IMAGES = Path(__file__).parents[1] / "assets/tiny/images/000"
STEPS = ("--max-train-steps", "1", "--learning-rate", "1e-9", "--mixed-precision", "no")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "scorer" / "model.safetensors")


@pytest.mark.usefixtures("cpu")
def test_it_goes_on_from_an_earlier_scorer(root: Path, tmp_path: Path) -> None:
    flags = recorded.arguments("pretrain_scorer", root, tmp_path / "first")
    recorded.train("pretrain_scorer", [*flags, "--max-train-steps", "2", "--seed", "3"])
    data = ["--data", f"{root}/images", "--train-batch-size", "2", *STEPS]
    second = [*data, "--model", f"{tmp_path}/first/scorer"]
    recorded.train("pretrain_scorer", [*second, "--output-dir", f"{tmp_path}/second"])
    one, two = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    assert load_trainable(str(tmp_path / "second" / "scorer")).card.preprocess is not None
    with pytest.raises(SystemExit) as stop:
        recorded.train(
            "pretrain_scorer", [*second, "--output-dir", f"{tmp_path}/third", "--architecture", "clip"]
        )
    assert stop.value.code == 2


EMBEDDED_CLIP = str(Path(__file__).parents[1] / "assets/tiny/pretrained/clip")


def tiny_imagereward(**sizes: int) -> ImageReward:
    vocab = Path(__file__).parents[1] / "assets/tiny/imagereward/vocab.txt"
    return build_imagereward(Config(data=vocab, vocab=vocab, sizes=Sizes(**sizes)), vocab)


def test_an_image_tower_of_a_clip_sees_as_it_did() -> None:
    """Unit vectors of images stay near: the layer norm that BLIP has not is part of the embeddings, but for one number."""
    clip, scorer = cast(ClipScorer, load_trainable(EMBEDDED_CLIP)), tiny_imagereward()
    pixels = torch.stack([load_pixels(path) for path in sorted(IMAGES.iterdir())[:32]])
    take_image_tower(scorer, clip)
    with torch.no_grad():
        theirs = clip.vision(pixels)
        ours = F.normalize(scorer.vision_proj(scorer.image_tokens(pixels)[:, 0]), dim=1)
    same, others = (ours * theirs).sum(1), ours @ theirs.T
    assert same.mean() > 0.9
    assert (others.argmax(1) == torch.arange(32)).float().mean() > 0.9
    # the start token is the same in all images: nothing of it is averaged
    embedded = scorer.vision_model.embeddings(pixels[:1])[0, 0]
    assert torch.allclose(
        embedded,
        clip.vision.vision_model.pre_layrnorm(clip.vision.vision_model.embeddings(pixels[:1]))[0, 0],
        atol=1e-5,
    )


def test_an_image_tower_of_another_size_is_refused(tmp_path: Path) -> None:
    clip = cast(ClipScorer, load_trainable(EMBEDDED_CLIP))
    with pytest.raises(ValueError, match=r"does not fit: patch 8 instead of 16, layers 4 instead of 2"):
        take_image_tower(tiny_imagereward(patch=16, vision_layers=2), clip)
    for wrong in ({"model": tmp_path}, {"vocab": tmp_path, "architecture": "clip"}):
        with pytest.raises(ValueError, match="--image-tower is of a new ImageReward"):
            Config(data=tmp_path, image_tower=tmp_path, **wrong)


def test_a_start_is_one_of_two(tmp_path: Path) -> None:
    for settings in ({}, {"vocab": tmp_path, "model": tmp_path}):
        with pytest.raises(ValueError, match=r"give --vocab .* or --model"):
            Config(data=tmp_path, **settings)
