"""Pre-training of scorers that goes on from an earlier one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import record_trajectories as recorded
from finetune.pretrain_scorer import Config
from rewards.training import load_trainable

STEPS = ("--max-train-steps", "1", "--learning-rate", "1e-9", "--mixed-precision", "no")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "scorer" / "model.safetensors")


@pytest.mark.usefixtures("cpu")
def test_it_goes_on_from_an_earlier_scorer(root: Path, tmp_path: Path) -> None:
    flags = recorded.arguments("pretrain_scorer", root, tmp_path / "first")
    recorded.train("pretrain_scorer", [*flags, "--max-train-steps", "2", "--seed", "3"])
    data = ["--data", f"{root}/images", "--train-batch-size", "2", *STEPS]
    second = [*data, "--model", f"{tmp_path}/first/scorer"]
    recorded.train("pretrain_scorer", [*second, "--output-dir", f"{tmp_path}/second"])
    one, two = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    assert load_trainable(str(tmp_path / "second" / "scorer")).card.preprocess is not None
    with pytest.raises(SystemExit) as stop:
        recorded.train(
            "pretrain_scorer", [*second, "--output-dir", f"{tmp_path}/third", "--architecture", "clip"]
        )
    assert stop.value.code == 2


def test_a_start_is_one_of_two(tmp_path: Path) -> None:
    for settings in ({}, {"vocab": tmp_path, "model": tmp_path}):
        with pytest.raises(ValueError, match=r"give --vocab .* or --model"):
            Config(data=tmp_path, **settings)
