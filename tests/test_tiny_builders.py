"""The builders of small pipelines in Stable Diffusion's format, from which the embedded one grew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tiny
from preftune import families
from preftune.families import sd
from preftune.families import tiny as builders
from preftune.resolution import Resolution
from preftune.sampling import Sampling, sample
from rewards.shapes_rendering import random_scene


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


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, seed: int) -> CLIPTextModel:
    """Return a CLIP text encoder for this tokenizer, with four heads and QuickGELU as Stable Diffusion 1.x's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return CLIPTextModel(config)


def test_a_built_pipeline_generates_and_comes_back(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """save_pipeline writes a folder that diffusers loads by itself, and that generates the same image."""
    built = sd.SD(
        unet=builders.build_unet((16, 32), 1, 32, 8, 0).eval(),
        vae=builders.build_autoencoder((8, 8, 16, 16), 64, 0).eval(),
        text_encoder=build_text_encoder(tokenizer, 32, 2, 0).eval(),
        tokenizer=tokenizer,
        scheduler_config=builders.SCHEDULER_CONFIG,
    )
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # the posterior starts narrow: standard deviation about exp(-6 / 2)
        std = built.vae.encode(images * 2 - 1).latent_dist.std.mean().item()
    assert std == pytest.approx(np.exp(-3), rel=0.2)
    built.save_pipeline(tmp_path / "pipeline")
    assert families.check(tmp_path / "pipeline") == built.defaults
    assert built.defaults.resolution == Resolution(64, 64)
    sampling = Sampling(num_inference_steps=3, guidance_scale=3.0)
    (ours,) = sample(built, ["a red circle"], [7], sampling)
    (again,) = sample(families.load(tmp_path / "pipeline"), ["a red circle"], [7], sampling)
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    theirs = pipe(
        "a red circle", latents=x, guidance_scale=3.0, num_inference_steps=3, output_type="pt"
    ).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_saved_pipeline_keeps_zero_snr(tmp_path: Path) -> None:
    family = families.load(tiny.pipeline_folder(tmp_path / "one", "v_prediction", zero_snr=True))
    family.save_pipeline(tmp_path / "two")
    again = families.load(tmp_path / "two")
    assert again.prediction_type == "v_prediction"
    assert torch.equal(again.schedule(torch.arange(1000))[0], family.schedule(torch.arange(1000))[0])
    assert again.schedule(torch.tensor(999))[0] == 0
