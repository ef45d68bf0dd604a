"""AWM and DiffusionNFT: advantages, losses by hand and by their identities, images of an epoch, other policies, resumes."""

import json
import math
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

import record_trajectories as recorded
import tiny
from finetune import awm, nft, reward_weighted
from preftune import families
from preftune.cli import parse
from preftune.diffusion_loss import Noised, diffusion_loss, noised
from preftune.families.base import Family
from preftune.files import manifest
from preftune.lora.config import LoRA
from preftune.noise import add_noise, target
from preftune.records import read_jsonl
from preftune.sampling import Sampling, sample_latents
from preftune.training import advantages, scored_samples
from preftune.training.checkpoint import read
from preftune.training.policies import Base, Policy, distance
from preftune.training.scored_config import ScoredConfig
from test_stopping import signal_when

pytestmark = pytest.mark.usefixtures("cpu")

KINDS = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS: tuple[awm.Weighting, ...] = ("1", "t", "t2", "huber", "ghuber")


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    rewards, one = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, dtype=torch.int64)
    found = advantages.group_advantages(rewards, one)
    assert found.tolist() == pytest.approx([-1.34152, -0.44717, 0.44717, 1.34152], abs=1e-5)
    unbiased = advantages.group_advantages(rewards, one, unbiased=True)
    assert unbiased.tolist() == pytest.approx([-1.16181, -0.38727, 0.38727, 1.16181], abs=1e-5)
    # groups 1 3 and 2 8: means 2 and 5; all four have mean 3.5 and squares 6.25, 0.25, 2.25, 20.25
    mixed, groups = torch.tensor([1.0, 2.0, 3.0, 8.0]), torch.tensor([0, 1, 0, 1])
    expected = [value / (math.sqrt(7.25) + 1e-4) for value in (-1, -3, 1, 3)]
    assert advantages.batch_advantages(mixed, groups).tolist() == pytest.approx(expected, rel=1e-6)
    own = [value / (std + 1e-4) for value, std in ((-1, 1), (-3, 3), (1, 1), (3, 3))]
    assert advantages.group_advantages(mixed, groups).tolist() == pytest.approx(own, rel=1e-6)
    assert advantages.scaled(torch.tensor([-7.0, 2.5, 5.0]), 5.0).tolist() == [-1.0, 0.5, 1.0]


