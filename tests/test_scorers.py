"""What every scorer promises, and the pixel arithmetic they share."""

import importlib
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import rewards
from golden_weights import CLIP_NAMES, tiny_card
from preftune.images import to_pil
from rewards import CARDS, Preprocess, Scorer
from rewards.aesthetic import load_scorer
from rewards.blipscore import BlipScore
from rewards.card import ImageRewardConfig
from rewards.imagereward import ImageReward, to_transformers
from rewards.pixels import OUTSIDE, from_pil, prepare
from rewards.weights import local

PROMPTS = [
    "a red circle on a white background",
    "two blue squares on a grey background",
    "a small green triangle above a yellow cross on a black background",
]
UNTRAINED = {
    f"{name}, untrained": name for name in ("imagereward-tiny", *CLIP_NAMES, "aesthetic", "blipscore")
}
"""Architectures with small random weights, so that they keep the contract where the published ones are not."""


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ImageReward with random weights, so that the architecture keeps the contract also without weights."""
    folder = tmp_path_factory.mktemp("untrained")
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "words.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    config = ImageRewardConfig(
        image_size=64, vision_width=32, vision_layers=2, vision_heads=2, vocab_size=len(tokens) + 2, max_length=16,
        text_width=24, text_layers=2, text_heads=2, text_intermediate=48, projection=8, head=(16, 8, 8, 4),
    )  # fmt: skip
    model = ImageReward.build(config, folder / "words.txt", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that scores differ between images by more than rounding
    model.save(folder)
    return folder


@pytest.fixture(params=[*CARDS, *UNTRAINED])
def scorer(request: pytest.FixtureRequest, untrained: Path, clips: Path) -> Scorer:
    name = UNTRAINED.get(request.param)
    if name == "imagereward-tiny":
        return rewards.load(name, weights=untrained)
    if name == "blipscore":
        config = ImageReward.load(untrained).config
        blip = BlipScore(CARDS[name], config, (untrained / "vocab.txt").read_text(encoding="utf-8"))
        towers = load_file(untrained / "model.safetensors")
        towers = {key: value for key, value in to_transformers(towers).items() if key.startswith(("v", "t"))}
        blip.blip.load_state_dict(towers)
        return blip.eval().requires_grad_(False)
    if name is not None:
        card = tiny_card(name)
        module = importlib.import_module(card.module)
        return module.load_scorer(card, clips / f"{name}.pt", "cpu", torch.float32)
    card = CARDS[request.param]
    if card.has_weights and local(card) is None:
        pytest.skip(f"the weights of {card.name} are not here")
    if card.file is not None:
        pytest.skip(f"the weights of {card.name} are large; its golden test is marked slow")
    return rewards.load(request.param)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_scores_are_float32_one_an_image(scorer: Scorer, pixels: torch.Tensor) -> None:
    scores = scorer(pixels, PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert len(set(scores.tolist())) == 3


def test_gradient_reaches_pixels_iff_the_card_says_so(scorer: Scorer, pixels: torch.Tensor) -> None:
    pixels.requires_grad_()
    scores = scorer(pixels, PROMPTS)
    assert scores.requires_grad == scorer.card.differentiable
    if scorer.card.differentiable:
        (gradient,) = torch.autograd.grad(scores[0], pixels)
        assert gradient[0].isfinite().all()
        assert (gradient[0].abs().amax(dim=(1, 2)) > 0).all()
        assert gradient[1:].abs().max() == 0  # an image's score depends on that image alone


def test_weights_are_frozen_and_in_eval_mode(scorer: Scorer) -> None:
    if isinstance(scorer, nn.Module):
        assert not scorer.training
        assert not any(parameter.requires_grad for parameter in scorer.parameters())


def test_a_batch_scores_like_its_images(scorer: Scorer, pixels: torch.Tensor) -> None:
    batch = scorer(pixels, PROMPTS)
    singles = torch.cat([scorer(pixels[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(singles, batch, atol=1e-5, rtol=1e-5)
    order = [2, 0, 1]
    permuted = scorer(pixels[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted, batch[order], atol=1e-5, rtol=1e-5)


def test_prompts_matter_iff_the_card_says_so(scorer: Scorer, pixels: torch.Tensor) -> None:
    same = pixels[:1].expand(3, -1, -1, -1)
    scores = scorer(same, PROMPTS)
    assert (scores.max() > scores.min()).item() == scorer.card.prompted


def test_black_and_white_are_finite(scorer: Scorer) -> None:
    pixels = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    assert scorer(pixels, PROMPTS[:2]).isfinite().all()


def test_any_prompt_and_size_but_for_the_judge(scorer: Scorer) -> None:
    if scorer.card.name == "shapes":
        with pytest.raises(ValueError, match="not a caption"):
            scorer(torch.zeros(1, 3, 64, 64), [""])
        return
    prompts = ["", "word " * 200, "\u6771\u4eac [MASK] \x00"]
    assert scorer(torch.rand(3, 3, 80, 48), prompts).isfinite().all()


def test_as_many_prompts_as_images(scorer: Scorer, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="3 images need as many prompts, got 2"):
        scorer(pixels, PROMPTS[:2])
    with pytest.raises(ValueError, match="3 images need as many prompts, got 0"):
        scorer(pixels, [])


def test_one_prompt_for_several_images(scorer: Scorer, pixels: torch.Tensor) -> None:
    scores = scorer(pixels, [PROMPTS[1]] * 3)
    assert torch.equal(scorer(pixels, PROMPTS[1]), scores)
    assert torch.equal(scorer(pixels, PROMPTS[1:2]), scores)


def test_pil_images_are_prepared_as_the_authors_do(scorer: Scorer, pixels: torch.Tensor) -> None:
    """Of one size or of several, or one by itself; the judge reads one size alone."""
    sizes = [(64, 64)] * 3 if scorer.card.name == "shapes" else [(64, 64), (100, 40), (31, 64)]
    images = [to_pil(image).resize(size) for image, size in zip(pixels, sizes, strict=True)]
    images[0] = images[0].convert("P")  # which the authors resize before they make it RGB
    singles = [
        scorer(from_pil(image, scorer.card.preprocess)[None], [prompt])
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    torch.testing.assert_close(scorer(images, PROMPTS), torch.cat(singles), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scorer(images[1], PROMPTS[1]), singles[1])
    same = scorer([images[1]] * 2, PROMPTS[1])
    torch.testing.assert_close(same, torch.cat([singles[1]] * 2), atol=1e-5, rtol=1e-5)


def test_pixels_outside_their_range_are_refused(scorer: Scorer, pixels: torch.Tensor) -> None:
    for wrong, words in (
        (pixels * 255, r"pixels must lie in \[0, 1\], got .* to 25\d\.\d*; divide values in 0\.\.255 by 255"),
        (
            pixels * 2 - 1,
            r"pixels must lie in \[0, 1\], got -0\.99\d* to 0\.99\d*; bring values in -1\.\.1 there by",
        ),
        (
            (pixels * 255).byte(),
            r"pixels must be a float tensor .* got torch\.uint8 \(3, 3, 64, 64\); divide 0\.\.255",
        ),
        (pixels[0], "pixels must be a float tensor"),
        (list(pixels), "a list of PIL images or a tensor .*, got a list with Tensor"),
        (["image.png"] * 3, "got a list with str 'image.png'; open a file by PIL.Image.open"),
        (pixels.numpy(), "takes pixels .* or a list of PIL images, got array"),
        ([], r"got \[\]"),
    ):
        with pytest.raises(ValueError, match=words):
            scorer(wrong, PROMPTS)  # type: ignore[arg-type]


def test_what_a_decoder_overshoots_passes(scorer: Scorer, pixels: torch.Tensor) -> None:
    """A little without a gradient, and anything with one, whose values are not read: on a GPU that would be a wait an update."""
    assert scorer(pixels * 1.4 - 0.2, PROMPTS).isfinite().all()
    assert scorer((pixels * 8 - 4).requires_grad_(), PROMPTS).isfinite().all()


def test_half_precision_towers_still_give_float32(untrained: Path, pixels: torch.Tensor) -> None:
    full = rewards.load("imagereward-tiny", weights=untrained)
    half = rewards.load("imagereward-tiny", weights=untrained, dtype=torch.bfloat16)
    scores = half(pixels.bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, full(pixels, PROMPTS))
    torch.testing.assert_close(scores, full(pixels, PROMPTS), atol=0.05, rtol=0.05)


def test_the_aesthetic_layers_run_in_float32_under_autocast(clips: Path, pixels: torch.Tensor) -> None:
    """In bfloat16, of 8 bits, all images from 5 to 5.03 would tie."""
    scorer = load_scorer(tiny_card("aesthetic"), clips / "aesthetic.pt", "cpu", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = scorer(pixels, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).all()


def test_brightness_by_hand() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert rewards.load("brightness")(image, [""]).item() == 0.5


# ---------------------------------------------------------------- the table


def test_unknown_names_and_needless_weights(tmp_path: Path) -> None:
    for call in (rewards.load, rewards.check):
        with pytest.raises(
            ValueError,
            match=r"'imagerewrd' \(did you mean imagereward\?\); one of brightness, shapes, imagereward, imagereward-tiny",
        ):
            call("imagerewrd")
        with pytest.raises(ValueError, match="brightness has no weights"):
            call("brightness", weights=tmp_path)
    rewards.check("brightness")


def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("rewards.weights.ROOT", tmp_path)
    monkeypatch.setattr("rewards.embedded.PLACES", (tmp_path,))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hf download zai-org/ImageReward ImageReward\.pt"):
        rewards.check("imagereward")
    with pytest.raises(
        ValueError, match=r"config\.json, vocab\.txt and model\.safetensors into assets/tiny/imagereward"
    ):
        rewards.check("imagereward-tiny")
    with pytest.raises(ValueError, match="gone does not exist"):
        rewards.check("imagereward-tiny", tmp_path / "gone")


def test_every_card_can_bring_its_scores_to_common_units() -> None:
    for name, card in CARDS.items():
        assert card.name == name
        assert card.std > 0
        assert card.typical_range[0] <= card.mean <= card.typical_range[1]
        assert all(getattr(card, field.name) != "" for field in fields(card))


def test_the_table_prints_every_scorer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rewards"])
    runpy.run_module("rewards", run_name="__main__")
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table and f"\n{name}: " in table for name in CARDS)
    assert "zai-org/ImageReward/ImageReward.pt (1.8 GB)" in table


# ---------------------------------------------------------------- pixels

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def ramp(height: int, width: int) -> torch.Tensor:
    """Pixel value = column index / 100, the same in every row and channel."""
    return (torch.arange(width) / 100).expand(1, 3, height, width)


@pytest.mark.parametrize(("crop_offset", "first_of_seven"), [("round", 2), ("floor", 1)])
def test_centre_crop_rounds_half_to_even_or_down(
    crop_offset: Literal["round", "floor"], first_of_seven: int
) -> None:
    """Offsets round(1 / 2) = 0 and round(3 / 2) = 2; floor(3 / 2) = 1."""
    for width, first in ((5, 0), (7, first_of_seven), (6, 1)):
        cut = prepare(ramp(4, width), Preprocess(size=4, crop_offset=crop_offset, **PLAIN))
        assert cut[0, 0, 0].tolist() == pytest.approx([(first + i) / 100 for i in range(4)])


def test_padding_is_black_and_comes_before_the_mean() -> None:
    """2 x 4 to 4 x 4: one row above and below, equal to (0 - 0.5) / 0.5; the image is (1 - 0.5) / 0.5."""
    half = (0.5, 0.5, 0.5)
    padded = prepare(
        torch.ones(1, 3, 2, 4), Preprocess(size=4, resize="longest", crop="pad", mean=half, std=half)
    )
    assert padded[0, 0, :, 0].tolist() == [-1, 1, 1, -1]


@pytest.mark.parametrize(("resize", "shape"), [("shortest", (6, 10)), ("longest", (4, 6))])
def test_resize_keeps_the_aspect_ratio(resize: str, shape: tuple[int, int]) -> None:
    """12 x 20 to shortest 6 is 6 x 10, and to longest 6 is 4 x 6 (3.6 rounded); a ramp keeps its mean."""
    crop = "center" if resize == "shortest" else "pad"
    result = prepare(ramp(12, 20), Preprocess(size=6, resize=resize, crop=crop, **PLAIN))  # type: ignore[arg-type]
    assert result.shape == (1, 3, 6, 6)
    rows = (result[0, 0].abs().sum(dim=1) > 0).sum().item()
    assert rows == min(shape[0], 6)
    assert result[0, 0, 3].mean().item() == pytest.approx(0.095, abs=2e-3)  # the middle of 0..19, over 100


def test_antialiasing_averages_and_its_absence_does_not() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    smooth, sharp = (
        prepare(stripes, Preprocess(size=24, antialias=antialias, **PLAIN)) for antialias in (True, False)
    )
    assert smooth[..., 2:-2].std() < 0.05 < sharp[..., 2:-2].std()


def test_white_and_black_pixels_keep_their_gradient() -> None:
    for value in (0.0, 1.0):
        pixels = torch.full((1, 3, 100, 90), value, requires_grad=True)
        (gradient,) = torch.autograd.grad(prepare(pixels, Preprocess(size=64)).sum(), pixels)
        assert (gradient[0, :, 10:-10].abs().amin(dim=(1, 2)) > 0).all()


def test_files_and_tensors_are_prepared_alike(tmp_path: Path) -> None:
    """PIL rounds to 8 bits after each pass, so up to about 1.5/255 before normalisation, and nothing else differs."""
    height, width = 150, 213
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    values = ((torch.stack([y.sin(), x.cos(), (x * y).sin()], dim=-1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(values.numpy())
    rule = Preprocess(size=64, **PLAIN)
    from_file, from_tensor = from_pil(image, rule), prepare(from_pil(image)[None], rule)[0]
    assert from_pil(image).shape == (3, height, width)
    assert from_file.shape == (3, 64, 64)
    assert (from_file - from_tensor.clamp(0, 1)).abs().max() < 2 / 255


RULES = {card.preprocess: name for name, card in CARDS.items() if card.preprocess is not None}


@pytest.mark.parametrize("rule", RULES, ids=RULES.values())
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16"])
def test_images_of_every_mode_are_prepared(rule: Preprocess, mode: str) -> None:
    """A dark half above a light one stays so."""
    grey = np.repeat(np.array([40, 200], dtype=np.uint8), 50)[:, None].repeat(90, axis=1)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB")
        image = image.quantize(2) if mode == "P" else image.convert(mode)
    assert image.mode == mode
    for pixels in (from_pil(image, rule), prepare(from_pil(image)[None], replace(rule, **PLAIN))[0]):
        assert pixels.shape == (3, rule.size, rule.size)
        middle = pixels[:, :, rule.size // 2]
        dark, light = (middle[:, int(rule.size * place)].mean().item() for place in (0.4, 0.6))
        if mode == "1":  # dithered
            assert pixels.isfinite().all()
        else:
            assert (dark, light) == pytest.approx((40 / 255, 200 / 255), abs=0.02)


@pytest.mark.parametrize("rule", RULES, ids=RULES.values())
@pytest.mark.parametrize("size", [(1, 1), (1, 460), (40, 1), (224, 160)])
def test_thin_images_are_prepared(rule: Preprocess, size: tuple[int, int]) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    pixels = from_pil(white, rule)
    assert pixels.shape == (3, rule.size, rule.size)
    assert pixels.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_rotation_in_the_exif_data_is_not_applied(tmp_path: Path) -> None:
    """As by none of the authors: an image is scored as its pixels are stored."""
    image = Image.new("RGB", (60, 90), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
    assert from_pil(Image.open(tmp_path / "turned.png")).shape == (3, 90, 60)


def test_a_bicubic_resize_stays_within_what_is_taken() -> None:
    """Also of the worst image, black and white pixels by chance, with the kernel that overshoots most."""
    noise = (torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for antialias in (True, False):
        found = F.interpolate(noise, (509, 509), mode="bicubic", antialias=antialias)
        assert found.min() < -0.1
        assert found.min() > -OUTSIDE
        assert found.max() < 1 + OUTSIDE


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)],
    ids=["no batch", "four channels", "uint8"],
)
def test_what_is_not_a_batch_of_pixels_is_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float tensor"):
        prepare(pixels, Preprocess(size=64))


def test_an_image_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="10 x 20 pixels do not become 64 x 64"):
        prepare(torch.zeros(1, 3, 10, 20), Preprocess(size=64, resize="none"))
