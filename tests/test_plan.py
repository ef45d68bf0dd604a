"""The plan: what is counted on fake tensors must be what a real device would do, and flags that it names must be the drivers'."""

import importlib
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from benchmarks import count, drivers, plan, plan_table, prediction
from benchmarks.cards import CARDS
from benchmarks.counter import BLOCK, Counter, Kernel, cuda_autocast, largest, lean_steps, totals
from benchmarks.setting import FORWARD, GENERATED, SCORED, THROUGH_PIXELS, Setting
from preftune import cli, families
from preftune.lora.config import LoRA
from preftune.noise import Prediction
from preftune.training.weight_copy import WeightCopy

MIB = 2**20


def test_counter_knows_the_peak_of_a_backward_pass() -> None:
    """Two layers, all tensors of 1 MiB: in the backward pass of ReLU there are two weights, x, ReLU's output, a weight's gradient,
    and the gradients of ReLU's output and input; the loss and its gradient have a block each.
    """
    with FakeTensorMode(), Counter() as counter:
        layers = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 512, bias=False))
        x = torch.empty(512, 512)
        assert counter.now == 3 * MIB
        counter.restart()
        loss = layers(x).sum()
        assert counter.now == 4 * MIB + BLOCK  # ReLU's output is kept, its input and the last output are not
        loss.backward()
    assert counter.peak == 7 * MIB + 2 * BLOCK


