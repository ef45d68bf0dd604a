"""Resizing on a device equals the authors' on the CPU, which tests run on the CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import CARDS, device_resize
from rewards.card import Preprocess
from rewards.device_resize import MAX_ASPECT, equals_the_authors, is_exact, resize_as_pil, resize_as_torch
from rewards.pixels import can_wait, from_original, from_pil

SIZES = [
    (512, 512), (512, 768), (768, 512), (225, 225), (640, 480), (333, 500), (100, 150), (150, 100), (1024, 1024), (224, 336),
    (896, 1152), (31, 40), (360, 640), (640, 360),
]  # fmt: skip
RULES = [CARDS["imagereward"].preprocess, CARDS["hpsv2.1"].preprocess, CARDS["pickscore"].preprocess]
PAD = Preprocess(size=224, resize="longest", crop="pad")


def noise(height: int, width: int, *, extreme: bool = False) -> Image.Image:
    """Noise, with `extreme` of 0 and 255 alone: it overshoots most."""
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray((values // 128 * 255).astype(np.uint8) if extreme else values)


def bytes_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].contiguous()


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pils_resize_to_the_bit(height: int, width: int, extreme: bool) -> None:
    image, scale = noise(height, width, extreme=extreme), 224 / min(height, width)
    after = round(height * scale), round(width * scale)
    assert is_exact((height, width), after)
    theirs = np.asarray(image.resize(after[::-1], Image.Resampling.BICUBIC))
    assert torch.equal(
        resize_as_pil(bytes_of(image), *after), torch.from_numpy(theirs.copy()).permute(2, 0, 1)[None]
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_torchs_resize_to_a_millionth(height: int, width: int) -> None:
    pixels, scale = bytes_of(noise(height, width, extreme=True)).float() / 255, 224 / max(height, width)
    after = round(height * scale), round(width * scale)
    theirs = F.interpolate(pixels, after, mode="bicubic", align_corners=False, antialias=True)
    assert (resize_as_torch(pixels, *after) - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("rule", [*RULES, PAD], ids=["own mode", "tensor", "rgb", "pad"])
def test_originals_are_prepared_as_files_are(rule: Preprocess) -> None:
    """Whole images, cut images and padded ones, also in grey."""
    tolerance = 1e-6 if rule.files == "tensor" else 0
    for height, width in SIZES:
        for image in (noise(height, width), noise(height, width).convert("L")):
            assert can_wait(image, rule)
            distance = (from_original(bytes_of(image), rule)[0] - from_pil(image, rule)).abs().max()
            assert distance <= tolerance, f"{height} x {width}, {image.mode}"


def test_what_has_to_be_prepared_by_pil() -> None:
    """Transparency and palettes are resized before they are resolved; PIL 13 resizes tall images in another order."""
    rule = RULES[0]
    assert rule is not None
    for mode in ("RGBA", "P", "1", "LA", "CMYK", "I;16"):
        assert not can_wait(Image.new(mode, (256, 256)), rule), mode
    for width, height in ((1025, 1024), (200, 400), (400, 200), (20, 20)):
        waits = width * height <= 1 << 20 and max(width, height) <= MAX_ASPECT * min(width, height)
        assert can_wait(Image.new("RGB", (width, height)), rule) == waits
    assert not can_wait(Image.new("RGB", (1000, 1000)), Preprocess(size=64)), (
        "15 times fewer: sums are not exact"
    )
    assert not can_wait(Image.new("RGB", (64, 64)), Preprocess(size=64, resize="none"))


def test_the_trial_finds_another_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a PIL whose kernel differs in the last bit of its weights."""
    device = torch.device("cpu")
    equals_the_authors.cache_clear()
    assert equals_the_authors(device)
    for name in ("_bicubic", "_torch_weights"):
        device_resize._pil_weights.cache_clear()
        equals_the_authors.cache_clear()
        original = getattr(device_resize, name)
        with monkeypatch.context() as patch:
            patch.setattr(
                device_resize,
                name,
                lambda *x, original=original: original(*x) * (1 if len(x) == 1 and abs(x[0]) > 1 else 1.0001),
            )
            assert not equals_the_authors(device), name
    device_resize._pil_weights.cache_clear()
    equals_the_authors.cache_clear()


@pytest.mark.gpu
def test_resizing_on_a_gpu() -> None:
    """Also where TF32 is allowed, which it is not for what needs float32."""
    assert equals_the_authors(torch.device("cuda"))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for rule in (*RULES, PAD):
            assert rule is not None
            for height, width in SIZES:
                image = noise(height, width, extreme=True)
                distance = from_original(bytes_of(image).cuda(), rule)[0].cpu() - from_pil(image, rule)
                assert distance.abs().max() <= (1e-6 if rule.files == "tensor" else 0)
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
