"""AutoencoderTiny (TAESD) as a pipeline's autoencoder, as --vae, and as the decoder of the reward's gradient."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

import tiny
from finetune import refl
from preftune import families
from preftune.cli import parse
from preftune.families import reward_decoder
from preftune.families.locate import locate
from preftune.resolution import Resolution
from preftune.sampling import Sampling, sample

pytestmark = pytest.mark.usefixtures("cpu")

PROMPTS = ["a red circle", "two cats"]


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; like the published one, its config.json has no block_out_channels."""
    folder = tmp_path_factory.mktemp("taesd")
    tiny.taesd().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["block_out_channels"]
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def with_taesd(request: pytest.FixtureRequest, taesd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder that holds it."""
    folder = tmp_path_factory.mktemp("pipeline")
    (tiny.pipeline_folder if request.param == "sd" else tiny.pipeline_xl_folder)(folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(taesd, folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    return folder


def images_of(pipe: Any, count: int) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    found: torch.Tensor = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=3.0, latents=torch.stack(noise), output_type="pt"
    ).images
    return found


def test_a_pipeline_with_it_gives_the_images_of_diffusers(with_taesd: Path, tmp_path: Path) -> None:
    theirs = images_of(DiffusionPipeline.from_pretrained(with_taesd, local_files_only=True), 2)
    family = families.load(with_taesd)
    settings = Sampling(num_inference_steps=3, guidance_scale=3.0)
    (ours,) = sample(family, PROMPTS, [0, 1], settings)
    assert tuple(ours.shape) == (2, 3, 64, 64)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert theirs.std() > 1e-3
    family.save_pipeline(tmp_path / "saved")
    (again,) = sample(families.load(tmp_path / "saved"), PROMPTS, [0, 1], settings)
    assert torch.equal(again, ours)


def test_latents_are_those_of_diffusers(with_taesd: Path) -> None:
    family = families.load(with_taesd)
    vae = AutoencoderTiny.from_pretrained(with_taesd / "vae", local_files_only=True)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    states = [generator.get_state() for generator in generators]
    with torch.no_grad():
        theirs = vae.encode(pixels * 2 - 1).latents * vae.config.scaling_factor
        torch.testing.assert_close(family.encode_pixels(pixels, generators), theirs)
        torch.testing.assert_close(family.decode(theirs), vae.decode(theirs).sample / 2 + 0.5)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))
    assert family.latent_shape(Resolution(64, 96)) == (4, 8, 12)


def test_in_place_of_the_pipelines_own(taesd: Path, tmp_path: Path) -> None:
    pipeline = tiny.pipeline_folder(tmp_path / "pipeline")
    family = families.load(pipeline, vae=taesd)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    direct = tiny.taesd().decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(family.decode(latents), direct)


def test_float16_keeps_it_small() -> None:
    from preftune.families.sdxl import vae_dtype

    assert vae_dtype({"_class_name": "AutoencoderTiny"}, torch.float16) == torch.float16
    assert vae_dtype({"_class_name": "AutoencoderKL"}, torch.float16) == torch.float32


# --reward-vae


@pytest.fixture
def train(root: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *more: object) -> Path:
        flags = (
            f"--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --resolution 32 --num-inference-steps 4"
            " --window 1 2 --max-train-steps 2 --train-batch-size 2 --gradient-accumulation-steps 1 --mixed-precision no"
            f" --num-validation-prompts 2 --sample.num-inference-steps 2 --output-dir {tmp_path / name}"
        )
        assert refl.main(parse(refl.Config, [*flags.split(), *map(str, more)])) == 0
        return tmp_path / name

    return run


def losses(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def test_the_reward_sees_its_pixels_and_validation_does_not(
    train: Callable[..., Path], root: Path, taesd: Path
) -> None:
    plain = train("plain")
    own = train("own", "--reward-vae", root / "pipeline" / "vae")
    assert losses(own) == losses(plain), "the model's own decoder changes nothing"
    small = train("small", "--reward-vae", taesd)
    assert losses(small)[0] != losses(plain)[0]
    before, other = (
        json.loads((run / "samples" / "step_000000" / "scores.json").read_text()) for run in (plain, small)
    )
    assert before["proxy"] == other["proxy"]


def test_it_decodes_as_diffusers_does_with_a_gradient(taesd: Path) -> None:
    decode = reward_decoder.load(taesd, "cpu", torch.float32, checkpointing=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    theirs = tiny.taesd()
    expected = theirs.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(decode(latents), expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        torch.autograd.grad((one * weights).sum(), latents)[0] for one in (decode(latents), expected)
    )
    torch.testing.assert_close(found, wanted)


def test_what_does_not_fit_is_refused(taesd: Path, root: Path, tmp_path: Path) -> None:
    source = locate(str(root / "pipeline"))
    with pytest.raises(
        ValueError,
        match=r"--reward-vae absent/x/y does not exist; name the folder of an autoencoder or a hub id, as madebyollin/taesd",
    ):
        reward_decoder.check(source, Path("absent/x/y"))
    other = shutil.copytree(taesd, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(
        ValueError,
        match=r"--reward-vae .*other: .* has 16 latent channels and a factor of 8; expected 4 and 8",
    ):
        reward_decoder.check(source, other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--reward-vae .*: .* has no weights"):
        reward_decoder.check(source, other)