def test_equal_rewards_of_a_group_have_no_advantage() -> None:
    """0.1 three times has a mean in float32 that is another number; a tiny difference is one."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.5, 0.5 + 1e-7])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for find in (advantages.group_advantages, advantages.batch_advantages):
        assert find(rewards, groups)[:3].tolist() == [0.0] * 3
        assert find(rewards, groups)[5] > 0
    assert advantages.statistics(rewards, groups).flat.tolist() == [True] * 3 + [False] * 3
    assert advantages.batch_advantages(torch.ones(6), groups).tolist() == [0.0] * 6


# ---------------------------------------------------------------- losses by hand


def test_likelihoods_by_hand() -> None:
    errors, t = torch.tensor([0.16, 0.0]), torch.tensor([0.5, 0.5])
    expected = {"1": -0.16, "t": -0.08, "t2": -0.04, "huber": -0.2, "ghuber": -1.2585843}
    for weighting, value in expected.items():
        found = awm.log_likelihoods(errors, t, weighting).tolist()  # type: ignore[arg-type]
        assert found == pytest.approx([value, 0.0], rel=1e-4, abs=1e-7), weighting
    half = awm.log_likelihoods(errors, t, "ghuber", 0.5)[0]
    assert float(half) == pytest.approx(-(math.sqrt(0.16) - 1e-5), rel=1e-5)
    whole = awm.log_likelihoods(errors, t, "ghuber", 1.0)[0]
    assert float(whole) == pytest.approx(-0.08, rel=1e-6), "a power of 1 is t"


def test_the_clip_stops_what_goes_further() -> None:
    """Ratios 0.5, 0.9, 1.1, 1.5 with clip 0.2: no gradient above 1.2 for good images, below 0.8 for bad ones."""
    config = SimpleNamespace(weighting="1", ghuber_power=0.25, clip_range=0.2)
    for sign, live in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        errors = (1 - torch.tensor([0.5, 0.9, 1.1, 1.5]).log()).requires_grad_()
        loss, noted = awm.policy_loss(errors, torch.ones(4), torch.ones(4), torch.full((4,), sign), config)  # type: ignore[arg-type]
        loss.backward()
        assert errors.grad is not None
        assert (errors.grad != 0).tolist() == live
        inside = [-0.5, -0.9, -1.1, -1.2] if sign > 0 else [0.8, 0.9, 1.1, 1.5]
        assert float(loss.detach()) == pytest.approx(sum(inside) / 4)
        assert float(noted["clip_share"]) == 0.25
        assert float(noted["ratio_error"]) == pytest.approx(0.3)


def test_decays() -> None:
    assert [awm.ema_decay(updates) for updates in (1, 100, 1000)] == pytest.approx([0.001, 0.1, 0.3])
    assert [nft.old_decay(updates, "0") for updates in (1, 1000)] == [0.0, 0.0]
    assert [nft.old_decay(u, "1") for u in (1, 100, 500, 900)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    assert [nft.old_decay(u, "2") for u in (1, 75, 85, 300)] == pytest.approx([0.0, 0.0, 0.075, 0.999])


def case_of(kind: Any, number: int = 3) -> tuple[Noised, Tensor, Tensor]:
    """Latents with noise, clean ones, and what a network might say, of seeded numbers."""
    x0, eps, output = torch.randn(3, number, 4, 2, 2, generator=Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.6, 0.8])[:number]
    alpha = 1 - sigma if kind == "flow" else (1 - sigma**2).sqrt()
    at = Noised(
        add_noise(x0, eps, alpha, sigma),
        torch.zeros(number),
        alpha,
        sigma,
        target(x0, eps, alpha, sigma, kind),
    )
    return at, x0, output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_where_both_policies_agree_nft_is_2_rho_minus_1_times_the_clean_loss(kind: Any, beta: float) -> None:
    at, x0, output = case_of(kind)
    rho = torch.tensor([0.0, 0.5, 0.9])

    def gradient(losses: Any) -> Tensor:
        v = output.clone().requires_grad_()
        losses(v).sum().backward()
        assert v.grad is not None
        return v.grad

    found = gradient(lambda v: nft.nft_losses(v, output, at, x0, kind, rho, beta))
    plain = gradient(lambda v: nft.clean_errors(v, at, x0, kind))
    torch.testing.assert_close(found, (2 * rho - 1).reshape(-1, 1, 1, 1) * plain, rtol=1e-4, atol=1e-6)
    assert found[1].abs().max() < 1e-6 * plain[1].abs().max() + 1e-7, "an average image does nothing"
    assert plain[2].abs().max() > 1e-3


def test_nft_by_hand() -> None:
    """One number, flow, sigma 0.5, x0 1, x 2: an output v means x0hat = 2 - v / 2. v 1, old 2, b 0.5: v+ 1.5 (x0hat 1.25), v- 2.5 (0.75)."""
    one = torch.ones(1, 1, 1, 1)
    at = Noised(2 * one, torch.zeros(1), torch.tensor([0.5]), torch.tensor([0.5]), 2 * one)
    found = nft.nft_losses(one, 2 * one, at, one, "flow", torch.tensor([0.8]), 0.5)
    assert found.tolist() == pytest.approx([(0.8 * 0.25 + 0.2 * 0.25) / 0.5]), "e^2 / |e|"
    other = nft.nft_losses(one, 1.5 * one, at, one, "flow", torch.tensor([0.8]), 1.0)
    assert other.tolist() == pytest.approx([0.8 * 0.5 + 0.2 * 0.0]), (
        "v+ 1 (1.5), v- 2 (1): the floor, not 0 / 0"
    )
    errors = nft.clean_errors(
        torch.full((1, 1, 1, 2), 1.0), at._replace(x=torch.tensor([[[[2.0, 1.5]]]])), one, "flow"
    )
    assert errors.tolist() == pytest.approx([(0.25 + 0.0) / 2 / 0.25]), "means of squares and of sizes"  # fmt: skip
    v = one.clone().requires_grad_()
    nft.clean_errors(v, at, one, "flow").sum().backward()
    assert v.grad is not None
    assert v.grad.item() == pytest.approx(-1.0), "2 (0.5) (-0.5) / 0.5: the size is a constant"
    assert nft.probabilities(torch.tensor([-1.0, -0.5, 0.0, 1.0])).tolist() == [0.0, 0.25, 0.5, 1.0]


# ---------------------------------------------------------------- identities with plain training, on a network


@pytest.fixture(scope="module")
def trained_family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, list[Tensor]]:
    """A tiny model with a LoRA that does something."""
    family = families.load(tiny.pipeline_folder(tmp_path_factory.mktemp("model") / "pipeline"))
    weights = [w for w in family.trainable(LoRA(), 0).parameters() if w.requires_grad]
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return family, weights


def generators(number: int = 3) -> list[Generator]:
    return [Generator().manual_seed(50 + row) for row in range(number)]


def gradient_of(weights: list[Tensor], loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


def awm_config(**values: Any) -> awm.Config:
    config = parse(awm.Config, ["--prompts", "a", "--model", "m", "--rewards", "brightness=1"])
    return awm.Config(**{**vars(config), **values})


def test_awm_on_its_own_images_is_weighted_training(trained_family: tuple[Family, list[Tensor]]) -> None:
    """A = 1 is plain training; A >= 0 reward weighting; any A and weighting: A times the gradient of -lp, at ratio 1 exactly."""
    family, weights = trained_family
    x0 = torch.randn(3, 4, 4, 4, generator=Generator().manual_seed(2))
    cond = family.encode(["a red circle", "a cross", "two stars"])

    def losses() -> Tensor:
        return diffusion_loss(family, lambda x, t: family.predict(x, t, cond).output, x0, generators())

    def policy(
        weighting: awm.Weighting, own: Tensor, before: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        at = noised(family, x0, generators())
        errors = at.errors(family.predict(at.x, at.t, cond).output)
        config = awm_config(weighting=weighting)
        return awm.policy_loss(errors, errors.detach() if before else None, at.sigma, own, config)

    plain = gradient_of(weights, losses().mean())
    assert plain.abs().max() > 1e-4
    torch.testing.assert_close(gradient_of(weights, policy("1", torch.ones(3))[0]), plain)
    own = torch.tensor([0.2, 0.0, 0.9])
    weighted = gradient_of(weights, reward_weighted.weighted_loss(losses(), own))
    torch.testing.assert_close(gradient_of(weights, policy("1", own)[0]), weighted)
    signed = torch.tensor([-1.0, 0.3, 0.7])
    for weighting in WEIGHTINGS:
        at = noised(family, x0, generators())
        lp = awm.log_likelihoods(at.errors(family.predict(at.x, at.t, cond).output), at.sigma, weighting)
        expected = gradient_of(weights, (-signed * lp).mean())
        for before in (False, True):
            loss, noted = policy(weighting, signed, before)
            assert noted["ratio_error"] == 0
            assert noted["clip_share"] == 0
            assert float(loss.detach()) == pytest.approx(-float(signed.mean()), abs=1e-7)
            torch.testing.assert_close(gradient_of(weights, loss), expected)


# ---------------------------------------------------------------- the images of an epoch


def scored(**values: Any) -> ScoredConfig:
    return ScoredConfig(prompts_per_epoch=3, images_per_prompt=2, **values)


def written(folder: Path, rewards: list[float], world: int = 2) -> scored_samples.Samples:
    """An epoch that several processes wrote, put together and read."""
    folder.mkdir(parents=True)
    for rank in range(world):
        images = range(rank, len(rewards), world)
        rows = [{"image": k, "text": f"p{k // 2}", "reward": rewards[k], "seed": k} for k in images]
        latents = torch.tensor([float(k) for k in images]).reshape(-1, 1, 1, 1)
        scored_samples._write(folder, f"rank_{rank}", rows, latents)
    scored_samples._merge(folder, world)
    manifest.write(folder)
    return scored_samples._read(folder, 1, scored())


@pytest.mark.parametrize("world", [1, 2, 7])
def test_what_processes_generate_is_put_in_order(tmp_path: Path, world: int) -> None:
    """Seven processes for six images: one has none."""
    folder = tmp_path / "epoch"
    samples = written(folder, [0.0, 1.0, 0.5, 0.5, 3.0, 1.0], world)
    assert samples.latents.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert list(samples.prompts) == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "latents.safetensors",
        "manifest.json",
        "metadata.jsonl",
    ]
    assert list(samples.used) == [0, 1, 4, 5]
    assert samples.skipped_groups == 1
    std = torch.tensor([0.0, 1.0, 0.5, 0.5, 3.0, 1.0]).std(correction=0).item() + 1e-4
    expected = [value / std / 5 for value in (-0.5, 0.5, 0, 0, 1, -1)]
    assert samples.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert samples.metrics() == pytest.approx({"reward": 1.0, "reward_std": std - 1e-4, "skipped_groups": 1})


def test_an_epoch_of_equal_rewards_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = written(tmp_path / "epoch", [0.1, 0.1, 0.7, 0.7, 0.3, 0.3])
    assert (samples.skipped_groups, list(samples.used)) == (3, [0, 1, 2, 3, 4, 5])
    assert samples.advantages.tolist() == [0.0] * 6
    assert "epoch 2: the images of each prompt have equal rewards" in capsys.readouterr().err


def test_advantages_of_a_prompts_own_std(tmp_path: Path) -> None:
    written(tmp_path / "epoch", [0.0, 1.0, 0.0, 100.0, 2.0, 3.0])
    found = scored_samples._read(tmp_path / "epoch", 1, scored(advantage_std="prompt", advantage_clip=0.5))
    assert found.advantages.tolist() == [-1, 1, -1, 1, -1, 1]


@pytest.mark.parametrize("used", [6, 4])
def test_each_image_comes_once_before_any_comes_again(used: int) -> None:
    """Of 6 indices an epoch: all six once; of four images two come twice; another epoch has another order."""
    orders = []
    for epoch in (0, 1, 2):
        samples = scored_samples.Samples(
            epoch=epoch, prompts=["a"] * 6, latents=torch.zeros(6), rewards=torch.zeros(6), advantages=torch.zeros(6),
            used=range(used), skipped_groups=0,
        )  # fmt: skip
        parts = [range(6 * epoch, 6 * epoch + 2), range(6 * epoch + 2, 6 * epoch + 6)]
        rows = [row for part in parts for row in scored_samples.rows_at(samples, part, 6, 0)]
        assert sorted(rows[:used]) == list(range(used))
        assert max(Counter(rows).values()) == (1 if used == 6 else 2)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]


# ---------------------------------------------------------------- runs

DRIVERS = ("awm", "nft")


def argv(driver: str, root: Path, output: Path, *flags: str) -> list[str]:
    few = ["--validation-prompts", str(root / "prompts.txt"), "--num-validation-prompts", "1"]
    return [*recorded.arguments(driver, root, output), *few, *flags]


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def weights_of(output: Path, updates: int = 3) -> dict[str, Tensor]:
    found: dict[str, Tensor] = read(output / f"step_{updates:06d}")["parameters"]
    return found


def test_each_image_has_an_order_of_its_levels() -> None:
    levels = torch.tensor([751, 501, 251])

    def orders() -> list[Generator]:
        return [Generator().manual_seed(image) for image in range(6)]

    turns = torch.stack([scored_samples.levels_at(levels, orders(), turn) for turn in range(4)])
    assert all(sorted(image.tolist()) == [251, 501, 751] for image in turns[:3].T), "each level once"
    assert turns[3].equal(turns[0]), "then from the first again"
    assert len({tuple(image.tolist()) for image in turns[:3].T}) > 2, "not in one order for all"


@pytest.mark.parametrize(
    ("driver", "solver", "expected"),
    [("nft", "ddim", {751, 501, 251}), ("awm", "dpm++", {999, 749, 500})],
)
def test_levels_are_those_of_the_epochs_images(
    driver: str, solver: str, expected: set[int], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four, where a clean image is known already, is left out; the others come equally often."""
    seen = Counter[int]()

    def record(*given: Any) -> Noised:
        at = noised(*given)
        seen.update(int(t) for t in at.t)
        return at

    monkeypatch.setattr(scored_samples, "noised", record)
    flags = f"--timesteps sampling --timesteps-per-image 3 --sample.num-inference-steps 4 --sample.solver {solver}"
    assert recorded.train(driver, argv(driver, root, tmp_path / "out", *flags.split())) == 0
    assert set(seen) == expected
    assert len(set(seen.values())) == 1


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each driver: two updates on the images of epoch 1, one on those of epoch 2."""
    folder = tmp_path_factory.mktemp("straight")
    for driver in DRIVERS:
        assert recorded.train(driver, argv(driver, root, folder / driver)) == 0
    return {driver: folder / driver for driver in DRIVERS}


@pytest.mark.parametrize(
    ("driver", "updates"),
    [
        (DRIVERS[0], 1),
        (DRIVERS[1], 2),
        pytest.param(DRIVERS[0], 2, marks=pytest.mark.slow),
        pytest.param(DRIVERS[1], 1, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    driver: str, updates: int, root: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end; with its images there, damaged, and gone: they are of the old policy's weights."""
    for case in ("there", "damaged", "gone") if updates == 1 else ("there",):
        output = Path(shutil.copytree(straight[driver], tmp_path / case))
        for later in range(updates + 1, 4):
            shutil.rmtree(output / f"step_{later:06d}")
        now = output / f"epoch_{updates // 2 + 1:04d}"
        stamp = (now / "latents.safetensors").stat().st_mtime_ns
        if case == "damaged":
            (now / "latents.safetensors").write_bytes(b"of nothing")
        elif case == "gone":
            shutil.rmtree(now)
        assert recorded.train(driver, argv(driver, root, output, "--resume-from-checkpoint", "latest")) == 0
        kept = (now / "latents.safetensors").stat().st_mtime_ns == stamp
        assert kept == (case == "there"), "what was generated is used"
        expected, found = weights_of(straight[driver]), weights_of(output)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items()), case
        assert rows_of(output)[-1] == rows_of(straight[driver])[-1]
        for name in ("metadata.jsonl", "latents.safetensors"):
            one, other = (place / "epoch_0002" / name for place in (straight[driver], output))
            assert one.read_bytes() == other.read_bytes()


