"""LoRA on a tiny Stable Diffusion pipeline: the file that diffusers loads generates the image that was trained."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import tiny
from preftune.lora import tuning as lora

SMALL = lora.LoRA(rank=2, alpha=6.0)
WIDE = lora.LoRA(
    rank=2,
    alpha=6.0,
    target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


def trained(unet: UNet2DConditionModel, config: lora.LoRA = SMALL) -> UNet2DConditionModel:
    """The UNet with an update that does something."""
    generator = torch.Generator().manual_seed(1)
    for weight in lora.inject(unet, config, seed=0):
        with torch.no_grad():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return unet


def noise(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        out: torch.Tensor = unet(x.to(unet.dtype), 500, text.to(unet.dtype)).sample
    return out


def image(
    folder: Path, unet: UNet2DConditionModel | None = None, weights: Path | None = None
) -> torch.Tensor:
    """What the pipeline generates, with another UNet or with LoRA weights that diffusers itself loads."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, **({"unet": unet} if unet is not None else {}))
    pipe.set_progress_bar_config(disable=True)
    if weights is not None:
        pipe.load_lora_weights(weights)
    images: torch.Tensor = pipe(
        "a red circle",
        num_inference_steps=3,
        height=tiny.PIXELS,
        width=tiny.PIXELS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return images


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["attention", "attention and convolutions"])
def test_diffusers_generates_the_same_image(folder: Path, tmp_path: Path, config: lora.LoRA) -> None:
    unet = trained(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"), config)
    lora.save(unet, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [lora.FILE]
    ours, theirs, base = image(folder, unet=unet), image(folder, weights=tmp_path), image(folder)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (base - ours).abs().max() > 1e-2


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["attention", "attention and convolutions"])
def test_load_is_the_inverse_of_save(tmp_path: Path, config: lora.LoRA) -> None:
    unet = trained(tiny.unet(), config)
    lora.save(unet, tmp_path)
    fresh = tiny.unet()
    lora.load(fresh, tmp_path)
    torch.testing.assert_close(noise(fresh), noise(unet))
    assert not any(weight.requires_grad for weight in fresh.parameters())


def test_half_an_update(tmp_path: Path) -> None:
    unet = trained(tiny.unet())
    lora.save(unet, tmp_path)
    fresh = tiny.unet()
    lora.load(fresh, tmp_path, weight=0.0)
    torch.testing.assert_close(noise(fresh), noise(tiny.unet()))
    lora.load(fresh, tmp_path, weight=0.5)
    half = tiny.unet()
    lora.inject(half, lora.LoRA(rank=2, alpha=3.0), seed=0)
    half.load_state_dict(unet.state_dict())
    torch.testing.assert_close(noise(fresh), noise(half))


def test_files_of_attention_processors(tmp_path: Path) -> None:
    """The layout of HPS v1's released file, written by hand from the trained layers: a scale of 1, no prefix, a torch file."""
    unet = trained(tiny.unet(), lora.LoRA(rank=2))
    old = {}
    for name, value in unet.state_dict().items():
        if "lora_" in name:
            plain = name.removesuffix(".default.weight").replace(".to_out.0", ".to_out")
            layer, projection, half = plain.rsplit(".", 2)
            kind = {"lora_A": "down", "lora_B": "up"}[half]
            old[f"{layer}.processor.{projection}_lora.{kind}.weight"] = value
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in old
    torch.save(old, tmp_path / lora.OLD_FILE)
    fresh = tiny.unet()
    lora.load(fresh, tmp_path)
    torch.testing.assert_close(noise(fresh), noise(unet))
    del old["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"]
    torch.save(old | {"stray": torch.zeros(1)}, tmp_path / lora.OLD_FILE)
    with pytest.raises(ValueError, match="is not a LoRA, or of an unknown kind: it holds stray"):
        lora.load(tiny.unet(), tmp_path)


def test_a_torch_file_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"x": Hostile()}, tmp_path / lora.OLD_FILE)
    with pytest.raises(ValueError, match="is damaged, or holds more than weights"):
        lora.load(tiny.unet(), tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(1)], tmp_path / lora.OLD_FILE)
    with pytest.raises(ValueError, match="does not hold weights by name"):
        lora.load(tiny.unet(), tmp_path)


def test_the_update_is_alpha_over_rank_b_a(tmp_path: Path) -> None:
    """The formula on one layer, by hand: W + 6 / 2 B A."""
    unet, base = trained(tiny.unet()), tiny.unet()
    state = unet.state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    a, b = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
    assert (a.shape, b.shape) == ((2, 32), (16, 2))
    lora.merge(unet)
    assert unet.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(
        unet.state_dict()[f"{name}.weight"], base.state_dict()[f"{name}.weight"] + 3 * b @ a
    )


