"""Pipeline folders as they are published, with small widths: the latents are those of diffusers' pipeline, or one sentence says why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import single_files
from preftune import families
from preftune.solver_names import SolverName

SOLVERS: dict[str, SolverName] = {
    "PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler",
}  # fmt: skip
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
TURBO = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "prediction_type": "epsilon",
    "interpolation_type": "linear", "num_train_timesteps": 1000, "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing", "use_karras_sigmas": False, "trained_betas": None,
}  # fmt: skip
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0,
    "sigma_min": 0.002, "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "thresholding": False,
}  # fmt: skip
Folder = Callable[..., Path]


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Write a folder of published configurations with random weights; `save` are arguments of save_pretrained."""

    def write(kind: str, scheduler: dict[str, Any] | None = None, **save: Any) -> Path:
        root = tmp_path_factory.mktemp("layout")
        narrow = single_files.NARROW if kind.startswith("sd2") else None
        configs = single_files.configurations(kind, root / "configs", narrow)
        if scheduler is not None:
            (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
            name = scheduler["_class_name"]
            if not name.startswith("EDM"):
                edit(configs / "model_index.json", scheduler=["diffusers", name])
        if name_of(configs).startswith("EDM"):
            shutil.copy(
                single_files.PUBLISHED / kind / "scheduler" / "scheduler_config.json", configs / "scheduler"
            )
        pipe = single_files.pipeline(configs)
        pipe.save_pretrained(root / "model", **save)
        if scheduler is not None:
            (root / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        return root / "model"

    return write


def name_of(folder: Path) -> str:
    """The class of the folder's scheduler."""
    return str(json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"])


def with_checker(folder: Path) -> Path:
    """The safety checker, which is not read: 1.2 GB that are no weights of the model."""
    edit(folder / "model_index.json", **CHECKER, requires_safety_checker=True)
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not read")
    return folder


def check_equal(folder: Path, steps: int, scale: float, **options: Any) -> None:
    pipe = DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, safety_checker=None, feature_extractor=None, **options
    )
    pipe.set_progress_bar_config(disable=True)
    if "Ancestral" in name_of(folder):  # our Euler adds no noise
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    family = families.load(families.locate(str(folder), variant=options.get("variant")))
    x = single_files.start(family)
    begin = x
    if "Euler" in name_of(folder) and pipe.scheduler.config.timestep_spacing == "trailing":
        # here diffusers begins with sigma times the noise, 0.9977, where it begins with the noise itself at leading spacing
        begin = x * family.schedule(torch.tensor(999))[1]
    mine = single_files.latents(family, SOLVERS[name_of(folder)], steps, scale, begin)
    theirs = single_files.latents_of_pipeline(pipe, steps, scale, x)
    assert (mine - theirs).abs().max() < 1e-5 * max(5, theirs.abs().max().item())
    assert mine.std() > 0.3


def test_stable_diffusion_1_4(build: Folder) -> None:
    """.bin files and a safety checker."""
    folder = with_checker(build("sd1", safe_serialization=False))
    text = folder / "text_encoder" / "model.safetensors"  # transformers has no other format any more
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    assert not [path for path in folder.rglob("*.safetensors") if path.parent.name != "safety_checker"]
    check_equal(folder, 3, 7.5)


def test_stable_diffusion_1_5(build: Folder) -> None:
    """Plain weights beside the variants fp16 and non_ema: the plain ones, or those of --variant."""
    folder = with_checker(build("sd1"))
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        plain = load_file(folder / part / f"{stem}.safetensors")
        other = {name: value.half().float() + 0.01 for name, value in plain.items()}
        save_file(other, folder / part / f"{stem}.fp16.safetensors")
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors",
    )
    check_equal(folder, 3, 7.5)
    check_equal(folder, 3, 7.5, variant="fp16")
    plain, half = (families.load(families.locate(str(folder), variant=variant)) for variant in (None, "fp16"))
    assert not torch.equal(plain.denoiser.conv_in.weight, half.denoiser.conv_in.weight)
    with pytest.raises(
        ValueError, match=r"--variant bf16 is not there: .*model has the variants fp16, non_ema$"
    ):
        families.check(families.locate(str(folder), variant="bf16"))


def test_variant_alone(build: Folder) -> None:
    """hf download --include '*.fp16*': taken by itself, without --variant."""
    folder = build("sd1", variant="fp16")
    assert len(list(folder.rglob("*.fp16.safetensors"))) == 3
    assert families.check(folder).num_inference_steps == 50
    check_equal(folder, 3, 7.5, variant="fp16")
    plain = families.load(folder)
    named = families.load(families.locate(str(folder), variant="fp16"))
    assert torch.equal(plain.denoiser.conv_in.weight, named.denoiser.conv_in.weight)


@pytest.mark.parametrize("save", [{}, {"variant": "fp16"}, {"safe_serialization": False}], ids=str)
def test_shards(build: Folder, save: dict[str, Any]) -> None:
    folder = build("sdxl", max_shard_size="200KB", **save)
    assert len(list((folder / "unet").glob("*-of-*"))) > 1
    assert len(list((folder / "text_encoder_2").glob("*-of-*"))) > 1
    family: Any = families.load(folder)
    reference = single_files.pipeline(folder.parent / "configs")
    assert torch.equal(family.unet.conv_out.weight, reference.unet.conv_out.weight)
    second = family.text_encoders[1].text_projection.weight
    assert torch.equal(second, reference.text_encoder_2.text_projection.weight)
    shard = next((folder / "unet").glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"unet: it lacks {shard.name}, which .*index.*json names"):
        families.check(folder)


class Run:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code was executed')",)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights(build: Folder, tmp_path: Path, part: str) -> None:
    """Truncated, not all there, or with code in them: one sentence, and nothing runs."""
    original = build("sd1")
    for damage in ("truncated", "missing", "pickle"):
        folder = shutil.copytree(original, tmp_path / damage)
        (file,) = (folder / part).glob("*.safetensors")
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        elif damage == "missing":
            weights = load_file(file)
            del weights[min(weights)]
            save_file(weights, file, {"format": "pt"})
        else:
            file.unlink()
            torch.save(
                {"a": Run()},
                file.with_name(
                    "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
                ),
            )
        words = (
            rf"{part} lacks 1 weights, such as"
            if damage == "missing"
            else rf"weights in .*{part} cannot be read \("
        )
        with pytest.raises(ValueError, match=words) as error:
            families.load(folder)
        assert len(str(error.value).splitlines()) == 1


def test_stable_diffusion_2_1(build: Folder) -> None:
    folder = build("sd2")
    edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    edit(folder / "unet" / "config.json", upcast_attention=True, dual_cross_attention=False)
    assert families.check(folder).prediction_type == "v_prediction"
    check_equal(folder, 3, 7.5)
    check_equal(build("sd2-base"), 3, 7.5)


@pytest.mark.parametrize(
    ("kind", "name"), [("sd2-base", "EulerDiscreteScheduler"), ("sdxl", "EulerAncestralDiscreteScheduler")]
)
def test_turbo(build: Folder, kind: str, name: str) -> None:
    """SD-Turbo and SDXL-Turbo: a few steps from the last timestep, without guidance."""
    folder = build(kind, {**TURBO, "_class_name": name})
    defaults = families.check(folder)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.solver) == (4, 1.0, "euler")
    for steps in (1, 2, 4):
        check_equal(folder, steps, 0.0)
    family = families.load(folder)
    assert family.timesteps(4, "euler", defaults.resolution).tolist() == [999, 749, 499, 249, -1]
    family.save_pipeline(folder.parent / "saved")
    assert families.check(folder.parent / "saved") == defaults


