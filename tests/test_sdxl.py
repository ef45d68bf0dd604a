"""Stable Diffusion XL as a family, on tiny real weights; the loop against the pipeline is in test_same_as_diffusers.py."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

import tiny
from preftune import families
from preftune.families import Cond, locate, sdxl
from preftune.lora import tuning as lora
from preftune.lora.tuning import LoRA
from preftune.resolution import Framing, Resolution
from preftune.sampling import Sampling, sample

PROMPTS = ["a red circle", "far too many words for sixteen tokens of one byte each"]
WIDE = LoRA(
    rank=2, alpha=6.0, target_modules=("to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "conv")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_xl_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def family(folder: Path) -> sdxl.SDXL:
    return sdxl.load(locate(str(folder)))


def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("negative", [None, "ugly"])
@pytest.mark.parametrize("zeros", [True, False])
def test_encode_is_the_pipelines(tmp_path: Path, zeros: bool, negative: str | None) -> None:
    folder = tiny.pipeline_xl_folder(tmp_path, force_zeros_for_empty_prompt=zeros)
    embeds, null, pooled, null_pooled = pipeline(folder).encode_prompt(
        PROMPTS, device="cpu", negative_prompt=negative and [negative] * 2
    )
    cond = families.load(folder).encode(PROMPTS, negative or "")
    assert {name: value.shape for name, value in cond.positive.items()} == {
        "embeds": (2, 16, 80),
        "pooled": (2, 24),
    }
    for ours, theirs in (
        (cond.positive["embeds"], embeds),
        (cond.positive["pooled"], pooled),
        (cond.negative["embeds"].expand(2, -1, -1), null),
        (cond.negative["pooled"].expand(2, -1), null_pooled),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    empty = negative is None and zeros
    assert (cond.negative["embeds"] == 0).all() == empty
    assert (cond.negative["pooled"] == 0).all() == empty


def test_both_tokenizers_are_used(family: sdxl.SDXL) -> None:
    """They pad otherwise, so the second encoder's states are those of its own tokens."""
    before = family.encode(PROMPTS[:1]).positive["embeds"]
    family.tokenizers = (family.tokenizers[0], family.tokenizers[0])
    after = family.encode(PROMPTS[:1]).positive["embeds"]
    assert torch.equal(before[..., :32], after[..., :32])
    assert (before[..., 32:] - after[..., 32:]).abs().max() > 1e-3


def test_either_text_encoder_in_training_is_differentiated(family: sdxl.SDXL) -> None:
    family.encode(PROMPTS, "ugly")
    for trained in family.text_encoders:
        trained.requires_grad_(True).train()
        assert family.encode(PROMPTS, "ugly").negative["embeds"].requires_grad
        assert family.encode(PROMPTS).positive["embeds"].requires_grad
        trained.requires_grad_(False).eval()
    assert not family.encode(PROMPTS, "ugly").negative["embeds"].requires_grad


# ---------------------------------------------------------------- sizes


