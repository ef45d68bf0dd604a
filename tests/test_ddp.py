"""Two processes on the CPU: both get the same gradients, and follow one process with twice the batch.

This file is also the program that the launcher starts: it runs a driver as it is and notes, through torch's own hook, the
gradients that each optimizer step sees.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parents[1]

# Without a GPU `accelerate launch --cpu` starts a single process whatever it is asked for; `--multi_gpu` goes the way of
# several processes, and ACCELERATE_USE_CPU then makes them a gloo group on the CPU.
TWO = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


FLAGS = {  # what makes both runs do the same
    "refl": [
        "--pretraining",
        "sum",
        "--window",
        "2",
        "2",
    ],  # one late step for both ranks, which otherwise draw their own
    # the weights of all pairs sum to one over both processes, in each of the two stages
    "reward_model": "--stable.views 2 --stable.weighting two-stage --stable.first-stage-updates 1 --shift 1".split(),  # noqa: SIM905
}
NOTED = {"refl": ("loss", "reward", "grad_norm"), "reward_model": ("loss", "accuracy", "grad_norm")}


def run_driver(driver: str, arguments: list[str], notes: Path) -> None:
    """Run the driver, and write the gradients of every optimizer step to notes/rank0.pt."""
    seen: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        seen.append([weight.grad.clone() for weight in weights])

    handle = register_optimizer_step_pre_hook(note)
    sys.argv = [str(ROOT / "finetune" / f"{driver}.py"), *arguments]
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    handle.remove()
    assert stop.value.code == 0
    torch.save(seen, notes / f"rank{os.environ.get('RANK', '0')}.pt")


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("driver", list(FLAGS))
def test_two_processes_equal_one_with_twice_the_batch(
    driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import record_trajectories

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    record_trajectories.write_inputs(tmp_path)
    command = [*record_trajectories.arguments(driver, tmp_path, tmp_path), *FLAGS[driver]]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = [*command, "--output", str(tmp_path / "one"), "--batch", "2"]
    two = [*command, "--output", str(tmp_path / "two"), "--batch", "1"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "no_config"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *TWO.split(), __file__, driver, str(tmp_path / "two"), *two],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", sys.argv)
    run_driver(driver, one, tmp_path / "one")

    assert "processes 2" in (tmp_path / "two" / "config.yaml").read_text().splitlines()[0]
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    assert len(alone) == len(ranks[0]) == record_trajectories.UPDATES
    for first, second, single in zip(*ranks, alone, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in single)
        assert largest > 0
        for a, b, c in zip(first, second, single, strict=True):
            assert torch.equal(a, b), "the ranks stepped by different gradients"
            torch.testing.assert_close(a, c, atol=1e-4 * largest, rtol=1e-3)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in NOTED[driver]:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


if __name__ == "__main__":
    run_driver(sys.argv[1], sys.argv[3:], Path(sys.argv[2]))
