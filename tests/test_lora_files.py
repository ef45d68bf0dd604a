"""LoRA files of the world: each layout equals its own arithmetic, whole or refused by name; ours are right in the programs of others."""

import json
import math
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.utils.other import get_pattern_key
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import record_trajectories as recorded
import tiny
from eval import grid
from eval.models import parse_column
from preftune import cli, families
from preftune.families import Family
from preftune.lora import export_lora
from preftune.lora import files as lora_files
from preftune.lora import names as lora_names
from preftune.lora import write as lora_write
from preftune.lora.scales import Scales
from preftune.sampling import Sampling, sample
from rewards.weights import read as read_scorer

PROMPTS = ["a red circle", "two cats"]
BUILD = {"sd": tiny.pipeline_folder, "sdxl": tiny.pipeline_xl_folder}
INNER = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
KINDS = pytest.mark.parametrize("kind", BUILD)
LAYERS = (
    "to_q", "to_k", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "0.conv", "conv_in",
    "add_embedding.linear_1", "q_proj", "out_proj", "fc1", "text_projection",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {kind: build(tmp_path_factory.mktemp(kind)) for kind, build in BUILD.items()}


def parts_of(family: Any) -> dict[str, nn.Module]:
    names = ("text_encoder", "text_encoder_2")
    return {"unet": family.unet, **dict(zip(names, family.text_encoders, strict=False))}


def layers_of(family: Family) -> dict[tuple[str, str], Any]:
    """Part and path of some layers of each kind, text encoders included, and the layers themselves."""
    return {
        (part, name): layer
        for part, module in parts_of(family).items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(LAYERS)
    }


def output(family: Family) -> Tensor:
    """What the model predicts, with a negative prompt."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return family.predict(x, torch.tensor([800, 40]), family.encode(PROMPTS, "ugly"), 3.0).output


def random(*shape: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def original(unet: Any) -> dict[str, str]:
    """The names in the original release, from a walk through the blocks in their order."""
    places = {"conv_in": "input_blocks_0_0", "add_embedding.linear_1": "label_emb_0_0"}
    places |= {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
    places |= {"mid_block.resnets.1": "middle_block_2"}
    number = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks_{number}_0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks_{number}_1"
        if block.downsamplers:
            number += 1
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks_{number}_0_op"
    number = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks_{number}_0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks_{number}_1"
        last = 1 + hasattr(block, "attentions")
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks_{number}_{last}"
    found = {}
    for name, module in unet.named_modules():
        for path, place in places.items():
            if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.".startswith(f"{path}."):
                rest = name.removeprefix(path).removeprefix(".")
                found[name] = f"{place}_{INNER.get(rest, rest.replace('.', '_'))}".rstrip("_")
    return found


def text_name(layer: str) -> str:
    """A text encoder's layer in files."""
    return layer if layer == "text_projection" else f"text_model.{layer.removeprefix('text_model.')}"


def kohya_name(part: str, layer: str, family: Any) -> str:
    """A layer in sd-scripts' files."""
    xl = len(family.text_encoders) == 2
    if part != "unet":
        prefix = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
        return prefix + text_name(layer).replace(".", "_")
    return "lora_unet_" + (original(family.unet)[layer] if xl else layer.replace(".", "_"))


def kohya_file(family: Family, rank_step: int = 3) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """A LoCon with text encoders, with ranks and alphas of each layer, and what it adds to each weight by LyCORIS' formulas."""
    state, added = {}, {}
    for index, ((part, layer), module) in enumerate(layers_of(family).items()):
        shape, name = module.weight.shape, kohya_name(part, layer, family)
        rank, alpha = 2 + index % rank_step, 1.0 + index % 4
        up = random(shape[0], rank, *[1] * (len(shape) - 2), seed=2 * index)
        scale = alpha / rank
        if len(shape) == 4 and shape[2] == 3 and index % 2:
            down, mid = random(rank, shape[1], 1, 1, seed=1), random(rank, rank, 3, 3, seed=index)
            state[f"{name}.lora_mid.weight"] = mid
            change = torch.einsum("nmkl,in,mj->ijkl", mid, up.flatten(1), down.flatten(1))
        else:
            down = random(rank, *shape[1:], seed=2 * index + 1)
            change = (up.flatten(1) @ down.flatten(1)).reshape(shape)
        if layer.endswith("proj_in"):  # as convolutions, also where the layer is linear
            up, down = up.reshape(*up.shape[:2], 1, 1), down.reshape(*down.shape[:2], 1, 1)
        state |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(alpha),
        }
        added[part, layer] = scale * change
    return state, added


