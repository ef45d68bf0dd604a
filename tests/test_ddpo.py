"""Policy gradients as a program: the ratio, the pairs, what is learnt from a rollout, and that no rollout is lost or made twice."""

import itertools
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

import record_trajectories as recorded
import tiny
from finetune import ddpo
from preftune import families
from preftune.cli import parse
from preftune.families.base import Cond, Family
from preftune.families.sd import SD
from preftune.lora.config import LoRA
from preftune.noise import Prediction
from preftune.records import read_jsonl
from preftune.resolution import Resolution
from preftune.rollout import rollout
from preftune.sampling import initial_noise
from preftune.training import policy_rollouts, rollouts
from preftune.training.before_tuning import BeforeTuning
from preftune.training.checkpoint import read
from preftune.training.policy_config import Plan, PolicyConfig
from preftune.training.policy_rollouts import Pairs
from preftune.training.rollouts import Rollout
from test_stopping import signal_when

pytestmark = pytest.mark.usefixtures("cpu")

FEW = ["--num-validation-prompts", "1"]
CLOCK = {"images_per_s", "sampling_time", "scoring_time", "update_time"}
GROUP = ["--advantages", "group", "--prompt-buffer-size", "16", "--prompt-buffer-min-count", "16"]
UPDATES = 2
"""Of each rollout of the recorded command: 4 images, 2 of 4 steps, 4 pairs an update."""


def argv(root: Path, output: Path, *flags: str) -> list[str]:
    return [*recorded.arguments("ddpo", root, output), *FEW, *flags]


