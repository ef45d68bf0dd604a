"""ReFL: its loss by hand, its gradient against finite differences and a loop written here, and the driver's promises."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from finetune import refl
from preftune import families
from preftune.augment import shifted
from preftune.cli import dump
from preftune.families import Pretrained
from preftune.families.sd import SD
from preftune.families.tiny import SCHEDULER_CONFIG
from preftune.lora import tuning as lora
from preftune.lora.tuning import LoRA
from preftune.resolution import Resolution
from preftune.sampling import Sampling, sample
from preftune.training import validation
from preftune.training.checkpoint import find_checkpoints, read
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.run import RunConfig
from rewards import CARDS
from rewards.brightness import Brightness
from rewards.imagereward import ImageReward
from rewards.mix import Mix

pytestmark = pytest.mark.usefixtures("cpu")

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "two blue stars"]
SIZE, STEPS, LATE = 32, 5, 3


def config(root: Path, output: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> refl.Config:
    few = {
        "max_train_steps": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "threads": 1,
    }
    sampling = Sampling(num_inference_steps=4, guidance_scale=3.0, solver="pndm", resolution=str(SIZE))
    settings: dict[str, Any] = {
        "prompts": root / "prompts.txt",
        "reward_scale": 1.0,
        "num_inference_steps": STEPS,
        "window": (1, 3),
        "solver": "ddpm",
        "pretraining": "off",
        "data": root / "images",
        "model": model_config(root),
        "reward": RewardConfig(rewards=("brightness=1",)),
        "validation": ValidationConfig(sample=sampling),
        "run": RunConfig(output_dir=output, **{**few, **(run or {})}),
    }
    return refl.Config(**{**settings, **changes})


def model_config(root: Path, **changes: Any) -> ModelConfig:
    pretrained = Pretrained(model=str(root / "pipeline"))
    return ModelConfig(**{"pretrained": pretrained, "resolution": str(SIZE), **changes})


def rows(output: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in lines]


def state(output: Path, updates: int) -> dict[str, Any]:
    return read(output / f"step_{updates:06d}")


# The loss and its gradient


def test_loss_by_hand() -> None:
    # margin 2: relu(2 - r) is 2.5, 1, 0 (at the margin), 0 (beyond); the mean is 3.5 / 4.
    scores = torch.tensor([-0.5, 1.0, 2.0, 3.0], requires_grad=True)
    loss = refl.reward_loss(scores, margin=2.0, scale=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.0875)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.025, -0.025, 0, 0])


class Case:
    """A tiny Stable Diffusion in float64, all of whose trained weights matter, and a curved reward of its pixels."""

    def __init__(self, folder: Path, prediction: str, lora: LoRA | None, **changes: Any) -> None:
        self.config = config(folder, folder, **changes)
        self.family = SD(
            unet=tiny.unet(),
            vae=tiny.vae(),
            text_encoder=tiny.text_encoder(),
            tokenizer=tiny.tokenizer(folder / "tokenizer"),
            scheduler_config={**SCHEDULER_CONFIG, "prediction_type": prediction},
        )
        self.family.trainable(lora, seed=0)
        self.family.to("cpu", torch.float64)
        draws = torch.Generator().manual_seed(3)
        self.weights = [weight for weight in self.family.unet.parameters() if weight.requires_grad]
        for weight in self.weights:
            noise = 0.05 * torch.randn(weight.shape, generator=draws, dtype=torch.float64)
            weight.data = weight.data.double() + noise  # a LoRA begins with B = 0, where A has no gradient
        self.filters = torch.randn(4, 3, 3, 3, generator=draws, dtype=torch.float64)
        self.direction = [torch.randn(w.shape, generator=draws, dtype=torch.float64) for w in self.weights]

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(10 + i) for i in range(len(PROMPTS))]

    def loss(self, pixels: Tensor) -> Tensor:
        scores = torch.tanh(F.conv2d(pixels, self.filters, stride=2)).mean((1, 2, 3))
        return refl.reward_loss(scores, margin=2.0, scale=1e3)

    def driver_loss(self, late: int = LATE) -> Tensor:
        return self.loss(self.late_pixels(late))

    def late_pixels(self, late: int = LATE) -> Tensor:
        taken = refl.late_step(
            self.family, PROMPTS, self.generators(), late, Resolution(SIZE, SIZE), self.config
        )
        return self.family.decode(taken.prediction.x0)

    def plain_loss(self, late: int = LATE, detach: bool = True) -> Tensor:
        """The same from the papers' formulas: no scheduler, no guidance batch, no shared code but the networks."""
        family, guidance = self.family, self.config.guidance_scale
        generators = self.generators()
        given, without = (family.encode(texts).positive["embeds"] for texts in (PROMPTS, [""] * len(PROMPTS)))
        alphas_cumprod = (
            1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        ).cumprod(0)
        stride, ddim = 1000 // STEPS, self.config.solver != "ddpm"  # euler is ddim in other coordinates
        x = torch.cat([torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=g) for g in generators]).double()
        for index in range(late + 1):
            t = stride * (STEPS - 1 - index) + ddim  # ddpm has no offset
            a, b = alphas_cumprod[t], alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0)
            output = family.unet(x, t, given).sample
            if guidance != 1:
                plain = family.unet(x, t, without).sample
                output = plain + guidance * (output - plain)
            if family.prediction_type == "epsilon":
                eps, x0 = output, (x - (1 - a).sqrt() * output) / a.sqrt()
            else:
                eps, x0 = a.sqrt() * output + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * output
            if index == late:
                return self.loss(family.vae.decode(x0 / 0.18215).sample / 2 + 0.5)
            if ddim:
                x = b.sqrt() * x0 + (1 - b).sqrt() * eps
            else:  # Ho et al. 2020, eq. 7
                alpha = a / b
                noise = torch.cat([torch.randn(1, *x.shape[1:], generator=g).double() for g in generators])
                x = (b.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - b) * x) / (1 - a)
                x = x + ((1 - b) / (1 - a) * (1 - alpha)).sqrt() * noise
            x = x.detach() if detach else x
        raise AssertionError

    def slope(self, loss: Tensor) -> float:
        """The derivative along the direction, by backward."""
        gradient = torch.autograd.grad(loss, self.weights)
        return sum(float((g * d).sum()) for g, d in zip(gradient, self.direction, strict=True))

    def finite_slope(self, late: int = LATE, h: float = 1e-5) -> float:
        """The same by central differences, the weights moved in the late step alone."""

        def moved(amount: float) -> float:
            calls = 0

            def shift(by: float) -> None:
                with torch.no_grad():
                    for weight, way in zip(self.weights, self.direction, strict=True):
                        weight += by * way

            def before(module: nn.Module, args: object) -> None:
                shift(amount if calls == late else 0.0)

            def after(module: nn.Module, args: object, output: object) -> None:
                nonlocal calls
                shift(-amount if calls == late else 0.0)
                calls += 1

            handles = [
                self.family.unet.register_forward_pre_hook(before),
                self.family.unet.register_forward_hook(after),
            ]
            loss = float(self.driver_loss(late))
            for handle in handles:
                handle.remove()
            assert calls == late + 1, "one pass of the network a step, none after the late one"
            return loss

        with torch.no_grad():
            return (moved(h) - moved(-h)) / (2 * h)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_gradient(
    lora: LoRA | None,
    prediction: str,
    solver: Literal["ddpm", "ddim", "euler"],
    guidance_scale: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The family returns float32 whatever its parts hold; differences need all of it in float64.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    normal = torch.randn

    def in_float32(*shape: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return normal(*shape, **rest).to(dtype or torch.float32)  # one stream of numbers for both loops

    case = Case(tmp_path, prediction, lora, solver=solver, guidance_scale=guidance_scale)
    monkeypatch.setattr(torch, "randn", in_float32)
    loss, plain = case.driver_loss(), case.plain_loss()
    slope = case.slope(loss)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert slope == pytest.approx(case.slope(plain), rel=1e-4), "the loop of this file disagrees"
    assert slope == pytest.approx(case.finite_slope(), rel=1e-5), "finite differences disagree"
    through = case.slope(case.plain_loss(detach=False))
    assert abs(through - slope) > 1e-3 * abs(slope), (
        "earlier steps would have counted: the test would not see it"
    )


def test_pixels_out_of_range_have_a_gradient(tmp_path: Path) -> None:
    case = Case(tmp_path, "epsilon", LoRA(rank=2))
    case.family.to("cpu", torch.float32)
    for weight in case.weights:
        weight.data = weight.data.float()
    for bias, inside in ((20.0, lambda pixels: pixels > 1), (-20.0, lambda pixels: pixels < 0)):
        case.family.vae.decoder.conv_out.bias.data.fill_(bias)
        pixels = case.late_pixels()
        assert inside(pixels).all()
        gradient = torch.autograd.grad(pixels.mean(), case.weights)
        assert all(part.abs().max() > 0 for part in gradient)


# The driver


def test_the_reward_is_the_mean_over_moved_copies(root: Path, tmp_path: Path) -> None:
    scorer = ImageReward.load(root / "scorer").eval()
    scorer.card = replace(CARDS["imagereward-tiny"], preprocess=scorer.config.preprocess)
    mix = Mix([scorer], {"imagereward-tiny": 2.0}, "none")
    pixels = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    three = config(root, tmp_path, jitter=5, jitter_copies=3)
    found, _ = refl.mean_reward(mix, pixels, PROMPTS, generators(), three)
    seen = generators()
    by_hand = [2 * scorer(shifted(pixels, seen, 5), PROMPTS) for _ in range(3)]
    torch.testing.assert_close(found, torch.stack(by_hand).mean(0))
    assert (by_hand[0] - by_hand[1]).abs().min() > 1e-4, "copies differ"
    flat, _ = refl.mean_reward(mix, pixels, PROMPTS, generators(), config(root, tmp_path, flatness=3.0))
    leaf = pixels.clone().requires_grad_()
    (slope,) = torch.autograd.grad(2 * scorer(leaf, PROMPTS).sum(), leaf)
    moved = pixels - 3 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(flat, 2 * scorer(moved, PROMPTS))
    assert (flat < 2 * scorer(pixels, PROMPTS)).all(), "downhill"
    as_published, _ = refl.mean_reward(mix, pixels, PROMPTS, generators(), config(root, tmp_path))
    torch.testing.assert_close(as_published, 2 * scorer(pixels, PROMPTS))


@torch.no_grad()
def test_the_noise_of_the_base_is_that_of_a_model_without_lora(tmp_path: Path) -> None:
    case, plain = (Case(tmp_path, "v_prediction", lora) for lora in (LoRA(rank=2), LoRA(rank=2)))
    for weight in plain.weights:
        weight.zero_()
    late = refl.late_step(case.family, PROMPTS, case.generators(), LATE, Resolution(SIZE, SIZE), case.config)
    base = refl.base_noise(case.family, late, case.config.guidance_scale)
    expected = plain.family.predict(late.x, late.t, late.cond, case.config.guidance_scale).eps
    torch.testing.assert_close(base, expected)
    assert (base - late.prediction.eps).abs().mean() > 1e-4
    again = case.family.predict(late.x, late.t, late.cond, case.config.guidance_scale).eps
    torch.testing.assert_close(again, late.prediction.eps, msg="the LoRA is on again")


def test_the_distance_to_the_base_holds_the_model_back(root: Path, tmp_path: Path) -> None:
    """0 before the first update; with a large weight less of it is left, and it is part of the loss."""
    found = {}
    for weight in (1e-9, 1e3):
        run = {"max_train_steps": 8, "learning_rate": 1e-2}
        refl.main(config(root, tmp_path / f"{weight:g}", base_distance=weight, run=run))
        found[weight] = rows(tmp_path / f"{weight:g}")
    assert found[1e3][0]["base_distance"] == pytest.approx(0, abs=1e-12)
    assert found[1e3][-1]["base_distance"] < 0.2 * found[1e-9][-1]["base_distance"]
    for weight, written in found.items():
        row = written[-1]
        assert row["loss"] == pytest.approx(2 - row["reward"] + weight * row["base_distance"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_distance": -1.0}, "--base-distance must be 0 or more and finite, got -1"),
        ({"base_distance": 1.0, "full": True}, "and --train full has none"),
    ],
)
def test_wrong_distances(changes: dict[str, Any], message: str, root: Path, tmp_path: Path) -> None:
    more = {"model": model_config(root, train="full")} if changes.pop("full", False) else {}
    with pytest.raises(ValueError, match=message):
        config(root, tmp_path, **changes, **more)


def test_the_late_step_is_chosen_from_the_window(root: Path, tmp_path: Path) -> None:
    refl.main(config(root, tmp_path, window=(1, 3), run={"max_train_steps": 6, "seed": 5}))
    generated = [row["late_step"] for row in rows(tmp_path)]
    # (seed, stream 3, 0, step, micro batch), as Run.rng says
    wanted = [int(np.random.default_rng((5, 3, 0, step, 0)).integers(1, 4)) for step in range(6)]
    assert generated == wanted
    assert set(wanted) == {1, 2, 3}, "choose a seed that reaches both ends"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_brightness_rises(train: Literal["lora", "full"], root: Path, tmp_path: Path) -> None:
    sampling = Sampling(num_inference_steps=STEPS, guidance_scale=1.0, solver="ddim", resolution=str(SIZE))
    refl.main(
        config(
            root,
            tmp_path,
            model=model_config(root, train=train),
            window=(2, 4),
            validation=ValidationConfig(sample=sampling),
            run={"max_train_steps": 20, "learning_rate": 1e-2 if train == "lora" else 1e-3},
        )
    )
    rewards = [row["reward"] for row in rows(tmp_path)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.01
    before, after = (
        json.loads((tmp_path / "samples" / f"step_{step:06d}" / "scores.json").read_text())["proxy"]
        for step in (0, 20)
    )
    assert all(new > old for old, new in zip(before, after, strict=True)), (
        "every validation image is brighter"
    )


def test_diffusers_generates_what_was_tuned(root: Path, tmp_path: Path) -> None:
    tuned = model_config(root, lora=LoRA(rank=4, alpha=8.0))
    settings = config(root, tmp_path, model=tuned, run={"learning_rate": 3e-2, "ema_decay": 0.9})
    refl.main(settings)
    sampling = settings.validation.sample
    family = families.load(root / "pipeline")
    (base,) = sample(family, PROMPTS, [0, 1], sampling)
    family.load_tuned(tmp_path / "lora")
    (ours,) = sample(family, PROMPTS, [0, 1], sampling)
    pipe = StableDiffusionPipeline.from_pretrained(root / "pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def generated(prompts: list[str]) -> Tensor:
        latents = [
            torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))
        ]
        return pipe(
            prompts,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            height=SIZE,
            width=SIZE,
            latents=torch.stack(latents),
            output_type="pt",
        ).images

    torch.testing.assert_close(generated(PROMPTS), base, atol=1e-4, rtol=0)
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(generated(PROMPTS), ours, atol=1e-4, rtol=0)
    assert (ours - base).abs().max() > 1e-2, "nothing was tuned"
    # What the driver itself generated at the end, with the weights in its memory; its files hold 8 bits.
    shown = validation.read(tmp_path, f"step_{settings.run.max_train_steps:06d}")
    assert shown is not None
    assert len(shown.prompts) == 8
    torch.testing.assert_close(
        generated(shown.prompts), torch.stack(shown.images()), atol=0.5 / 255 + 1e-4, rtol=0
    )


def test_accumulation_equals_a_larger_batch(root: Path, tmp_path: Path) -> None:
    for name, batch, accumulation in (("a", 1, 4), ("b", 4, 1)):
        run = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-4}
        refl.main(config(root, tmp_path / name, pretraining="sum", run=run))
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, other = (state(tmp_path / name, 4)["parameters"] for name in ("a", "b"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_the_three_ways_of_pretraining(root: Path, tmp_path: Path) -> None:
    for name in ("off", "sum", "alternate"):
        refl.main(config(root, tmp_path / name, pretraining=name, run={"max_train_steps": 2}))
    off, both, alternate = (rows(tmp_path / name) for name in ("off", "sum", "alternate"))
    steps = [state(tmp_path / name, 2)["optimizer"][0]["step"] for name in ("off", "sum", "alternate")]
    assert steps == [2, 2, 4]
    extra = {"pretrain_loss", "pretrain_grad_norm"}
    assert set(off[0]) == {"step", "lr", "loss", "reward", "late_step", "grad_norm"}
    assert set(both[0]) == set(off[0])
    assert set(alternate[0]) == set(off[0]) | extra
    # Before any update the weights are the same three times.
    assert both[0]["loss"] == pytest.approx(off[0]["loss"] + alternate[0]["pretrain_loss"], rel=1e-5)
    assert both[0]["reward"] == pytest.approx(off[0]["reward"], rel=1e-6)
    assert alternate[0]["reward"] != off[0]["reward"], "the reward update comes after the pre-training update"


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_score_that_is_not_finite_stops_the_run(
    factor: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also an infinite one, of which the loss, beyond its margin, knows nothing."""
    score: Callable[..., Tensor] = Brightness.__call__
    calls = 0

    def third_is_not_finite(self: Brightness, pixels: Tensor, prompts: list[str]) -> Tensor:
        nonlocal calls
        calls += pixels.requires_grad  # those of training
        return score(self, pixels, prompts) * (float(factor) if calls == 3 else 1.0)

    monkeypatch.setattr(Brightness, "__call__", third_is_not_finite)
    with pytest.raises(SystemExit) as stop:
        refl.main(config(root, tmp_path, run={"checkpointing_steps": 1, "checkpoints_total_limit": 0}))
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: brightness gave {factor}" in said
    assert f"checkpoint is {tmp_path / 'step_000002'}" in said
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]
    assert [path.name for path in find_checkpoints(tmp_path)] == [f"step_{n:06d}" for n in range(3)]
    assert not (tmp_path / "lora").exists()
    assert all(weight.isfinite().all() for weight in state(tmp_path, 2)["parameters"].values())


# Kills


def wait_for_rows(output: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    path, end = output / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None, "stopped before it was killed"
        assert time.monotonic() < end, "trained nothing in five minutes"
        time.sleep(0.005)


def leaves(saved: Any) -> list[Tensor]:
    """The tensors and numbers of nested dicts and lists, in order."""
    if isinstance(saved, dict | list):
        return [
            leaf for part in (saved.values() if isinstance(saved, dict) else saved) for leaf in leaves(part)
        ]
    return [torch.as_tensor(saved)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_runs_resume_bit_for_bit(kills: int, root: Path, tmp_path: Path) -> None:
    updates = 10 * kills + 10
    run = {
        "max_train_steps": updates,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 3,
        "ema_decay": 0.9,
    }
    small = Sampling(num_inference_steps=1, guidance_scale=1.0, solver="ddim", resolution=str(SIZE))
    straight = config(
        root,
        tmp_path / "straight",
        pretraining="alternate",
        validation=ValidationConfig(sample=small),
        run=run,
    )
    refl.main(straight)
    output = tmp_path / "killed"
    broken = replace(straight, run=replace(straight.run, output_dir=output, resume_from_checkpoint="latest"))
    (tmp_path / "broken.yaml").write_text(dump(broken))
    command = [sys.executable, ROOT / "finetune" / "refl.py", "--config", tmp_path / "broken.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    moments = random.Random(0)
    for kill in range(kills):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for_rows(output, 2 + 10 * kill, process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it was killed"
    assert refl.main(broken) == 0
    assert rows(tmp_path / "straight") == rows(output)
    one, other = (state(folder, updates) for folder in (tmp_path / "straight", output))
    for key in ("parameters", "optimizer", "average"):
        saved = [leaves(whole[key]) for whole in (one, other)]
        assert len(saved[0]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*saved, strict=True)), key
    files = [load_file(folder / "lora" / lora.FILE) for folder in (tmp_path / "straight", output)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