def changed(folder: Path, added: Mapping[tuple[str, str], Tensor], weight: float = 1.0) -> Family:
    """The model with its weights themselves changed."""
    family = families.load(folder)
    for (part, layer), change in added.items():
        parts_of(family)[part].get_submodule(layer).weight.data += weight * change
    return family


@KINDS
def test_kohya_with_text_encoders_alphas_per_layer_and_convolutions(
    kind: str, models: Mapping[str, Path], tmp_path: Path
) -> None:
    """As the whole model with these weights; on, off, half and on again, with nothing left of prompts encoded before."""
    family = families.load(models[kind])
    state, added = kohya_file(family)
    assert any("lora_mid" in name for name in state)
    assert {part for part, _ in added} == parts_of(family).keys()
    save_file(state, tmp_path / "my style.safetensors")
    base = output(family)
    generator = torch.get_rng_state()
    family.load_tuned(tmp_path / "my style.safetensors")
    assert torch.equal(torch.get_rng_state(), generator), "the caller's random numbers are not touched"
    whole = output(changed(models[kind], added))
    torch.testing.assert_close(output(family), whole, atol=1e-5, rtol=1e-5)
    assert (whole - base).abs().max() > 1e-2
    text = {key: change for key, change in added.items() if key[0] != "unet"}
    assert (output(changed(models[kind], text)) - base).abs().max() > 1e-3, "the text encoders' part is seen"
    with family.reference():
        assert torch.equal(output(family), base)
    torch.testing.assert_close(output(family), whole, atol=1e-5, rtol=1e-5)
    family.load_tuned(tmp_path, 0.5)
    torch.testing.assert_close(
        output(family), output(changed(models[kind], added, 0.5)), atol=1e-5, rtol=1e-5
    )
    unet_alone = {name: value for name, value in state.items() if name.startswith("lora_unet_")}
    save_file(unet_alone, tmp_path / "unet_alone.safetensors")
    family.load_tuned(tmp_path / "unet_alone.safetensors")
    only = {key: change for key, change in added.items() if key[0] == "unet"}
    torch.testing.assert_close(output(family), output(changed(models[kind], only)), atol=1e-5, rtol=1e-5)


