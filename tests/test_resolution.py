"""How a user writes the size of images."""

import pytest

from preftune.resolution import Framing, Resolution, parse


@pytest.mark.parametrize(
    ("text", "height", "width"),
    [("512", 512, 512), ("768x512", 512, 768), (" 64X1024 ", 1024, 64), ("8", 8, 8)],
)
def test_width_comes_first(text: str, height: int, width: int) -> None:
    resolution = parse(text)
    assert resolution == Resolution(height=height, width=width)
    assert parse(str(resolution)) == resolution


@pytest.mark.parametrize(
    "text",
    ["", "x", "512x", "x512", "512*512", "-8", "8.0", "1e3", "512x512x3", "\u0665\u0661\u0662", "9999999"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a number, as in 512, nor WIDTHxHEIGHT, as in 768x512"):
        parse(text)


@pytest.mark.parametrize("text", ["0", "0x512", "512x0", "500", "512x500", "500x512", "4"])
def test_only_multiples_of_eight(text: str) -> None:
    with pytest.raises(ValueError, match=rf"resolution '{text}': .* must be positive multiples of 8"):
        parse(text)


def test_a_framing_starts_at_the_corner() -> None:
    assert Framing(Resolution(300, 400)) == ((300, 400), 0, 0)