def test_time_ids(family: sdxl.SDXL) -> None:
    """Height first; the target is the latents' size, and an image without a framing was neither resized nor cropped."""
    wide = latents(height=8, width=12)
    assert family.time_ids(wide).tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    framings = [Framing(Resolution(height=480, width=641), top=3, left=5), Framing(Resolution(64, 96))]
    framing = family.encode(PROMPTS, framings=framings).positive["framing"]
    assert family.time_ids(wide, framing).tolist() == [[480, 641, 3, 5, 64, 96], [64, 96, 0, 0, 64, 96]]
    assert family.time_ids(wide.bfloat16(), framing).dtype == torch.float32  # bfloat16 would round 641 to 640
    with pytest.raises(ValueError, match="2 prompts but 1 framings"):
        family.encode(PROMPTS, framings=framings[:1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_unet_sees_each_images_own_ids(family: sdxl.SDXL, scale: float) -> None:
    seen: list[Tensor] = []
    family.denoiser.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    framings = [Framing(Resolution(480, 640), 3, 5), Framing(Resolution(100, 200), 7, 9)]
    cond = family.encode(PROMPTS, framings=framings)
    rows = [[480, 640, 3, 5, 64, 64], [100, 200, 7, 9, 64, 64]]
    t = torch.tensor([800, 40])
    with torch.no_grad():
        framed = family.predict(latents(), t, cond, scale).output
        plain = family.predict(latents(), t, family.encode(PROMPTS), scale).output
        family.predict(latents()[:1], t[:1], cond.rows([1]), scale)
    copies = 2 if scale > 1 else 1  # the negative prompt with the same ids, as in the pipeline
    assert seen[0].tolist() == rows * copies
    assert seen[1].tolist() == [[64, 64, 0, 0, 64, 64]] * 2 * copies
    assert seen[2].tolist() == rows[1:] * copies
    assert (framed - plain).abs().max() > 1e-3


def test_framings_are_joined_and_not_mixed_with_none(family: sdxl.SDXL) -> None:
    framed = family.encode(PROMPTS[:1], framings=[Framing(Resolution(480, 640), 3, 5)])
    assert Cond.cat([framed, framed]).positive["framing"].tolist() == [[480, 640, 3, 5]] * 2
    with pytest.raises(ValueError, match=r"encoded as .*framing"):
        Cond.cat([framed, family.encode(PROMPTS[:1])])


# ---------------------------------------------------------------- the autoencoder


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_stays_float32(
    tmp_path: Path, upcast: bool, dtype: torch.dtype
) -> None:
    """As in the pipeline float16 alone: bfloat16 has float32's range."""
    folder = tiny.pipeline_xl_folder(tmp_path)
    repaired = tiny.vae()
    repaired.register_to_config(force_upcast=upcast)
    repaired.save_pretrained(tmp_path / "repaired")
    expected = {torch.float32 if upcast and dtype == torch.float16 else dtype}
    loaded = sdxl.load(locate(str(folder)), dtype=dtype, vae=tmp_path / "repaired")
    cast = sdxl.load(locate(str(folder)), vae=tmp_path / "repaired").to("cpu", dtype)
    for family in (loaded, cast):
        assert dtypes(family.vae) == expected
        assert {kind for part in (family.unet, *family.text_encoders) for kind in dtypes(part)} == {dtype}


def test_no_overflow_in_float16(folder: Path) -> None:
    """Activations beyond 65504, as SDXL's, neither in a cast model nor under autocast."""
    family = sdxl.load(locate(str(folder))).to("cpu", torch.float16)
    for part in (family.vae.decoder, family.vae.encoder):
        with torch.no_grad():
            part.conv_in.weight.mul_(1e6)
    with torch.no_grad():
        expected = family.decode(latents()), family.encode_pixels(images())
        with torch.autocast("cpu", torch.float16):
            found = family.decode(latents()), family.encode_pixels(images())
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    with torch.no_grad():
        family.vae.half()
        assert not family.decode(latents()).isfinite().all()


def test_decode_is_the_pipelines(folder: Path, family: sdxl.SDXL) -> None:
    x = latents(8, 12)
    pipe = pipeline(folder)
    with torch.no_grad():
        theirs = pipe.vae.decode(x / 0.13025).sample
        assert torch.equal(family.decode(x), theirs / 2 + 0.5)
        posterior = pipe.vae.encode(images() * 2 - 1).latent_dist.mean
        assert torch.equal(family.encode_pixels(images()), posterior * 0.13025)


def test_latents_with_a_mean_and_a_deviation(family: sdxl.SDXL) -> None:
    mean, std = [1.0, -2.0, 3.0, 0.5], [2.0, 0.5, 4.0, 1.5]
    with torch.no_grad():
        plain = family.encode_pixels(images()) / 0.13025
        family.vae.register_to_config(latents_mean=mean, latents_std=std)
        m, s = (torch.tensor(value).reshape(1, 4, 1, 1) for value in (mean, std))
        normed = family.encode_pixels(images())
        torch.testing.assert_close(normed, (plain - m) / s * 0.13025)
        decoded = family.vae.decode(latents() * s / 0.13025 + m).sample / 2 + 0.5  # as the pipeline
        torch.testing.assert_close(family.decode(latents()), decoded, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- files


def test_a_saved_pipeline_comes_back(tmp_path: Path) -> None:
    one = families.load(
        tiny.pipeline_xl_folder(
            tmp_path / "one", "v_prediction", zero_snr=True, force_zeros_for_empty_prompt=False
        )
    )
    one.save_pipeline(tmp_path / "two")
    two = families.load(tmp_path / "two")
    assert two.prediction_type == "v_prediction"
    assert two.schedule(torch.tensor(999))[0] == 0
    sampling = Sampling(num_inference_steps=3, resolution="96x64")
    first, second = (list(sample(family, PROMPTS, [1, 2], sampling)) for family in (one, two))
    assert first[0].shape == (2, 3, 64, 96)
    assert torch.equal(first[0], second[0])
    scheduler = pipeline(tmp_path / "two").scheduler
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == one.timesteps(4, "euler", Resolution(64, 64))[:4].tolist()


@pytest.mark.parametrize(
    "config", [LoRA(rank=2, alpha=6.0), WIDE], ids=["attention", "attention and convolutions"]
)
def test_the_pipeline_loads_all_of_a_lora(folder: Path, tmp_path: Path, config: LoRA) -> None:
    family = families.load(folder)
    base = generated(pipeline(folder))
    generator = torch.Generator().manual_seed(1)
    unet = family.trainable(config, seed=0)
    layers = [weight for weight in unet.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in layers:
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    family.save_tuned(tmp_path, config)
    assert [file.name for file in tmp_path.iterdir()] == [lora.FILE]
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path)
    names = [name for name, _ in pipe.unet.named_parameters() if ".lora_" in name]
    assert len(names) == len(layers)
    theirs = generated(pipe)
    pipe = pipeline(folder)
    pipe.unet = unet
    torch.testing.assert_close(theirs, generated(pipe), atol=1e-5, rtol=0)
    assert (theirs - base).abs().max() > 1e-2
    fresh = families.load(folder)
    fresh.load_tuned(tmp_path)
    pipe.unet = fresh.denoiser
    torch.testing.assert_close(theirs, generated(pipe), atol=1e-5, rtol=0)


def generated(pipe: StableDiffusionXLPipeline) -> Tensor:
    image: Tensor = pipe(
        "a red circle",
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return image


def test_the_text_encoders_open_what_the_encoding_depends_on(family: sdxl.SDXL) -> None:
    """Every weight that is opened gets a gradient, since processes wait for all of them."""
    family.open_text_encoders()
    try:
        cond = family.encode(["a red circle"])
        sum(value.float().square().sum() for value in cond.positive.values()).backward()
        opened = [p for encoder in family.text_encoders for p in encoder.parameters() if p.requires_grad]
        assert len(opened) > 20
        assert all(weight.grad is not None for weight in opened)
    finally:
        for encoder in family.text_encoders:
            encoder.requires_grad_(False).eval()
            encoder.zero_grad()
