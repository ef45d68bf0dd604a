"""What only a CUDA device shows: runs that stop and go on there, in each precision, and drivers beside the CPU's numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import refl
from preftune.cli import parse
from preftune.training.checkpoint import read

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny"


def train(output: Path, *flags: str, updates: int = 4) -> list[dict[str, Any]]:
    """Train the embedded model by ReFL and return its metrics, without those of the clock."""
    command = [
        "--model", str(TINY / "pipeline"), "--prompts", str(TINY / "prompts.txt"), "--rewards", "imagereward-tiny=1",
        "--resolution", "64", "--num-inference-steps", "6", "--window", "3", "5", "--solver", "ddim", "--reward-scale", "1",
        "--num-validation-prompts", "4", "--sample.num-inference-steps", "4", "--sample.resolution", "64", "--train-batch-size", "8",
        "--gradient-accumulation-steps", "1", "--checkpointing-steps", "2", "--checkpoints-total-limit", "0", "--report-to", "none",
        "--max-train-steps", str(updates), "--output-dir", str(output), *flags,
    ]  # fmt: skip
    assert refl.main(parse(refl.Config, command)) == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "images_per_s"} for line in lines
    ]


@pytest.mark.parametrize("train_weights", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, precision: str, train_weights: str) -> None:
    flags = ("--mixed-precision", precision, "--train", train_weights)
    straight = train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, updates=2)
    resumed = train(tmp_path / "stopped", *flags, "--resume-from-checkpoint", "latest")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]
    one, other = (read(tmp_path / name / "step_000004")["parameters"] for name in ("straight", "stopped"))
    assert one.keys() == other.keys()
    if (precision, train_weights) == (
        "no",
        "full",
    ):  # gradients of float32 convolutions are added in any order
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=0)
    else:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_float32_gives_the_losses_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = train(tmp_path / "gpu", "--mixed-precision", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_cpu = train(tmp_path / "cpu", "--mixed-precision", "no")
    assert [row["loss"] for row in on_gpu] == pytest.approx([row["loss"] for row in on_cpu], rel=2e-3)