def test_counter_forgets_what_is_gone() -> None:
    with FakeTensorMode(), Counter() as counter:
        kept = torch.empty(MIB, dtype=torch.uint8)
        torch.empty(3 * MIB, dtype=torch.uint8)
        view = kept.view(2, -1)
        assert view.shape == (2, MIB // 2)
        assert counter.now == MIB
        assert counter.peak == 4 * MIB


def test_kernels_are_operations_that_are_no_views() -> None:
    with FakeTensorMode(), Counter() as counter:
        x = torch.empty(64, 32)
        product = x.T[:, :16].contiguous() @ torch.empty(16, 8)
        product.add_(1).to(torch.bfloat16)
    names = [kernel.name for kernel in counter.kernels]
    assert names == ["clone", "mm", "add_", "_to_copy"]
    assert counter.kernels[1].flop == 2 * 32 * 16 * 8
    assert (counter.kernels[1].read, counter.kernels[1].written) == (4 * (32 * 16 + 16 * 8), 4 * 32 * 8)
    assert totals(counter.kernels)["casts"] == 1
    assert largest(counter.kernels, 1)[0][0] == "clone float32"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_counts_the_same(mode: type[torch.no_grad]) -> None:
    """In inference mode a convolution, a linear layer or attention comes as one operation without a formula."""

    def kernels() -> list[str]:
        with FakeTensorMode(), Counter() as counter, mode():
            x = torch.empty(1, 4, 8, 8)
            x = nn.Conv2d(4, 8, 3)(x).flatten(2)
            x = nn.Linear(36, 16)(x)[:, None]
            counter.restart()
            nn.functional.scaled_dot_product_attention(x, x, x)
            nn.functional.linear(x[0, 0], torch.empty(16, 16))
        return [kernel.name for kernel in counter.kernels if kernel.flop]

    assert kernels() == ["_scaled_dot_product_flash_attention_for_cpu", "mm"]


def test_autocast_has_the_rules_of_cuda() -> None:
    """On CUDA norms are computed in float32, on the CPU in the dtype of their input; afterwards the CPU has its own rule again."""
    x, norm = torch.ones(2, 4, 3, dtype=torch.bfloat16), nn.GroupNorm(2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with cuda_autocast():
            assert norm(x).dtype == torch.float32
            assert (x**2).dtype == torch.float32
            assert nn.functional.silu(x).dtype == torch.bfloat16
        assert norm(x).dtype == torch.bfloat16
    with cuda_autocast():
        assert norm(x).dtype == torch.bfloat16  # without autocast


@pytest.mark.slow
def test_a_pass_with_gradient_has_many_kernels() -> None:
    """Of Stable Diffusion's UNet; published are 1,474 kernels and 758 casts."""
    step = totals(count.one_call(Setting(method="pretrain", train_batch_size=1), "step"))
    assert 2100 < step["kernels"] < 2250
    assert 900 < step["casts"] < 950


def test_a_lean_pass_has_few_kernels() -> None:
    """Of Stable Diffusion's UNet: casts and the LoRA's products are gone."""
    lean = totals(count.one_call(Setting(method="pretrain", train_batch_size=1), "lean"))
    assert lean["kernels"] <= 760
    assert lean["casts"] <= 10
    assert 1600 / 2 < lean["gflop"] < 1610 / 2


def test_seconds_are_bounded_by_the_card_and_the_host() -> None:
    card = CARDS["H100"]
    product = Kernel("mm", torch.bfloat16, flop=989 * 10**9, read=0, written=0, cast=False)
    best, modelled = prediction.seconds([product], card)
    assert best == pytest.approx(1e-3)
    assert modelled == pytest.approx(prediction.UNCOUNTED * 1e-3 / prediction.MATMUL)
    assert prediction.seconds([product] * 2, card, replayed=True)[1] == pytest.approx(2 * modelled)
    copy = Kernel("clone", torch.float32, flop=0, read=int(1.675e9), written=int(1.675e9), cast=False)
    assert prediction.seconds([copy], card)[0] == pytest.approx(1e-3)
    small = Kernel("add", torch.float32, flop=0, read=4, written=4, cast=False)
    assert prediction.seconds([small] * 10, card)[1] == pytest.approx(10 * prediction.LAUNCH)
    replayed = prediction.seconds([small] * 10, card, replayed=True)[1]
    assert replayed == pytest.approx(10 * prediction.UNCOUNTED * prediction.SHORTEST), (
        "a graph costs the host nothing"
    )


class Square:
    """A family whose network is x @ x."""

    def lean(self) -> AbstractContextManager[None]:
        return torch.no_grad()

    def predict(self, x: torch.Tensor) -> Prediction:
        return Prediction(x @ x, x + 1, x.relu())


def test_steps_without_gradient_are_counted_once() -> None:
    """And as often as there are; a call with gradient, or without it but not lean, is what it is."""

    def run(family: Square, x: torch.Tensor) -> None:
        with family.lean():
            for _ in range(3):
                x = family.predict(x).output
        with torch.no_grad():
            family.predict(x)
        family.predict(x.requires_grad_()).x0.sum().backward()

    family = Square()
    with FakeTensorMode(), Counter() as counter:
        run(family, torch.empty(512, 512))
        names, peak = [kernel.name for kernel in counter.kernels], counter.peak
    with FakeTensorMode(), Counter() as counter:
        with lean_steps(family, counter) as lean:
            run(family, torch.empty(512, 512))
        assert lean.number == 3
        assert [kernel.name for kernel in lean.kernels] == ["mm", "add", "relu"] == names[:3]
        assert [kernel.name for kernel in counter.kernels] == names[9:]
        assert counter.peak == peak
        phase = prediction.phase(counter, family, lambda: run(family, torch.empty(512, 512)), 1, times=2.0)  # type: ignore[arg-type]
        assert (phase.steps, len(phase.step), len(phase.rest)) == (6, 3, len(names) - 9)
    assert "predict" not in vars(family), "as it was"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tflop"), [("draft", 92.2), ("flowbp", 63.2)])
def test_gradients_through_steps_take_the_memory_of_one(method: plan_table.Method, tflop: float) -> None:
    """What benchmarks/direct_memory.py counts of an image at 512 px, with a LoRA and all checkpointing."""
    found, _ = prediction.count_update(Setting(method=method, train_batch_size=1))
    assert found.peak / prediction.GIB == pytest.approx(5.84, abs=0.02)
    assert found.per_image()["tflop_per_image"] == pytest.approx(tflop, rel=0.01)


@pytest.mark.slow
def test_pairs_of_stable_diffusion_fit_into_10_gb() -> None:
    """Two at 512 px with a LoRA: one pass without gradient, the reference, and one with it."""
    found, _ = prediction.count_update(Setting(method="dpo"))
    assert 6 < found.peak / prediction.GIB < 7
    plain, _ = prediction.count_update(Setting(method="pretrain", train_batch_size=4))
    assert plain.peak < 1.05 * found.peak < 1.1 * plain.peak, (
        "four images; what the reference needs is gone before"
    )
    work = [totals([*one.step, *one.rest])["gflop"] for one in (found, plain)]
    assert 1.3 < work[0] / work[1] < 1.4, (
        "a third more: the forward pass of the reference beside one with its backward pass"
    )


@pytest.mark.parametrize(("method", "forwards"), [("awm", 3), ("nft", 3), ("ddpo", 2)])
def test_an_update_asks_each_policy_once(
    method: plan_table.Method, forwards: int, tmp_path: Path, cpu: None
) -> None:
    """AWM and DiffusionNFT the earlier policy, the model before tuning, and the one that learns; DDPO this alone, with guidance."""
    family: Any = families.load(tiny.pipeline_folder(tmp_path / "model"))
    weights = [weight for weight in family.trainable(LoRA(), 0).parameters() if weight.requires_grad]
    setting = Setting(method=method, resolution=str(tiny.PIXELS), train_batch_size=2)
    earlier = WeightCopy(weights) if method in FORWARD else None
    loaded = drivers.Loaded(setting=setting, family=family, scorer=None, earlier=earlier)
    x = torch.zeros(2, *family.latent_shape(setting.size()))
    with Counter() as counter:
        cond = family.encode(["a", "b"])
        counter.restart()
        with torch.no_grad(), family.reference():
            family.predict(x, torch.ones(2, dtype=torch.int64), cond)
        one = totals(counter.kernels)["gflop"]
        loss = drivers.loss_of(loaded, tmp_path)
        counter.restart()
        value = loss()
        assert forwards <= totals(counter.kernels)["gflop"] / one < 1.2 * forwards
    assert any(grad.abs().sum() > 0 for grad in torch.autograd.grad(value, weights))
    if earlier is not None and method == "nft":
        for weight in earlier.weights:
            weight.fill_(0.1)
        assert loss().item() != pytest.approx(value.item(), rel=1e-4), "the earlier policy is asked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "batch", "gib", "tflop"),
    [("awm", 1, 4.93, 3.385), ("nft", 1, 4.93, 3.385), ("ddpo", 2, 8.20, 3.555)],
)
def test_what_learns_from_images_of_its_own(
    method: plan_table.Method, batch: int, gib: float, tflop: float
) -> None:
    """Of an image or pair at 512 px with a LoRA; the scorer, 1.7 GiB, is in memory besides. ddpo has two samples of a pair, as dpo has."""
    found, _ = prediction.count_update(Setting(method=method, train_batch_size=batch))
    assert found.peak / prediction.GIB == pytest.approx(gib, abs=0.02)
    assert found.per_image()["tflop_per_image"] == pytest.approx(tflop, rel=0.01)


@pytest.mark.parametrize(
    "method",
    ["refl", "raft", "pretrain", "dpo", "draft", "drtune", "flowbp", "ddpo", "awm", "nft"],
)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_flags_that_a_plan_names_are_the_drivers(
    method: plan_table.Method, train: plan_table.Train
) -> None:
    """And they say the same: the driver that gets them is the one that was planned."""
    driver = importlib.import_module(f"finetune.{method}")
    needed = dict.fromkeys(THROUGH_PIXELS, "--prompts p.txt --model m")
    needed |= dict.fromkeys(GENERATED, "--prompts p.txt --model m --rewards imagereward=1")
    needed |= dict.fromkeys(("pretrain", "dpo"), "--data d --model m")
    settings = list(plan_table.ladder("sd1", method, train))
    assert len(settings) >= 5
    for setting in (*settings, replace(settings[0], sample_batch_size=2)):
        words = " ".join([needed[method], *setting.flags()]).split()
        config = cli.parse(driver.Config, words)
        assert config.run.train_batch_size == setting.train_batch_size
        assert config.model.gradient_checkpointing == setting.checkpointed()
        assert config.model.train == train
        assert config.run.use_8bit_adam == setting.use_8bit_adam
        assert config.validation.sample.batch_size == setting.sample_batch_size
        if method in THROUGH_PIXELS:
            assert config.model.vae_checkpointing == setting.checkpointed()
        if method in SCORED:
            assert config.reward.reward_precision == setting.reward_precision


def test_an_update_is_counted_once_for_settings_that_do_not_change_it() -> None:
    one = Setting(method="awm", train_batch_size=8, checkpointing="on")
    for other in ({"sample_batch_size": 2}, {"reward_precision": "bf16"}):
        assert plan_table.basis(replace(one, **other), 8) == plan_table.basis(one, 8)  # type: ignore[arg-type]
    refl = Setting(reward_precision="bf16")
    assert plan_table.basis(refl, 2) == refl, "its scorer is part of the update"
    assert plan_table.basis(replace(one, method="raft"), 1).method == "pretrain"


def test_a_figure_between_two_batch_sizes() -> None:
    assert plan_table.between(1, lambda batch: batch**2) == 1
    assert plan_table.between(8, lambda batch: batch**2) == 64
    assert plan_table.between(2, lambda batch: 3 * batch + 1) == pytest.approx(7)
    assert plan_table.between(4, lambda batch: batch**2) > 16  # convex: no less than it is


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--train-batch-size 2 0", "--train-batch-size must be at least 1, got 0"),
        ("--resolution 510", "--resolution: resolution '510'"),
        ("--train lora full --lora.rank 8", "--lora settings do nothing with --train full"),
        ("--model sd3", "--model is 'sd3'; it must be sd1 or sdxl"),
        ("--late 0", "--late must be at least 1, got 0"),
        ("--measured nothing.json", "--output FILE: no such file or directory; make it anew"),
        ("--measured README.md", "--output FILE: it is not JSON; make it anew"),
        ("--output docs", "--output docs is a folder; name a file in it, as docs/result.json"),
        ("--table README.md/plan.md", "--table README.md/plan.md cannot be written: Not a directory"),
    ],
)
def test_wrong_flags_end_with_one_sentence(flags: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(cli.parse(plan.Config, flags.split()))
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_measured_rows_are_planned_as_they_were_measured(tmp_path: Path) -> None:
    base = {
        "loop": "ours", "model": "sd1", "precision": "bf16", "train": "lora", "checkpointing": "off", "compile": "off",
        "train_batch_size": 8, "late": 35, "peak_mib": 2048.0, "images_per_s": 4.0,
    }  # fmt: skip
    others = [{"loop": "published"}, {"model": "tiny"}, {"compile": "on"}]
    rows = [base, base | {"train": "full", "checkpointing": "on"}, *(base | other for other in others)]
    file = tmp_path / "refl_step.json"
    file.write_text(json.dumps({"hardware": "NVIDIA H100 80GB HBM3", "rows": rows}))
    pairs = plan.read_measured(file)
    assert [row for _, row in pairs] == rows[:2]
    first, second = (setting for setting, _ in pairs)
    assert (first.train_batch_size, first.late, first.reward_precision) == (8, 35, "bf16")
    assert not first.checkpointed()
    assert second.checkpointed()
    assert second.ema_decay > 0
    cards = {name: {"update": {"roofline": 9.0, "modelled": 5.0}} for name in CARDS}
    found = plan.compare(
        {"peaks_gib": {"update": 2.2}, "cards": cards}, base, "NVIDIA H100 80GB HBM3, torch 2.11"
    )
    assert found["peak_error"] == pytest.approx(0.1)
    assert found["time_error"] == pytest.approx(4 / 5 - 1)
    assert "time_error" not in plan.compare({"peaks_gib": {"update": 2.2}, "cards": cards}, base, "some CPU")
