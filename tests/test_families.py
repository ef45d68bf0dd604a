"""Stable Diffusion as a family: each method against diffusers' own parts, on tiny real weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

import tiny
from preftune import families
from preftune.families import Cond, Family, locate, sd, text
from preftune.resolution import Framing, Resolution

PROMPTS = ["a red circle", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def family(folder: Path) -> sd.SD:
    return sd.load(locate(str(folder)))


def latents(num: int = 2) -> Tensor:
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def images(num: int = 2) -> Tensor:
    return torch.rand(num, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- Cond


def cond(*values: float, negative: float = 0.0) -> Cond:
    column = torch.tensor(values).reshape(-1, 1)
    return Cond(
        positive={"embeds": column, "pooled": column + 10},
        negative={"embeds": torch.full((1, 1), negative), "pooled": torch.zeros(1, 1)},
    )


def test_rows_of_a_cond() -> None:
    whole = cond(1, 2, 3)
    assert len(whole) == 3
    for index, expected in ((slice(1, 3), [2, 3]), ([2, 0, 2], [3, 1, 3]), ((1,), [2])):
        part = whole.rows(index)
        assert part.positive["embeds"].flatten().tolist() == expected
        assert part.positive["pooled"].flatten().tolist() == [value + 10 for value in expected]
        assert part.negative is whole.negative


def test_conds_are_joined_under_one_negative() -> None:
    joined = Cond.cat([cond(1, 2), cond(3), cond(4)])
    assert joined.positive["embeds"].flatten().tolist() == [1, 2, 3, 4]
    assert joined.positive["pooled"].flatten().tolist() == [11, 12, 13, 14]
    assert {name: value.shape for name, value in joined.negative.items()} == {
        "embeds": (1, 1),
        "pooled": (1, 1),
    }
    with pytest.raises(ValueError, match="different negative prompts cannot be joined"):
        Cond.cat([cond(1), cond(2, negative=0.5)])
    other = Cond(positive={"embeds": torch.ones(1, 1)}, negative={"embeds": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="encoded as"):
        Cond.cat([cond(1), other])


def test_a_row_is_what_its_prompt_alone_is(family: sd.SD) -> None:
    whole, alone = family.encode(PROMPTS), family.encode(PROMPTS[1:])
    torch.testing.assert_close(whole.rows([1]).positive["embeds"], alone.positive["embeds"])


# ---------------------------------------------------------------- methods


def test_the_type_is_the_protocols(folder: Path, tmp_path: Path) -> None:
    """What mypy checks in preftune/families/__init__.py, and that load gives each folder its own class."""
    loaded: list[Family] = [families.load(folder), families.load(tiny.pipeline_xl_folder(tmp_path))]
    assert [type(one).__name__ for one in loaded] == ["SD", "SDXL"]
    for one in loaded:
        for name in [*Family.__annotations__, *(n for n in vars(Family) if not n.startswith("_"))]:
            assert hasattr(one, name), name


def test_latent_shape(family: sd.SD) -> None:
    assert family.latent_shape(Resolution(height=64, width=128)) == (4, 8, 16)
    with pytest.raises(ValueError, match="multiples of 8, got 64 x 60"):
        family.latent_shape(Resolution(height=64, width=60))


def test_encode_is_the_pipelines(folder: Path, family: sd.SD) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    prompts = [*PROMPTS, "far too many words for sixteen tokens of one byte each"]
    given, negative = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["ugly"] * 3)
    encoded = family.encode(prompts, negative="ugly")
    torch.testing.assert_close(encoded.positive["embeds"], given)
    torch.testing.assert_close(encoded.negative["embeds"], negative[:1])
    assert (encoded.negative["embeds"] - family.encode(PROMPTS).negative["embeds"]).abs().max() > 1e-3
    framed = family.encode(prompts, "ugly", [Framing(Resolution(9, 9), 1, 2)] * 3)
    assert framed.positive.keys() == {"embeds"}  # Stable Diffusion has no input for it
    assert torch.equal(framed.positive["embeds"], encoded.positive["embeds"])


def test_a_tokenizer_without_a_length_takes_the_encoders(family: sd.SD) -> None:
    expected = family.encode(PROMPTS).positive["embeds"]
    family.tokenizer.model_max_length = int(1e30)
    assert text.token_ids(family.tokenizer, family.text_encoder, PROMPTS, family.device).shape == (2, 16)
    assert torch.equal(family.encode(PROMPTS).positive["embeds"], expected)


def test_a_text_encoder_in_training_is_differentiated_and_never_cached(family: sd.SD) -> None:
    family.encode(PROMPTS)
    (encoder,) = family.text_encoders
    encoder.requires_grad_(True).train()
    encoded = family.encode(PROMPTS)
    assert encoded.positive["embeds"].requires_grad
    assert encoded.negative["embeds"].requires_grad


def test_guidance_is_the_two_pass_formula(family: sd.SD) -> None:
    x, t = latents(), torch.tensor([800, 40])
    encoded = family.encode(PROMPTS, negative="ugly")
    null = encoded.negative["embeds"].expand(2, -1, -1)
    seen: list[int] = []
    family.denoiser.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    with torch.no_grad():
        given = family.predict(x, t, encoded).output
        assert seen == [2]  # without guidance the negative prompt costs nothing
        guided = family.predict(x, t, encoded, guidance_scale=3.0).output
        assert seen == [2, 4]
        without = family.predict(x, t, Cond(positive={"embeds": null}, negative=encoded.negative)).output
        expected = family.unet(x, t, encoded.positive["embeds"]).sample
        both = family.unet(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, encoded.positive["embeds"]])
        ).sample
    assert torch.equal(given, expected)
    negative, positive = both.chunk(2)  # the order of the pipeline
    assert torch.equal(guided, negative + 3 * (positive - negative))
    torch.testing.assert_close(guided, without + 3 * (given - without), rtol=1e-4, atol=1e-5)
    assert (guided - given).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
def test_guidance_of_one_or_less_is_none(family: sd.SD, scale: float) -> None:
    """As in diffusers: 0 does not mean the negative prompt alone."""
    x, t, encoded = latents(), torch.tensor([800, 40]), family.encode(PROMPTS, "ugly")
    with torch.no_grad():
        assert torch.equal(family.predict(x, t, encoded, scale).output, family.predict(x, t, encoded).output)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_is_of_the_folders_kind(tmp_path: Path, kind: str) -> None:
    """x = alpha x0 + sigma eps at each row's own timestep, and the output is x0, eps or v = alpha eps - sigma x0."""
    if kind == "sample":
        file = tiny.pipeline_folder(tmp_path) / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
    else:
        tiny.pipeline_folder(tmp_path, kind)  # type: ignore[arg-type]
    family = families.load(tmp_path)
    assert family.prediction_type == kind
    x, t = latents(), torch.tensor([700, 90])
    with torch.no_grad():
        x0, eps, output = family.predict(x, t, family.encode(PROMPTS), 3.0)
    alpha, sigma = (level.reshape(2, 1, 1, 1) for level in family.schedule(t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, atol=1e-5, rtol=1e-5)
    said = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
    torch.testing.assert_close(said, output, atol=1e-5, rtol=1e-5)


class Wrapper(torch.nn.Module):
    """What accelerate puts around a module that several processes train."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments: object, **named: object) -> object:
        self.calls += 1
        return self.inner(*arguments, **named)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("build", [tiny.pipeline_folder, tiny.pipeline_xl_folder])
def test_predict_calls_the_module_that_was_prepared(tmp_path: Path, build: object, scale: float) -> None:
    """Processes share gradients only through the wrapper that accelerate put in denoiser."""
    family = families.load(build(tmp_path))  # type: ignore[operator]
    family.denoiser = wrapper = Wrapper(family.denoiser)
    family.predict(latents(), torch.tensor([1, 2]), family.encode(PROMPTS), scale)
    assert wrapper.calls == 1


def test_decode_is_not_clamped_and_differentiable(family: sd.SD) -> None:
    with torch.no_grad():
        family.vae.decoder.conv_out.weight.mul_(30)
    x0 = latents().requires_grad_(True)
    pixels = family.decode(x0)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() < -0.01
    assert pixels.max() > 1.01
    raw = family.vae.decode(x0 / family.vae.config.scaling_factor).sample
    assert torch.equal(pixels, raw / 2 + 0.5)
    pixels.sum().backward()
    assert x0.grad.abs().max() > 0


def test_encode_pixels_is_the_mean_or_a_sample(family: sd.SD) -> None:
    pixels = images()
    scale = family.vae.config.scaling_factor
    with torch.no_grad():
        posterior = family.vae.encode(pixels * 2 - 1).latent_dist
        mean = family.encode_pixels(pixels)
        sampled = family.encode_pixels(pixels, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
        alone = family.encode_pixels(pixels[1:], [torch.Generator().manual_seed(6)])
    assert mean.shape == (2, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean * scale)
    noise = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise) * scale)
    torch.testing.assert_close(alone, sampled[1:], rtol=0, atol=1e-5)
    assert (sampled - mean).abs().max() > 1e-2


def test_the_schedule_is_the_schedulers(folder: Path, family: sd.SD) -> None:
    t = torch.tensor([[0, 500], [999, -1]])
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    table = DDPMScheduler.from_config(config).alphas_cumprod
    alpha, sigma = family.schedule(t)
    assert alpha.shape == sigma.shape == (2, 2)
    assert torch.equal(alpha.flatten()[:3], table[[0, 500, 999]].sqrt())
    assert torch.equal(sigma.flatten()[:3], (1 - table[[0, 500, 999]]).sqrt())
    assert (alpha[1, 1], sigma[1, 1]) == (1, 0)
    assert [level.shape for level in family.schedule(torch.tensor(7.0))] == [(), ()]


def test_training_timesteps_are_uniform_and_each_generators_own(family: sd.SD) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    t = family.training_timesteps(generators)
    assert t.shape == (400,)
    assert t.dtype == torch.int64
    assert 0 <= t.min() < 20
    assert 979 < t.max() <= 999
    assert abs(t.float().mean() - 499.5) < 4 * 289 / 20
    alone = torch.randint(1000, (1,), generator=torch.Generator().manual_seed(7))
    assert t[7] == alone == family.training_timesteps([torch.Generator().manual_seed(7)])


def test_zero_snr_reaches_pure_noise(tmp_path: Path) -> None:
    family = families.load(tiny.pipeline_folder(tmp_path, "v_prediction", zero_snr=True))
    alpha, sigma = family.schedule(torch.tensor([999, 998]))
    assert (alpha[0], sigma[0]) == (0, 1)
    assert 0 < alpha[1] < 0.01
    assert family.timesteps(4, "ddim", Resolution(64, 64)).tolist() == [999, 749, 499, 249, 0]
    x, t = latents(), torch.tensor([999, 999])
    with torch.no_grad():
        x0, eps, output = family.predict(x, t, family.encode(PROMPTS), 2.0)
    assert torch.equal(x0, -output)
    assert torch.equal(eps, x)
    with pytest.raises(ValueError, match="pndm cannot start at zero terminal SNR"):
        family.timesteps(4, "pndm", Resolution(64, 64))
