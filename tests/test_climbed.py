"""Rankings of what a scorer's gradient leads to: `simulate_rankings --climbed-by`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import rewards
import tiny
from data_build import climbed, simulate_rankings
from preftune import families
from preftune.cli import parse
from preftune.images import load_pixels
from preftune.records import read_jsonl, read_rankings

TINY = Path(__file__).parents[1] / "assets" / "tiny"
PIXELS = SimpleNamespace(decode=lambda latents: latents)
"""A family whose latents are pixels."""


def run(folder: Path, *words: str) -> Path:
    simulate_rankings.main(parse(simulate_rankings.Config, [*words, "--output-dir", str(folder)]))
    return folder


def images_of(folder: Path) -> Tensor:
    """(N, images, 3, H, W) of all rankings."""
    read = read_rankings(folder)
    return torch.stack([torch.stack([load_pixels(path) for path in ranking.paths]) for ranking in read])


# ---------------------------------------------------------------- the climb itself


def test_the_stops_are_evenly_spaced() -> None:
    assert climbed.stops(3, 12) == [4, 8, 12]
    assert climbed.stops(1, 12) == [12]
    assert climbed.stops(5, 12) == [2, 4, 7, 9, 12]
    assert climbed.stops(4, 4) == [1, 2, 3, 4]
    assert climbed.stops(0, 4) == []


def test_a_step_is_one_of_adam_up_the_reward() -> None:
    """Adam's first steps with a constant gradient move each number by the rate, along its sign; beyond [0, 1], too."""
    slopes = torch.tensor([2.0, -0.5, 1e-3]).view(1, 3, 1, 1)
    start = torch.full((2, 3, 2, 2), 0.98)
    first, third = climbed.climb(
        PIXELS, lambda pixels, _: (slopes * pixels).sum((1, 2, 3)), start, ["", ""], [1, 3], 0.05, torch.clone
    )
    torch.testing.assert_close(first, start + 0.05 * slopes.sign())
    torch.testing.assert_close(third, start + 0.15 * slopes.sign())
    assert (start == 0.98).all()