def simple(family: Family, *ends: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """A and B of rank 2 for the layers with these endings."""
    chosen = {key: layer.weight.shape for key, layer in layers_of(family).items() if key[1].endswith(ends)}
    return {
        key: (random(2, *shape[1:], seed=i), random(shape[0], 2, *[1] * (len(shape) - 2), seed=99 + i))
        for i, (key, shape) in enumerate(chosen.items())
    }


def write_diffusers(
    folder: Path, pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]], first: str, second: str
) -> None:
    state = {}
    for (part, layer), (a, b) in pairs.items():
        name = f"{part}.{layer if part == 'unet' else text_name(layer)}"
        state |= {f"{name}.{first}.weight": a, f"{name}.{second}.weight": b}
    save_file(state, folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    "style",
    [
        "lora_A lora_B",
        "lora.down lora.up",
        "lora_linear_layer.down lora_linear_layer.up",
        "processor",
        "peft",
        "peft parts",
    ],
)
def test_layouts_of_diffusers_and_peft(style: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    family, scale = families.load(models["sd"]), 1.0
    pairs = simple(
        family, "to_q", "to_out.0", "q_proj", "out_proj", *(["conv1", "fc1"] if " " in style else [])
    )
    if style == "processor":
        state = {}
        for (part, layer), (a, b) in pairs.items():
            path, _, last = (layer if part == "unet" else text_name(layer)).removesuffix(".0").rpartition(".")
            last = {"q_proj": "to_q", "out_proj": "to_out"}.get(last, last)
            place = f"{part}.{path}{'.processor' * (part == 'unet')}.{last}_lora"
            state |= {f"{place}.down.weight": a, f"{place}.up.weight": b}
        torch.save(state, tmp_path / lora_files.OLD_FILE)
    elif style.startswith("peft"):
        scale = 6 / math.sqrt(2)
        folders = {"unet": tmp_path / "unet", "text_encoder": tmp_path / "text_encoder"}
        if style == "peft":
            folders = {"unet": tmp_path}
            pairs = {key: pair for key, pair in pairs.items() if key[0] == "unet"}
        for part, folder in folders.items():
            state = {
                f"base_model.model.{layer}.lora_{half}.weight": tensor
                for (owner, layer), pair in pairs.items()
                if owner == part
                for half, tensor in zip("AB", pair, strict=True)
            }
            folder.mkdir(exist_ok=True)
            save_file(state, folder / lora_files.ADAPTER)
            config = {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 2,
                "alpha_pattern": dict.fromkeys(
                    ("to_q", r"to_out\.0", "out_proj$", "q_proj", "fc1", "conv1"), 6
                ),
            }
            (folder / lora_files.ADAPTER_CONFIG).write_text(json.dumps({**config, "use_rslora": True}))
    else:
        write_diffusers(tmp_path, pairs, *style.split())
    family.load_tuned(tmp_path)
    added = {
        key: scale * (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
        for key, (a, b) in pairs.items()
    }
    torch.testing.assert_close(output(family), output(changed(models["sd"], added)), atol=1e-5, rtol=1e-5)


def test_the_scale_in_the_metadata_of_diffusers(models: Mapping[str, Path], tmp_path: Path) -> None:
    """By part and by layer, as diffusers writes and reads it."""
    family = families.load(models["sd"])
    pairs = simple(family, "to_q", "q_proj")
    state = {
        f"{part}.{layer if part == 'unet' else text_name(layer)}.lora_{half}.weight": tensor
        for (part, layer), pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn2.to_q": 1},
        "text_encoder.lora_alpha": 8,
    }
    save_file(state, tmp_path / lora_files.FILE, {"lora_adapter_metadata": json.dumps(config)})
    family.load_tuned(tmp_path)
    scales = {key: 4.0 if key[0] != "unet" else 0.5 if "attn2" in key[1] else 3.0 for key in pairs}
    added = {key: scales[key] * (b @ a) for key, (a, b) in pairs.items()}
    torch.testing.assert_close(output(family), output(changed(models["sd"], added)), atol=1e-5, rtol=1e-5)


Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = torch.ones(2, 16), torch.ones(16, 2)
GOOD = {f"lora_unet_{Q}.lora_down.weight": A, f"lora_unet_{Q}.lora_up.weight": B}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {**GOOD, f"lora_unet_{Q}.dora_scale": B},
            r"has a DoRA \(lora_unet_\S+dora_scale\), but only LoRA and LoCon",
        ),
        ({"unet.conv_in.lora_magnitude_vector": B}, r"has a DoRA"),
        (
            {f"lora_unet_{Q}.hada_w1_a": A, f"lora_unet_{Q}.alpha": torch.tensor(1.0)},
            r"has a LoHa \(\S+hada_w1_a",
        ),
        ({f"lora_unet_{Q}.lokr_w1": A}, "has a LoKr"),
        ({f"lora_unet_{Q}.oft_blocks": A}, "has a OFT"),
        ({f"lora_unet_{Q}.diff": A}, "has a set of whole weights"),
        ({**GOOD, f"unet.{Q}.lora_B.bias": A}, "has a LoRA with biases"),
        (
            {f"lora_unet_unet_{Q}_lora_down.weight": A},
            "is not a LoRA, or of an unknown kind: it holds lora_unet_unet_down",
        ),
        (
            {f"lora_unet_unet_{Q}.lora_down.weight": A},
            r"does not fit this model: lora_unet_unet\S+ would update layers",
        ),
        (
            {**GOOD, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": A},
            r"lora_te2_\S+ would .* unet and text_encoder lack",
        ),
        (
            {"model.diffusion_model.out.2.weight": A, "cond": B},
            "is not a LoRA, or of an unknown kind: it holds ",
        ),
        ({f"lora_unet_{Q}.lora_down.weight": A}, "is incomplete: lora_unet_.* has only A"),
        ({**GOOD, f"lora_unet_{Q}.lora_up.weight": B * math.nan}, "is damaged: lora_unet_.* not finite"),
        (
            {**GOOD, f"lora_unet_{Q}.lora_up.weight": torch.ones(16, 3)},
            r"has .*B \(16, 3\), but the weight there is \(16, 16\)",
        ),
        ({**GOOD, f"lora_unet_{Q}.alpha": torch.ones(2)}, "several alphas"),
        ({**GOOD, f"unet.{Q}.lora_A.weight": A}, r"has two updates of unet\."),
        ({f"base_model.model.{Q}.lora_A.weight": A}, r"whose scale is in adapter_config\.json"),
        ({}, "holds no weights"),
    ],
)
def test_refused_by_name(
    state: dict[str, Tensor], words: str, models: Mapping[str, Path], tmp_path: Path
) -> None:
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "x.safetensors")
    family = families.load(models["sd"])
    before = output(family)
    with pytest.raises(ValueError, match=words) as error:
        family.load_tuned(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
    assert torch.equal(output(family), before)
    with pytest.raises(ValueError, match=words):  # before any weight of the model is read
        parse_column(f"x={tmp_path / 'x.safetensors'}", families.locate(str(models["sd"])))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, r"adapter_config.json has use_dora \(DoRA\), but only"),
        ({"peft_type": "LOHA"}, "has peft_type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4"),
        ({"lora_alpha": "four"}, "lora_alpha is 'four', not a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True, not a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, not a finite number"),
        ({"lora_alpha": -math.inf}, "lora_alpha is -inf, not a finite number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 1000\S+, not a finite number"),
        ({"lora_alpha": 1e300}, r"not finite, or a scale, 5e\+299, that makes such"),
        ({"lora_alpha": 2, "use_rslora": "no"}, "use_rslora is 'no'; it must be true or false"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; it must be an object"),
        ({"alpha_pattern": 5}, "alpha_pattern is 5; it must be an object"),
        ({"alpha_pattern": {"to_q": math.inf}}, "alpha_pattern 'to_q' is inf, not a finite number"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(', but only names of layers"),
        ({"alpha_pattern": {"": 1}}, "alpha_pattern has '', but only names of layers"),
        (
            {"alpha_pattern": {"(a|a|[a-z_.0-9]+)+!": 1}},
            r"alpha_pattern has '\(a\|a.*, but only names of layers",
        ),
        ([], "must hold a JSON object, not a list"),
    ],
)
def test_configurations_of_peft_that_are_refused(
    config: object, words: str, models: Mapping[str, Path], tmp_path: Path
) -> None:
    path = Q.replace("_blocks", "+blocks").replace("to_q", "to+q").replace("_", ".").replace("+", "_")
    save_file(
        {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B},
        tmp_path / lora_files.ADAPTER,
    )
    (tmp_path / lora_files.ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        families.load(models["sd"]).load_tuned(tmp_path)


def test_configurations_that_are_no_text_and_hostile_metadata(tmp_path: Path) -> None:
    """Each is refused at once, under the name of its file."""
    layers = lora_names.Layers({"unet": {"conv_in": (4, 4)}})
    state = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.ones(4, 2)}
    deep = "[" * 200 + "]" * 200
    for text, words in (
        ('{"unet.alpha_pattern": {"(a|a|[a-z_.0-9]+)+!": 1}}', r"alpha_pattern has '\(a\|a"),
        ('{"unet.lora_alpha": Infinity}', "lora_alpha is inf, not a finite number"),
        ('{"unet.use_dora": true}', r"has use_dora \(DoRA\)"),
        ('{"unet.x": ' + deep + "}", "is nested too deep"),
        ("{", "is not JSON"),
        ("3", "must be a JSON object, not a int"),
    ):
        save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=f"x.safetensors: lora_adapter_metadata.*{words}"):
            lora_files.read(tmp_path / "x.safetensors", layers)
    save_file(
        {f"base_model.model.{name[5:]}": value for name, value in state.items()},
        tmp_path / lora_files.ADAPTER,
    )
    for content, words in (
        (b'{"lora_alpha": "\xff"}', "is not UTF-8 text"),
        (f'{{"lora_alpha": {deep}}}'.encode(), "is nested too deep"),
        (b"{", "is not JSON"),
    ):
        (tmp_path / lora_files.ADAPTER_CONFIG).write_bytes(content)
        with pytest.raises(ValueError, match=f"adapter_config.json.*{words}"):
            lora_files.read(tmp_path / lora_files.ADAPTER, layers)