def test_inject_freezes_the_base_and_changes_nothing_yet() -> None:
    unet, base = tiny.unet(), tiny.unet()
    weights = lora.inject(unet, SMALL, seed=0)
    named = dict(unet.named_parameters())
    assert {name for name, weight in named.items() if weight.requires_grad} == {
        n for n in named if "lora_" in n
    }
    # each transformer block has 2 attentions of 4 projections, and each projection an A and a B
    blocks = sum(name.endswith("attn1.to_q") for name, _ in base.named_modules())
    assert len(weights) == blocks * 2 * 4 * 2
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert torch.equal(noise(unet), noise(base))


def test_the_seed_alone_decides_the_weights() -> None:
    def weights_of(seed: int, leave: int) -> list[torch.Tensor]:
        torch.manual_seed(leave)
        weights = lora.inject(tiny.unet(), SMALL, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(leave)))
        return [weight.detach() for weight in weights]

    first, again, other = weights_of(0, 1), weights_of(0, 2), weights_of(5, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    a = torch.cat([weight.flatten() for weight in first if weight.shape[0] == 2])
    assert abs(a.std() - 1 / 2) < 0.02


def test_half_precision_base_trains_in_float32() -> None:
    unet = tiny.unet().to(torch.bfloat16)
    weights = lora.inject(unet, SMALL, seed=0)
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    x, text = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 16, 32).bfloat16()
    unet(x, 500, text).sample.float().square().mean().backward()
    assert sum(weight.grad is not None for weight in weights) == len(weights)


def test_disabled_is_the_reference_model() -> None:
    unet, base = trained(tiny.unet()), tiny.unet()
    tuned = noise(unet)
    with lora.disabled(unet):
        torch.testing.assert_close(noise(unet), noise(base))
    assert torch.equal(noise(unet), tuned)
    assert (tuned - noise(base)).abs().max() > 1e-2
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in unet.named_parameters())
    with pytest.raises(RuntimeError, match="out"), lora.disabled(unet):
        raise RuntimeError("out")
    assert torch.equal(noise(unet), tuned)
    unet.requires_grad_(False)
    with lora.disabled(unet):
        pass
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_merge_keeps_the_function() -> None:
    unet = trained(tiny.unet())
    tuned = noise(unet)
    lora.merge(unet)
    torch.testing.assert_close(noise(unet), tuned, atol=1e-4, rtol=1e-4)


def test_two_updates_in_turn(tmp_path: Path) -> None:
    one, two = trained(tiny.unet()), trained(tiny.unet(), lora.LoRA(rank=3, target_modules=("to_q",)))
    lora.save(one, tmp_path / "1")
    lora.save(two, tmp_path / "2")
    unet = tiny.unet()
    for folder, expected in (("1", one), ("2", two), ("1", one)):
        lora.load(unet, tmp_path / folder)
        torch.testing.assert_close(noise(unet), noise(expected))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"alpha": 0.0}, r"lora.alpha is 0\.0; it must be above 0"),
        ({"alpha": float("nan")}, "lora.alpha is nan"),
        ({"rank": 0}, "lora.rank is 0; it must be 1 or more; --train full trains all weights"),
        ({"target_modules": ()}, "name at least one layer"),
    ],
)
def test_wrong_configs(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora.LoRA(**values)  # type: ignore[arg-type]


def test_a_misspelt_target_is_refused_even_beside_a_right_one() -> None:
    with pytest.raises(ValueError, match=r"no layer is called to_z; there are .*to_out\.0.*to_q"):
        lora.inject(tiny.unet(), lora.LoRA(target_modules=("to_q", "to_z")), seed=0)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA in"):
        lora.load(tiny.unet(), tmp_path)
    lora.save(trained(tiny.unet()), tmp_path)
    file = tmp_path / lora.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        lora.load(tiny.unet(), tmp_path)
    layers = safetensors.torch.load(whole)
    name = next(iter(layers))
    for changed, words in (
        ({name.replace("unet.", "text_encoder."): layers[name]}, r"text_encoder\S+ would .* its unet lack"),
        ({name.replace("blocks.0", "blocks.7"): layers[name]}, r"does not fit this model: unet\S+blocks\.7"),
    ):
        safetensors.torch.save_file(layers | {key: value.clone() for key, value in changed.items()}, file)
        with pytest.raises(ValueError, match=words):
            lora.load(tiny.unet(), tmp_path)
    safetensors.torch.save_file({key: torch.zeros(2, 5) for key in layers}, file)
    with pytest.raises(
        ValueError, match=r"does not fit this model: unet\S+ has [AB] \(2, 5\).* weight there is \("
    ):
        lora.load(tiny.unet(), tmp_path)
