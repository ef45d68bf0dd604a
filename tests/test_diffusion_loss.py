"""The pre-training loss, against diffusers' way to compute it and hand arithmetic; and what an image file gives to it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import Generator, Tensor

import tiny
from preftune import families
from preftune.captioned_inputs import CaptionedInputs
from preftune.diffusion_loss import captioned_loss, diffusion_loss, min_snr
from preftune.families.base import Family
from preftune.images import load_levels, load_pixels, to_pixels
from preftune.noise import add_noise
from preftune.resolution import Framing, Resolution

CAPTIONS = ["a red circle", "two cats", "a dog at sea"]
SQUARE = Resolution(64, 64)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "zero_snr"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    kind = "epsilon" if request.param == "epsilon" else "v_prediction"
    folder = tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"), kind)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"rescale_betas_zero_snr": request.param == "zero_snr"}
    path.write_text(json.dumps(config))
    return families.load(folder)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images of different sizes and colours."""
    paths = []
    for number, size in enumerate([(64, 64), (100, 80), (70, 200)]):
        noise = torch.rand(size[1], size[0], 3, generator=Generator().manual_seed(number))
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray((noise * 255).to(torch.uint8).numpy()).save(paths[-1])
    return paths


def generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def test_it_is_the_loss_of_the_diffusers_scripts(family: Family) -> None:
    """Bit for bit, with each image's timestep and then its noise from its own generator."""
    scheduler = DDPMScheduler.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": float(family.schedule(torch.tensor(999))[0]) == 0,
        }
    )
    x0 = torch.randn(3, 4, 8, 8, generator=Generator().manual_seed(9))
    cond = family.encode(CAPTIONS)
    with torch.no_grad():
        found = diffusion_loss(
            family, lambda x, t: family.predict(x, t, cond).output, x0, generators(0, 1, 2)
        )
        t, eps = [], []
        for generator in generators(0, 1, 2):
            t.append(torch.randint(1000, (1,), generator=generator))
            eps.append(torch.randn(4, 8, 8, generator=generator))
        times, noise = torch.cat(t), torch.stack(eps)
        output = family.predict(scheduler.add_noise(x0, noise, times), times, cond).output
        wanted = noise if family.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, times)
        expected = F.mse_loss(output, wanted, reduction="none").flatten(1).mean(1)
    assert len(set(times.tolist())) == 3
    assert torch.equal(found, expected)


def test_a_perfect_network_has_no_loss_and_an_idle_one_its_variance(family: Family) -> None:
    """Knowing x0 the target follows from x; a network that says 0 has the mean square of the target, about 1."""
    x0 = torch.full((64, 4, 8, 8), 0.0)

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in family.schedule(t))
        eps = (x - alpha * x0) / sigma
        return eps if family.prediction_type == "epsilon" else alpha * eps - sigma * x0

    own = generators(*range(64))
    assert diffusion_loss(family, perfect, x0, own).max() < 1e-9
    idle = diffusion_loss(family, lambda x, t: torch.zeros_like(x), x0, generators(*range(64)))
    assert idle.shape == (64,)
    if family.prediction_type == "epsilon":
        assert idle.mean().item() == pytest.approx(1, abs=0.03)


def test_an_image_does_not_depend_on_its_neighbours(family: Family, files: list[Path]) -> None:
    def losses(rows: list[int]) -> Tensor:
        with torch.no_grad():
            return captioned_loss(
                CaptionedInputs(family, SQUARE),
                [files[row] for row in rows],
                [CAPTIONS[row] for row in rows],
                generators(*rows),
                caption_dropout=0.5,
            )

    together = losses([0, 1, 2])
    torch.testing.assert_close(losses([2, 0]), together[[2, 0]], rtol=0, atol=1e-5)
    assert len({round(value, 4) for value in together.tolist()}) == 3


def test_the_order_of_random_numbers(family: Family, files: list[Path]) -> None:
    """Dropout, posterior, timestep, noise: recorded trajectories depend on it."""
    with torch.no_grad():
        found = captioned_loss(
            CaptionedInputs(family, SQUARE), files[:1], CAPTIONS[:1], generators(3), caption_dropout=0.0
        )
        own = generators(3)
        torch.rand((), generator=own[0])
        x0 = family.encode_pixels(load_pixels(files[0], 64)[None], own)
        t = torch.randint(1000, (1,), generator=own[0])
        eps = torch.randn(1, 4, 8, 8, generator=own[0])
        alpha, sigma = family.schedule(t)
        cond = family.encode(CAPTIONS[:1])
        output = family.predict(add_noise(x0, eps, alpha, sigma), t, cond).output
        wanted = eps
        if family.prediction_type == "v_prediction":
            wanted = alpha.view(-1, 1, 1, 1) * eps - sigma.view(-1, 1, 1, 1) * x0
        assert torch.equal(found, (output - wanted).square().flatten(1).mean(1))