@pytest.mark.parametrize(
    "patterns",
    [
        ["to_q"],
        ["attn2.to_q", "to_q", "0.to_q"],
        ["to_q", "attn2.to_q"],
        ["q", "o_q", "attn2"],
        [r"^attn2\.to_q", r"^down\.0\.attn2\.to_q", "to_q"],
        ["down.0.attn2.to_q$", "^to_q$"],
        ["attn2.to_q$", "attn2.to_q", "1.attn2.to_q"],
    ],
)
def test_the_alpha_of_a_layer_is_that_of_peft(patterns: list[str]) -> None:
    alphas = {pattern: place + 1 for place, pattern in enumerate(patterns)}
    scales = Scales({"lora_alpha": 40, "alpha_pattern": alphas}, "here")
    for layer in ("down.0.attn2.to_q", "down.1.attn2.to_q", "attn2.to_q", "to_q", "conv_in"):
        assert scales.of(layer, 8) == alphas.get(get_pattern_key(list(alphas), layer), 40) / 8, layer


def test_many_patterns_take_no_time() -> None:
    scales = Scales({"alpha_pattern": {f"a{i}": 3 for i in range(100_000)}}, "here")
    began = time.perf_counter()
    assert {scales.of(f"down.{i}.a9", 3) for i in range(1000)} == {1.0}
    assert time.perf_counter() - began < 1


