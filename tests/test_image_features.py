"""Features and statistics of image files, by scorers that are there and by a small DINOv2."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

import rewards
import tiny
from eval import benchmark
from preftune import cli
from preftune.images import load_pixels, save_image
from preftune.statistics import diversity, image_features
from preftune.statistics.image_statistics import image_statistics
from rewards.clip import ClipScorer
from rewards.pixels import prepare
from test_distribution import write_folder
from test_trained_scorers import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images of two sizes; the last two are the same."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, 48, generator=generator) for size in (48, 40, 40, 48)]
    paths = [folder / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, [*images, images[-1]], strict=True):
        save_image(image, path)
    return paths


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> ClipScorer:
    """A CLIP of random weights."""
    root = tmp_path_factory.mktemp("clip")
    tiny.tokenizer(root / "pipeline" / "tokenizer")
    return build(root)


def write_dino(folder: Path) -> None:
    """A small DINOv2 of random weights, large enough for its features to differ."""
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)


def test_files_are_described_as_their_pixels(files: list[Path], scorer: ClipScorer) -> None:
    found = image_features.describe(files, scorer.vision, CPU, batch_size=2)
    assert found.features is not None
    for row, path in enumerate(files):
        pixels = load_pixels(path)[None]
        with torch.no_grad():
            vector = scorer.vision(pixels)[0].numpy()
        assert found.features[row] == pytest.approx(vector, abs=0.02), "prepared as files are, in 8 bits"
        for name, values in image_statistics(pixels).items():
            assert found.statistics[name][row] == pytest.approx(values.item(), abs=1e-6)
    assert diversity.mean_pairwise_distance(found.features[3:]) == pytest.approx(0, abs=1e-6)
    assert diversity.vendi(found.features[3:]) == pytest.approx(1, abs=1e-5)
    assert diversity.vendi(found.features[:2]) > 1.0001


def test_without_a_tower_there_are_statistics(files: list[Path]) -> None:
    assert image_features.clip_tower([rewards.load("brightness")]) is None
    found = image_features.describe(files, None, CPU)
    assert found.features is None
    assert {len(values) for values in found.statistics.values()} == {5}


def test_the_first_clip_is_taken(scorer: ClipScorer) -> None:
    assert image_features.clip_tower([rewards.load("brightness"), scorer]) is scorer.vision


def test_an_image_that_cannot_be_read_is_named(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png"):
        image_features.describe([files[0], tmp_path / "cut.png"], None, CPU)


def test_a_small_dino(files: list[Path], tmp_path: Path) -> None:
    write_dino(tmp_path / "dino")
    dino = image_features.load_dino(str(tmp_path / "dino"))
    found = image_features.describe(files, dino, CPU).features
    assert found is not None
    assert found.shape == (5, 16)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(5))
    pixels = prepare(load_pixels(files[1])[None], dino.preprocess)
    with torch.no_grad():
        pooled = Dinov2Model.from_pretrained(tmp_path / "dino")(pixels).pooler_output[0]
    assert found[1] == pytest.approx((pooled / pooled.norm()).numpy(), abs=0.02), "prepared in 8 bits"
    assert found[3] == pytest.approx(found[4])
    assert np.abs(found[0] - found[3]).max() > 1e-4
    with pytest.raises(ValueError, match=r"cannot load DINOv2 from .*nowhere"):
        image_features.load_dino(str(tmp_path / "nowhere"))


def test_mean_pairwise_of_a_distance_by_hand() -> None:
    """Levels 0, 1/2 and 1 are 1/2, 1 and 1/2 apart."""
    pixels = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 4, 4)

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).abs().mean((1, 2, 3))

    assert image_features.mean_pairwise(pixels, distance) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 images or more of a prompt, got 1"):
        image_features.mean_pairwise(pixels[:1], distance)


def test_lpips_says_what_to_install() -> None:
    import importlib.util

    if importlib.util.find_spec("lpips"):
        pytest.skip("lpips is installed")
    with pytest.raises(ValueError, match="pip install lpips"):
        image_features.load_lpips()


def test_a_benchmark_measures_diversity_by_dino(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three equal images of a prompt have the Vendi score 1, by a scorer that is no CLIP."""
    write_dino(tmp_path / "dino")
    generator = torch.Generator().manual_seed(0)
    folder = write_folder(tmp_path / "same", [[0.5] * 3, [0.2] * 3, [0.7] * 3])
    other = write_folder(tmp_path / "other", [[0.5] * 3, [0.2] * 3, [0.7] * 3])
    for path in sorted(other.glob("*.png")):
        save_image(torch.rand(3, 16, 16, generator=generator), path)
    words = ["--folders", str(folder), str(other), "--rewards", "brightness", "--workers", "0"]
    words += ["--output-dir", str(tmp_path / "out"), "--diversity-by"]
    assert benchmark.main(cli.parse(benchmark.Config, [*words, str(tmp_path / "dino")])) == 0
    with (tmp_path / "out" / "measures.csv").open() as file:
        rows = {(row["model"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows["same", "Vendi score within a prompt"] == pytest.approx(1, abs=1e-4)
    assert rows["other", "Vendi score within a prompt"] > 1.001
    with pytest.raises(SystemExit):
        benchmark.main(cli.parse(benchmark.Config, [*words, "nowhere", "--overwrite-output-dir"]))
    assert "cannot load DINOv2 from nowhere" in capsys.readouterr().err
