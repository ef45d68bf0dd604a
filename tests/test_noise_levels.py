"""The timestep bias is diffusers': weights by hand, frequencies, and no change without one. Min-SNR: tests/test_diffusion_loss.py."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

import tiny
from preftune import families
from preftune.training.noise_levels import NoiseLevels


def bias(strategy: str, **settings: float) -> NoiseLevels:
    values = {f"timestep_bias_{name}": value for name, value in settings.items()}
    return NoiseLevels(timestep_bias_strategy=strategy, **values)  # type: ignore[arg-type]


def test_weights_by_hand() -> None:
    """As generate_timestep_weights of train_text_to_image_sdxl.py, but for the division by their sum."""
    assert bias("later", multiplier=3, portion=0.5).weights(4).tolist() == [1, 1, 3, 3]
    assert bias("earlier", multiplier=0.5, portion=0.25).weights(4).tolist() == [0.5, 1, 1, 1]
    assert bias("range", multiplier=2, begin=1, end=3).weights(4).tolist() == [1, 2, 2, 1]
    assert NoiseLevels().weights(4).tolist() == [1, 1, 1, 1]
    assert bias("later", multiplier=3, portion=0.1).weights(4).tolist() == [1, 1, 1, 1], (
        "less than one timestep"
    )


def test_timesteps_are_as_frequent_as_their_weights() -> None:
    settings = bias("later", multiplier=3, portion=0.5)
    drawn = settings.draw(1000, [Generator().manual_seed(seed) for seed in range(8000)])
    assert drawn is not None
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min()) < 20
    assert 980 < int(drawn.max()) <= 999
    assert float((drawn >= 500).double().mean()) == pytest.approx(0.75, abs=4 * (0.1875 / 8000) ** 0.5)
    quarters = Counter((drawn // 250).tolist())
    assert quarters[2] == pytest.approx(quarters[3], rel=0.1)


def test_one_generator_one_timestep() -> None:
    settings = bias("earlier", multiplier=4)
    one, two = (
        settings.draw(1000, [Generator().manual_seed(s) for s in seeds]) for seeds in ((1, 2), (2, 1))
    )
    assert one is not None
    assert two is not None
    assert one.tolist() == two.tolist()[::-1]
    assert NoiseLevels().draw(1000, [Generator()]) is None


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("later", {"multiplier": 0.0}, "must be positive, got 0.0"),
        ("later", {"multiplier": float("nan")}, "must be positive, got nan"),
        ("later", {"portion": 0.0}, r"must lie in \(0, 1\], got 0.0"),
        ("none", {"multiplier": 2.0}, "needs a --timestep-bias-strategy"),
    ],
)
def test_settings_that_mean_nothing(strategy: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias(strategy, **settings)


@pytest.mark.parametrize(("begin", "end"), [(-1, 5), (5, 5), (0, 1001)])
def test_a_range_that_the_model_does_not_have(begin: int, end: int, tmp_path: Path) -> None:
    defaults = families.check(tiny.pipeline_folder(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"{begin} and --timestep-bias-end {end} are no range"):
        bias("range", multiplier=2, begin=begin, end=end).check(defaults)
    bias("range", multiplier=2, begin=0, end=1000).check(defaults)
    NoiseLevels(snr_gamma=5).check(defaults)
    with pytest.raises(ValueError, match=r"--snr-gamma .* this model predicts sample; leave it out"):
        NoiseLevels(snr_gamma=5).check(replace(defaults, prediction_type="sample"))
    with pytest.raises(ValueError, match=r"--snr-gamma must be positive, got 0"):
        NoiseLevels(snr_gamma=0)
