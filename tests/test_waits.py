"""How often a program would wait for a GPU: counted on a device that needs none, see transfers.py."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import rewards
import tiny
from finetune import awm, ddpo, dpo, draft, drtune, flowbp, nft, refl, reward_weighted
from golden_weights import tiny_card
from preftune import families
from preftune.cli import parse
from preftune.families import Family
from preftune.resolution import Resolution
from preftune.rollout import replay, rollout
from preftune.sampling import Sampling, initial_noise, sample
from preftune.solver_names import SolverName
from preftune.training import workspace
from preftune.training.run import Run
from preftune.training.validation import Scoring
from record_trajectories import arguments
from rewards import clip
from rewards.card import Scorer
from transfers import DEVICE, Transfers

PROMPTS = ["a red circle", "two blue stars"]
SIZE = Resolution(tiny.PIXELS, tiny.PIXELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"sd": tiny.pipeline_folder, "sdxl": tiny.pipeline_xl_folder}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in made.items()}


# The device itself


def read(name: str, x: Tensor) -> object:
    """Something that makes a program wait."""
    index = torch.tensor([0, 2])
    return {
        "item": lambda: x[0].item(),
        "if": lambda: bool((x > 0).all()),
        "float": lambda: float(x.sum()),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "numpy": lambda: x.numpy(),
        "copy_": lambda: torch.zeros(3).copy_(x),
        "nonzero": lambda: x.nonzero(),
        "a mask": lambda: x[x > 0],
        "a tensor () as an index": lambda: x[x.sum().long() * 0],
        "a list as an index": lambda: x[[0, 2]],
        "an index of the CPU": lambda: x[index],
        "an upload": lambda: index.to(DEVICE),
        "an upload in place": lambda: x.copy_(torch.ones(3)),
        "torch.tensor": lambda: torch.tensor([1.0], device=DEVICE),
        "new_tensor": lambda: x.new_tensor([1.0]),
    }[name]()


@pytest.mark.parametrize(
    "name",
    ["item", "if", "float", "tolist", "cpu", "numpy", "copy_", "nonzero", "a mask", "a tensor () as an index",
     "a list as an index", "an index of the CPU", "an upload", "an upload in place", "torch.tensor", "new_tensor"],
)  # fmt: skip
def test_what_waits_is_counted(name: str) -> None:
    with Transfers() as transfers:
        x = torch.ones(3, device=DEVICE)
        read(name, x)
    assert len(transfers.waits) == 1


def test_what_does_not_wait_is_not() -> None:
    with Transfers() as transfers:
        x = torch.arange(3.0, device=DEVICE)
        module = nn.Linear(3, 1)
        module.weight = nn.Parameter(x[None].clone())
        module.bias = nn.Parameter(x.new_full((1,), 2.0))
        optimizer = torch.optim.AdamW(module.parameters())
        module(x * 2).sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        x[:2] = torch.zeros(2).to(DEVICE, non_blocking=True)
        y = torch.where(x > 0, x, -x)[torch.arange(2, device=DEVICE)]
    assert (transfers.waits, len(transfers.uploads)) == ([], 1)
    assert y.held.tolist() == [0, 0]  # type: ignore[attr-defined]


# A trajectory


def counted(folder: Path, work: Callable[[Family], Tensor]) -> tuple[Tensor, Tensor, int, int]:
    """What some work on a model returns on the CPU, and on the device, and its uploads and waits there."""
    expected, family = work(families.load(folder)), families.load(folder)
    with Transfers() as transfers:
        family.to(DEVICE)
        transfers.uploads.clear()
        transfers.waits.clear()
        found = work(family)
        uploads, waits = len(transfers.uploads), len(transfers.waits)
        return expected, found.cpu(), uploads, waits


@pytest.mark.parametrize(
    ("name", "solver"), [("sd", "ddpm"), ("sd", "pndm"), ("sd", "dpm++"), ("sdxl", "euler")]
)
def test_a_denoising_step_copies_nothing(name: str, solver: SolverName, folders: dict[str, Path]) -> None:
    """Four steps copy what two copy; the one wait is for the pixels. The images are those of the CPU."""
    folder, found = folders[name], []
    for steps in (2, 4):
        settings = Sampling(num_inference_steps=steps, guidance_scale=3.0, solver=solver, resolution="64")
        expected, images, *counts = counted(
            folder,
            lambda family, settings=settings: torch.cat(list(sample(family, PROMPTS, [1, 2], settings))),
        )
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        found.append(counts)
    assert found[0] == found[1]
    assert found[0][1] == 1
    assert found[0][0] <= 6  # tokens of both prompts and encoders, timesteps, noise


@pytest.mark.parametrize(("name", "solver"), [("sd", "ddpm"), ("sdxl", "ddim")])
def test_a_step_of_a_rollout_and_a_replay_copies_nothing(
    name: str, solver: SolverName, folders: dict[str, Path]
) -> None:
    """The one wait is for which steps have noise."""

    def work(family: Family, steps: int) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in (1, 2)]
        cond = family.encode(PROMPTS)
        x_t = initial_noise(family.latent_shape(SIZE), generators, family.device)
        trajectory = rollout(family, cond, x_t, solver, steps, 3.0, generators)
        with torch.no_grad():
            transitions = [replay(family, trajectory, cond, index) for index in range(steps)]
            own = replay(family, trajectory, cond, torch.arange(2, device=family.device))
        if solver == "ddpm":
            transitions[0].log_prob(trajectory.latents[1], "mean")
        return torch.cat([own.mean, *(transition.mean for transition in transitions)])

    found = []
    for steps in (2, 3):
        expected, latents, *counts = counted(folders[name], lambda family, steps=steps: work(family, steps))
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        found.append(counts)
    assert found[0] == found[1]
    assert found[0][1] == 1


# Scorers


def on_device(scorer: Any) -> Any:
    if isinstance(scorer, nn.Module):
        scorer.to(DEVICE)
    return scorer


def test_scorers_wait_for_nothing_where_a_gradient_is_needed(root: Path, clips: Path) -> None:
    """And where none is, for the range of the pixels alone, once the work has been asked for. Scores are those of the CPU."""
    pixels = torch.rand(2, 3, 40, 40, generator=Generator().manual_seed(0))
    scorers: list[Scorer] = [
        rewards.load(str(root / "scorer")),
        *(
            clip.load_scorer(tiny_card(name), clips / f"{name}.pt", "cpu", torch.float32)
            for name in ("hpsv2", "pickscore")
        ),
    ]
    expected = [scorer(pixels, PROMPTS) for scorer in scorers]
    with Transfers() as transfers:
        inputs = pixels.to(DEVICE)
        for scorer, scores in zip(scorers, expected, strict=True):
            on_device(scorer)
            for x, waits in ((inputs.clone().requires_grad_(), 0), (inputs, 1)):
                transfers.waits.clear()
                found = scorer(x, PROMPTS)
                assert len(transfers.waits) == waits, transfers.waits
                torch.testing.assert_close(found.detach().cpu(), scores, rtol=1e-5, atol=1e-6)


# An update


class Counted(Run):
    """A run that keeps what its updates copied, without what comes after them: validation and checkpoints."""

    transfers: Transfers
    updates: list[tuple[list[str], list[str]]]

    def steps(self) -> Iterator[int]:
        for step in super().steps():
            self.transfers.uploads.clear()
            self.transfers.waits.clear()
            yield step

    def due(self, what: Any, step: int) -> bool:
        if what == "validation_steps":
            self.updates.append(([*self.transfers.uploads], [*self.transfers.waits]))
        return super().due(what, step)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[str], list[str]]]]:
    """A device for drivers: models load on the CPU and move there. What each update uploads and waits for."""
    transfers, load_model, load_scoring = Transfers(), workspace.load_model, workspace.load_scoring

    def model(*args: Any, **rest: Any) -> tuple[Family, nn.Module]:
        with _disable_current_modes():
            family, denoiser = load_model(*args[:2], torch.device("cpu"), **rest)
        return family.to(DEVICE), denoiser

    def scoring(reward: Any, device: torch.device, **rest: Any) -> Scoring:
        with _disable_current_modes():
            found = load_scoring(reward, torch.device("cpu"), **rest)
        for mix in (found.mix, found.holdout):
            for scorer in mix.scorers if mix is not None else ():
                on_device(scorer)
        return found

    monkeypatch.setattr(workspace, "load_model", model)
    monkeypatch.setattr(workspace, "load_scoring", scoring)
    monkeypatch.setattr(workspace, "Run", Counted)
    monkeypatch.setattr(Accelerator, "device", property(lambda _: DEVICE))
    Counted.transfers, Counted.updates = transfers, []
    with transfers:
        yield Counted.updates


DRIVERS = {
    "awm": awm,
    "ddpo": ddpo,
    "dpo": dpo,
    "draft": draft,
    "drtune": drtune,
    "flowbp": flowbp,
    "nft": nft,
    "refl": refl,
    "reward_weighted": reward_weighted,
}
CLOCK = ("images_per_s", "sampling_time", "scoring_time", "update_time")
_FEW = "--updates-per-epoch 3 --prompts-per-epoch 2 --timesteps-per-image 1"
GENERATING = {"awm": _FEW, "nft": _FEW, "ddpo": "--inner-epochs 2"}
"""Drivers that generate images, and wait for these, before their first update -> flags with which they do not between the next ones."""


OFTEN = ("dpo", "draft", "nft", "refl")
"""Drivers whose updates are counted with the quick tests; the others share their parts."""


@pytest.mark.parametrize(
    "driver", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in DRIVERS]
)
def test_an_update_waits_once(
    driver: str, root: Path, tmp_path: Path, request: pytest.FixtureRequest, cpu: None
) -> None:
    """Once for each step of the optimizer: ReFL has two, with its pre-training loss. Metrics are those of the CPU.

    Of drivers that generate images, an update between two generations.
    """
    program: Any = DRIVERS[driver]

    def train(name: str) -> list[dict[str, Any]]:
        few = f"--max-train-steps {2 + (driver in GENERATING)} --checkpointing-steps 0 --num-validation-prompts 2"
        argv = [*arguments(driver, root, tmp_path / name), *few.split()]
        if driver not in ("dpo", "reward_weighted"):
            argv += ["--rewards", f"{root / 'scorer'}=1"]
        if driver == "dpo":
            argv += ["--validation-share", "0"]
        argv += GENERATING.get(driver, "").split()
        config = parse(program.Config, argv)
        assert program.main(config) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]

    expected = train("cpu")
    counts = request.getfixturevalue("updates")
    for ours, theirs in zip(train("device"), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    waits = counts[driver in GENERATING][1]  # the last also writes the result
    assert len(waits) == (2 if driver == "refl" else 1), waits
    assert all("_averaged" in wait for wait in waits)