def test_dropped_captions(family: Family, files: list[Path]) -> None:
    """All dropped is the same as empty captions; `dropped` gives others in their place."""

    def losses(captions: list[str], dropout: float, dropped: list[str] | None = None) -> Tensor:
        with torch.no_grad():
            return captioned_loss(
                CaptionedInputs(family, SQUARE),
                files,
                captions,
                generators(0, 1, 2),
                caption_dropout=dropout,
                dropped=dropped,
            )

    kept = losses(CAPTIONS, 0.0)
    empty = losses(["", "", ""], 0.0)
    assert (kept - empty).abs().min() > 1e-6
    assert torch.equal(losses(CAPTIONS, 1.0), empty)
    assert torch.equal(losses(["x", "y", "z"], 1.0, CAPTIONS), kept)
    some = losses(CAPTIONS, 0.5)  # the first numbers of the seeds are 0.496, 0.758 and 0.615
    assert torch.equal(some, torch.stack([empty[0], kept[1], kept[2]]))


def test_framings_reach_the_text_encoding(family: Family, files: list[Path]) -> None:
    """SDXL reads them; the crop is the middle of the resized image."""
    seen: list[object] = []
    plain = family.encode

    def encode(*args: object, **kwargs: object) -> object:
        seen.append(kwargs["framings"])
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    family.encode = encode  # type: ignore[method-assign]
    try:
        captioned_loss(
            CaptionedInputs(family, SQUARE), files, CAPTIONS, generators(0, 1, 2), caption_dropout=0.0
        )
    finally:
        family.encode = plain  # type: ignore[method-assign]
    assert seen == [
        [
            Framing(Resolution(64, 64), 0, 0),
            Framing(Resolution(80, 100), 0, 8),
            Framing(Resolution(200, 70), 59, 0),
        ]
    ]


def test_pixels_at_a_resolution(files: list[Path]) -> None:
    """A square resolution is the old square; another keeps the shape of the image and cuts the middle out."""
    assert torch.equal(load_pixels(files[1], Resolution(64, 64)), load_pixels(files[1], 64))
    for path in files:
        levels, framing = load_levels(path, Resolution(height=32, width=64))
        wide = to_pixels(levels)
        assert wide.shape == (3, 32, 64)
        assert torch.equal(wide, load_pixels(path, Resolution(height=32, width=64)))
        assert framing.original == Resolution(*load_pixels(path).shape[1:])


def test_a_crop_is_where_its_framing_says(tmp_path: Path) -> None:
    """A bright column and row in a large image: resized by half, then cut at (top, left)."""
    pixels = torch.zeros(128, 256, 3, dtype=torch.uint8)
    pixels[:, 100:104] = 255
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    levels, framing = load_levels(tmp_path / "a.png", Resolution(64, 64))
    assert framing == Framing(Resolution(128, 256), top=0, left=32)
    assert int(to_pixels(levels)[0, 10].argmax()) + framing.left in (50, 51)


def test_exif_turns_the_original_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    _, framing = load_levels(tmp_path / "a.jpg", Resolution(64, 64))
    assert framing == Framing(Resolution(height=96, width=64), top=16, left=0)


def test_min_snr_by_hand() -> None:
    """Hang et al. 2023: min(SNR, gamma) times the error of x0, whatever is predicted."""
    alpha, sigma = (
        torch.tensor([0.5, 10 / 11, 0.0]).sqrt(),
        torch.tensor([0.5, 1 / 11, 1.0]).sqrt(),
    )  # SNR 1, 10, 0
    torch.testing.assert_close(min_snr(alpha, sigma, "epsilon", 5), torch.tensor([1, 0.5, 1]))
    torch.testing.assert_close(min_snr(alpha, sigma, "v_prediction", 5), torch.tensor([0.5, 5 / 11, 0]))
    with pytest.raises(ValueError, match="not of flow"):
        min_snr(alpha, sigma, "flow", 5)


def test_min_snr_is_the_same_for_epsilon_and_v() -> None:
    """An error of x0 by d is one of epsilon by d alpha / sigma and one of v by d / sigma."""
    alpha = torch.linspace(0.1, 0.99, 20)
    sigma = (1 - alpha**2).sqrt()
    by_epsilon = min_snr(alpha, sigma, "epsilon", 5) * (alpha / sigma) ** 2
    by_v = min_snr(alpha, sigma, "v_prediction", 5) / sigma**2
    torch.testing.assert_close(by_epsilon, by_v)
    torch.testing.assert_close(by_v, (alpha / sigma).square().clamp(max=5))


def test_the_weighted_loss_and_given_timesteps(family: Family) -> None:
    x0 = torch.zeros(3, 4, 8, 8)
    times = torch.tensor([20, 500, 900])

    def idle(x: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(t, times)
        return torch.zeros_like(x)

    plain = diffusion_loss(family, idle, x0, generators(0, 1, 2), times)
    weighted = diffusion_loss(family, idle, x0, generators(0, 1, 2), times, 5.0)
    weights = min_snr(*family.schedule(times), family.prediction_type, 5.0)
    assert weights[0] < 0.6
    torch.testing.assert_close(weighted, plain * weights)