def rows(output: Path) -> list[dict[str, float]]:
    """Metrics, but for the clock."""
    found = read_jsonl(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def train(root: Path, output: Path, *flags: str) -> list[dict[str, float]]:
    assert recorded.train("ddpo", argv(root, output, *flags)) == 0
    return rows(output)


def weights(output: Path, updates: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = read(output / f"step_{updates:06d}")["parameters"]
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- the ratio and the gradient


class World:
    """A tiny model with a LoRA that has been moved, a rollout of two images in four steps, and pairs of it."""

    def __init__(self, kind: str, folder: Path, **policy: Any) -> None:
        make = tiny.pipeline_folder if kind == "sd" else tiny.pipeline_xl_folder
        self.family: Family = families.load(make(folder / kind))
        self.weights = [w for w in self.family.trainable(LoRA(), 0).parameters() if w.requires_grad]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.weights:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        self.policy = PolicyConfig(
            num_inference_steps=4, guidance_scale=3.0, prompts_per_rollout=2, window=(0, 3), **policy
        )
        self.cond = self.family.encode(["a red circle", "two cats"])
        own = [torch.Generator().manual_seed(seed) for seed in range(2)]
        at = Resolution(tiny.PIXELS, tiny.PIXELS)
        x_t = initial_noise(self.family.latent_shape(at), own, "cpu")
        self.made = rollout(
            self.family, self.cond, x_t, "ddim", 4, 3.0, own, resolution=at, step=self.policy.step()
        )

    def config(self, **changes: Any) -> ddpo.Config:
        model = ddpo.ModelConfig(pretrained=families.Pretrained(model="-"))
        return ddpo.Config(prompts=Path("-"), policy=self.policy, model=model, **changes)

    def pairs(self, images: Sequence[int], steps: Sequence[int], advantages: Tensor) -> tuple[Pairs, Cond]:
        made, rows, at = self.made, torch.tensor(images), torch.tensor(steps)
        t, t_next = made.timesteps[at], made.timesteps[at + 1]
        x, x_next = made.latents[at, rows], made.latents[at + 1, rows]
        return Pairs(x, x_next, t, t_next, made.log_probs[at, rows], advantages), self.cond.rows(images)

    def gradient(self, losses: Tensor) -> Tensor:
        parts = torch.autograd.grad(losses.mean(), self.weights, allow_unused=True, retain_graph=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    def before(self) -> BeforeTuning:
        model = SimpleNamespace(train="lora")
        return BeforeTuning(SimpleNamespace(family=self.family, run=None, model=model))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_the_first_ratio_is_exactly_1_for_pairs_of_all_steps(kind: str, eta: float, tmp_path: Path) -> None:
    """Of both families, with guidance, two pairs at once as in the rollout: images and steps in any mixture."""
    world = World(kind, tmp_path, eta=eta)
    for images, steps in itertools.product(([0, 1], [1, 0], [0, 0]), ([0, 3], [1, 2], [2, 0])):
        pairs, cond = world.pairs(images, steps, torch.ones(2))
        _, ratios, noted = ddpo.losses_of(world.family, pairs, cond, world.config(), None)
        assert torch.equal(ratios, torch.ones(2))
        assert noted["approx_kl"] == noted["clip_share"] == 0
        assert not ratios.requires_grad


def test_the_first_gradient_is_that_of_reinforce(tmp_path: Path) -> None:
    """-A grad log p, with log p written out from torch's normal distribution; swapped rewards change its sign; none for A = 0."""
    world = World("sd", tmp_path)
    config = world.config()

    def found(a: float, b: float) -> Tensor:
        pairs, cond = world.pairs([0, 0], [1, 1], torch.tensor([a, b]))
        return world.gradient(ddpo.losses_of(world.family, pairs, cond, config, None)[0])

    pairs, cond = world.pairs([0, 1], [1, 3], torch.tensor([1.5, -0.5]))
    losses, _, _ = ddpo.losses_of(world.family, pairs, cond, config, None)
    log_probs = []
    for row in range(2):
        t, t_next = pairs.t[row : row + 1], pairs.t_next[row : row + 1]
        prediction = world.family.predict(pairs.x[row : row + 1], t, cond.rows([row]), 3.0)
        levels = (world.family.schedule(time) for time in (t, t_next))
        transition = world.policy.step()(prediction, *levels)
        normal = torch.distributions.Normal(transition.mean, transition.std.expand_as(transition.mean))
        log_probs.append(normal.log_prob(pairs.x_next[row : row + 1]).mean())
    torch.testing.assert_close(torch.stack(log_probs).detach(), pairs.log_probs, rtol=0, atol=1e-5)
    expected = world.gradient(-(pairs.advantages * torch.stack(log_probs)))
    largest = float(expected.abs().max())
    assert largest > 0
    torch.testing.assert_close(world.gradient(losses), expected, rtol=1e-3, atol=1e-4 * largest)
    assert not found(0.0, 0.0).any()
    torch.testing.assert_close(found(1.0, 2.0), -found(-1.0, -2.0))
    assert not found(1.0, -1.0).abs().max() > 1e-5 * largest, "one pair twice, with opposite advantages"


@pytest.mark.parametrize("unit", ["step-exact", "prediction"])
def test_the_divergence_to_the_model_before_tuning(unit: str, tmp_path: Path) -> None:
    """It is that of the two predictions of one step, counts with its weight, and pulls the model back to where it was."""
    world = World("sd", tmp_path)
    pairs, cond = world.pairs([0, 1], [1, 3], torch.zeros(2))
    weighted = world.config(kl_weight=7.0, kl=unit)
    losses, _, noted = ddpo.losses_of(world.family, pairs, cond, weighted, world.before())
    step, family = world.policy.step(), world.family
    with torch.no_grad():
        now, after = ddpo.predicted_step(family, pairs.x, pairs.t, pairs.t_next, cond, 3.0, step)
        with family.reference():
            base, base_after = ddpo.predicted_step(family, pairs.x, pairs.t, pairs.t_next, cond, 3.0, step)
    exact = ((after.mean - base_after.mean) ** 2 / (2 * after.std**2)).flatten(1).mean(1)
    expected = exact if unit == "step-exact" else ((now.eps - base.eps) ** 2).flatten(1).mean(1)
    assert expected.min() > 0
    torch.testing.assert_close(losses.detach(), 7 * expected)
    assert noted["kl"].item() == pytest.approx(expected.mean().item())
    moved = world.gradient(losses)
    with torch.no_grad():
        start = 0
        for weight in world.weights:
            weight -= 1e-3 * moved[start : start + weight.numel()].view_as(weight) / moved.norm()
            start += weight.numel()
    assert ddpo.losses_of(family, pairs, cond, weighted, world.before())[2]["kl"] < noted["kl"]
    unweighted, _, measured = ddpo.losses_of(family, pairs, cond, world.config(kl=unit), world.before())
    assert not unweighted.any(), "measured, but not in the loss"
    assert measured["kl"] > 0
    assert "kl" not in ddpo.losses_of(family, pairs, cond, world.config(), None)[2]


def test_the_noise_of_a_step_is_that_of_eta() -> None:
    """At t 501 -> 481 of Stable Diffusion the deviation is 0.294785 for eta 1, in proportion to eta."""
    zero = torch.zeros(1, 1, 1, 1)
    levels = [(torch.tensor(a**0.5), torch.tensor((1 - a) ** 0.5)) for a in (0.274999, 0.302295)]
    for eta in (1.0, 0.3):
        step = PolicyConfig(eta=eta).step()
        assert step(Prediction(zero, zero, zero), *levels).std.item() == pytest.approx(
            0.294785 * eta, rel=1e-4
        )


def test_the_old_log_probabilities_of_self_are_the_present_ones(tmp_path: Path) -> None:
    world = World("sd", tmp_path, old_logprob="self")
    pairs, cond = world.pairs([0, 1], [1, 3], torch.tensor([1.0, -1.0]))
    pairs = pairs._replace(log_probs=pairs.log_probs + 100)
    losses, ratios, _ = ddpo.losses_of(world.family, pairs, cond, world.config(), None)
    assert torch.equal(ratios, torch.ones(2))
    assert world.gradient(losses).any()


# ---------------------------------------------------------------- what is trained on


def experience(plan: Plan, seed: int = 0) -> policy_rollouts.Experience:
    """Of numbers that say which image and step they are of."""
    steps = plan.window.stop
    places = torch.arange(plan.images)[:, None] * 100 + torch.arange(steps + 1)
    made = Rollout(
        latents=places[..., None, None, None].float(), log_probs=places[:, :-1].float(),
        scores=torch.zeros(plan.images, 1), rewards=torch.zeros(plan.images),
    )  # fmt: skip

    run = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(seed=seed))
    texts = ["a", "b", "a", "c"][: plan.images]
    cond = Cond(positive={"word": torch.tensor([1.0, 2.0, 3.0])}, negative={})
    w: Any = SimpleNamespace(run=run)
    return policy_rollouts.Experience(
        w=w, plan=plan, rollout=made, texts=texts, cond=cond, timesteps=torch.arange(steps, -1, -1) * 10,
        advantages=torch.arange(plan.images).float(), history=[], noted={}, clock=rollouts.Clock(), sampled=True,
    )  # fmt: skip


def test_an_inner_epoch_has_each_pair_of_the_window_once() -> None:
    plan = Plan(images=4, window=range(1, 4), steps=3, updates=2)
    pairs, cond = experience(plan).pairs(range(12), range(12))
    x = pairs.x.flatten().int().tolist()
    assert sorted(x) == sorted(100 * image + step for image in range(4) for step in (1, 2, 3))
    assert (pairs.x_next - pairs.x == 1).all()
    assert torch.equal(pairs.log_probs, pairs.x.flatten())
    steps = torch.tensor(x) % 100
    assert torch.equal(pairs.t, 10 * (4 - steps))
    assert torch.equal(pairs.t_next, pairs.t - 10)
    images = torch.tensor(x) // 100
    assert torch.equal(pairs.advantages, images.float())
    words = torch.tensor([1.0, 2.0, 1.0, 3.0])
    assert torch.equal(cond.positive["word"], words[images]), "each with its own prompt, encoded once"


def test_a_fraction_of_the_steps_is_chosen_anew_for_each_image_and_epoch() -> None:
    plan = Plan(images=4, window=range(0, 8), steps=4, updates=2)
    made = experience(plan)
    seen = [made.pairs(range(16 * k, 16 * k + 16), range(16))[0].x.flatten().int().tolist() for k in range(3)]
    for epoch in seen:
        assert len(set(epoch)) == 16, "no pair twice"
        assert Counter(value // 100 for value in epoch) == dict.fromkeys(range(4), 4)
    chosen = [{v for v in epoch if v // 100 == image} for epoch in seen for image in range(4)]
    assert len({frozenset(v % 100 for v in one) for one in chosen}) > 6
    assert made.pairs(range(16), range(16))[0].x.flatten().int().tolist() == seen[0], "whatever came before"
    assert experience(plan, seed=1).pairs(range(16), range(16))[0].x.flatten().int().tolist() != seen[0]


def test_each_scorer_by_itself_or_their_sum() -> None:
    """Scores of the scale 1 and 1000, by both kinds of advantages; histories are kept for each column."""
    made = Rollout(
        latents=torch.zeros(4, 1), log_probs=torch.zeros(4, 0), rewards=torch.tensor([300.0, 103.0, 206.0, 9.0]),
        scores=torch.tensor([[0.0, 3000.0], [1.0, 1000.0], [2.0, 2000.0], [3.0, 0.0]]),
    )  # fmt: skip
    w: Any = SimpleNamespace(mix=SimpleNamespace(weights=(3.0, 0.1)))
    for kind, normal in (("group", 1.290994), ("prompt", 1.118034)):
        own = {"images_per_prompt": 4} if kind == "group" else {"prompt_buffer_min_count": 4}
        each = PolicyConfig(advantages=kind, normalize_rewards="each", **own)  # type: ignore[arg-type]
        found, history = policy_rollouts.advantages_of(each, w, made, ["a"] * 4, [])
        small, large = ((torch.tensor(v) - 1.5) / normal for v in ([0.0, 1, 2, 3], [3.0, 1, 2, 0]))
        torch.testing.assert_close(found.values, 3 * small + 0.1 * large, rtol=1e-4, atol=1e-4)
        assert len(history) == (2 if kind == "prompt" else 0)
        total = PolicyConfig(advantages=kind, **own)  # type: ignore[arg-type]
        found, history = policy_rollouts.advantages_of(total, w, made, ["a"] * 4, [])
        assert found.values.argsort().tolist() == [3, 1, 2, 0]
        assert history == ([{"a": made.rewards.tolist()}] if kind == "prompt" else [])


# ---------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five updates: two rollouts, and one update of a third."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(root, folder, "--max-train-steps", "5")
    return folder


def test_what_is_logged(straight: Path) -> None:
    found = read_jsonl(straight / "metrics.jsonl")
    assert len(found) == 5
    for step, row in enumerate(found):
        first = step % UPDATES == 0
        assert ("first_ratio_error" in row) == first
        assert (row["ratio"] == 1) == first, "weights have moved since the rollout"
        assert (row["approx_kl"] == 0) == first
        assert ("sampling_time" in row) == (not first)
        assert row.get("first_ratio_error", 0) == 0, "to the last bit"
        assert row["zero_variance_share"] == 0
        if not first:
            assert row["sampling_time"] + row["scoring_time"] + row["update_time"] == pytest.approx(1)
            assert (row["reward"], row["reward_std"]) == (
                found[step - 1]["reward"],
                found[step - 1]["reward_std"],
            )
    assert len({row["reward"] for row in found}) == 3, "of each rollout"
    assert found[0]["kl"] == 0
    assert found[1]["kl"] > 0


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_a_run_goes_on_at_any_update_with_the_same_bits(
    updates: int, straight: Path, root: Path, tmp_path: Path
) -> None:
    """As a kill there leaves it: later checkpoints and rollouts are not there, or are of weights that are gone."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for later in range(updates + 1, 6):
        shutil.rmtree(run / f"step_{later:06d}")
    if updates == 2:  # a rollout that was complete, but not its first update
        assert (run / "rollout_000001" / "manifest.json").exists()
    stale = run / "rollout_000002"
    (stale / "rank_0.safetensors").write_bytes(b"of weights that are gone")
    (run / ".rollout_000001.tmp-shared").mkdir()
    found = train(root, run, "--max-train-steps", "5", "--resume-from-checkpoint", "latest")
    assert found == rows(straight)
    assert equal(weights(run, 5), weights(straight, 5))
    names = [sorted(path.name for path in folder.glob("*rollout*")) for folder in (run, straight)]
    assert names[0] == names[1] == [f"rollout_{number:06d}" for number in range(3)]


def test_a_rollout_is_read_and_not_sampled_again(
    straight: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was killed between the rollout and its first update."""
    sampled = []
    original = policy_rollouts._sample
    monkeypatch.setattr(
        policy_rollouts, "_sample", lambda *given: sampled.append(given[5]) or original(*given)
    )
    for updates, expected in ((2, [2]), (3, [2])):
        run = Path(shutil.copytree(straight, tmp_path / str(updates)))
        for later in range(updates + 1, 6):
            shutil.rmtree(run / f"step_{later:06d}")
        sampled.clear()
        train(root, run, "--max-train-steps", "5", "--resume-from-checkpoint", "latest")
        assert sampled == expected
        assert equal(weights(run, 5), weights(straight, 5))


def test_a_rollout_that_is_gone_or_damaged(
    straight: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within its updates it is named, with exit code 2; before the first it is made again."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for later in (4, 5):
        shutil.rmtree(run / f"step_{later:06d}")
    part = run / "rollout_000001" / "rank_0.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    again = argv(root, run, "--max-train-steps", "5", "--resume-from-checkpoint", "latest")
    with pytest.raises(SystemExit) as stop:
        recorded.train("ddpo", again)
    assert stop.value.code == 2
    assert "rank_0.safetensors is damaged" in (said := capsys.readouterr().err)
    assert "go on from a checkpoint after a multiple of 2 updates" in said
    shutil.rmtree(run / "rollout_000001")
    with pytest.raises(SystemExit):
        recorded.train("ddpo", again)
    assert "rollout_000001 is gone" in capsys.readouterr().err
    shutil.rmtree(run / "step_000003")
    assert recorded.train("ddpo", again) == 0
    assert equal(weights(run, 5), weights(straight, 5))


def test_rollouts_are_kept_while_something_needs_them(root: Path, tmp_path: Path) -> None:
    """The last checkpoints, of 4 and 5 updates: only the one within a rollout needs it."""
    train(root, tmp_path, "--max-train-steps", "5", "--checkpoints-total-limit", "2")
    assert [path.name for path in tmp_path.glob("*rollout*")] == ["rollout_000002"]
    train(
        root, tmp_path, "--max-train-steps", "4", "--checkpoints-total-limit", "1", "--overwrite-output-dir"
    )
    assert not list(tmp_path.glob("*rollout*"))


def test_a_signal_while_images_are_sampled(root: Path, straight: Path, tmp_path: Path) -> None:
    """The partial rollout is dropped, the updates before it are saved though no checkpoint was due, and the rest is as if nothing had been."""
    run, flags = tmp_path / "run", ["--max-train-steps", "5", "--checkpointing-steps", "100"]
    original = policy_rollouts._batch

    def batch(w: Any, *given: Any) -> Any:
        if given[-2][0] == 6:  # images 4 to 7 are of the second rollout
            os.kill(os.getpid(), signal.SIGTERM)
        return original(w, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_rollouts, "_batch", batch)
        assert recorded.train("ddpo", argv(root, run, *flags)) == 143
    assert sorted(path.name for path in run.glob("step_*")) == ["step_000000", "step_000002"]
    assert not list(run.glob("*rollout_000001*"))
    assert len(rows(run)) == 2
    found = train(root, run, *flags, "--resume-from-checkpoint", "latest")
    assert found == rows(straight)
    assert equal(weights(run, 5), weights(straight, 5))


def test_a_signal_within_the_updates_of_a_rollout(root: Path, straight: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ["--max-train-steps", "5", "--checkpointing-steps", "100"]
    watcher = signal_when(run / "rollout_000001" / "manifest.json", [])
    assert recorded.train("ddpo", argv(root, run, *flags)) == 143
    watcher.join()
    found = train(root, run, *flags, "--resume-from-checkpoint", "latest")
    assert found == rows(straight)
    assert equal(weights(run, 5), weights(straight, 5))


def test_a_ratio_that_is_off_ends_a_run_in_float32(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one sentence before the weights change; half precision only notes it."""
    original = policy_rollouts.rollout

    def off(*given: Any, **named: Any) -> Any:
        made = original(*given, **named)
        made.log_probs[1] += 1e-4
        return made

    monkeypatch.setattr(policy_rollouts, "rollout", off)
    with pytest.raises(SystemExit) as stop:
        recorded.train("ddpo", argv(root, tmp_path / "a"))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "the ratio before the first update of a rollout, step 0, is off 1 by 0.0001, above 1e-05" in said
    assert "Traceback" not in said
    assert not (tmp_path / "a" / "step_000001").exists()
    (row, *_) = train(root, tmp_path / "b", "--max-train-steps", "1", "--mixed-precision", "bf16")
    assert row["first_ratio_error"] > 1e-5
    (row, *_) = train(root, tmp_path / "c", "--max-train-steps", "1", "--old-logprob", "replay")
    assert row["first_ratio_error"] == 0


def test_log_probabilities_of_a_replay_are_those_of_the_rollout(
    straight: Path, root: Path, tmp_path: Path
) -> None:
    """Sampled the fast way, whose latents differ in the last bits; where no step is trained there are none."""
    found = train(root, tmp_path, "--max-train-steps", "2", "--old-logprob", "replay")
    ours, theirs = rollouts.read(tmp_path, 0), rollouts.read(straight, 0)
    assert ours.log_probs.isnan().any(0).tolist() == [True, False, False, True]
    assert theirs.log_probs.isfinite().all()
    torch.testing.assert_close(ours.log_probs[:, 1:3], theirs.log_probs[:, 1:3], rtol=0, atol=1e-4)
    for row, other in zip(found, rows(straight), strict=False):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-2, abs=1e-2)


CONSTANT = "def flat(pixels, prompts):\n    assert not pixels.requires_grad\n    return pixels.new_full((len(pixels),), 0.1)\n"


@pytest.mark.parametrize("flags", [[], ["--advantages", "group"]], ids=["prompt", "group"])
def test_a_constant_reward_changes_nothing_and_is_counted(
    flags: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even by weight decay or momentum; it is said once for each rollout."""
    (tmp_path / "own.py").write_text(CONSTANT)
    buffers = ["--prompt-buffer-size", "16", "--prompt-buffer-min-count", "16"]
    reward = ["--rewards", f"{tmp_path / 'own.py'}:flat=1", "--kl-weight", "0", *buffers]
    found = train(root, tmp_path / "run", *flags, *reward)
    assert [row["zero_variance_share"] for row in found] == [1, 1, 1]
    assert not any("loss" in row for row in found)
    assert equal(weights(tmp_path / "run", 0), weights(tmp_path / "run", 3))
    said = capsys.readouterr().err
    assert said.count("all rewards that are compared are equal; its updates are left out") == 2


def test_all_weights_have_a_frozen_second_model_as_reference(root: Path, tmp_path: Path) -> None:
    found = train(root, tmp_path, "--train", "full", "--max-train-steps", "2", "--kl", "prediction")
    assert found[0]["kl"] == 0
    assert found[0]["first_ratio_error"] == 0
    assert found[1]["kl"] > 0


def test_images_of_a_prompt_are_encoded_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of two images each: one call with both in a rollout, whatever the number of updates."""
    seen, original = [], SD.encode

    def encode(self: Any, prompts: Sequence[str], *given: Any, **named: Any) -> Cond:
        seen.append(len(prompts))
        return original(self, prompts, *given, **named)

    monkeypatch.setattr(SD, "encode", encode)
    train(root, tmp_path, "--validation-steps", "0")
    assert Counter(seen)[2] == 2, "two rollouts; validation has one prompt"


def test_seeds_are_of_images_and_not_of_batches(root: Path, tmp_path: Path, straight: Path) -> None:
    train(root, tmp_path, "--max-train-steps", "2", "--rollout-batch-size", "3")
    ours, theirs = rollouts.read(tmp_path, 0), rollouts.read(straight, 0)
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=1e-4)
    first = rollouts.read(straight, 1)
    noise = torch.cat([theirs.latents[:, 0], first.latents[:, 0]]).flatten(1)
    assert len({tuple(row.tolist()[:4]) for row in noise}) == 8, "no noise comes twice"


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_lora_loads_in_diffusers(kind: str, root: Path, tmp_path: Path) -> None:
    model = root / "pipeline" if kind == "sd" else tiny.pipeline_xl_folder(tmp_path / "pipeline")
    train(root, tmp_path / "run", "--model", str(model), *GROUP)
    pipe = (StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline).from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    assert pipe.get_active_adapters()


@pytest.mark.parametrize("weight", [1, -1])
def test_a_reward_rises(weight: int, root: Path, tmp_path: Path) -> None:
    """Brightness of a tiny random model, and its opposite, without a gradient of them: ten rollouts of 64 images, two updates each.

    The deviation between images is 0.021, of a rollout's mean 0.0026.
    """
    (tmp_path / "prompts.txt").write_text("a red circle on a white background\n")
    flags = f"--rewards brightness={weight} --prompts {tmp_path / 'prompts.txt'} --prompts-per-rollout 1 --images-per-prompt 64"
    more = "--max-train-steps 20 --train-batch-size 64 --gradient-accumulation-steps 2 --kl-weight 0 --window 0 3 --adam-epsilon 1e-8"
    less = "--guidance-scale 1 --checkpointing-steps 0"
    found = train(root, tmp_path / "run", *flags.split(), *more.split(), *less.split(), *GROUP)
    assert found[-1]["reward"] > found[0]["reward"] + 0.008, [row["reward"] for row in found]


def test_updates_must_divide_a_rollout() -> None:
    run = ddpo.RunConfig(train_batch_size=2, gradient_accumulation_steps=3)
    policy = PolicyConfig(num_inference_steps=5, guidance_scale=1, prompts_per_rollout=4, inner_epochs=3)
    defaults: Any = SimpleNamespace(check_solver=lambda *_: None)
    plan = ddpo.plan_of(policy, run, defaults)
    assert (plan.images, plan.window, plan.steps, plan.updates, plan.pairs) == (4, range(5), 5, 10, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "7")
        with pytest.raises(ValueError, match=r"an update has 42 pairs .* do not divide the 60 of a rollout"):
            ddpo.plan_of(policy, run, defaults)


def test_the_published_configurations() -> None:
    """DDPO's config/dgx.py and DanceGRPO's script: images, pairs of an update and updates of a rollout."""
    folder = Path(ddpo.__file__).parent / "configs" / "ddpo"
    defaults: Any = SimpleNamespace(check_solver=lambda *_: None)
    for name, images, updates in (
        ("sd15", 256, 2),
        ("sd15_grpo", 128, 1),
        ("tiny", 64, 1),
        ("tiny_jpeg", 64, 2),
        ("tiny_grpo", 64, 1),
    ):
        config = parse(ddpo.Config, ["--config", str(folder / f"{name}.yaml"), "--prompts", "a"])
        policy = config.policy
        if policy.num_inference_steps is None:
            policy = PolicyConfig(**{**vars(policy), "num_inference_steps": 50})
        plan = ddpo.plan_of(policy, config.run, defaults)
        assert (plan.images, plan.updates) == (images, updates), name
        assert (config.clip_range, policy.advantage_clip, policy.eta) == (1e-4, 5, 1)


def test_a_state_of_histories_is_kept(straight: Path) -> None:
    """Before the rollout in use: a run that goes on adds it once."""
    made = [rollouts.read(straight, number) for number in range(3)]
    states: list[Any] = [
        read(straight / f"step_{updates:06d}")["driver"]["history"] for updates in (1, 2, 3, 4)
    ]
    assert states[0] == []
    assert states[1] == states[2]
    values = [value for rewards in states[1][0].values() for value in rewards]
    assert sorted(values) == sorted(made[0].rewards.tolist())
    assert len(states[3][0]) == 4
    assert json.dumps(states)
