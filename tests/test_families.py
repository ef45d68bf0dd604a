"""Stable Diffusion as a family: each method against diffusers' own parts, on tiny real weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

import tiny
from preftune import families
from preftune.families import Cond, sd
from preftune.families import tiny as builders
from preftune.lora import LoRA
from preftune.sampling import Sampling, sample
from rewards.shapes_rendering import random_scene

PROMPTS = ["a red circle", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def family(folder: Path) -> sd.SD:
    return families.load(folder)


def latents(num: int = 2) -> Tensor:
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def images(num: int = 2) -> Tensor:
    return torch.rand(num, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- check


def index(folder: Path, **parts: object) -> Path:
    """A folder with a model_index.json and an empty folder for each part."""
    for part in parts:
        (folder / part).mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **parts}))
    return folder


def test_check_accepts_the_format(folder: Path, tmp_path: Path) -> None:
    families.check(folder)
    families.check(index(tmp_path, **{key: ["diffusers", "X"] for key in sd.PARTS}))


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index.json; save one with pipe.save_pretrained"):
        families.check(tmp_path)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        families.load(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"model_index\.json is not JSON"):
        families.check(tmp_path)
    (tmp_path / "model_index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model_index\.json is not JSON"):
        families.check(tmp_path)
    for text in ("[]", "3", "null"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model_index\.json holds no JSON object"):
            families.check(tmp_path)


def test_check_names_other_families(tmp_path: Path) -> None:
    parts = {key: ["diffusers", "X"] for key in sd.PARTS}
    (tmp_path / "xl").mkdir()
    with pytest.raises(ValueError, match=r"has a second text encoder \(its class is SomePipeline\)"):
        families.check(index(tmp_path / "xl", **parts, text_encoder_2=["transformers", "X"]))
    (tmp_path / "flux").mkdir()
    del parts["unet"]
    with pytest.raises(ValueError, match="lacks unet"):
        families.check(index(tmp_path / "flux", **parts))
    (tmp_path / "bare").mkdir()
    whole = index(tmp_path / "bare", **parts, unet=["diffusers", "X"])
    (whole / "vae").rmdir()
    with pytest.raises(ValueError, match="lacks vae"):
        families.check(whole)


# ---------------------------------------------------------------- methods


def test_latent_shape(family: sd.SD) -> None:
    assert family.latent_shape(64, 128) == (4, 8, 16)
    with pytest.raises(ValueError, match="multiples of 8, got 64 x 60"):
        family.latent_shape(64, 60)


def test_encode_is_the_pipelines(folder: Path, family: sd.SD) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    prompts = [*PROMPTS, "far too many words for sixteen tokens of one byte each"]
    given, negative = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["ugly"] * 3)
    cond = family.encode(prompts, negative="ugly")
    torch.testing.assert_close(cond.states, given)
    torch.testing.assert_close(cond.negative, negative[:1])
    torch.testing.assert_close(family.encode(PROMPTS[:1]).states, given[:1])
    assert (cond.negative - family.encode(PROMPTS).negative).abs().max() > 1e-3


def test_a_text_encoder_in_training_is_differentiated_and_never_cached(family: sd.SD) -> None:
    family.encode(PROMPTS)
    family.text_encoder.requires_grad_(True).train()
    cond = family.encode(PROMPTS)
    assert cond.states.requires_grad
    assert cond.negative.requires_grad


def test_guidance_is_the_two_pass_formula(family: sd.SD) -> None:
    x, t = latents(), torch.tensor([800, 40])
    cond = family.encode(PROMPTS, negative="ugly")
    seen: list[int] = []
    family.denoiser.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    with torch.no_grad():
        given = family.denoise(x, t, cond)
        assert seen == [2]  # without guidance the negative prompt costs nothing
        guided = family.denoise(x, t, cond, guidance=3.0)
        assert seen == [2, 4]
        without = family.denoise(x, t, Cond(states=cond.negative.expand(2, -1, -1), negative=cond.negative))
        expected = family.unet(x, t, cond.states).sample
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(guided, without + 3 * (given - without), rtol=1e-4, atol=1e-5)
    assert (guided - given).abs().max() > 1e-3


def test_denoise_calls_the_module_that_was_prepared(family: sd.SD) -> None:
    """Processes share gradients only through the wrapper that accelerate put in denoiser."""
    calls: list[int] = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Tensor) -> object:
            calls.append(1)
            return self.inner(*arguments)

    family.denoiser = Wrapper(family.unet)
    family.denoise(latents(), torch.tensor([1, 2]), family.encode(PROMPTS), 2.0)
    assert calls == [1]


def test_decode_is_not_clamped_and_differentiable(family: sd.SD) -> None:
    with torch.no_grad():
        family.vae.decoder.conv_out.weight.mul_(30)
    x0 = latents().requires_grad_(True)
    pixels = family.decode(x0)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() < -0.01
    assert pixels.max() > 1.01
    raw = family.vae.decode(x0 / family.vae.config.scaling_factor).sample
    torch.testing.assert_close(pixels, raw / 2 + 0.5)
    pixels.sum().backward()
    assert x0.grad.abs().max() > 0


def test_encode_pixels_is_the_mean_or_a_draw(family: sd.SD) -> None:
    pixels = images()
    scale = family.vae.config.scaling_factor
    with torch.no_grad():
        posterior = family.vae.encode(pixels * 2 - 1).latent_dist
        mean = family.encode_pixels(pixels)
        generated = family.encode_pixels(pixels, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
        alone = family.encode_pixels(pixels[1:], [torch.Generator().manual_seed(6)])
    assert mean.shape == (2, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean * scale)
    noise = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    torch.testing.assert_close(generated, (posterior.mean + posterior.std * noise) * scale)
    torch.testing.assert_close(alone, generated[1:], rtol=0, atol=1e-5)
    assert (generated - mean).abs().max() > 1e-2


def test_abar_is_the_schedulers(family: sd.SD) -> None:
    t = torch.tensor([0, 500, 999])
    expected = DDPMScheduler.from_config(family.scheduler_config).alphas_cumprod[t]
    assert torch.equal(family.abar(t), expected)
    assert family.abar(t)[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)


# ---------------------------------------------------------------- training


def opened(module: torch.nn.Module) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.requires_grad]


def test_all_is_frozen_when_loaded(family: sd.SD) -> None:
    for part in (family.unet, family.vae, family.text_encoder):
        assert not opened(part)
        assert not part.training


@pytest.mark.parametrize("rank", [0, 2])
def test_trainable_opens_the_unet_alone_in_float32(folder: Path, rank: int) -> None:
    family = families.load(folder, dtype=torch.bfloat16)
    whole = len(list(family.unet.parameters()))
    family.text_encoder.requires_grad_(True)
    assert family.trainable(LoRA(rank=rank), seed=0) is family.unet
    assert not opened(family.vae)
    assert not opened(family.text_encoder)
    names = opened(family.unet)
    assert len(names) == whole if rank == 0 else all(".lora_" in name for name in names)
    weights = dict(family.unet.named_parameters())
    assert {weights[name].dtype for name in names} == {torch.float32}
    assert {w.dtype for w in weights.values() if not w.requires_grad} == (
        set() if rank == 0 else {torch.bfloat16}
    )


def test_casting_spares_trained_weights(family: sd.SD) -> None:
    """--mixed-precision casts what is frozen; an optimiser on bfloat16 weights would lose its small updates."""
    family.trainable(LoRA(rank=2), seed=0)
    family.to("cpu", torch.bfloat16)
    for part in (family.unet, family.vae, family.text_encoder):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            expected = torch.float32 if tensor.requires_grad else torch.bfloat16
            assert tensor.dtype == (expected if tensor.is_floating_point() else torch.int64), name
    cond = family.encode(PROMPTS)
    assert cond.states.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert family.denoise(latents(), torch.tensor([5, 9]), cond, 2.0).dtype == torch.float32
    assert family.decode(latents()).dtype == torch.float32
    assert family.encode_pixels(images()).dtype == torch.float32


def test_casting_forgets_the_cached_negative(family: sd.SD) -> None:
    family.encode(PROMPTS)
    family.to("cpu", torch.bfloat16)
    assert family.encode(PROMPTS).negative.dtype == torch.bfloat16


def test_checkpointing_and_attention(family: sd.SD) -> None:
    family.set_speed("sdpa", checkpointing=True, vae_checkpointing=True)
    assert family.unet.is_gradient_checkpointing
    assert family.vae.is_gradient_checkpointing
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--attention xformers: .* or use sdpa"):
            family.set_speed("xformers", checkpointing=False, vae_checkpointing=False)


def test_what_was_tuned_is_saved(folder: Path, tmp_path: Path) -> None:
    tuned = families.load(folder)
    tuned.trainable(LoRA(rank=2), seed=0)
    tuned.save_tuned(tmp_path / "lora", LoRA(rank=2))
    StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).load_lora_weights(tmp_path / "lora")
    whole = families.load(folder)
    whole.trainable(LoRA(rank=0), seed=0)
    with torch.no_grad():
        whole.unet.conv_out.bias.fill_(0.5)
    whole.save_tuned(tmp_path / "unet", LoRA(rank=0))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    assert torch.equal(unet.conv_out.bias, torch.full((4,), 0.5))


# ---------------------------------------------------------------- builders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    rng = np.random.default_rng(0)
    captions = [random_scene(rng).caption() for _ in range(300)]
    return builders.build_tokenizer(
        captions, tmp_path_factory.mktemp("tokenizer"), num_merges=160, max_length=32
    )


@pytest.mark.parametrize("word", ["red", "purple", "circle", "triangle", "background", "above", "on"])
def test_words_of_the_captions_are_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    ids = tokenizer(word).input_ids
    assert len(ids) == 3
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_start_end_and_padding(tokenizer: CLIPTokenizer) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id}) == 2
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # as Stable Diffusion 1.x pads
    assert max(tokenizer.bos_token_id, tokenizer.eos_token_id) < len(tokenizer)
    batch = tokenizer(["red", "word " * 99], padding="max_length", truncation=True, max_length=32)
    assert [len(ids) for ids in batch.input_ids] == [32, 32]
    assert batch.input_ids[0][2:] == [tokenizer.eos_token_id] * 30
    assert batch.input_ids[1][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text", ["zebra 42!", "Stra\u00dfe", "\u732b", "\U0001f600 100%", "<b>&amp;</b>", "x\ty"]
)
def test_any_text_can_be_encoded(tokenizer: CLIPTokenizer, text: str) -> None:
    """No byte is unknown: the text comes back, in lower case and with its spaces normalised."""
    ids = tokenizer(text).input_ids
    assert max(ids) < len(tokenizer)
    inner = ids[1:-1]
    assert inner
    assert tokenizer.bos_token_id not in inner
    assert tokenizer.eos_token_id not in inner
    back = tokenizer.decode(inner)
    assert "".join(back.split()) == "".join(text.lower().split())


def test_an_empty_prompt(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_built_parts_are_seeded() -> None:
    before = torch.get_rng_state()
    one, same, other = (builders.build_unet((16, 32), 1, 32, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


def test_a_built_pipeline_draws_and_comes_back(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """save_pipeline writes a folder that diffusers loads by itself, and that draws the same image."""
    built = sd.SD(
        unet=builders.build_unet((16, 32), 1, 32, 8, 0).eval(),
        vae=builders.build_autoencoder((8, 8, 16, 16), 64, 0).eval(),
        text_encoder=builders.build_text_encoder(tokenizer, 32, 2, 0).eval(),
        tokenizer=tokenizer,
        scheduler_config=builders.SCHEDULER_CONFIG,
    )
    with torch.no_grad():  # the posterior starts narrow: deviation about exp(-6 / 2)
        deviation = built.vae.encode(images() * 2 - 1).latent_dist.std.mean().item()
    assert deviation == pytest.approx(np.exp(-3), rel=0.2)
    built.save_pipeline(tmp_path / "pipeline")
    families.check(tmp_path / "pipeline")
    sampling = Sampling(num_inference_steps=3, guidance_scale=3.0, solver="pndm", resolution="64")
    ours = sample(built, ["a red circle"], [7], sampling)
    again = sample(families.load(tmp_path / "pipeline"), ["a red circle"], [7], sampling)
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    generated = pipe(
        "a red circle", latents=x, guidance_scale=3.0, num_inference_steps=3, output_type="pt"
    ).images
    torch.testing.assert_close(generated, ours, rtol=0, atol=1e-4)
