"""ImageReward against the authors' numbers, its file formats, and what it refuses to read.

The golden numbers come from the authors' class at toy sizes, with weights by the formula of golden_weights.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
from golden_weights import BLIP as GOLDEN
from golden_weights import FOLDER as GOLDEN_FOLDER
from golden_weights import SHARED, fill
from rewards import Preprocess
from rewards.card import ImageRewardConfig
from rewards.imagereward import FULL_SIZE, VOCAB, ImageReward, to_authors, to_transformers
from rewards.pixels import from_pil

TOLERANCE = 5e-6  # independent float32 implementations on a CPU differ by less


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    config = replace(FULL_SIZE, **GOLDEN["config"])
    ImageReward.build(config, VOCAB, seed=0).save(folder)
    save_file(fill(GOLDEN["shapes"], GOLDEN["weights_seed"]), folder / "model.safetensors")
    return folder


@pytest.fixture
def golden(golden_folder: Path) -> ImageReward:
    return ImageReward.load(golden_folder).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack(
        [from_pil(Image.open(GOLDEN_FOLDER / name), FULL_SIZE.preprocess) for name in GOLDEN["images"]]
    )


def deviation(model: ImageReward, images: torch.Tensor) -> float:
    with torch.no_grad():
        scores = [model(images, [prompt] * len(images)) for prompt in GOLDEN["prompts"]]
    return (torch.stack(scores) - torch.tensor(GOLDEN["scores"])).abs().max().item()


def test_scores_equal_the_authors(golden: ImageReward, images: torch.Tensor) -> None:
    assert deviation(golden, images) < TOLERANCE


def test_token_ids_equal_the_authors(golden: ImageReward) -> None:
    ids, mask = golden.tokenize(GOLDEN["prompts"])
    assert ids.shape == mask.shape == (len(GOLDEN["prompts"]), 35)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == GOLDEN["token_ids"]
    assert [len(row) for row in GOLDEN["token_ids"]].count(
        35
    ) > 0  # a prompt that had to be cut is among them


def test_golden_notices_another_eps(golden: ImageReward, images: torch.Tensor) -> None:
    for module in golden.vision_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-6
            module.eps = 1e-5
    assert deviation(golden, images) > 4 * TOLERANCE


def test_golden_notices_another_token(
    golden: ImageReward, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = golden.text_model.forward

    def rolled(**inputs: torch.Tensor) -> object:
        output = run(**inputs)
        output.last_hidden_state = output.last_hidden_state.roll(-1, dims=1)
        return output

    monkeypatch.setattr(golden.text_model, "forward", rolled)
    assert deviation(golden, images) > 1000 * TOLERANCE


def test_golden_notices_colours_under_alpha(golden: ImageReward) -> None:
    badge = Image.open(GOLDEN_FOLDER / GOLDEN["images"][0])
    assert badge.mode == "RGBA"
    early = from_pil(badge.convert("RGB"), FULL_SIZE.preprocess)
    with torch.no_grad():
        score = golden(early[None], GOLDEN["prompts"][:1])
    assert abs(score.item() - GOLDEN["scores"][0][0]) > 1000 * TOLERANCE


def test_pixel_gradient_equals_finite_differences(golden: ImageReward) -> None:
    """Through resize, crop, both towers and head, in float64; the image is larger than the model's 224 pixels."""
    model = golden.double()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 240, 260, generator=noise, dtype=torch.float64).requires_grad_()
    direction = torch.randn(pixels.shape, generator=noise, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(model.raw(pixels, ["cat"]).sum(), pixels)
    with torch.no_grad():
        step = 1e-5 * direction
        numeric = (model.raw(pixels + step, ["cat"]) - model.raw(pixels - step, ["cat"])).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-6)


