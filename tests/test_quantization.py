"""A base in 4 or 8 bits under a LoRA, with the real libraries where they are installed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import tiny
from finetune import refl
from preftune import families
from preftune.cli import parse
from preftune.families import quantization
from preftune.families.base import Cond, Family
from preftune.families.quantization import Kind
from preftune.lora.tuning import LoRA

pytestmark = [
    pytest.mark.usefixtures("cpu"),
    pytest.mark.filterwarnings("ignore"),  # the libraries say much about what a CPU lacks
]

KINDS: list[Kind] = ["4bit", "8bit", "fp8"]
PROMPTS = ["a red circle", "two blue stars"]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    pytest.importorskip(quantization.LIBRARIES[found], reason="an optional library")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"sd": tiny.pipeline_folder(place / "sd"), "sdxl": tiny.pipeline_xl_folder(place / "sdxl")}


def output(family: Family, cond: Cond) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return family.predict(x, torch.tensor([100, 600]), cond).output


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_it_is_nearly_the_model_and_its_lora_learns(kind: Kind, name: str, folders: dict[str, Path]) -> None:
    family = families.load(folders[name], "cpu", torch.float32).to("cpu", torch.bfloat16)
    with torch.no_grad():
        cond = family.encode(PROMPTS)
        plain = output(family, cond)
    assert not quantization.is_quantized(family.denoiser)
    layers = family.lora_layers()
    family.quantize(kind, "cpu")
    assert quantization.is_quantized(family.denoiser)
    assert family.lora_layers() == layers, "a file of a LoRA fits as before"
    unet = family.trainable(LoRA(rank=2), seed=0)
    family.to("cpu", torch.bfloat16)
    with torch.no_grad():
        error = float((output(family, cond) - plain).abs().max() / plain.abs().max())
    assert 0 < error < {"4bit": 0.15, "8bit": 0.05, "fp8": 0.08}[kind]
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in weights} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        output(family, cond).square().mean().backward()
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in weights)
    with family.reference(), torch.no_grad():
        assert output(family, cond).isfinite().all()


def test_weights_take_fewer_bytes(kind: Kind, folders: dict[str, Path]) -> None:
    family = families.load(folders["sd"], "cpu", torch.bfloat16)
    layer = family.denoiser.get_submodule(LAYER)
    assert isinstance(layer, nn.Linear)
    before = layer.weight.numel() * 2
    conv = family.denoiser.get_submodule("conv_in").weight
    family.quantize(kind, "cpu")
    weight = family.denoiser.get_submodule(LAYER).weight
    data = getattr(weight, "qdata", weight)  # torchao's
    assert data.numel() * data.element_size() == before // (4 if kind == "4bit" else 2)
    assert family.denoiser.get_submodule("conv_in").weight is conv


@pytest.fixture
def train(root: Path, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    def run(*more: str) -> list[dict[str, float]]:
        words = (
            f"--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --resolution 32 --num-inference-steps 4"
            " --window 1 2 --train-batch-size 2 --gradient-accumulation-steps 1 --learning-rate 1e-2 --num-validation-prompts 2"
            f" --sample.num-inference-steps 2 --output-dir {tmp_path / 'run'}"
        )
        assert refl.main(parse(refl.Config, [*words.split(), *more])) == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]

    return run


def test_a_run_goes_on_and_its_lora_fits_the_model(
    kind: Kind, train: Callable[..., list[dict[str, float]]], root: Path, tmp_path: Path
) -> None:
    flags = ("--quantization", kind, "--mixed-precision", "bf16", "--lora.rank", "2")
    whole = train(
        *flags, "--max-train-steps", "3", "--checkpointing-steps", "2", "--checkpoints-total-limit", "0"
    )
    source = tmp_path / "run" / "step_000002"
    resumed = train(*flags, "--max-train-steps", "3", "--resume-from-checkpoint", str(source), "--output-dir", str(tmp_path / "run"), "--overwrite-output-dir")  # fmt: skip
    assert whole[2] | {"validation_proxy": 0} == resumed[-1] | {"validation_proxy": 0}
    pipe = StableDiffusionPipeline.from_pretrained(root / "pipeline", safety_checker=None)
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    assert pipe.get_active_adapters()


def test_what_cannot_be_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        f"--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --output-dir {tmp_path}"
    )
    for more, message in (
        (
            "--quantization 8bit --train full",
            "--quantization 8bit freezes the weights that --train full trains; use --train lora",
        ),
        (
            "--quantization fp8",
            "--quantization fp8 needs torchao_absent: pip install torchao_absent, or leave the flag out",
        ),
    ):
        monkeypatch.setattr(
            "preftune.families.quantization.LIBRARIES", {"fp8": "torchao_absent", "8bit": "math"}
        )
        with pytest.raises(SystemExit) as stop:
            refl.main(parse(refl.Config, [*words.split(), *more.split()]))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
