"""A training run: accumulation, several processes, resuming after any kind of stop, and its errors.

The toy driver in drivers/toy.py is a real driver, run in this process or through the launchers.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from drivers import toy
from preftune.training import checkpoint
from preftune.training.optimizer import MAX_SKIPPED, lr_factor
from preftune.training.run import Run, RunConfig, check

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "tests" / "drivers" / "toy.py")


def run_config(output: Path, **changes: Any) -> RunConfig:
    few = {
        "max_train_steps": 8,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "threads": 1,
        "ema_decay": 0.9,
    }
    return RunConfig(output_dir=output, **{**few, **changes})


def train(output: Path, *, driver: dict[str, Any] | None = None, **changes: Any) -> int:
    return toy.main(toy.Config(run=run_config(output, **changes), **(driver or {})))


def rows(output: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in lines]


def state(output: Path, updates: int) -> dict[str, Any]:
    return checkpoint.read(output / f"step_{updates:06d}")


def assert_same_state(one: Any, other: Any) -> None:
    """Equal bit for bit, at any depth."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same_state(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_state(a, b)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path, updates: int) -> None:
    assert rows(one) == rows(other)
    assert_same_state(state(one, updates), state(other, updates))
    extras = [torch.load(p / f"step_{updates:06d}" / "extra.pt", weights_only=True) for p in (one, other)]
    assert_same_state(*extras)