def test_images_climb_on_their_own() -> None:
    start = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def distance(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        goals = torch.tensor([float(prompt) for prompt in prompts]).view(-1, 1, 1, 1)
        return -(pixels - goals).square().sum((1, 2, 3))

    (both,) = climbed.climb(PIXELS, distance, start, ["0", "1"], [5], 0.05, torch.clone)
    for row, prompt in enumerate(("0", "1")):
        (alone,) = climbed.climb(PIXELS, distance, start[row : row + 1], [prompt], [5], 0.05, torch.clone)
        torch.testing.assert_close(both[row : row + 1], alone)
    assert (distance(both, ["0", "1"]) > distance(start, ["0", "1"])).all()


def test_half_of_the_climbed_images_are_shifted() -> None:
    """The reward reads one pixel: without shifts the gradient reaches that one alone, with them its surroundings, up to SHIFT away."""
    start = torch.full((1, 3, 16, 16), 0.5)
    generators = [torch.Generator().manual_seed(0)]
    pixels = climbed.climbed(
        PIXELS, lambda shown, _: shown[:, 0, 8, 8], start, [""], generators, images=6, steps=12, rate=0.1
    )
    assert pixels.shape == (1, 6, 3, 16, 16)
    assert (pixels[0, 0] == 0.5).all()
    changed = [(image[0] != 0.5).nonzero() for image in pixels[0]]
    for near in changed[1:3]:
        assert near.tolist() == [[8, 8]]
    for far in changed[3:]:
        assert len(far) > 1
        assert ((far - 8).abs() <= climbed.SHIFT).all()
    assert ((changed[5] - 8).abs() > climbed.SHIFT // 2).any()
    assert [len(far) for far in changed[3:]] == sorted({len(far) for far in changed[3:]})
    assert pixels[0, 2, 0, 8, 8] == 1, "clamped: 0.5 and 12 steps of 0.1"
    assert pixels[0, 1, 0, 8, 8] == 1


# ---------------------------------------------------------------- the program

WORDS = [
    "--model", str(TINY / "pipeline"), "--images", "4", "--guidance-scales", "1", "3", "--step-counts", "2",
    "--annotator-noise", "0", "--seed", "5",
]  # fmt: skip
CLIMB = ["--climbed-by", "imagereward-tiny", "--climb-steps", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("climbed") / "data", *WORDS, *CLIMB, "--count", "2")


def test_the_rankings_are_those_of_the_images(made: Path) -> None:
    rows = read_jsonl(made / "rankings.jsonl")
    assert [row["images"] for row in rows] == ["climbed"] * 2
    for row in rows:
        assert len(row["generations"]) == len(row["ranking"]) == len(row["gold"]) == 4
        best = max(range(4), key=lambda place: row["gold"][place])
        assert row["ranking"][best] == 1


def test_the_scorer_prefers_what_its_gradient_leads_to(made: Path) -> None:
    scorer = rewards.load("imagereward-tiny")
    for ranking, images in zip(read_rankings(made), images_of(made), strict=True):
        with torch.no_grad():
            scores = scorer(images, [ranking.prompt] * 4)
        assert scores[1] > scores[0] + 0.1, "without shifts"
        assert len({image.numpy().tobytes() for image in images}) == 4


def test_the_first_image_is_the_models(made: Path, tmp_path: Path) -> None:
    drawn = images_of(run(tmp_path / "drawn", *WORDS, "--count", "2"))
    torch.testing.assert_close(images_of(made)[:, 0], drawn[:, 0], rtol=0, atol=1.01 / 255)


def test_a_ranking_is_a_function_of_the_seed_and_its_number(made: Path, tmp_path: Path) -> None:
    """Byte for byte of the same command; up to rounding, of other batches."""
    again = run(tmp_path / "again", *WORDS, *CLIMB, "--count", "2")
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(made)).read_bytes()
    alone = images_of(run(tmp_path / "alone", *WORDS, *CLIMB, "--count", "1"))
    assert (alone[0] - images_of(made)[0]).abs().mean() < 1e-3


def test_batches_keep_their_rankings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of the user's own wants images redder or less red, by their captions: each climbs by its own one, in batches of any size."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef red(pixels, prompts):\n    signs = torch.tensor([1 - 2 * (len(prompt) % 2) for prompt in prompts])\n"
        "    return signs * pixels[:, 0].mean((1, 2))\n"
    )
    model = tiny.pipeline_folder(tmp_path / "model")
    words = ["--model", str(model), "--count", "5", "--images", "3", "--guidance-scales", "2", "--step-counts", "1"]  # fmt: skip
    drawn = images_of(run(tmp_path / "drawn", *words))
    climb = [*words, "--climbed-by", f"{tmp_path / 'mine.py'}:red"]
    found = {}
    for size in (2, 5):
        monkeypatch.setattr(climbed, "BATCH", size)
        found[size] = images_of(run(tmp_path / str(size), *climb))
    torch.testing.assert_close(found[2][:, 0], drawn[:, 0], rtol=0, atol=1.01 / 255)
    torch.testing.assert_close(found[2], found[5], rtol=0, atol=2.01 / 255)
    wanted = torch.tensor([1 - 2 * (len(ranking.prompt) % 2) for ranking in read_rankings(tmp_path / "2")])
    assert len(wanted.unique()) == 2
    red = found[2][:, :, 0].mean((2, 3))
    assert ((red[:, 1:] - red[:, :1]) * wanted[:, None] > 0).all()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--climbed-by imagereward-tiny", "--climbed-by imagereward-tiny starts from images of a --model; name one"),
        ("--model MODEL --climbed-by shapes", "--climbed-by shapes is not differentiable, but its gradient is needed; one of brightness"),
        ("--model MODEL --climbed-by imagereward-tin", "unknown scorer 'imagereward-tin' (did you mean imagereward-tiny?)"),
        ("--model MODEL --climb-steps 4", "--climb-steps and --climb-rate belong to --climbed-by"),
        ("--model MODEL --climb-rate 0.1", "--climb-steps and --climb-rate belong to --climbed-by"),
        ("--model MODEL --climbed-by brightness --images 8 --climb-steps 3", "--climb-steps must be at least 4, half of --images, one for each image of a climb, got 3"),
        ("--model MODEL --climbed-by brightness --climb-steps 0", "--climb-steps must be at least 2"),
        ("--model MODEL --climbed-by brightness --climb-rate 0", "--climb-rate must be a number above 0, got 0"),
        ("--model MODEL --climbed-by brightness --climb-rate nan", "--climb-rate must be a number above 0, got nan"),
        ("--model MODEL --climbed-by brightness --climb-rate inf", "--climb-rate must be a number above 0, got inf"),
        ("--model MODEL --climbed-by SCORER", "SCORER"),
        ("--model MODEL --climbed-by hpsv1", "hpsv1"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_sentence_before_a_model_loads(
    words: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scorer = shutil.copytree(TINY / "imagereward", tmp_path / "scorer")
    for path in scorer.glob("*.safetensors"):
        path.unlink()
    names = {"MODEL": str(TINY / "pipeline"), "SCORER": str(scorer)}
    monkeypatch.setattr(families, "load", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "data", *(names.get(word, word) for word in words.split()))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert names.get(sentence, sentence) in said
    assert "Traceback" not in said
    assert not (tmp_path / "data").exists()


def test_the_defaults() -> None:
    words = ["--output-dir", "x", "--model", "m", "--climbed-by", "brightness"]
    assert parse(simulate_rankings.Config, words).climb() == (12, 0.05)
    words += ["--climb-steps", "9", "--climb-rate", "0.1"]
    assert parse(simulate_rankings.Config, words).climb() == (9, 0.1)
