"""A model in one file: its kind is told from the weights, offline, and its latents are those of diffusers' pipeline."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import single_files
import tiny
from preftune import families
from preftune.families import locate, parts, single_file, vp
from preftune.families.digest import digest

KINDS = ("sd1", "sd2", "sd2-base", "sdxl")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a single file asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folder of tiny configurations, and diffusers' pipeline with random weights, by kind."""
    made = {}
    for kind in KINDS:
        folder = single_files.configurations(kind, tmp_path_factory.mktemp("published") / kind)
        made[kind] = folder, single_files.pipeline(folder)
    return made


@pytest.fixture
def published(models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published configurations with small widths."""
    for kind, (folder, _) in models.items():
        (tmp_path / "published").mkdir(exist_ok=True)
        (tmp_path / "published" / kind).symlink_to(folder)
    monkeypatch.setattr(single_file, "PUBLISHED", tmp_path / "published")
    return tmp_path / "published"


def write(pipe: Any, file: Path, kind: str, **metadata: str) -> Path:
    if kind.startswith("sd2"):
        metadata = {"modelspec.prediction_type": "v" if kind == "sd2" else "epsilon", **metadata}
    save_file(single_files.single_file(pipe), file, metadata)
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_pipeline(
    models: dict[str, Any], published: Path, tmp_path: Path, kind: str, suffix: str
) -> None:
    _, pipe = models[kind]
    if kind == "sd2":
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)  # it was published with DDIM
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": single_files.single_file(pipe), "global_step": 3}, file)
        parameterization = "v" if kind == "sd2" else "eps"
        file.with_suffix(".yaml").write_text(f"model: {{params: {{parameterization: {parameterization}}}}}")
    else:
        write(pipe, file, kind)
    start = time.perf_counter()
    defaults = families.check(str(file))
    assert time.perf_counter() - start < 1
    assert defaults.resolution == ((96, 96) if kind == "sd2" else (64, 64))
    assert families.names_a_model(str(file))
    family = families.load(str(file))
    for part in ("unet", "vae"):
        mine, other = getattr(family, part).state_dict(), getattr(pipe, part).state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)
    x = single_files.start(family)
    mine = single_files.latents(family, defaults.solver, 3, 5.0, x)
    assert (mine - single_files.latents_of_pipeline(pipe, 3, 5.0, x)).abs().max() < 5e-5
    assert mine.std() > 0.3


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def without(prefix: str) -> Change:
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(prefix)]


def put(name: str, *shape: int) -> Change:
    return lambda state: state.update({name: torch.zeros(shape)})


def only(prefix: str) -> Change:
    return lambda state: [state.pop(name) for name in list(state) if not name.startswith(prefix)]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "sd1",
            put("lora_unet_mid_block.lora_down.weight", 4, 4),
            r"is a LoRA, not a model: .* --columns tuned=",
        ),
        ("sd1", only("first_stage_model."), "lacks the UNet, the text encoder; name a checkpoint"),
        ("sd1", without("cond_stage_model."), "lacks the text encoder; name a checkpoint"),
        ("sd1", without(""), "it has no weights; name a checkpoint"),
        ("sd1", lambda state: [without("")(state), put("a.b", 1)(state)], r"it has 1 weights, such as a\.b"),
        (
            "sd1",
            put(FIRST, 16, 9, 3, 3),
            "is an inpainting model; known are Stable Diffusion 1.x, 2.x and XL",
        ),
        ("sdxl", put(FIRST, 16, 9, 3, 3), "is an inpainting model"),
        ("sd1", put(FIRST, 16, 8, 3, 3), "is InstructPix2Pix|8 input channels"),
        (
            "sd1",
            put(FIRST, 24, 4, 3, 3),
            "width of 24, 4 input channels and text of width 32; expected 16, 4 and 32, as in sd1",
        ),
        ("sdxl", put("edm_mean", 4), r"is Playground v2\.5, whose noise \(EDM\)"),
        (
            "sdxl",
            lambda state: [
                without("conditioner.embedders.1")(state),
                put("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", 4)(state),
            ],
            "is an SDXL refiner",
        ),
    ],
)
def test_one_sentence_for_another_file(
    models: dict[str, Any], published: Path, tmp_path: Path, kind: str, change: Change, words: str
) -> None:
    state = single_files.single_file(models[kind][1])
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        families.check(str(tmp_path / "model.safetensors"))
    assert len(str(error.value).splitlines()) == 1


class Run:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code was executed')",)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
    for name, content, words in (
        ("a.safetensors", pointer.encode(), "is a Git LFS pointer, not the weights; run `git lfs pull`"),
        ("b.ckpt", pointer.encode(), "is a Git LFS pointer"),
        ("c.safetensors", b"\x00" * 40, "is no readable safetensors file .*; download it again"),
        (
            "d.ckpt",
            b"PK\x03\x04" + b"\x00" * 2000,
            "is no readable checkpoint .*; download it again|holds more than tensors",
        ),
        ("e.txt", b"hello", r"is no model; expected a \.safetensors or \.ckpt file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            locate(str(tmp_path / name))
        assert len(str(error.value).splitlines()) == 1
    torch.save({"state_dict": {"a": Run()}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"holds more than tensors.*; use a .safetensors file"):
        locate(str(tmp_path / "evil.ckpt"))
    for flags in ({"revision": "v1"}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match=r"leave it out$"):
            locate(str(tmp_path / "evil.ckpt"), **flags)


def test_stable_diffusion_2_says_what_it_predicts(
    models: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    """Its weights do not tell; diffusers takes v for all of them, and samples noise from a 2-1-base."""
    file = tmp_path / "model.safetensors"
    save_file(single_files.single_file(models["sd2"][1]), file)
    with pytest.raises(
        ValueError,
        match=r"do not say whether they predict noise or v; put the model's \.yaml beside it as model\.yaml",
    ):
        locate(str(file))
    digests = set()
    for text, kind, predicted in (("eps", "sd2-base", "epsilon"), ("v", "sd2", "v_prediction")):
        locate.cache_clear()
        file.with_suffix(".yaml").write_text(f'model:\n  params:\n    parameterization: "{text}"\n')
        source = locate(str(file))
        assert source.folder.name == kind
        assert families.check(source).prediction_type == predicted
        digests.add(digest(source))
    assert len(digests) == 2, "a run does not go on with the other one"
    locate.cache_clear()
    file.with_suffix(".yaml").write_text("model: 3")
    with pytest.raises(ValueError, match="is no configuration of a checkpoint"):
        locate(str(file))


def test_sdxl_with_v_prediction_and_zero_snr(models: dict[str, Any], published: Path, tmp_path: Path) -> None:
    """Trainers write two empty weights for what SDXL's configuration does not say."""
    state = single_files.single_file(models["sdxl"][1])
    save_file(state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "model.safetensors")
    defaults = families.check(str(tmp_path / "model.safetensors"))
    assert (defaults.prediction_type, defaults.zero_snr) == ("v_prediction", True)
    family = families.load(str(tmp_path / "model.safetensors"))
    assert family.defaults == defaults
    assert family.schedule(torch.tensor(999))[0] == 0


def test_precision_and_another_autoencoder(models: dict[str, Any], published: Path, tmp_path: Path) -> None:
    file = write(models["sdxl"][1], tmp_path / "model.safetensors", "sdxl")
    half: Any = families.load(str(file), dtype=torch.float16)
    assert half.unet.dtype == half.text_encoders[1].dtype == torch.float16
    assert half.vae.dtype == torch.float32  # force_upcast
    vae = tiny.vae(5)
    vae.save_pretrained(tmp_path / "vae")
    other: Any = families.load(str(file), vae=tmp_path / "vae")
    assert torch.equal(other.vae.quant_conv.weight, vae.quant_conv.weight)


def test_missing_weights_are_named(models: dict[str, Any], published: Path, tmp_path: Path) -> None:
    for prefix in (
        "model.diffusion_model.out.2.",
        "first_stage_model.decoder.conv_out.",
        "cond_stage_model.transformer.text_model.final_layer_norm.",
    ):
        state = single_files.single_file(models["sd1"][1])
        without(prefix)(state)
        file = tmp_path / f"{prefix}safetensors"
        save_file(state, file)
        with pytest.raises(ValueError, match=r"safetensors (lacks|does not fit)") as error:
            families.load(str(file))
        assert len(str(error.value).splitlines()) == 1


WEIGHTS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd2-base": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""Numbers of weights of the checkpoints."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_configurations(kind: str) -> None:
    """They make models with as many weights as the checkpoints have, and pass the check of a pipeline folder."""
    source = families.Source(name=kind, folder=single_file.PUBLISHED / kind, file=Path("model.safetensors"))
    defaults = families.known.check(source)
    side = {"sd1": 512, "sd2": 768, "sd2-base": 512, "sdxl": 1024}[kind]
    assert defaults.resolution == (side, side)
    assert defaults.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    alpha = vp.read(source.scheduler_config(), kind).alphas_cumprod[999].sqrt()
    assert alpha == pytest.approx(0.068265, abs=1e-5)  # of all Stable Diffusion models
    for part, number in WEIGHTS[kind].items():
        config = json.loads((source.folder / part / "config.json").read_text())
        with init_empty_weights():
            if part.startswith("text"):
                text = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
                model = text(CLIPTextConfig(**config))
            else:
                model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        assert sum(weight.numel() for weight in model.parameters()) == number


def test_the_tokenizer_of_single_files() -> None:
    """CLIP's ids; Stable Diffusion 2 and SDXL's second encoder pad with "!", which is 0."""
    for kind, part, padding in (
        ("sd1", "tokenizer", 49407),
        ("sd2", "tokenizer", 0),
        ("sdxl", "tokenizer_2", 0),
    ):
        source = families.Source(name=kind, folder=single_file.PUBLISHED / kind, file=Path("x"))
        tokenizer = parts._tokenizer(source, part)
        ids = tokenizer("a photo of a cat", padding="max_length", truncation=True, max_length=77).input_ids
        assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert ids[7:] == [padding] * 70
