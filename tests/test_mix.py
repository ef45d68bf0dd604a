"""Weighted sums by hand, and what a mix refuses."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewards
from data_build import diffusiondb, score
from eval import compare_methods, grid, preference_accuracy
from finetune import refl
from preftune import cli
from preftune.training.config import RewardConfig
from rewards import CARDS, Card
from rewards.mix import Mix, named
from rewards.terms import parse_files, parse_names, parse_weights, units


class Fixed:
    """A scorer that adds a constant to the brightness; its card has mean 0.5 and std 0.15 unless told."""

    def __init__(self, name: str, offset: float, **card: float) -> None:
        self.card: Card = replace(CARDS["brightness"], name=name, **card)
        self.offset = offset

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return pixels.mean(dim=(1, 2, 3)) + self.offset


PIXELS = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
PROMPTS = ["black", "white"]


def test_raw_mix_by_hand() -> None:
    mixed = Mix([Fixed("a", 0.0), Fixed("b", 3.0)], {"b": 0.5, "a": 2.0}, "none")(PIXELS, PROMPTS)
    assert mixed.scores.tolist() == [[0.0, 3.0], [1.0, 4.0]]
    assert mixed.rewards.tolist() == [0.5 * 3, 2 * 1 + 0.5 * 4]


def test_card_units_by_hand() -> None:
    """(score - mean) / std of each card, then the weights; scores stay raw."""
    scorers = [Fixed("a", 0.0, mean=0.5, std=0.25), Fixed("b", 3.0, mean=1.0, std=2.0)]
    mixed = Mix(scorers, {"a": 1.0, "b": -1.0}, "card")(PIXELS, PROMPTS)
    assert mixed.scores.tolist() == [[0.0, 3.0], [1.0, 4.0]]
    assert mixed.rewards.tolist() == [-2.0 - 1.0, 2.0 - 1.5]


def test_the_least_by_hand() -> None:
    """Of (0 - 0.5) / 0.25 = -2 and 0.5 (3 - 1) / 2 = 0.5 the first, of 2 and 0.75 the second, whose gradient alone flows."""
    scorers = [Fixed("a", 0.0, mean=0.5, std=0.25), Fixed("b", 3.0, mean=1.0, std=2.0)]
    mix = Mix(scorers, {"a": 1.0, "b": 0.5}, "card", combination="min")
    pixels = PIXELS.clone().requires_grad_()
    mixed = mix(pixels, PROMPTS)
    assert mixed.rewards.tolist() == [-2.0, 0.75]
    mixed.rewards.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad[0].sum().item() == pytest.approx(1 / 0.25)
    assert pixels.grad[1].sum().item() == pytest.approx(0.5 / 2)


@pytest.mark.parametrize(
    "more",
    [{"rewards": ("brightness",)}, {"rewards": ("brightness", "shapes")}, {"reward_normalization": "card"}],
)
def test_the_least_needs_two_scores_in_one_unit(more: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="--reward-combination min is the least of several scores in one unit"
    ):
        RewardConfig(reward_combination="min", **more)


def stats_file(folder: Path, **scores: object) -> Path:
    """A summary.json as data_build/score.py writes it, as far as a mix reads it."""
    (folder / "summary.json").write_text(json.dumps({"count": 9, "scores": scores}), encoding="utf-8")
    return folder / "summary.json"


def test_dataset_units_by_hand(tmp_path: Path) -> None:
    """Mean and std of the file, not of the card; scorers that the mix lacks may be there, too."""
    a, b, c = {"mean": 0.5, "std": 0.25}, {"mean": 1.0, "std": 2.0}, {"mean": 0.0, "std": 0.0}
    stats = stats_file(tmp_path, b=b, c=c, a=a)
    mixed = Mix([Fixed("a", 0.0), Fixed("b", 3.0)], {"a": 1.0, "b": -1.0}, "dataset", stats)(PIXELS, PROMPTS)
    assert mixed.scores.tolist() == [[0.0, 3.0], [1.0, 4.0]]
    assert mixed.rewards.tolist() == [-2.0 - 1.0, 2.0 - 1.5]


def test_statistics_that_cannot_be_used(tmp_path: Path) -> None:
    cards = [Fixed("a", 0.0).card]
    for row, words in (
        ({"mean": 0.5, "std": 0.0}, "gives a mean 0.5 and std 0; scores that do not differ"),
        ({"mean": math.inf, "std": 1.0}, "gives a mean inf"),
        ({"mean": None, "std": 1.0}, "is no summary.json"),
        ({"mean": 0.5}, r"is no summary.json of preftune score \(KeyError: 'std'\)"),
        ("x", "is no summary.json"),
    ):
        with pytest.raises(ValueError, match=words):
            units(cards, "dataset", stats_file(tmp_path, a=row))
    with pytest.raises(ValueError, match=r"summary\.json has no a; it has b"):
        units(cards, "dataset", stats_file(tmp_path, b={"mean": 0, "std": 1}))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json is no summary\.json"):
        units(cards, "dataset", tmp_path / "list.json")
    with pytest.raises(ValueError, match=r"cannot read the file of statistics .*gone: No such file"):
        units(cards, "dataset", tmp_path / "gone")


def test_statistics_are_for_dataset_alone(tmp_path: Path) -> None:
    stats = stats_file(tmp_path, a={"mean": 0, "std": 1})
    with pytest.raises(
        ValueError, match=r"--reward-normalization card with .*summary\.json; dataset, and dataset alone"
    ):
        Mix([Fixed("a", 0)], {"a": 1.0}, "card", stats)
    with pytest.raises(ValueError, match="--reward-normalization dataset with no file of statistics"):
        Mix([Fixed("a", 0)], {"a": 1.0}, "dataset")


def test_gradient_is_the_weighted_sum() -> None:
    pixels = PIXELS.clone().requires_grad_()
    Mix([Fixed("a", 0.0), Fixed("b", 1.0)], {"a": 3.0, "b": 1.0}, "none")(
        pixels, PROMPTS
    ).rewards.sum().backward()
    assert pixels.grad is not None
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 4 / 48))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_its_scorer(value: float) -> None:
    mix = Mix([Fixed("good", 0.0), Fixed("bad", value)], {"good": 1.0, "bad": 1.0}, "none")
    with pytest.raises(FloatingPointError, match=r"bad gave .* for 'black'"):
        mix(PIXELS, PROMPTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_nobody_looked_at_is_named_where_the_update_fails(value: float) -> None:
    good = Mix([Fixed("good", 0.0)], {"good": 1.0}, "none").unchecked(PIXELS, PROMPTS)
    bad = Mix([Fixed("good", 0.0), Fixed("bad", value)], {"good": 1.0, "bad": 1.0}, "none").unchecked(
        PIXELS, PROMPTS
    )
    with pytest.raises(FloatingPointError, match=r"bad gave .* for 'black'"), named([good, bad]):
        raise FloatingPointError("the loss")
    with pytest.raises(FloatingPointError, match="the loss"), named([good]):  # it was not the scorer
        raise FloatingPointError("the loss")
    with named([bad]):
        pass


def test_weights_and_scorers_must_correspond() -> None:
    for scorers, weights in (([], {}), ([Fixed("a", 0)], {}), ([Fixed("a", 0)] * 2, {"a": 1.0})):
        with pytest.raises(ValueError, match="one weight for each"):
            Mix(scorers, weights, "none")
    with pytest.raises(ValueError, match=r"'zscore'; one of none, card, dataset"):
        Mix([Fixed("a", 0)], {"a": 1.0}, "zscore")  # type: ignore[arg-type]


def test_a_loaded_scorer_can_be_mixed() -> None:
    mix = Mix([rewards.load("brightness")], parse_weights(["brightness=2"]), "none")
    assert mix(PIXELS, PROMPTS).rewards.tolist() == [0.0, 2.0]


def test_parse_weights_keeps_the_order() -> None:
    parsed = parse_weights(["shapes=1e-1", "brightness=-0.5", "imagereward"])
    assert list(parsed.items()) == [("shapes", 0.1), ("brightness", -0.5), ("imagereward", 1.0)]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["brightness="], "'brightness=' is not NAME or NAME=WEIGHT"),
        (["=1"], "'=1' is not NAME or NAME=WEIGHT"),
        (["brightness=much"], "not NAME or NAME=WEIGHT .* --reward-files NAME=PATH"),
        (["brightness=nan"], "finite"),
        (["brightness=0"], "other than 0"),
        (
            ["brightnes=1"],
            r"unknown scorer 'brightnes' \(did you mean brightness\?\); one of brightness, shapes",
        ),
        (["brightness=1", "brightness=2"], "repeats brightness"),
        (["brightness", "brightness=1"], "repeats brightness"),
        ([], "--rewards is empty; name at least one scorer, as NAME or NAME=WEIGHT, of brightness"),
    ],
)
def test_parse_weights_refuses(terms: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(terms)


def test_names_take_no_weight_but_one() -> None:
    assert parse_names(["shapes", "brightness=1.0"]) == ("shapes", "brightness")
    with pytest.raises(
        ValueError, match=r"--rewards shapes=2 has a weight, but .* reported by itself; write shapes"
    ):
        parse_names(["shapes=2"])


PROGRAMS = {
    "score": (score.Config, ["--data", "x", "--output-dir", "x"]),
    "diffusiondb": (diffusiondb.Config, ["--data", "x", "--output-dir", "x"]),
    "preference_accuracy": (preference_accuracy.Config, ["--data", "x"]),
    "compare_methods": (compare_methods.Config, ["--methods", "a=finetune/refl.py"]),
    "grid": (grid.Config, []),
    "refl": (refl.Config, ["--model", "x", "--prompts", "x", "--pretraining", "off"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_programs_read_scorers_alike(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One grammar, one help text, one set of sentences."""
    config, flags = PROGRAMS[program]
    for term in ("brightness", "brightness=1", "brightness=1.0"):
        assert cli.parse(config, [*flags, "--rewards", term])
    for term, words in (
        ("brightnes", "unknown scorer 'brightnes' (did you mean brightness?); one of brightness, shapes"),
        ("brightness=x.pt", "'brightness=x.pt' is not NAME or NAME=WEIGHT"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.parse(config, [*flags, "--rewards", term])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(config, ["--help"])
    said = " ".join(re.sub(r"[^\x20-\x7e]", " ", capsys.readouterr().out).split())
    assert "`preftune scorers` lists" in said
    assert "the folder of a trained" in said
    assert "Weights of scorers on disk, as NAME=PATH" in said


def test_parse_files() -> None:
    parsed = parse_files(["shapes=a=b.pt", "brightness=c"], ["brightness", "shapes"])
    assert parsed == {"shapes": Path("a=b.pt"), "brightness": Path("c")}
    for term, words in (
        ("shapes", "'shapes' is not scorer=path"),
        ("shapes=", "'shapes=' is not scorer=path"),
        ("=x", "'=x' is not scorer=path"),
        ("clipscore=x", "names clipscore, which --rewards does not use"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_files([term], ["shapes"])
    with pytest.raises(ValueError, match="once a scorer"):
        parse_files(["shapes=x", "shapes=y"], ["shapes"])
