"""What families.check says of a folder: a whole pipeline of a known family, or one sentence for what it is instead."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from preftune import families
from preftune.families import vp
from preftune.resolution import Resolution

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {"sd": tiny.pipeline_folder(folder / "sd"), "sdxl": tiny.pipeline_xl_folder(folder / "sdxl")}


def edit(file: str, **changes: object) -> Change:
    """A change of some values of a JSON file; None takes the value away."""

    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        config = {key: value for key, value in (config | changes).items() if value is not None}
        (folder / file).write_text(json.dumps(config))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def unet(**changes: object) -> Change:
    return edit("unet/config.json", **changes)


def scheduler(**changes: object) -> Change:
    return edit("scheduler/scheduler_config.json", **changes)


def index(**changes: object) -> Change:
    return edit("model_index.json", **changes)


def rename(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
ANOTHER_VAE = both(
    index(vae=["diffusers", "AutoencoderDC"]), edit("vae/config.json", _class_name="AutoencoderDC")
)
REFUSED: list[tuple[str, str, Change, str]] = [
    ("sd", "another pipeline", index(_class_name="FluxPipeline"), "is a FluxPipeline; known are StableDiffusionPipeline, StableDiffusionXLPipeline"),
    ("sd", "image to image", index(_class_name="StableDiffusionImg2ImgPipeline"), "is a StableDiffusionImg2ImgPipeline; known are"),
    ("sd", "AltDiffusion", index(_class_name="AltDiffusionPipeline"), "is a AltDiffusionPipeline; known are"),
    ("sd", "no class", index(_class_name=None), "is a None; known are"),
    ("sd", "a list for a class", index(_class_name=["x"]), r"is a \['x'\]; known are"),
    ("sd", "inpainting", unet(in_channels=9), r"unet has 9 input \(an inpainting model\) and 4 output channels; expected 4 and 4"),
    ("sd", "InstructPix2Pix", unet(in_channels=8), r"8 input \(such as InstructPix2Pix\) and 4 output"),
    ("sd", "learned variance", unet(out_channels=8), "4 input and 8 output channels"),
    ("sd", "LCM", unet(time_cond_proj_dim=256), r"time_cond_proj_dim 256 \(a latent consistency model, .*expected none"),
    ("sd", "SDXL's UNet", unet(addition_embed_type="text_time"), "addition_embed_type text_time; expected none"),
    ("sd", "class embedding", unet(class_embed_type="timestep"), "class_embed_type timestep; expected none"),
    ("sd", "classes", unet(num_class_embeds=1000), "num_class_embeds 1000; expected none"),
    ("sd", "image embedding", unet(encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type image_proj; expected none"),
    ("sd", "width of the UNet", unet(cross_attention_dim=64), r"cross_attention_dim 64, but its text is 32 wide \(hidden_size\)"),
    ("sd", "width of the text", edit("text_encoder/config.json", hidden_size=48), "cross_attention_dim 32, but its text is 48 wide"),
    ("sd", "no width", edit("text_encoder/config.json", hidden_size=None), "no hidden_size"),
    ("sd", "another UNet", unet(_class_name="UNet3DConditionModel"), "unet is UNet3DConditionModel, not UNet2DConditionModel"),
    ("sd", "another autoencoder", ANOTHER_VAE, "its vae is AutoencoderDC; expected AutoencoderKL or AutoencoderTiny"),
    ("sd", "another in its folder alone", edit("vae/config.json", _class_name="AutoencoderDC"), "vae is AutoencoderDC, not AutoencoderKL or AutoencoderTiny"),
    ("sd", "TAESD without widths", edit("vae/config.json", _class_name="AutoencoderTiny"), "lacks the list decoder_block_out_channels"),
    ("sd", "latent channels", edit("vae/config.json", latent_channels=16), "expected 16 and 16, the latent channels of its vae"),
    ("sd", "foreign text encoder", index(text_encoder=["transformers", "T5EncoderModel"]), "its text_encoder is T5EncoderModel; expected CLIPTextModel"),
    ("sd", "XLM-R in the folder", edit("text_encoder/config.json", model_type="xlm-roberta"), "text_encoder is xlm-roberta, not CLIPTextModel"),
    ("sd", "foreign tokenizer", index(tokenizer=["transformers", "T5Tokenizer"]), "its tokenizer is T5Tokenizer; expected CLIPTokenizer or"),
    ("sd", "two encoders", index(text_encoder_2=["transformers", "CLIPTextModel"]), "has a text_encoder_2; expected one text encoder"),
    ("sd", "no vae named", index(vae=None), "has no vae; a StableDiffusionPipeline needs AutoencoderKL"),
    ("sd", "no scheduler named", index(scheduler=None), "has no scheduler; a StableDiffusionPipeline needs one"),
    ("sd", "no vae there", rename("vae", "vae-ema"), "lacks the folder vae"),
    ("sd", "no config", rename("vae/config.json", "x"), "config.json is not there; name a folder that save_pretrained"),
    ("sd", "no scheduler config", rename("scheduler/scheduler_config.json", "x"), "scheduler_config.json is not there"),
    ("sd", "no weights", rename(f"vae/{WEIGHTS}", "vae/x"), f"vae has no weights: neither {WEIGHTS} nor diffusion_pytorch_model.bin is there$"),
    ("sd", "two variants alone", both(rename(f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors"), lambda folder: shutil.copy(folder / "unet/diffusion_pytorch_model.fp16.safetensors", folder / "unet/diffusion_pytorch_model.non_ema.bin")), "unet: there are no weights without a variant, only fp16, non_ema; choose one with --variant"),
    ("sd", "no text weights", rename("text_encoder/model.safetensors", "x"), "neither model.safetensors nor pytorch_model.bin"),
    ("sd", "no merges", both(rename("tokenizer/tokenizer.json", "x"), lambda folder: (folder / "tokenizer/merges.txt").unlink(missing_ok=True)), "tokenizer has no tokenizer.json and lacks .*merges.txt"),
    ("sd", "flow", scheduler(_class_name="FlowMatchEulerDiscreteScheduler", beta_start=None, beta_end=None), r"\(FlowMatchEulerDiscreteScheduler\) has beta_start None and beta_end None; expected"),
    ("sd", "flow prediction", scheduler(prediction_type="flow_prediction"), "prediction_type 'flow_prediction'; expected epsilon, v_prediction, sample$"),
    ("sd", "zero SNR of epsilon", scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr with prediction_type epsilon.* expected v_prediction"),
    ("sd", "schedule", scheduler(beta_schedule="exp"), "beta_schedule 'exp'; expected linear, scaled_linear"),
    ("sd", "betas", scheduler(beta_end=1.5), "beta_end 1.5; expected 0 < beta_start"),
    ("sd", "betas in words", scheduler(beta_start="0.1"), "beta_start 0.1 and beta_end"),
    ("sd", "trained betas", scheduler(trained_betas=[0.1, 0.2]), "trained_betas is not a list of 1000 numbers"),
    ("sd", "number of timesteps", scheduler(num_train_timesteps="many"), "num_train_timesteps 'many'; expected a whole number"),
    ("sdxl", "refiner", index(text_encoder=[None, None], tokenizer=[None, None]), r"has text_encoder_2 alone \(an SDXL refiner\); expected two"),
    ("sdxl", "refiner's UNet", unet(projection_class_embeddings_input_dim=5 * 8 + 24), r"input_dim 64 .*expected 6 x 8 \+ 24, the pooled text"),
    ("sdxl", "SD's UNet", unet(addition_embed_type=None), "addition_embed_type None; expected text_time"),
    ("sdxl", "inpainting", unet(in_channels=9), "an inpainting model"),
    ("sdxl", "one encoder's width", unet(cross_attention_dim=48), "cross_attention_dim 48, but its text is 80 wide"),
    ("sdxl", "no projection", index(text_encoder_2=["transformers", "CLIPTextModel"]), "its text_encoder_2 is CLIPTextModel; expected CLIPTextModelWithProjection"),
    ("sdxl", "one encoder", index(text_encoder_2=None), "has no text_encoder_2; a StableDiffusionXLPipeline needs"),
    ("sdxl", "no second tokenizer", rename("tokenizer_2", "x"), "lacks the folder tokenizer_2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "words"), [(k, c, w) for k, _, c, w in REFUSED], ids=[f"{k} {n}" for k, n, _, _ in REFUSED])  # fmt: skip
def test_one_sentence_for_another_model(
    originals: dict[str, Path], tmp_path: Path, kind: str, change: Change, words: str
) -> None:
    folder = shutil.copytree(originals[kind], tmp_path / "pipeline")
    families.check(folder)
    change(folder)
    with pytest.raises(ValueError, match=words) as error:
        families.check(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):
        families.load(folder)


def test_no_pipeline_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index.json; save one with pipe.save_pretrained"):
        families.check(tmp_path)
    with pytest.raises(ValueError, match=r"absent does not exist; name a pipeline folder, a \.safetensors"):
        families.load(tmp_path / "absent")
    for content in (b"{oops", b"\xff\xfe\x00"):
        (tmp_path / "model_index.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"model_index\.json (line 1 )?is not (JSON|UTF-8)"):
            families.check(tmp_path)
    for content in (b"[]", b"3", b"null"):
        (tmp_path / "model_index.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"model_index\.json holds no JSON object"):
            families.check(tmp_path)


def test_milliseconds(originals: dict[str, Path]) -> None:
    for folder in originals.values():
        families.check(folder)
        start = time.perf_counter()
        families.check(folder)
        assert time.perf_counter() - start < 0.25


def test_shards(originals: dict[str, Path], tmp_path: Path) -> None:
    """Large weights are saved in several files, which a list names."""
    folder = shutil.copytree(originals["sd"], tmp_path / "pipeline")
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "one.safetensors")
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(SHARDS))
    with pytest.raises(ValueError, match=r"unet: it lacks two.safetensors, which .*index.json names"):
        families.check(folder)
    (folder / "unet" / "two.safetensors").touch()
    families.check(folder)


@pytest.mark.parametrize(
    ("kind", "change", "resolution"),
    [
        ("sd", unet(sample_size=96), (768, 768)),
        ("sd", unet(sample_size=[64, 96]), (512, 768)),
        ("sd", unet(sample_size=None), (512, 512)),
        ("sdxl", unet(sample_size=128), (1024, 1024)),
        ("sdxl", unet(sample_size=None), (1024, 1024)),
    ],
)
def test_the_resolution_is_the_folders(
    originals: dict[str, Path], tmp_path: Path, kind: str, change: Change, resolution: tuple[int, int]
) -> None:
    folder = shutil.copytree(originals[kind], tmp_path / "pipeline")
    change(folder)
    assert families.check(folder).resolution == resolution


def test_the_other_defaults(originals: dict[str, Path], tmp_path: Path) -> None:
    sd, sdxl = families.check(originals["sd"]), families.check(originals["sdxl"])
    assert (sd.num_inference_steps, sd.guidance_scale, sd.solver) == (50, 7.5, "pndm")
    assert (sdxl.num_inference_steps, sdxl.guidance_scale, sdxl.solver) == (50, 5.0, "euler")
    for defaults in (sd, sdxl):
        assert defaults.resolution == Resolution(64, 64)
        assert defaults.lora_target_modules == ("to_q", "to_k", "to_v", "to_out.0")
        assert not defaults.distilled
    assert (sd.family, sdxl.family) == ("sd", "sdxl")
    zero = tiny.pipeline_folder(tmp_path / "zero", "v_prediction", zero_snr=True)
    assert families.check(zero).solver == "ddim"
    assert families.load(originals["sd"]).defaults == sd
    assert families.load(originals["sdxl"]).defaults == sdxl


@pytest.mark.parametrize(
    "change",
    [
        scheduler(_class_name="EulerDiscreteScheduler", timestep_spacing="linspace", steps_offset=7),
        scheduler(clip_sample=True, thresholding=True, set_alpha_to_one=True, skip_prk_steps=False),
        scheduler(beta_start=None, beta_end=None, trained_betas=[0.01] * 1000),
        index(tokenizer=["transformers", "CLIPTokenizerFast"], safety_checker=["x", "Y"]),
        index(text_encoder_2=[None, None]),
    ],
)
def test_what_is_not_read_is_no_reason_to_refuse(
    originals: dict[str, Path], tmp_path: Path, change: Change
) -> None:
    folder = shutil.copytree(originals["sd"], tmp_path / "pipeline")
    change(folder)
    assert families.check(folder) == families.check(originals["sd"])
    assert families.load(folder).timesteps(40, "ddpm", Resolution(64, 64)).tolist() == [
        *range(975, -1, -25),
        -1,
    ]


def test_only_betas_prediction_type_and_zero_snr_are_read(originals: dict[str, Path]) -> None:
    config: dict[str, Any] = json.loads((originals["sd"] / "scheduler/scheduler_config.json").read_text())
    plain = vp.read(config, "here")
    other = vp.read(config | {"timestep_spacing": "trailing", "steps_offset": 9, "clip_sample": True}, "here")
    assert plain.alphas_cumprod.equal(other.alphas_cumprod)
    assert plain.betas == other.betas
    assert plain.alphas_cumprod.shape == (1001,)
    trained = vp.read({"trained_betas": [0.5, 0.5], "num_train_timesteps": 2}, "here")
    assert trained.alphas_cumprod.tolist() == [0.5, 0.25, 1]
    zero = vp.read(config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "here")
    assert zero.alphas_cumprod[999] == 0
    assert zero.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-6)


def test_another_autoencoder(originals: dict[str, Path], tmp_path: Path) -> None:
    vae = shutil.copytree(originals["sdxl"] / "vae", tmp_path / "vae")
    for kind in ("sd", "sdxl"):
        families.check(originals[kind], vae)
    edit("config.json", latent_channels=16)(vae)
    for kind in ("sd", "sdxl"):
        with pytest.raises(ValueError, match="16 latent channels and a factor of 8; expected 4 and 8"):
            families.load(originals[kind], vae=vae)
    edit("config.json", latent_channels=4, block_out_channels=[8, 16, 32])(vae)
    with pytest.raises(ValueError, match="4 latent channels and a factor of 4; expected 4 and 8"):
        families.check(originals["sd"], vae)
    edit("config.json", _class_name="AutoencoderDC")(vae)
    with pytest.raises(ValueError, match="vae is AutoencoderDC, not AutoencoderKL or AutoencoderTiny"):
        families.check(originals["sd"], vae)
    with pytest.raises(
        ValueError, match=r"--vae .*absent does not exist; name the folder of an autoencoder or a hub id"
    ):
        families.check(originals["sd"], tmp_path / "absent")
