"""Families in training: what is frozen, what is cast, and what was tuned is saved and loaded; on tiny real weights."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import tiny
from preftune import families
from preftune.families import Family, locate, sd
from preftune.lora.tuning import LoRA

PROMPTS = ["a red circle", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def family(folder: Path) -> sd.SD:
    return sd.load(locate(str(folder)))


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def opened(module: torch.nn.Module) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.requires_grad]


def test_all_is_frozen_when_loaded(family: sd.SD) -> None:
    for part in (family.unet, family.vae, family.text_encoder):
        assert not opened(part)
        assert not part.training


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_trainable_opens_the_unet_alone_in_float32(folder: Path, lora: LoRA | None) -> None:
    family = sd.load(locate(str(folder)), dtype=torch.bfloat16)
    count = len(list(family.unet.parameters()))
    family.text_encoder.requires_grad_(True)
    assert family.trainable(lora, seed=0) is family.unet
    assert not opened(family.vae)
    assert not opened(family.text_encoder)
    names = opened(family.unet)
    assert len(names) == count if lora is None else all(".lora_" in name for name in names)
    assert names
    weights = dict(family.unet.named_parameters())
    assert {weights[name].dtype for name in names} == {torch.float32}
    assert {w.dtype for w in weights.values() if not w.requires_grad} == (
        set() if lora is None else {torch.bfloat16}
    )


def test_casting_spares_trained_weights(family: sd.SD) -> None:
    """--mixed-precision casts what is frozen; an optimiser on bfloat16 weights would lose its small updates."""
    family.trainable(LoRA(rank=2), seed=0)
    assert family.to("cpu", torch.bfloat16) is family
    for part in (family.unet, family.vae, family.text_encoder):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            expected = torch.float32 if tensor.requires_grad else torch.bfloat16
            assert tensor.dtype == (expected if tensor.is_floating_point() else torch.int64), name
    encoded = family.encode(PROMPTS)
    assert encoded.positive["embeds"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        prediction = family.predict(latents(), torch.tensor([5, 9]), encoded, 2.0)
    assert {part.dtype for part in prediction} == {torch.float32}
    assert family.decode(latents()).dtype == torch.float32
    assert family.encode_pixels(images()).dtype == torch.float32
    assert {level.dtype for level in family.schedule(torch.tensor([5]))} == {torch.float32}


@pytest.mark.parametrize("build", [tiny.pipeline_folder, tiny.pipeline_xl_folder])
def test_casting_forgets_the_cached_negative(tmp_path: Path, build: object) -> None:
    family = families.load(build(tmp_path))  # type: ignore[operator]
    family.encode(PROMPTS, "ugly")
    family.to("cpu", torch.bfloat16)
    negative = family.encode(PROMPTS, "ugly").negative
    assert {value.dtype for value in negative.values()} == {torch.bfloat16}


def test_checkpointing_and_attention(family: sd.SD) -> None:
    family.set_speed("sdpa", gradient_checkpointing=False, vae_checkpointing=False)
    assert not family.unet.is_gradient_checkpointing
    family.set_speed("sdpa", gradient_checkpointing=True, vae_checkpointing=True)
    assert family.unet.is_gradient_checkpointing
    assert family.vae.is_gradient_checkpointing
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--attention xformers: .* or use sdpa"):
            family.set_speed("xformers", gradient_checkpointing=False, vae_checkpointing=False)


def test_another_autoencoder(folder: Path, tmp_path: Path) -> None:
    tiny.vae(seed=5).save_pretrained(tmp_path)
    ours = sd.load(locate(str(folder)), vae=tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(ours.vae.decoder.conv_in.weight, theirs.decoder.conv_in.weight)
    assert not torch.equal(
        ours.vae.decoder.conv_in.weight, sd.load(locate(str(folder))).vae.decoder.conv_in.weight
    )


# ---------------------------------------------------------------- what was tuned


def said(family: Family) -> Tensor:
    with torch.no_grad():
        return family.predict(latents(), torch.tensor([800, 40]), family.encode(PROMPTS), 3.0).output


def tuned(folder: Path, lora: LoRA | None) -> Family:
    """A family whose training changed something."""
    family = families.load(folder)
    generator = torch.Generator().manual_seed(1)
    module = family.trainable(lora, seed=0)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return family


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("build", [tiny.pipeline_folder, tiny.pipeline_xl_folder])
def test_what_was_tuned_is_saved_and_loaded(tmp_path: Path, build: object, lora: LoRA | None) -> None:
    folder = build(tmp_path / "pipeline")  # type: ignore[operator]
    one = tuned(folder, lora)
    one.save_tuned(tmp_path / "tuned", lora)
    fresh = families.load(folder)
    base = said(fresh)
    assert (said(one) - base).abs().max() > 1e-2
    fresh.load_tuned(tmp_path / "tuned")
    assert torch.equal(said(fresh), said(one))
    assert not opened(fresh.denoiser)
    if lora is None:
        with pytest.raises(ValueError, match=r"whole UNet, which has no weight 0\.5; only a LoRA has one"):
            fresh.load_tuned(tmp_path / "tuned", 0.5)
    else:
        fresh.load_tuned(tmp_path / "tuned", 0.0)
        torch.testing.assert_close(said(fresh), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny.pipeline_folder, tiny.pipeline_xl_folder])
def test_the_reference_is_the_model_before_tuning(tmp_path: Path, build: object) -> None:
    folder = build(tmp_path / "pipeline")  # type: ignore[operator]
    base = said(families.load(folder))
    family = tuned(folder, LoRA(rank=2))
    after = said(family)
    names = opened(family.denoiser)
    with family.reference():
        assert torch.equal(said(family), base)
    assert torch.equal(said(family), after)
    assert opened(family.denoiser) == names
    untouched = families.load(folder)
    with untouched.reference():
        assert torch.equal(said(untouched), base)
    whole = tuned(folder, None)
    with pytest.raises(ValueError, match="the model before tuning is gone; use --train lora"):
        whole.reference()
    whole.save_tuned(tmp_path / "unet", None)
    untouched.load_tuned(tmp_path / "unet")
    with pytest.raises(ValueError, match="the model before tuning is gone"):
        untouched.reference()


def test_wrong_folders_of_what_was_tuned(folder: Path, tmp_path: Path, family: sd.SD) -> None:
    before = said(family)
    with pytest.raises(ValueError, match=r"holds neither a LoRA .* nor a UNet"):
        family.load_tuned(tmp_path)
    tiny.unet_xl().save_pretrained(tmp_path / "xl")
    with pytest.raises(
        ValueError, match=r"is another UNet: add_embedding\S+ and \d+ more weights do not fit"
    ):
        family.load_tuned(tmp_path / "xl")
    tiny.vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae is AutoencoderKL, not UNet2DConditionModel"):
        family.load_tuned(tmp_path / "vae")
    (tmp_path / "xl" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="xl has no weights"):
        family.load_tuned(tmp_path / "xl")
    assert torch.equal(said(family), before)


def test_a_whole_unet_takes_the_place_of_a_lora(folder: Path, tmp_path: Path) -> None:
    whole, lora = tuned(folder, None), tuned(folder, LoRA(rank=2))
    whole.save_tuned(tmp_path, None)
    lora.load_tuned(tmp_path)
    assert torch.equal(said(lora), said(whole))
    assert opened(whole.denoiser)
    whole.load_tuned(tmp_path)
    assert not opened(whole.denoiser)
