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
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parents[1]
UPDATES = 3  # of record_trajectories, which must not be imported before the settings of conftest.py

# Without a GPU `accelerate launch --cpu` starts a single process whatever it is asked for; `--multi_gpu` goes the way of
# several processes, and ACCELERATE_USE_CPU then makes them a gloo group on the CPU.
TWO = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


CASES = {  # driver, flags, metrics that must agree
    # Its defaults: no guidance, a late step from a window, an update on captions before each one on rewards.
    "refl": (
        "refl",
        "--guidance-scale 1 --window 0 3",
        ("pretrain_loss", "pretrain_grad_norm", "loss", "reward", "late_step", "grad_norm"),
    ),
    "guided refl": (
        "refl",
        # and validation images at a size that has a gold score, one at a time: they must not depend on who makes them
        "--guidance-scale 2 --window 0 3 --pretraining off --sample.resolution 64 --sample.batch-size 1"
        " --validation-prompts {inputs}/prompts.txt --num-validation-prompts 5 --holdout-rewards {tiny}/pretrained/clip",
        ("loss", "reward", "late_step", "grad_norm"),
    ),
    # pairs, and the reference errors that each process finds for both
    "dpo": (
        "dpo",
        "--fixed-noise 1 --labels soft --ties half --validation-steps 1",
        (
            *(
                "loss",
                "implicit_accuracy",
                "margin",
                "reference_margin",
                "error",
                "reference_error",
                "grad_norm",
            ),
            *("validation_loss", "validation_accuracy"),
        ),
    ),
    # rollouts of which each process samples a half, and trains on pairs of both
    "ddpo": (
        "ddpo",
        "",
        ("loss", "reward", "reward_std", "ratio", "kl", "zero_variance_share", "grad_norm"),
    ),
    # calls that are computed again in the backward pass, three of one update and each with a negative prompt
    "draft": ("draft", "", ("loss", "reward", "first_step", "grad_norm")),
    "drtune": ("drtune", "", ("loss", "reward", "stop_step", "first_step", "grad_norm")),
    "flowbp": ("flowbp", "", ("loss", "reward", "miss", "grad_norm")),
    # images that both generate, rewards of all of them, and the weights of other policies; the second epoch's images are of moved weights
    "awm": ("awm", "", ("loss", "reward", "reward_std", "diffusion_loss", "kl", "ema_kl", "grad_norm")),
    "nft": ("nft", "", ("loss", "reward", "reward_std", "diffusion_loss", "kl", "old_distance", "grad_norm")),
    # the weights of all pairs sum to one over both processes, in each of the two stages
    "reward_model": (
        "reward_model",
        "--stable.views 2 --stable.weighting two-stage --stable.first-stage-steps 1 --jitter 1",
        ("loss", "accuracy", "grad_norm"),
    ),
}


def run_case(case: str, inputs: Path, notes: Path, *flags: str) -> None:
    """Run the driver of a case, and write the gradients of every optimizer step to notes/rank0.pt."""
    import record_trajectories

    driver, own, _ = CASES[case]
    seen: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        seen.append([weight.grad.clone() for weight in weights])

    handle = register_optimizer_step_pre_hook(note)
    command = [
        *record_trajectories.arguments(driver, inputs, notes),
        *own.format(inputs=inputs, tiny=ROOT / "assets" / "tiny").split(),
        *flags,
    ]
    sys.argv = [str(ROOT / "finetune" / f"{driver}.py"), *command]
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    handle.remove()
    assert stop.value.code == 0
    torch.save(seen, notes / f"rank{os.environ.get('RANK', '0')}.pt")


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of two processes for every case, all made by one launch."""
    folder = tmp_path_factory.mktemp("two")
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "no_config"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, *TWO.split(), __file__, str(root), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one_with_twice_the_batch(
    case: str, root: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", sys.argv)
    run_case(case, root, tmp_path, "--train-batch-size", "2")

    assert "processes 2" in (two / case / "config.yaml").read_text().splitlines()[0]
    ranks = [torch.load(two / case / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert len(alone) == len(ranks[0]) == UPDATES * (2 if case == "refl" else 1)
    for first, second, single in zip(*ranks, alone, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in single)
        assert largest > 0
        for a, b, c in zip(first, second, single, strict=True):
            assert torch.equal(a, b), "the ranks stepped by different gradients"
            torch.testing.assert_close(a, c, atol=1e-4 * largest, rtol=1e-3)
    for a, b in zip(rows(tmp_path), rows(two / case), strict=True):
        for name in CASES[case][2]:
            least = 1e-6 if name.endswith(("margin", "kl")) else None  # a small difference of large numbers
            if case == "awm":  # the sum of advantages, which is 0, and distances from nearly the same weights
                least = {"loss": 1e-5, "kl": 1e-9, "ema_kl": 1e-9, "grad_norm": 1e-6}.get(name)
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=least), name
    if case == "guided refl":
        assert_same_validation(tmp_path / "samples", two / case / "samples")
    drawn = {"refl": "late_step", "guided refl": "late_step", "drtune": "first_step", "flowbp": "miss"}.get(
        case
    )
    if drawn is not None:
        assert len({row[drawn] for row in rows(tmp_path)}) > 1, "choose a seed that draws different steps"


def assert_same_validation(one: Path, other: Path) -> None:
    """The same files; before training the same bytes, for the weights are equal then; after it nearly the same scores."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, other)]
    assert names[0] == names[1], "nothing is left over, nothing is missing"
    assert [f"step_000000/{index:04d}.png" in names[0] for index in range(6)] == [True] * 5 + [False]
    for path in (one / "step_000000").iterdir():
        assert path.read_bytes() == (other / "step_000000" / path.name).read_bytes(), path.name
    assert (one / "step_000000.png").read_bytes() == (other / "step_000000.png").read_bytes()
    before, *after = (
        json.loads((folder / name / "scores.json").read_text())
        for folder, name in ((one, "step_000000"), (one, "step_000003"), (other, "step_000003"))
    )
    assert len(set(before["proxy"])) == len(before["gold"]) == len(before["prompts"]) == 5
    assert after[0]["proxy"] != before["proxy"]
    assert 1 < before["diversity"] < 5
    assert [len(values) for values in before["holdout"].values()] == [5]
    assert after[1]["proxy"] == pytest.approx(after[0]["proxy"], rel=1e-4)


if __name__ == "__main__":
    inputs, folder = (Path(word) for word in sys.argv[1:])
    store, rank, world = next(distributed.rendezvous("env://"))
    for name in CASES:  # each run has a process group of its own, which ends with the run
        distributed.init_process_group(
            "gloo", store=distributed.PrefixStore(name, store), rank=rank, world_size=world
        )
        (folder / name).mkdir(exist_ok=True)
        run_case(name, inputs, folder / name, "--train-batch-size", "1")