def test_tensors_that_are_no_plain_arrays(tmp_path: Path) -> None:
    """Sparse, complex and without numbers; and a view that would take 40 GB of a file of 1 KB."""
    layers = lora_names.Layers({"unet": {"conv_in": (4, 4)}})
    good = {
        "unet.conv_in.lora.down.weight": torch.ones(2, 4),
        "unet.conv_in.lora.up.weight": torch.ones(4, 2),
    }
    a = torch.ones(2, 4)
    for number, (odd, words) in enumerate(
        (
            (a.to_sparse(), "is no plain array of numbers"),
            (a.to(torch.complex64), "is no plain array of numbers"),
            (a.to("meta"), "is no plain array of numbers"),
            (torch.ones(1).expand(100_000, 100_000), "has more numbers than the file holds"),
            (torch.ones(2, 3), "does not fit this model"),
        )
    ):
        file = tmp_path / f"{number}.pt"
        torch.save({**good, "unet.conv_in.lora.down.weight": odd}, file)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))} .*{words}") as error:
            lora_files.read(file, layers)
        assert "\n" not in str(error.value)
    torch.save({name: nn.Parameter(value) for name, value in good.items()}, tmp_path / "good.pt")
    a, b = lora_files.read(tmp_path / "good.pt", layers)["unet"]["conv_in"]
    assert torch.equal(b @ a, torch.full((4, 4), 2.0))
    assert not any(tensor.requires_grad for tensor in (a, b))


@pytest.mark.parametrize("name", ["style.safetensors", "style.ckpt", lora_files.FILE])
def test_a_pointer_of_git_lfs(name: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    """In the place of the weights, alone and in a folder, where it is what a clone without `git lfs` has."""
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
    )
    for path in (tmp_path / name, *([tmp_path] if name.endswith(".safetensors") else [])):
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, .*run `git lfs pull`"):
            parse_column(f"x={path}", families.locate(str(models["sd"])))
    with pytest.raises(
        ValueError, match=f"{name} is a Git LFS pointer"
    ):  # in the place of a scorer's weights
        read_scorer(tmp_path / name)


def test_folders(models: Mapping[str, Path], tmp_path: Path) -> None:
    """One file of any name is found, of two none is chosen, and a run is known by its lora/."""
    with pytest.raises(ValueError, match=r"holds neither a LoRA .* nor a UNet"):
        families.load(models["sd"]).load_tuned(tmp_path)
    save_file(GOOD, tmp_path / "a.safetensors")
    assert parse_column(f"x={tmp_path}@0.5", families.locate(str(models["sd"]))).has_lora
    save_file(GOOD, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"holds 2 files that may be a LoRA \(a.safetensors, b.safetensors\); name one"
    ):
        parse_column(f"x={tmp_path}", families.locate(str(models["sd"])))
    column = parse_column(f"x={tmp_path / 'b.safetensors'}@0.5", families.locate(str(models["sd"])))
    assert (column.weight, column.tuned) == (0.5, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"does not fit this model: lora_unet_down_blocks_0\S+ and 1 more of its 2 weights would",
    ):
        parse_column(f"x={tmp_path / 'b.safetensors'}", families.locate(str(models["sdxl"])))
    (tmp_path / "lora").mkdir()
    save_file(GOOD, tmp_path / "lora" / lora_files.FILE)
    assert lora_files.find(tmp_path) == [tmp_path / "lora" / lora_files.FILE]