def test_trailing_spacing_of_a_model_that_is_not_distilled(build: Folder) -> None:
    """4 steps, for diffusers' DDIM lands beside its own next timestep where the steps do not divide 1000."""
    folder = build("sd1", {**TURBO, "_class_name": "DDIMScheduler"})
    defaults = families.check(folder)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.solver) == (50, 7.5, "pndm")
    check_equal(folder, 4, 7.5)
    families.load(folder).save_pipeline(folder.parent / "saved")
    assert families.check(folder.parent / "saved") == defaults
    check_equal(folder.parent / "saved", 4, 7.5)
    for name in ("PNDMScheduler", "EulerDiscreteScheduler"):
        edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
        edit(folder / "model_index.json", scheduler=["diffusers", name])
        check_equal(folder, 4, 7.5)


def test_stable_diffusion_xl(build: Folder) -> None:
    """With what else lies in its repository: other autoencoders, other formats."""
    folder = build("sdxl")
    for part in ("vae_1_0", "vae_decoder", "vae_encoder"):
        (folder / part).mkdir()
    (folder / "unet" / "model.onnx").write_bytes(b"")
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"")
    check_equal(folder, 3, 5.0)


def test_refused_by_name(build: Folder) -> None:
    sd, sdxl = build("sd1"), build("sdxl", EDM)
    with pytest.raises(
        ValueError, match=r"EDMDPMSolverMultistepScheduler \(the noise of EDM, as in Playground v2\.5\)"
    ):
        families.check(sdxl)
    for folder, name, values in (
        (sd, "StableDiffusionInpaintPipeline", {"in_channels": 9}),
        (sdxl, "StableDiffusionXLImg2ImgPipeline", {}),  # the refiner
        (sdxl, "StableDiffusionXLInpaintPipeline", {"in_channels": 9}),
        (sd, "LatentConsistencyModelPipeline", {"time_cond_proj_dim": 256}),
        (sd, "StableDiffusionDepth2ImgPipeline", {"in_channels": 5}),
    ):
        edit(folder / "model_index.json", _class_name=name)
        edit(folder / "unet" / "config.json", **{"in_channels": 4, "time_cond_proj_dim": None, **values})
        with pytest.raises(
            ValueError, match=f"is a {name}; known are StableDiffusionPipeline, StableDiffusionXL"
        ):
            families.check(folder)