def launch(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


# Batches


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(2, 3, 1), (1, 4, 2), (3, 2, 4)])
def test_image_indices_partition_each_step(batch: int, accumulation: int, world: int) -> None:
    run = Run.__new__(Run)
    run.config = RunConfig(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    run.world, run.images_per_update = world, batch * accumulation * world
    for step in (0, 5):
        seen: list[int] = []
        for run.rank in range(world):
            for micro in range(accumulation):
                seen += run.image_indices(step, micro)
        per_step = batch * accumulation * world
        assert sorted(seen) == list(range(step * per_step, (step + 1) * per_step))


def test_generators_depend_on_seed_and_index_only(tmp_path: Path) -> None:
    one = Run(run_config(tmp_path / "a", train_batch_size=1), driver="toy", config_text="")
    two = Run(run_config(tmp_path / "b", train_batch_size=4), driver="toy", config_text="")
    other = Run(run_config(tmp_path / "c", seed=1), driver="toy", config_text="")

    def draw(run: Run, index: int) -> float:
        return torch.rand((), generator=run.generator(index)).item()

    assert draw(one, 3) == draw(two, 3)
    assert len({draw(run, index) for run in (one, other) for index in range(50)}) == 100
    draws = {float(one.rng(step, micro).random()) for step in range(5) for micro in range(3)}
    assert len(draws) == 15


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    train(tmp_path / "a", train_batch_size=1, gradient_accumulation_steps=4)
    train(tmp_path / "b", train_batch_size=4, gradient_accumulation_steps=1)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    one, other = state(tmp_path / "a", 8)["parameters"], state(tmp_path / "b", 8)["parameters"]
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_each_update_may_have_passes_of_its_own(tmp_path: Path) -> None:
    train(tmp_path / "whole", train_batch_size=6, gradient_accumulation_steps=1)
    cut = {"train_batch_size": 2, "gradient_accumulation_steps": 3}
    train(tmp_path / "cut", driver={"passes": (2, 1, 6, 3)}, **cut)
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "cut"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    whole, parts = (state(tmp_path / name, 8) for name in ("whole", "cut"))
    for name, weight in whole["parameters"].items():
        torch.testing.assert_close(weight, parts["parameters"][name], atol=1e-6, rtol=0)
    assert parts["optimizer"][0]["step"] == 8, "one optimizer step an update"
    # position is 10 step + pass: its mean over the passes of the update
    assert [row["position"] for row in rows(tmp_path / "cut")][:4] == [0.5, 10, 22.5, 31]


def test_first_update_is_adamw_by_hand(tmp_path: Path) -> None:
    # One weight w = 2, loss = w^2 / 2 on average over two micro batches (1/4 w^2 and 3/4 w^2): gradient w = 2, clipped to
    # 0.5. AdamW's first step is lr in the direction of the sign, after decay by lr * weight_decay.
    run = Run(
        run_config(tmp_path, max_train_steps=1, max_grad_norm=0.5, adam_weight_decay=0.1),
        driver="toy",
        config_text="",
    )
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    prepared = run.prepare(model, learning_rate=1.0)
    for _ in run.steps():
        for micro in run.passes():
            factor = (0.25, 0.75)[micro]
            with run.accumulate():
                run.update(factor * prepared(torch.ones(1, 1)).square().sum(), factor=factor)
    assert run.finish() == 0
    (row,) = rows(tmp_path)
    assert row == {"step": 0, "lr": 0.01, "loss": 2.0, "factor": 0.5, "grad_norm": 2.0}
    assert model.weight.item() == pytest.approx(2 * (1 - 0.01 * 0.1) - 0.01, abs=1e-6)
    with run.ema_weights():  # first average: decay 2 / 11
        assert model.weight.item() == pytest.approx(2 * 2 / 11 + 1.988 * 9 / 11, abs=1e-6)
    assert model.weight.item() == pytest.approx(1.988, abs=1e-6)


def test_two_phases_make_two_updates_in_one_row(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=3, driver={"two_phases": True})
    for row in rows(tmp_path):
        assert {"first_loss", "second_loss", "first_grad_norm", "second_grad_norm", "position"} < set(row)
        assert row["first_loss"] != row["second_loss"]
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert state(tmp_path, 3)["optimizer"][0]["step"] == 6


def test_learning_rate_by_hand() -> None:
    cosine = RunConfig(max_train_steps=10, lr_warmup_steps=2, lr_scheduler="cosine")
    assert [lr_factor(cosine, step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert lr_factor(cosine, 6) == pytest.approx(0.5)
    assert lr_factor(cosine, 9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert lr_factor(RunConfig(max_train_steps=10), 9) == 1.0
    assert lr_factor(RunConfig(max_train_steps=2, lr_warmup_steps=4), 1) == 0.5


@pytest.mark.parametrize(
    ("lr_scheduler", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_courses_of_the_learning_rate(lr_scheduler: Any, expected: list[float]) -> None:
    config = RunConfig(max_train_steps=6, lr_warmup_steps=2, lr_scheduler=lr_scheduler)
    assert [lr_factor(config, step) for step in range(6)] == pytest.approx(expected)


def test_the_learning_rate_is_the_users_or_that_of_the_program(tmp_path: Path) -> None:
    train(tmp_path / "none", max_train_steps=1, learning_rate=None)
    train(tmp_path / "given", max_train_steps=1, learning_rate=3e-3)
    assert [rows(tmp_path / name)[0]["lr"] for name in ("none", "given")] == [1e-5, 3e-3]


def test_adamw_is_the_configured_one(tmp_path: Path) -> None:
    changes = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-3, "adam_weight_decay": 0.1}
    run = Run(run_config(tmp_path, decay_vectors=False, **changes), driver="toy", config_text="")
    run.prepare(nn.Linear(2, 1), learning_rate=1.0)
    matrix, vector = run._optimizer.param_groups
    assert (matrix["betas"], matrix["eps"], matrix["lr"]) == ((0.5, 0.75), 1e-3, 1e-2)
    assert (matrix["weight_decay"], vector["weight_decay"]) == (0.1, 0.0)
    assert [weight.ndim for group in (matrix, vector) for weight in group["params"]] == [2, 1]


def test_rows_carry_the_schedule(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=4, lr_scheduler="cosine", learning_rate=0.1)
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-6)


def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    train(tmp_path / "bf16", max_train_steps=2, mixed_precision="bf16")
    train(tmp_path / "full", max_train_steps=2)
    losses = [rows(tmp_path / name)[0]["loss"] for name in ("bf16", "full")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(p.dtype == torch.float32 for p in state(tmp_path / "bf16", 2)["parameters"].values())


# Stopping and resuming


def test_resume_equals_straight(tmp_path: Path) -> None:
    noisy = {"local_noise": True, "remembers": True}  # the loss depends on what the driver itself saved
    hard = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 10}
    train(tmp_path / "straight", driver=noisy, **hard)
    assert train(tmp_path / "broken", driver=noisy | {"signal_at": 4}, **hard) == 128 + signal.SIGTERM
    assert [row["step"] for row in rows(tmp_path / "broken")] == [0, 1, 2, 3, 4]
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path / "broken")] == ["step_000005"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tmp_path / "broken", driver=noisy, resume_from_checkpoint="latest", **hard) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "broken", 10)


def test_killed_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    changes = {"max_train_steps": 40, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    train(tmp_path / "straight", driver={"local_noise": True}, **changes)
    output = tmp_path / "killed"
    flags = "--max-train-steps 40 --checkpointing-steps 1 --checkpoints-total-limit 3 --train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-2 --threads 1 --ema-decay 0.9"
    command = [sys.executable, TOY, "--local-noise", "--output-dir", str(output), *flags.split()]
    command += ["--resume-from-checkpoint", "latest", "--sleep", "0.02"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    moments = random.Random(0)
    for kill in range(3):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        wait_for_rows(output, 2 + 10 * kill, process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it was killed"
    (output / ".step_000099.tmp-4194305").mkdir()  # as a kill in the middle of a save leaves it
    train(output, resume_from_checkpoint="latest", driver={"local_noise": True}, **changes)
    assert_same_run(tmp_path / "straight", output, 40)
    assert sorted(p.name for p in output.glob("step_*")) == ["step_000038", "step_000039", "step_000040"]
    assert not list(output.glob(".*")), "leftovers are removed"


def wait_for_rows(output: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    path = output / "metrics.jsonl"
    end = time.monotonic() + 300
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None, "stopped before it was killed"
        assert time.monotonic() < end, "trained nothing in five minutes"
        time.sleep(0.005)


def test_second_signal_kills_and_repeats_do_not(tmp_path: Path) -> None:
    run = Run(run_config(tmp_path), driver="toy", config_text="")
    run.prepare(nn.Linear(1, 1), learning_rate=1e-5)
    killed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: killed.append(number))
    try:
        for _ in run.steps():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # the same request, delivered twice
            for _ in run.passes():
                with run.accumulate():
                    run.update(next(run._module.parameters()).sum())
            assert run.interrupted
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert killed == [signal.SIGTERM], "the handlers of before must be back"
    assert run.finish() == 143


def test_resume_of_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    train(tmp_path)
    before = rows(tmp_path)
    stamp = (tmp_path / "step_000008" / "state.pt").stat().st_mtime_ns
    assert train(tmp_path, resume_from_checkpoint="latest") == 0
    assert rows(tmp_path) == before
    assert (tmp_path / "step_000008" / "state.pt").stat().st_mtime_ns == stamp


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    train(tmp_path / "straight", max_train_steps=6)
    train(tmp_path / "torn", max_train_steps=6, driver={"signal_at": 3})
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    train(tmp_path / "torn", max_train_steps=6, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "straight", tmp_path / "torn", 6)


def test_a_spoilt_metrics_line_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "[]", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        train(tmp_path, resume_from_checkpoint="latest")


def test_resume_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "straight", checkpointing_steps=2, checkpoints_total_limit=0)
    train(tmp_path / "back", checkpointing_steps=2, checkpoints_total_limit=0)
    (tmp_path / "back" / "notes.txt").write_text("mine")
    source = tmp_path / "back" / "step_000004"
    with pytest.raises(ValueError, match="does not lead to"):
        train(
            tmp_path / "back", checkpointing_steps=2, checkpoints_total_limit=0, resume_from_checkpoint=source
        )
    train(
        tmp_path / "back",
        checkpointing_steps=2,
        checkpoints_total_limit=0,
        resume_from_checkpoint=source,
        overwrite_output_dir=True,
    )
    assert_same_run(tmp_path / "straight", tmp_path / "back", 8)
    train(tmp_path / "branch", resume_from_checkpoint=source)
    assert [row["step"] for row in rows(tmp_path / "branch")] == [4, 5, 6, 7]
    train(tmp_path / "back", max_train_steps=1, overwrite_output_dir=True)
    left = {p.name for p in (tmp_path / "back").iterdir()}
    assert left == {"config.yaml", "metrics.jsonl", "tensorboard", "step_000001", "rank0.pt", "notes.txt"}


@pytest.mark.parametrize(
    ("changes", "driver", "message"),
    [
        ({}, {"width": 5}, r"0\.weight was \(4, 3\), is \(5, 3\)"),
        ({"seed": 3}, {}, "seed was 0, is 3"),
        ({"gradient_accumulation_steps": 3}, {}, "batch x accumulation x processes was 4, is 6"),
        ({"ema_decay": 0.0}, {}, "use of ema_decay was True, is False"),
    ],
)
def test_resume_with_other_settings_is_refused(
    tmp_path: Path, changes: dict[str, Any], driver: dict[str, Any], message: str
) -> None:
    train(tmp_path, max_train_steps=1)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, resume_from_checkpoint="latest", driver=driver, **changes)


def test_the_drivers_own_settings_must_not_change(tmp_path: Path) -> None:
    def open_run(**settings: object) -> Run:
        run = Run(
            run_config(tmp_path, resume_from_checkpoint="latest"),
            driver="toy",
            config_text="",
            settings=settings,
        )
        run.prepare(nn.Linear(1, 1), learning_rate=1e-5)
        return run

    first = open_run(iterations=3, prompts="a.txt")
    assert first.resumed_state == {}
    first.save(-1, state={"best": 0.5, "seen": ["a", "b"]})
    again = open_run(iterations=3, prompts="a.txt")
    assert (again.start, again.resumed) == (0, True)
    assert again.resumed_state == {"best": 0.5, "seen": ["a", "b"]}
    with pytest.raises(ValueError, match=r"iterations was 3, is 4"):
        open_run(iterations=4, prompts="a.txt")
    with pytest.raises(ValueError, match=r"prompts was a\.txt, is absent"):
        open_run(iterations=3)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_earlier_run_goes_when_all_of_the_new_one_has_loaded(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=2)
    (tmp_path / "iteration_01").mkdir()
    before = files_of(tmp_path)
    new = Run(
        run_config(tmp_path, overwrite_output_dir=True),
        driver="toy",
        config_text="new: 1\n",
        driver_files=("iteration_*",),
    )
    with pytest.raises(AssertionError, match="float32"):  # as a model that is not what it should be
        new.prepare(nn.Linear(1, 1).double(), learning_rate=1e-5)
    assert files_of(tmp_path) == before
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        Run(run_config(tmp_path, seed=1, resume_from_checkpoint="latest"), driver="toy", config_text="")
    assert files_of(tmp_path) == before
    assert (tmp_path / "iteration_01").is_dir()
    new.prepare(nn.Linear(1, 1), learning_rate=1e-5)
    assert "new: 1" in (tmp_path / "config.yaml").read_text()
    assert not rows(tmp_path)
    assert not list(tmp_path.glob("step_*"))
    assert not (tmp_path / "iteration_01").exists(), "the driver's own files go, too"
    assert (tmp_path / "rank0.pt").is_file(), "others stay"


def test_current_hyperparameters_apply_after_resume(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=2)
    run = Run(
        run_config(tmp_path, adam_weight_decay=0.5, resume_from_checkpoint="latest"),
        driver="toy",
        config_text="",
    )
    run.prepare(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), learning_rate=1e-5)
    assert run.start == 2
    assert run._optimizer.param_groups[0]["weight_decay"] == 0.5


# Numbers that are not finite


@pytest.mark.parametrize(("setting", "what"), [("nan_at", "loss"), ("inf_gradient_at", "gradient norm")])
def test_a_number_that_is_not_finite_stops_at_its_step(tmp_path: Path, setting: str, what: str) -> None:
    with pytest.raises(FloatingPointError, match=f"^{what} at step 3, rank 0, learning rate 0.01 is nan"):
        train(tmp_path, checkpointing_steps=1, driver={setting: 3})
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert checkpoint.find_checkpoints(tmp_path)[-1].name == "step_000003"
    assert all(p.isfinite().all() for p in state(tmp_path, 3)["parameters"].values())


def test_skipped_updates_stop_the_run_when_they_do_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} gradients overflowed fp16, up to step 49"):
        train(tmp_path, max_train_steps=60)


