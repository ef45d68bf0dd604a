"""Fused AdamW: the formula of the plain one, where it is taken, and that a run with it goes on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drivers import toy
from preftune.training import checkpoint
from preftune.training.optimizer import adamw, is_fused
from preftune.training.run_config import RunConfig

pytestmark = pytest.mark.usefixtures("cpu")


def test_one_formula() -> None:
    found = []
    for fused in (False, True):
        weights = [nn.Parameter(torch.full((3, 2), 0.5)), nn.Parameter(torch.ones(2))]
        config = RunConfig(fused_adam=fused, adam_weight_decay=0.1, decay_vectors=False)
        optimizer = adamw(config, weights, lr=0.05)
        assert bool(optimizer.defaults["fused"]) is fused
        for step in range(5):
            for weight in weights:
                weight.grad = torch.sin(torch.arange(weight.numel()) + step).view_as(weight)
            optimizer.step()
        found.append([weight.detach() for weight in weights])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_where_it_is_taken() -> None:
    with FakeTensorMode():
        there = [nn.Parameter(torch.empty(2, device="cuda"))]
    here = [nn.Parameter(torch.empty(2))]
    assert is_fused(RunConfig(mixed_precision="bf16"), there)
    assert not is_fused(RunConfig(), here)
    assert not is_fused(RunConfig(), [*there, *here])
    assert not is_fused(RunConfig(mixed_precision="fp16"), there), "accelerate would not see skipped updates"
    assert not is_fused(RunConfig(use_8bit_adam=True), there)
    assert not is_fused(RunConfig(fused_adam=False), there)


@pytest.mark.parametrize(
    ("other", "flag"),
    [({"use_8bit_adam": True}, "--use-8bit-adam"), ({"mixed_precision": "fp16"}, "--mixed-precision fp16")],
)
def test_refused_together(other: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"--fused-adam does not work with {flag}; leave out one of them"):
        RunConfig(fused_adam=True, **other)


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def train(name: str, **changes: Any) -> None:
        few: dict[str, Any] = {"max_train_steps": 6, "learning_rate": 1e-2, "threads": 1, "fused_adam": True}
        assert toy.main(toy.Config(run=RunConfig(output_dir=tmp_path / name, **(few | changes)))) == 0

    train("whole")
    train("parts", max_train_steps=3)
    train("parts", resume_from_checkpoint="latest")
    one, other = (checkpoint.read(tmp_path / name / "step_000006") for name in ("whole", "parts"))
    for name, weight in one["parameters"].items():
        assert torch.equal(weight, other["parameters"][name])
    assert torch.equal(one["optimizer"][0]["exp_avg_sq"], other["optimizer"][0]["exp_avg_sq"])