def test_the_metrics_of_awm(straight: dict[str, Path]) -> None:
    """The first update of an epoch is on policy, the second is not; distances begin at 0."""
    rows = rows_of(straight["awm"])
    assert [row["ratio_error"] > 0 for row in rows] == [False, True, False]
    assert rows[0]["kl"] == rows[0]["ema_kl"] == 0
    assert rows[1]["kl"] == rows[1]["ema_kl"] > 0, "the average is renewed after an epoch"
    assert 0 < rows[2]["ema_kl"] < rows[2]["kl"]
    assert rows[0]["reward"] == rows[1]["reward"] != rows[2]["reward"]
    for row in rows:
        assert row["skipped_groups"] == 0


def test_the_metrics_of_nft(straight: dict[str, Path]) -> None:
    rows = rows_of(straight["nft"])
    assert rows[0]["kl"] == rows[0]["old_distance"] == 0
    assert rows[1]["kl"] == rows[1]["old_distance"] > 0
    assert 0 < rows[2]["old_distance"] < rows[2]["kl"], "the old policy is nearer than the base"


@pytest.mark.parametrize(("driver", "flags", "more"), [("awm", ["--ema-kl-weight", "2e4"], 3e4 - 0.2), ("nft", [], 1e4 - 0.1)])  # fmt: skip
def test_distances_are_part_of_the_loss(
    driver: str, flags: list[str], more: float, root: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    """They and their gradients are 0 in the first update, so that the second begins where it does with other weights."""
    own = [*flags, "--kl-weight", "1e4", "--max-train-steps", "2"]
    assert recorded.train(driver, argv(driver, root, tmp_path, *own)) == 0
    found, before = rows_of(tmp_path)[1], rows_of(straight[driver])[1]
    assert found["kl"] == pytest.approx(before["kl"], rel=1e-6)
    assert found["loss"] - before["loss"] == pytest.approx(more * found["kl"], rel=1e-3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_images_are_of_the_old_policy_with_guidance(
    driver: str, root: Path, straight: dict[str, Path]
) -> None:
    """Those of the second epoch, generated again from the checkpoint's old weights, at the model's own guidance."""
    family = families.load(root / "pipeline")
    trained = dict(family.trainable(LoRA(), 0).named_parameters())
    state = read(straight[driver] / "step_000002")
    names = list(state["parameters"])
    first = weights_of(straight[driver], 0)
    for name, weight in zip(names, state["driver"]["old"], strict=True):
        kept = 0.0 if driver == "awm" else 0.002  # min(u / 1000, 0.5) after two updates
        torch.testing.assert_close(weight, torch.lerp(state["parameters"][name], first[name], kept))
    rows = read_jsonl(straight[driver] / "epoch_0002" / "metadata.jsonl")
    samples = scored_samples._read(straight[driver] / "epoch_0002", 1, ScoredConfig(images_per_prompt=2))
    settings = Sampling(num_inference_steps=2, solver="ddim", resolution="32", guidance_scale=7.5)

    def latents(weights: list[Tensor], settings: Sampling) -> Tensor:
        with torch.no_grad():
            for name, weight in zip(names, weights, strict=True):
                trained[name].copy_(weight)
        seeds = [int(row["seed"]) for row in rows]
        return torch.cat([*sample_latents(family, samples.prompts, seeds, settings)])

    found = latents(state["driver"]["old"], settings)
    assert torch.equal(found, samples.latents)
    pixels = family.decode(found).clamp(0, 1)
    torch.testing.assert_close(pixels.mean((1, 2, 3)), samples.rewards, rtol=1e-5, atol=1e-6)
    unguided = Sampling(num_inference_steps=2, solver="ddim", resolution="32", guidance_scale=1)
    assert not torch.equal(latents(state["driver"]["old"], unguided), samples.latents)
    if driver == "nft":
        assert not torch.equal(latents(list(state["parameters"].values()), settings), samples.latents)
    assert len({row["seed"] for row in rows} | {row["seed"] for row in read_jsonl(straight[driver] / "epoch_0001" / "metadata.jsonl")}) == 16  # fmt: skip


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_lora_loads_in_diffusers(driver: str, root: Path, straight: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(root / "pipeline")
    pipe.load_lora_weights(straight[driver] / "lora")
    assert pipe.unet.peft_config


@pytest.mark.parametrize("driver", DRIVERS)
def test_all_weights_are_trained_beside_a_second_model(driver: str, root: Path, tmp_path: Path) -> None:
    flags = ["--train", "full", "--max-train-steps", "2", "--learning-rate", "1e-3"]
    assert recorded.train(driver, argv(driver, root, tmp_path, *flags)) == 0
    rows = rows_of(tmp_path)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-12)
    assert rows[1]["kl"] > 1e-9
    assert (tmp_path / "unet").is_dir()


@pytest.mark.parametrize("driver", DRIVERS)
def test_equal_rewards_teach_nothing(
    driver: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def same(pixels, prompts):\n    return 0 * pixels.mean((1, 2, 3)) + 0.1\n"
    )
    flags = ["--rewards", f"{tmp_path / 'mine.py'}:same=1", "--max-train-steps", "1"]
    assert recorded.train(driver, argv(driver, root, tmp_path / "run", *flags)) == 0
    (row,) = rows_of(tmp_path / "run")
    assert row["skipped_groups"] == 4
    assert row["grad_norm"] < 1e-6
    assert "equal rewards" in capsys.readouterr().err


def test_a_run_that_is_stopped_while_it_generates(root: Path, tmp_path: Path) -> None:
    """After the first epoch's updates: the checkpoint is there, half an epoch of images is not."""
    flags = ["--sample.batch-size", "2", "--max-train-steps", "3", "--checkpointing-steps", "0"]
    stopped = tmp_path / "stopped"
    watcher = signal_when(stopped / ".epoch_0002.tmp-shared", [])
    assert recorded.train("nft", argv("nft", root, stopped, *flags)) == 143
    watcher.join()
    assert sorted(path.name for path in stopped.glob("*epoch*")) == ["epoch_0001"]
    assert (stopped / "step_000002").is_dir()
    again = [*flags, "--resume-from-checkpoint", "latest"]
    assert recorded.train("nft", argv("nft", root, stopped, *again)) == 0
    assert recorded.train("nft", argv("nft", root, tmp_path / "whole", *flags)) == 0
    one, other = weights_of(stopped), weights_of(tmp_path / "whole")
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert sorted(path.name for path in (tmp_path / "whole").glob("epoch*")) == ["epoch_0001", "epoch_0002"]


def test_images_that_no_checkpoint_needs_go(root: Path, tmp_path: Path) -> None:
    flags = ["--updates-per-epoch", "1", "--max-train-steps", "4", "--checkpoints-total-limit", "1"]
    assert recorded.train("awm", argv("awm", root, tmp_path, *flags)) == 0
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch_0004"]
    assert json.loads((tmp_path / "step_000004" / "manifest.json").read_text())["updates"] == 4


# ---------------------------------------------------------------- other policies


class _Stub:
    """As much of a workspace as policies look at."""

    def __init__(self, family: Family) -> None:
        self.family = family

        class Lora:
            train = "lora"

        self.model = Lora()
        self.run = nullcontext()


def test_policies(trained_family: tuple[Family, list[Tensor]]) -> None:
    family, weights = trained_family
    before = [weight.detach().clone() for weight in weights]
    policy = Policy(_Stub(family))  # type: ignore[arg-type]
    x, t = torch.randn(1, 4, 4, 4, generator=Generator().manual_seed(3)), torch.tensor([400])
    cond = family.encode(["a star"])
    with torch.no_grad():
        first = family.predict(x, t, cond).output
        for weight in weights:
            weight += 1
        second = family.predict(x, t, cond).output
        assert torch.equal(policy.output(x, t, cond), first)
        assert torch.equal(family.predict(x, t, cond).output, second), "swapped back"
        with family.reference():
            base = family.predict(x, t, cond).output
        assert torch.equal(Base(_Stub(family)).output(x, t, cond), base)  # type: ignore[arg-type]
        assert not torch.equal(base, first)
        policy.follow(0.75)
        for kept, weight in zip(policy.weights, before, strict=True):
            torch.testing.assert_close(kept, weight + 0.25)
        other = Policy(_Stub(family), policy.state())  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(other.weights, policy.weights, strict=True))
        policy.follow(0.0)
        assert all(torch.equal(kept, weight) for kept, weight in zip(policy.weights, weights, strict=True))
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
    assert float(distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))) == 2.5