# ---------------------------------------------------------------- building and saving

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "white",
    "background",
]
SMALL = ImageRewardConfig(
    image_size=64, patch_size=16, vision_width=16, vision_layers=2, vision_heads=2, vocab_size=len(WORDS) + 2,
    max_positions=16, max_length=12, text_width=12, text_layers=2, text_heads=2, text_intermediate=24, projection=8,
    head=(16, 8, 8, 4),
)  # fmt: skip


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small(vocab: Path) -> ImageReward:
    return ImageReward.build(SMALL, vocab, seed=1)


def test_build_depends_on_the_seed_alone(vocab: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (ImageReward.build(SMALL, vocab, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["mlp.0.weight"], other["mlp.0.weight"])


def test_head_starts_as_the_authors_do(small: ImageReward) -> None:
    linear = [layer for layer in small.mlp if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [16, 8, 8, 4, 1]
    assert all(not layer.bias.any() for layer in linear)
    assert torch.cat([layer.weight.flatten() for layer in linear]).std().item() == pytest.approx(
        1 / 13, rel=0.15
    )


def test_save_and_load_give_the_same_scores(small: ImageReward, tmp_path: Path) -> None:
    small.set_statistics(mean=0.25, std=2.0)
    small.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    again = ImageReward.load(tmp_path / "saved").eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle on a white background", "a blue square"]
    with torch.no_grad():
        expected = (small.eval().raw(pixels, prompts) - 0.25) / 2
        assert torch.equal(again(pixels, prompts), expected)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_names_go_there_and_back(small: ImageReward, golden_folder: Path) -> None:
    authors = load_file(golden_folder / "model.safetensors")
    back = to_authors(to_transformers(authors))
    assert back.keys() == authors.keys() == GOLDEN["shapes"].keys()
    assert all(torch.equal(back[key], authors[key]) for key in authors)
    ours = small.state_dict()
    assert to_transformers(to_authors(ours)).keys() == ours.keys()


def test_every_parameter_of_the_score_gets_a_gradient(small: ImageReward) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small.raw(pixels, ["a red circle", "a blue square"]).sum().backward()
    without = {
        name for name, value in small.named_parameters() if value.grad is None or not value.grad.abs().any()
    }
    # A softmax does not change when all of its inputs shift, so a key bias has no gradient but rounding.
    without = {name for name in without if not name.endswith("key.bias")}
    assert without == {"vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias"}


def test_embeddings_are_unit_vectors(small: ImageReward) -> None:
    small.eval()
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images, texts = small.image_embedding(pixels), small.text_embedding(["a red circle", "a blue square", ""])
    assert images.shape == texts.shape == (3, SMALL.projection)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    assert (texts[0] - texts[1]).abs().max() > 1e-5


def test_the_head_runs_in_float32_under_autocast(small: ImageReward) -> None:
    """In bfloat16, of 8 bits, scores that differ by less than 1/256 of their size would tie."""
    small.eval()
    with torch.no_grad():
        for weight in small.mlp.parameters():
            weight *= 8
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "a blue square"] * 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw, features = small.raw(pixels, prompts), small.features(pixels, prompts)
    assert raw.dtype == torch.float32
    assert torch.equal(raw, small.mlp(features).squeeze(1))
    assert (raw != raw.bfloat16().float()).all()
    assert not torch.equal(features, small.features(pixels, prompts)), "the towers do run in bfloat16"


def test_padding_is_not_read(small: ImageReward) -> None:
    """A longer maximum adds padding only, and padding must not change a score."""
    small.eval()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = small.features(pixels, ["a red circle"])
        small.config = replace(SMALL, max_length=16)
        torch.testing.assert_close(small.features(pixels, ["a red circle"]), short, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- where it comes from


def test_a_folder_says_where_it_comes_from(small: ImageReward, tmp_path: Path) -> None:
    """Built from nothing; trained from a scorer of the table; trained from a folder, which hands on its licence."""
    small.save(tmp_path / "built")
    built = rewards.find_card(str(tmp_path / "built"))
    assert built.summary == "ImageReward's architecture, trained here, from random weights"
    assert built.licence == "Apache-2.0"
    small.card = replace(rewards.CARDS["blipscore"], typical_range=(-2.5, 2.5))
    small.save(tmp_path / "trained")
    card = rewards.find_card(str(tmp_path / "trained"))
    assert card == replace(
        built,
        name=str(tmp_path / "trained"),
        folder=str(tmp_path / "trained"),
        summary="ImageReward's architecture, trained here, from blipscore",
        licence="BSD-3-Clause",
        typical_range=(-2.5, 2.5),
    )
    for again in (ImageReward.load(tmp_path / "trained"), rewards.load(card.name)):
        assert again.card == card
        again.save(tmp_path / "further")  # type: ignore[attr-defined]
        further = rewards.find_card(str(tmp_path / "further"))
        assert further.summary.endswith(f"from {tmp_path / 'trained'}")
        assert (further.licence, further.typical_range) == ("BSD-3-Clause", (-2.5, 2.5))


def test_a_folder_from_before_there_were_cards(tmp_path: Path) -> None:
    """The embedded one: the card that it always had, and nothing is written beside it."""
    folder = Path(__file__).parents[1] / "assets" / "tiny" / "imagereward"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    card = rewards.find_card(str(folder))
    assert card == replace(
        rewards.CARDS["imagereward-tiny"],
        name=str(folder),
        folder=str(folder),
        summary="ImageReward's architecture, trained here",
        licence="that of what it started from",
    )
    embedded = ImageReward.load(folder)
    assert embedded.card == card
    embedded.save(tmp_path / "again")
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    again = rewards.find_card(str(tmp_path / "again"))
    assert again.summary == f"{card.summary}, from {folder}"
    assert again.licence == card.licence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"card\.json line 1 is not JSON"),
        ("[]", r"card\.json must hold a JSON object"),
        ('{"licence": "MIT"}', "card.json must have exactly the fields started_from, licence, typical_range"),
        (
            '{"started_from": "x", "licence": "MIT", "typical_range": 3}',
            r"card\.json: typical_range must be two numbers, got 3",
        ),
    ],
)
def test_a_wrong_card_is_a_clear_error(text: str, words: str, small: ImageReward, tmp_path: Path) -> None:
    small.save(tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        rewards.load(str(tmp_path / "model"))


# ---------------------------------------------------------------- files of others


@pytest.fixture
def folder(small: ImageReward, tmp_path: Path) -> Path:
    small.save(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: object) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors")  # type: ignore[operator]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrapped_and_prefixed_files_are_read(
    folder: Path, wrapper: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the authors' distributed trainer writes, and files without the position_ids buffer, in a torch file."""
    expected = ImageReward.load(folder).state_dict()
    state = {f"module.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    del state["module.blip.text_encoder.embeddings.position_ids"]
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, folder / "trained.pt")
    monkeypatch.setattr("rewards.imagereward.FOLDER_FILE", "trained.pt")
    loaded = ImageReward.load(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state["mlp.layers.7.bias"]
        return state | {"mlp.layers.6.bias": torch.zeros(5), "itm_head.weight": torch.zeros(2)}

    rewrite(folder, change)
    with pytest.raises(
        ValueError, match=r"missing: mlp\.7\.bias; unexpected: itm_head\.weight;.*\(5,\) instead of \(4,\)"
    ):
        ImageReward.load(folder)


def test_a_foreign_prefix_is_an_error_and_not_a_random_scorer(folder: Path) -> None:
    rewrite(folder, lambda state: {f"net.{key}": value for key, value in state.items()})
    with pytest.raises(ValueError, match=r"missing: .* more; unexpected: net"):
        ImageReward.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_truncated_file_is_a_clear_error(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("rewards.imagereward.FOLDER_FILE", name)
    with pytest.raises(ValueError, match="not a readable weights file"):
        ImageReward.load(folder)


class Hostile:
    """Unpickling this creates a file named executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_not_executed(
    folder: Path, tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"mlp.layers.0.weight": Hostile(tmp_path / "executed")}
    if writer == "torch":
        torch.save(content, folder / "hostile.pt")
    else:
        (folder / "hostile.pt").write_bytes(pickle.dumps(content, protocol=2))
    monkeypatch.setattr("rewards.imagereward.FOLDER_FILE", "hostile.pt")
    with pytest.raises(ValueError, match="not a readable weights file"):
        ImageReward.load(folder)
    assert not (tmp_path / "executed").exists()


def test_config_and_vocabulary_must_fit(folder: Path, vocab: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 99, but .* has 15 tokens"):
        ImageReward.build(replace(SMALL, vocab_size=99), vocab, seed=0)
    with pytest.raises(ValueError, match=r"head_dropout must lie in \[0, 1\), got \(0.2, 1.0, 0.1\)"):
        replace(SMALL, head_dropout=(0.2, 1.0, 0.1))
    with pytest.raises(ValueError, match="text_width 13 is not a multiple of text_heads 2"):
        replace(SMALL, text_width=13)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="hidden"):
        ImageReward.load(folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks vocab\.txt"):
        rewards.check("imagereward-tiny", folder)


def test_a_published_file_is_verified(tmp_path: Path) -> None:
    (tmp_path / "ImageReward.pt").write_bytes(b"not found")
    with pytest.raises(ValueError, match="has 9 bytes, the published file has 1786880927"):
        rewards.check("imagereward", tmp_path)
    (tmp_path / "mine.pt").write_bytes(b"anything")
    assert rewards.check("imagereward", tmp_path / "mine.pt") == (tmp_path / "mine.pt", VOCAB)


def test_a_model_of_another_size_is_not_this_scorer(small: ImageReward, vocab: Path, tmp_path: Path) -> None:
    ImageReward.build(replace(SMALL, image_size=32), vocab, seed=0).save(tmp_path / "other")
    with pytest.raises(ValueError, match="size=32"):
        rewards.load("imagereward-tiny", weights=tmp_path / "other")


# ---------------------------------------------------------------- full size


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="needs ../shared/golden")
def test_full_size_scores_and_gradients_equal_the_authors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 36 scores from files in the authors' layout (1.8 GB) and all 18 gradients, with and without antialiasing."""
    monkeypatch.syspath_prepend(SHARED / "golden")
    import recipe

    table = json.loads((SHARED / "golden" / "imagereward.json").read_text(encoding="utf-8"))
    torch.save(
        recipe.fill_state_dict(table["state_dict"]["keys"], table["weights_seed"]), tmp_path / "filled.pt"
    )
    scorer = rewards.load("imagereward", weights=tmp_path / "filled.pt")
    (tmp_path / "filled.pt").unlink()
    images = [Image.open(SHARED / "golden" / "inputs" / name) for name in table["images"]]
    images = torch.stack([from_pil(image, FULL_SIZE.preprocess) for image in images])
    with torch.no_grad():
        found = torch.stack([scorer(images, [prompt] * len(images)) for prompt in table["prompts"]])
    assert (found - torch.tensor(table["scores"])).abs().max() < TOLERANCE
    for case in table["gradients"]:
        rule = replace(Preprocess(size=224), antialias=case["resize"] == "antialias_true")
        monkeypatch.setattr(ImageRewardConfig, "preprocess", property(lambda _, rule=rule: rule))
        pixels = from_pil(images[table["images"].index(case["image"])])[None].requires_grad_()
        assert list(pixels.shape) == case["grad_shape"]
        score = scorer(pixels, [table["prompts"][case["prompt"]]])
        assert score.item() == pytest.approx(case["score"], abs=TOLERANCE), case["image"]
        (gradient,) = torch.autograd.grad(score.sum(), pixels)
        assert gradient.norm().item() == pytest.approx(case["grad_l2"], rel=1e-4)
        direction = torch.from_numpy(
            recipe.direction(case["image"], case["grad_shape"], table["weights_seed"])
        )
        along = (gradient * direction).sum().item()
        assert along == pytest.approx(case["grad_dot_direction"], abs=1e-4 * case["grad_l2"])
