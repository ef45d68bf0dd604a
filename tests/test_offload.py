"""Weights that stay in the CPU's memory: where they are when, and that nothing that is computed with them changes.

The device is the CPU here, too, but a copy is made all the same, so that a use of weights that are not loaded would show.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import pretrain, refl
from preftune.cli import parse
from rewards import load
from rewards.mix import Mix
from rewards.offload import Offloaded, offload_between_calls

pytestmark = pytest.mark.usefixtures("cpu")


def layer() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 2).requires_grad_(False)


def test_a_copy_is_there_between_load_and_unload() -> None:
    module = layer()
    value, shared = module.weight.clone(), nn.Sequential(module)
    weights = Offloaded([module, shared], "cpu")
    home = module.weight.data_ptr()
    weights.load()
    loaded = module.weight.data_ptr()
    assert loaded != home
    weights.load()
    assert module.weight.data_ptr() == loaded, "one copy, however often it is asked for"
    weights.unload()
    assert module.weight.data_ptr() == home
    assert torch.equal(module.weight, value)
    with pytest.raises(AssertionError, match="trained weights stay"):
        Offloaded([nn.Linear(2, 2)], "cpu")


def test_a_module_is_loaded_during_its_call_alone() -> None:
    module = layer()
    expected, home = module(torch.ones(1, 4)), module.weight.data_ptr()
    places: list[int] = []
    module.register_forward_pre_hook(lambda *_: places.append(module.weight.data_ptr()))
    offload_between_calls(module, "cpu")
    module.register_forward_pre_hook(lambda *_: places.append(module.weight.data_ptr()))
    assert torch.equal(module(torch.ones(1, 4)), expected)
    assert places[0] == home != places[1]
    assert module.weight.data_ptr() == home
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 5))
    assert module.weight.data_ptr() == home, "after an error, too"


def test_a_mix_is_loaded_until_its_backward_pass_is_done() -> None:
    prompts = ["a red circle on a white background"] * 2
    found = []
    for offload in (False, True):
        scorer = load("imagereward-tiny")
        assert isinstance(scorer, nn.Module)
        mix = Mix([scorer, load("brightness")], {"imagereward-tiny": 1.0, "brightness": 0.5}, "none")
        if offload:
            mix.offload("cpu")
        weight = next(scorer.parameters())
        home = weight.data_ptr()
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        rewards = mix(pixels * 1.0, prompts).rewards
        assert (weight.data_ptr() != home) is offload
        rewards.sum().backward()
        assert weight.data_ptr() == home
        with torch.no_grad():
            again = mix(pixels, prompts).scores
        assert weight.data_ptr() == home
        mix(pixels.detach(), prompts)
        assert weight.data_ptr() == home
        assert pixels.grad is not None
        found.append((rewards.detach(), pixels.grad, again))
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)


def flags(root: Path, output: Path, *more: str) -> list[str]:
    words = (
        f"--model {root}/pipeline --prompts {root}/prompts.txt --rewards imagereward-tiny=1 brightness=1 --resolution 64"
        " --num-inference-steps 4 --window 1 2 --max-train-steps 2 --train-batch-size 2 --gradient-accumulation-steps 2"
        f" --mixed-precision no --num-validation-prompts 2 --sample.num-inference-steps 2 --output-dir {output}"
    )
    return [*words.split(), *more]


def test_a_run_is_the_same(root: Path, tmp_path: Path) -> None:
    rows = []
    for name, more in (("plain", ()), ("offloaded", ("--offload",))):
        assert refl.main(parse(refl.Config, flags(root, tmp_path / name, *more))) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines])
    assert rows[0] == rows[1]


def test_trained_text_encoders_are_not_offloaded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model {root}/pipeline --data {root}/images --output-dir {tmp_path} --train full --train-text-encoder --offload"
    with pytest.raises(SystemExit) as stop:
        parse(pretrain.Config, words.split())
    assert stop.value.code == 2
    assert "--offload keeps frozen text encoders" in capsys.readouterr().err
