"""CLIP's towers and tokenizer give what open_clip gives (extra `parity`): its own classes, small widths, random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import CARDS, Card, Clip
from rewards.card import CLIP_MEAN, CLIP_STD
from rewards.clip import ClipScorer, load_scorer
from rewards.clip_tokenizer import MERGES, ClipTokenizer

MISSING = "needs open_clip: pip install -c constraints.txt -e '.[parity]' beside a torch with CUDA"
TEXTS = [
    "a red fox in the snow",
    "",
    "   \n\t ",
    "UPPER, MiXeD and lower",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family \U0001f1ef\U0001f1f5 \U0001f30c\u2728",
    "<b>bold</b> &lt;i&gt; &amp;amp; &eacute; &#8217; &nbsp;",
    "Caf\u00e9 fa\u00e7ade \u00e0 Z\u00fcrich, \u6771\u4eac\u306e\u591c \u2014 na\u00efve \u0141\u00f3d\u017a",
    "cafe\u0301 sch\u00c3\u00b6n \u00e2\u20ac\u0153quote\u00e2\u20ac\u009d \ufb01ne \u00bd \u2167",
    "\u0627\u0644\u0642\u0637 \u05d7\u05ea\u05d5\u05dc \u0e41\u0e21\u0e27 \u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uad6d\uc5b4",
    "I'll we've they're he'd I'm can't DON'T",
    "<start_of_text> inside <end_of_text> and <|endoftext|>",
    "\u200bzero\u200bwidth\u00a0nbsp\x00nul",
    "3.14159 1,000,000 8k 4:5 --ar 16:9 (masterpiece:1.2), [best]",
    "an oil painting of a lighthouse in a storm, " * 12,
    "a" * 400,
    "\u6f22" * 120,
]
SHAPES = {  # as ViT-H-14 and ViT-L-14: head widths 80 and 64, GELU and QuickGELU; narrow and shallow
    "hpsv2": Clip(
        embed=96, vision_width=160, vision_layers=4, vision_heads=2, patch=14, text_width=128, text_layers=3,
        text_heads=2, activation="gelu", tokenizer="open_clip",
    ),
    "hpsv1": Clip(
        embed=64, vision_width=128, vision_layers=4, vision_heads=2, patch=14, text_width=128, text_layers=3,
        text_heads=2, activation="quick_gelu", tokenizer="openai",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def open_clip() -> Any:
    try:
        import open_clip
    except (
        ImportError,
        RuntimeError,
    ) as error:  # the registry's torchvision cannot be loaded beside a CPU torch
        pytest.skip(f"{MISSING} ({str(error).splitlines()[0]})")
    return open_clip


def theirs(open_clip: Any, clip: Clip, size: int) -> Any:
    """open_clip's own model of these sizes with random weights, biases and norms included."""
    vision = open_clip.CLIPVisionCfg(
        layers=clip.vision_layers,
        width=clip.vision_width,
        head_width=clip.vision_width // clip.vision_heads,
        patch_size=clip.patch,
        image_size=size,
    )
    text = open_clip.CLIPTextCfg(width=clip.text_width, heads=clip.text_heads, layers=clip.text_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(clip.embed, vision, text, quick_gelu=clip.activation == "quick_gelu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif ".ln_" in name or name.startswith("ln_"):
                    parameter.normal_(mean=1.0, std=0.2)
    return model.eval()


@pytest.fixture(params=["hpsv2", "hpsv1"])
def pair(request: pytest.FixtureRequest, open_clip: Any, tmp_path: Path) -> tuple[ClipScorer, Any]:
    """Our scorer, read from the file that open_clip's model makes, and that model."""
    card: Card = replace(CARDS[request.param], clip=SHAPES[request.param])
    assert card.clip is not None
    assert card.preprocess is not None
    model = theirs(open_clip, card.clip, card.preprocess.size)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "open_clip.pt")
    return load_scorer(card, tmp_path / "open_clip.pt", "cpu", torch.float32), model


def test_images_have_the_same_vectors(pair: tuple[ClipScorer, Any]) -> None:
    ours, model = pair
    pixels = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        found = ours.vision(pixels)
        expected = model.encode_image((pixels - mean) / std, normalize=True)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "images differ"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_texts_have_the_same_vectors_and_images_the_same_scores(
    pair: tuple[ClipScorer, Any], open_clip: Any
) -> None:
    ours, model = pair
    texts = [text for text in TEXTS if "_of_text>" not in text]  # a spelling that the openai tokenizer lacks
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).expand(
        len(texts), -1, -1, -1
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        expected = model.encode_text(open_clip.tokenize(texts), normalize=True)
        images = model.encode_image((pixels[:1] - mean) / std, normalize=True)
        torch.testing.assert_close(ours.text(texts), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(pixels, texts), (images @ expected.T)[0], atol=1e-5, rtol=0)


def test_texts_have_the_same_tokens(open_clip: Any) -> None:
    ours = ClipTokenizer("open_clip", MERGES, 77)(TEXTS)
    theirs = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    assert torch.equal(ours, theirs), [
        text for text, a, b in zip(TEXTS, ours, theirs, strict=True) if (a != b).any()
    ]
    assert (ours != 0).sum(1).max() == 77, "one had to be cut"