# ---------------------------------------------------------------- ours, in the programs of others


def generated(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        "a red circle", num_inference_steps=2, height=tiny.PIXELS, width=tiny.PIXELS,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    return images


def read_kohya(path: Path, pipe: Any) -> None:
    """A reader of kohya's layout from its description alone: W + alpha / rank * up @ down, on the layer that a name means."""
    state = load_file(path)
    xl = hasattr(pipe, "text_encoder_2")
    table = {}
    for prefix, module in (("lora_unet_", pipe.unet), ("lora_te1_" if xl else "lora_te_", pipe.text_encoder)):
        for layer, child in module.named_modules():
            plain = layer if module is pipe.unet else text_name(layer)
            table[prefix + plain.replace(".", "_")] = child
    if xl:
        table |= {
            f"lora_unet_{name}": pipe.unet.get_submodule(layer) for layer, name in original(pipe.unet).items()
        }
        table |= {
            f"lora_te2_{text_name(n).replace('.', '_')}": m for n, m in pipe.text_encoder_2.named_modules()
        }
    names = {name.split(".")[0] for name in state}
    assert len(state) == 3 * len(names), "down, up and alpha, and nothing else"
    if xl:
        assert not any("down_blocks" in name for name in names)
    for name in names:
        up, down = state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"]
        weight = table[name].weight.data
        scale = state[f"{name}.alpha"].item() / down.shape[0]
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("cpu")
def test_a_lora_trained_here_is_the_same_in_diffusers_peft_and_by_kohyas_description(
    kind: str, root: Path, models: Mapping[str, Path], tmp_path: Path
) -> None:
    """Attention and convolutions, a scale of 3; it starts from a LoRA with text encoders, which goes on into all that is written."""
    start, _ = kohya_file(families.load(models[kind]))
    save_file(start, tmp_path / "start.safetensors")
    argv = [
        *recorded.arguments("refl", root, tmp_path / "run"), "--model", str(models[kind]), "--pretraining", "off",
        "--lora.rank", "2", "--lora.alpha", "6", "--lora.target-modules", "to_q", "to_out.0", "conv1", "proj_in",
        "--lora-start", str(tmp_path / "start.safetensors"), "--export", "kohya",
    ]  # fmt: skip
    assert recorded.train("refl", argv) == 0
    kohya = tmp_path / "run" / "lora_kohya.safetensors"

    pipe = DiffusionPipeline.from_pretrained(models[kind])
    base = generated(pipe)
    read_kohya(kohya, pipe)
    expected = generated(pipe)
    assert (expected - base).abs().max() > 1e-2

    begun = DiffusionPipeline.from_pretrained(models[kind])
    begun_family = families.load(models[kind])
    begun_family.start_from(tmp_path / "start.safetensors")
    for name, module in parts_of(begun_family).items():
        getattr(begun, name).load_state_dict(module.state_dict())
    assert (expected - generated(begun)).abs().max() > 1e-3, "training moved it from its start"

    for weights in (tmp_path / "run" / "lora", kohya):
        pipe = DiffusionPipeline.from_pretrained(models[kind])
        pipe.load_lora_weights(weights)
        torch.testing.assert_close(generated(pipe), expected, atol=1e-5, rtol=0)

    config = [
        "--lora",
        str(tmp_path / "run"),
        "--model",
        str(models[kind]),
        "--layout",
        "peft",
        "--output",
        str(tmp_path / "peft"),
    ]
    assert export_lora.main(cli.parse(export_lora.Config, config)) == 0
    pipe = DiffusionPipeline.from_pretrained(models[kind])
    for part in parts_of(begun_family):
        setattr(
            pipe,
            part,
            PeftModel.from_pretrained(getattr(pipe, part), tmp_path / "peft" / part).merge_and_unload(),
        )
    torch.testing.assert_close(generated(pipe), expected, atol=1e-5, rtol=0)

    family = families.load(models[kind])
    for written in (kohya, tmp_path / "peft", tmp_path / "run"):
        family.load_tuned(written)
        torch.testing.assert_close(
            output(family), output(families_of(pipe, models[kind])), atol=1e-5, rtol=1e-5
        )


def families_of(pipe: Any, folder: Path) -> Family:
    """The family with the weights of a pipeline."""
    family = families.load(folder)
    for name, module in parts_of(family).items():
        module.load_state_dict(getattr(pipe, name).state_dict())
    return family


@pytest.mark.usefixtures("cpu")
def test_a_start_is_checked_before_anything_loads_and_a_resume_keeps_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = families.load(root / "pipeline")
    state, _ = kohya_file(family)
    save_file(state, tmp_path / "start.safetensors")
    save_file({**state, "stray": A}, tmp_path / "bad.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, tmp_path / "other.safetensors")
    save_file(state, tmp_path / "moved.safetensors")
    command = recorded.arguments("weird_lora", root, tmp_path / "run")
    assert command[-2] == "--output-dir"
    resumed = ["--resume-from-checkpoint", "latest"]
    assert recorded.train("weird_lora", [*command, "--lora-start", str(tmp_path / "start.safetensors")]) == 0
    for more, words in (
        (["--lora-start", str(tmp_path / "bad.safetensors")], "of an unknown kind: it holds stray"),
        (["--lora-start", str(tmp_path / "none")], "no LoRA in"),
        (
            ["--lora-start", str(tmp_path / "start.safetensors"), "--train", "full", "--lora.rank", "32"],
            "also updates text_encoder",
        ),
        (["--train", "full", "--lora.rank", "32", "--export", "kohya"], "--export kohya writes a LoRA"),
        (
            [*resumed, "--lora-start", str(tmp_path / "other.safetensors")],
            "cannot resume .*: --lora-start was .*start.safetensors, is .*other.safetensors",
        ),
        (
            [*resumed, "--lora-start", str(tmp_path / "moved.safetensors"), "--max-train-steps", "2"],
            "--max-train-steps 2 is less",
        ),
        (resumed, "cannot resume .*: --lora-start was .*, is None"),
        (
            [*resumed, "--lora.alpha", "8", "--lora-start", str(tmp_path / "start.safetensors")],
            "lora scale was 1.0, is 2.0",
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            recorded.train(
                "weird_lora", [*command[:-1], str(tmp_path / ("run" if more[0] in resumed else "new")), *more]
            )
        assert stop.value.code == 2
        assert re.search(words, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.usefixtures("cpu")
def test_pretraining_exports_what_it_saves(root: Path, tmp_path: Path) -> None:
    argv = recorded.arguments("pretrain", root, tmp_path / "run")
    argv += ["--no-train-text-encoder", "--train", "lora", "--export", "kohya", "--ema-decay", "0.5"]
    assert recorded.train("pretrain", argv) == 0
    layers = families.lora_layers(root / "pipeline")
    ours = lora_files.read(tmp_path / "run" / "lora", layers)["unet"]
    theirs = lora_files.read(tmp_path / "run" / "lora_kohya.safetensors", layers)["unet"]
    assert ours.keys() == theirs.keys()
    for layer, pair in ours.items():
        torch.testing.assert_close(theirs[layer], pair, atol=0, rtol=0)
    assert any(b.abs().max() > 0 for _, b in ours.values())


def test_names_of_the_real_sdxl() -> None:
    """Names as sd-scripts writes them, of SDXL's own layers."""
    expected = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    }
    assert lora_names.original_names(expected) == expected
    layers = lora_names.Layers(
        {"unet": dict.fromkeys(expected, (4, 4)), "text_encoder": {}, "text_encoder_2": {}}
    )
    names, table = layers.kohya_names(), layers.by_flat_name()
    for layer, other in expected.items():  # read are both kinds of names, written is the original's
        assert names["unet", layer] == f"lora_unet_{other.replace('.', '_')}"
        assert table["unet", layer.replace(".", "_")] == table["unet", other.replace(".", "_")] == layer


def test_export_for_the_web_uis(
    models: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metadata by which AUTOMATIC1111's web UI shows the file beside the right models; half precision; no overwriting."""
    for kind, version in (("sd", "sd_v1"), ("sdxl", "sdxl_base_v1-0")):
        state, _ = kohya_file(families.load(models[kind]))
        save_file(state, tmp_path / f"{kind}.safetensors")
        target = tmp_path / "out" / f"{kind}.safetensors"
        argv = [
            "--lora",
            str(tmp_path / f"{kind}.safetensors"),
            "--model",
            str(models[kind]),
            "--output",
            str(target),
            "--precision",
            "fp16",
        ]
        assert export_lora.main(cli.parse(export_lora.Config, argv)) == 0
        assert "layers of text_encoder" in capsys.readouterr().out
        with safe_open(target, framework="pt") as file:
            assert (file.metadata()["ss_base_model_version"], file.metadata()["ss_v2"]) == (version, "False")
        assert {value.dtype for value in load_file(target).values()} == {torch.float16}
        with pytest.raises(SystemExit):
            cli.parse(export_lora.Config, argv)
        assert "is there already; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_an_export_that_cannot_be_written_leaves_nothing(
    layout: str, models: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk or quota that is full, and numbers that fp16 cannot hold: one sentence, and the same command works later."""
    state, _ = kohya_file(families.load(models["sd"]))
    save_file(state, tmp_path / "x.safetensors")
    save_file({name: 1e5 * value for name, value in state.items()}, tmp_path / "large.safetensors")
    target = tmp_path / "out" / ("x.safetensors" if layout == "kohya" else "x")
    argv = ["--model", str(models["sd"]), "--output", str(target), "--layout", layout, "--lora"]
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            export_lora.main(cli.parse(export_lora.Config, [*argv, str(tmp_path / "x.safetensors")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "a file would be larger than the system allows" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
    half = [*argv, str(tmp_path / "large.safetensors"), "--precision", "fp16"]
    with pytest.raises(SystemExit) as stop:
        export_lora.main(cli.parse(export_lora.Config, half))
    assert stop.value.code == 2
    assert "does not fit into torch.float16" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert export_lora.main(cli.parse(export_lora.Config, [*argv, str(tmp_path / "x.safetensors")])) == 0
    assert list((tmp_path / "out").iterdir()) == [target]


def test_kohyas_file_has_the_same_bytes_each_time(models: Mapping[str, Path], tmp_path: Path) -> None:
    """Its metadata have several keys, which safetensors itself writes in any order."""
    layers = families.lora_layers(models["sd"])
    save_file(kohya_file(families.load(models["sd"]))[0], tmp_path / "x.safetensors")
    update = lora_files.read(tmp_path / "x.safetensors", layers)
    for number in range(4):
        lora_write.write_kohya(tmp_path / f"{number}.safetensors", update, layers)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata) == 6
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "Dynamic")
    again = lora_files.read(tmp_path / "0.safetensors", layers)
    for part, pairs in update.items():
        for layer, (a, b) in pairs.items():
            assert torch.equal(again[part][layer][0], a)
            assert torch.equal(again[part][layer][1], b)


def test_a_column_of_the_grid_is_drawn_with_the_whole_file(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    """Text encoder and negative prompt included, and nothing of it is left in the column after."""
    state, added = kohya_file(families.load(models["sd"]))
    save_file(state, tmp_path / "my@style.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    argv = [
        "--model",
        str(models["sd"]),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--num-inference-steps",
        "2",
    ]
    argv += ["--solver", "ddim", "--negative", "ugly", "--output-dir", str(tmp_path / "grid"), "--rewards"]
    argv += ["--columns", "base=", f"style={tmp_path / 'my@style.safetensors'}", "again="]
    assert grid.main(cli.parse(grid.Config, argv)) == 0
    drawn = {
        title: [
            np.asarray(Image.open(tmp_path / "grid" / "images" / title / f"000{i}.png")) / 255
            for i in range(2)
        ]
        for title in ("base", "style", "again")
    }
    assert np.array_equal(drawn["base"], drawn["again"])
    sampling = Sampling(num_inference_steps=2, solver="ddim")
    (expected,) = sample(changed(models["sd"], added), PROMPTS, [0, 1], sampling, negative="ugly")
    assert np.abs(np.stack(drawn["style"]) - expected.permute(0, 2, 3, 1).numpy()).max() < 0.6 / 255
    assert np.abs(np.stack(drawn["style"]) - drawn["base"]).max() > 2 / 255