def train_with_scaler(output: Path, *, bad: set[int], **changes: Any) -> Run:
    """Train a weight under a loss scaler on the CPU, as fp16 has it on a GPU; `bad` steps have infinite gradients."""
    run = Run(
        run_config(
            output, gradient_accumulation_steps=1, checkpointing_steps=1, checkpoints_total_limit=0, **changes
        ),
        driver="toy",
        config_text="",
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    run.config = dataclasses.replace(
        run.config, mixed_precision="fp16"
    )  # `check` lets it through on a GPU only
    run._accelerator.scaler, run._accelerator.native_amp = scaler, True
    run._accelerator.state._mixed_precision = "fp16"
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    run.prepare(module, learning_rate=1e-5)
    for step in run.steps():
        with run.accumulate():
            x = torch.stack([torch.randn(3, generator=run.generator(i)) for i in run.image_indices(step, 0)])
            loss = (nn.functional.linear(x, module.weight, module.bias) - 1).square().mean()
            run.update(loss + 0 * torch.sqrt(0 * loss) if step in bad else loss)
        run.save(step)
    run.finish()
    return run


def test_resume_restores_the_loss_scaler_and_the_count_of_skipped_updates(tmp_path: Path) -> None:
    # Three good updates double the scale, a bad one halves it: at 5 updates the scale is 256 and one good update is
    # counted, at 7 it is 128 and one of the two bad ones in a row at the end is behind.
    bad = {3, 6, 7}
    train_with_scaler(tmp_path / "straight", bad=bad)
    assert [row["skipped_updates"] for row in rows(tmp_path / "straight")] == [0, 0, 0, 1, 1, 1, 2, 3]
    assert state(tmp_path / "straight", 8)["skipped"] == (3, 2)
    scales = [state(tmp_path / "straight", updates)["scaler"]["scale"] for updates in range(1, 9)]
    assert scales == [256, 256, 512, 256, 256, 256, 128, 64]
    for updates in (5, 7):
        broken = tmp_path / f"broken_{updates}"
        shutil.copytree(tmp_path / "straight", broken)
        for later in range(updates + 1, 9):
            shutil.rmtree(broken / f"step_{later:06d}")
        run = train_with_scaler(broken, bad=bad, resume_from_checkpoint="latest")
        assert run.start == updates
        assert rows(broken) == rows(tmp_path / "straight")
        assert_same_state(state(broken, 8), state(tmp_path / "straight", 8))


@pytest.mark.gpu
def test_fp16_skips_an_infinite_gradient(tmp_path: Path) -> None:
    train(tmp_path, mixed_precision="fp16", driver={"inf_gradient_at": 3})
    skipped = [row["skipped_updates"] for row in rows(tmp_path)]
    assert skipped[-1] - skipped[2] == 1


# Several processes


def test_two_processes_equal_one_with_twice_the_batch_also_after_a_stop(tmp_path: Path) -> None:
    train(tmp_path / "one", train_batch_size=2, gradient_accumulation_steps=2)
    output = tmp_path / "two"
    flags = "--max-train-steps 8 --train-batch-size 1 --gradient-accumulation-steps 2 --learning-rate 1e-2 --threads 1 --ema-decay 0.9 --resume-from-checkpoint latest --passes 1 2"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = (*torchrun, TOY, "--output-dir", str(output), *flags.split())
    # One process gets a signal: both must stop after the same update.
    stopped = launch(*command, "--signal-at", "3", "--signal-rank", "1", home=tmp_path)
    assert stopped.returncode != 0
    assert [p.name for p in checkpoint.find_checkpoints(output)] == ["step_000004"], stopped.stderr
    done = launch(*command, home=tmp_path)
    assert done.returncode == 0, done.stderr

    assert "processes 2" in (output / "config.yaml").read_text()
    ranks = [torch.load(output / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_state(*[list(weights.values()) for weights in ranks])
    for one, two in zip(rows(tmp_path / "one"), rows(output), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    one, two = state(tmp_path / "one", 8)["parameters"], state(output, 8)["parameters"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)


def test_accelerate_launch_without_a_config_file(tmp_path: Path) -> None:
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--cpu")
    flags = ("--max-train-steps", "2", "--threads", "1")
    done = launch(*accelerate, TOY, "--output-dir", str(tmp_path / "run"), *flags, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path / "run")] == ["step_000002"]
    assert len(rows(tmp_path / "run")) == 2


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    """`python FILE`, as in README: nothing stands before the program's own first line."""
    flags = ("--max-train-steps", "0", "--model", "m", "--prompts", "p.txt")
    done = launch(sys.executable, str(ROOT / "finetune" / "refl.py"), *flags, home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("refl.py: error: --max-train-steps is 0; it must be at least 1")


# What is refused before any work


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 0},
        {"train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"learning_rate": -1e-5},
        {"learning_rate": math.nan},
        {"seed": -1},
        {"lr_warmup_steps": -1},
        {"checkpointing_steps": -1},
        {"checkpoints_total_limit": -1},
        {"adam_weight_decay": -0.1},
        {"adam_beta1": 1.0},
        {"adam_beta2": -0.1},
        {"adam_epsilon": 0.0},
        {"max_grad_norm": 0.0},
        {"ema_decay": 1.0},
    ],
)
def test_illegal_settings_are_named(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is .*must be"):
        RunConfig(**changes)


def test_every_setting_has_a_help_text() -> None:
    source = (ROOT / "preftune" / "training" / "run_config.py").read_text()
    for field in dataclasses.fields(RunConfig):
        after = source.split(f"\n    {field.name}: ")[1].splitlines()[1]
        assert after.strip().startswith('"""'), field.name


def test_check_refuses_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        check(run_config(tmp_path, mixed_precision="fp16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bitsandbytes"):
        check(run_config(tmp_path, use_8bit_adam=True))


def test_check_refuses_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check(run_config(tmp_path / "file" / "run"))
    with pytest.raises(ValueError, match="is no checkpoint"):
        check(run_config(tmp_path / "run", resume_from_checkpoint=Path("atuo")))
    with pytest.raises(ValueError, match="give one of them"):
        run_config(tmp_path / "run", resume_from_checkpoint="latest", overwrite_output_dir=True)
    check(
        run_config(tmp_path / "run", resume_from_checkpoint="latest")
    )  # nothing there yet: starts from the beginning


def test_an_earlier_run_is_protected(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"already holds a run.*--resume-from-checkpoint latest.*--overwrite-output-dir.*--output-dir",
    ):
        train(tmp_path)
    assert train(tmp_path, max_train_steps=2, overwrite_output_dir=True) == 0
    assert len(rows(tmp_path)) == 2


def test_misuse_by_a_driver_is_caught(tmp_path: Path) -> None:
    run = Run(run_config(tmp_path), driver="toy", config_text="")
    model = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="no parameter that requires a gradient"):
        run.prepare(nn.Linear(1, 1).requires_grad_(False), learning_rate=1e-5)
    with pytest.raises(AssertionError, match="float32"):
        run.prepare(nn.Linear(1, 1).double(), learning_rate=1e-5)
    prepared = run.prepare(model, learning_rate=1e-5)

    def once_per_step() -> None:
        for _ in run.steps():
            with run.accumulate():
                run.update(prepared(torch.ones(1, 1)).sum())

    with pytest.raises(AssertionError, match="once in each of the passes"):
        once_per_step()


def test_log_joins_the_row_until_it_is_saved(tmp_path: Path) -> None:
    run = Run(
        run_config(tmp_path, max_train_steps=1, gradient_accumulation_steps=1),
        driver="toy",
        config_text="a: 1\n",
    )
    prepared = run.prepare(nn.Linear(1, 1), learning_rate=1e-5)
    for step in run.steps():
        with run.accumulate():
            run.update(prepared(torch.ones(1, 1)).sum())
        run.log(step, early=1.0, hole=math.nan)
        run.save(step)
        run.log(step, late=2.0)
    run.finish()
    first, second = rows(tmp_path)
    assert (first["early"], first["hole"]) == (1.0, None)
    assert second == {"step": 0, "late": 2.0}
    header, *text = (tmp_path / "config.yaml").read_text().splitlines()
    assert header.startswith("# driver toy, commit ")
    assert text == ["a: 1"]
    assert list((tmp_path / "tensorboard").iterdir())
