"""Scorers that are trained: gradients, what stays frozen, and folders that come back as the scorers that were saved."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import record_trajectories as recorded
import rewards
import rewards.weights as rewards_weights
from data_build import score
from finetune import pretrain_scorer
from golden_weights import BLIP, FOLDER, fill
from preftune.cli import parse
from rewards import CARDS, Clip, Preprocess, blipscore
from rewards.atomic_folder import left_behind
from rewards.clip import ClipScorer
from rewards.imagereward import FULL_SIZE, ImageReward
from rewards.mix import Mix
from rewards.shared_towers import load_all
from rewards.terms import parse_weights
from rewards.trained_cards import clip_card
from rewards.training import check_trainable, freeze, load_trainable

TINY = Clip(
    embed=16, vision_width=32, vision_layers=3, vision_heads=2, patch=16, text_width=32, text_layers=2, text_heads=2,
    activation="gelu", tokenizer="transformers", context=40, vocab_size=514,
)  # fmt: skip
PROMPTS = ["a red circle", "a red circle", "a blue square"]


def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(root: Path, **clip: Any) -> ClipScorer:
    """A CLIP with random weights, whose embeddings are large enough for scores to differ."""
    card = clip_card("random", replace(TINY, **clip), Preprocess(size=32))
    scorer = ClipScorer.build(card, root / "pipeline" / "tokenizer" / "merges.txt", seed=0, temperature=0.05)
    with torch.no_grad():
        for tower in scorer.towers():
            for weight in tower.embeddings[0].parameters():
                weight *= 20
    return scorer


def louder(scorer: Any) -> Any:
    """The same, with a head whose scores are far from 0."""
    with torch.no_grad():
        for layer in scorer.mlp:
            if isinstance(layer, nn.Linear):
                layer.weight *= 3
                layer.bias += 0.01
    return scorer


@pytest.fixture
def folders(root: Path, tmp_path: Path) -> dict[str, str]:
    """Folders of an ImageReward and of a CLIP; a path of the second has what might confuse a reader of names."""
    clip = tmp_path / "lr=1e-4" / "v2.1, <b>" / "scorer"
    build(root).save(clip)
    return {"imagereward": str(root / "scorer"), "clip": str(clip)}


@pytest.fixture(params=["imagereward", "clip"])
def folder(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return folders[request.param]


# ---------------------------------------------------------------- gradients


def test_gradients_reach_every_weight_that_a_score_depends_on(folder: str) -> None:
    scorer = load_trainable(folder)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in scorer.parameters())
    freeze(scorer)
    scorer.raw(pixels(), PROMPTS).square().sum().backward()
    module: Any = scorer
    for name, weight in module.named_parameters():
        if "vision_proj." in name or "text_proj." in name:
            assert not weight.requires_grad, "no score depends on it"
        elif not name.endswith(("k_proj.bias", "key.bias")):  # softmax does not see a constant
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().max() > 0, name


def test_gradients_reach_a_head_and_all_below_it(folders: dict[str, str]) -> None:
    """And not the scale, on which no score depends then: processes that share gradients would wait for it."""
    scorer: Any = load_trainable(folders["clip"], head="mlp")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in scorer.parameters())
    freeze(scorer)
    louder(scorer).raw(pixels(), PROMPTS).square().sum().backward()
    for name, weight in scorer.named_parameters():
        if name == "logit_scale":
            assert not weight.requires_grad
        elif not name.endswith("k_proj.bias"):
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().max() > 0, name


def test_raw_of_a_clip_is_its_cosine_times_its_scale(root: Path) -> None:
    scorer = build(root)
    cosines = (scorer.vision(pixels()) * scorer.text(PROMPTS)).sum(1)
    raw = scorer.raw(pixels(), PROMPTS)
    torch.testing.assert_close(raw, 20 * cosines)
    torch.testing.assert_close(scorer(pixels(), PROMPTS), cosines)
    (slope,) = torch.autograd.grad(raw[0], scorer.logit_scale)
    torch.testing.assert_close(slope, raw[0])  # d exp(s) c / ds


def test_calls_follow_weights_that_are_trained(folders: dict[str, str], tmp_path: Path) -> None:
    scorer: Any = load_trainable(folders["clip"]).eval()
    before = scorer(pixels(), PROMPTS)
    with torch.no_grad():
        for weight in scorer.text.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    after = scorer(pixels(), PROMPTS)
    assert (after - before).abs().max() > 1e-3
    scorer.save(tmp_path / "again")
    torch.testing.assert_close(rewards.load(str(tmp_path / "again"))(pixels(), PROMPTS), after.detach())


# ---------------------------------------------------------------- saving and loading


def test_a_saved_scorer_comes_back(folder: str, tmp_path: Path) -> None:
    scorer: Any = load_trainable(folder).eval()
    scorer.set_statistics(0.25, 0.5)
    scorer.save(tmp_path / "again")
    again: Any = load_trainable(str(tmp_path / "again")).eval()
    with torch.no_grad():
        raw = scorer.raw(pixels(), PROMPTS)
        assert len(set(raw.tolist())) == 3
        assert torch.equal(again.raw(pixels(), PROMPTS), raw)
        frozen: Any = rewards.load(str(tmp_path / "again"))
        assert torch.equal(frozen(pixels(), PROMPTS), scorer(pixels(), PROMPTS))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    assert frozen.card == rewards.find_card(str(tmp_path / "again"))
    expected = (raw - 0.25) / 0.5 if "vision_proj" in dict(scorer.named_children()) else raw / 20
    torch.testing.assert_close(frozen(pixels(), PROMPTS), expected)


def test_a_clip_says_its_scores_in_the_units_of_its_card(root: Path, tmp_path: Path) -> None:
    """Raw mean 4 and deviation 2 at a scale of 20: cosines of 0.2 and 0.1, four deviations wide."""
    for scaled, factor in ((False, 1 / 20), (True, 1)):
        scorer = build(root, scaled=scaled)
        scorer.set_statistics(4.0, 2.0)
        scorer.save(tmp_path / "scorer")
        card = rewards.find_card(str(tmp_path / "scorer"))
        assert card.name == str(tmp_path / "scorer")
        assert (card.mean, card.std) == pytest.approx((4 * factor, 2 * factor))
        assert card.typical_range == pytest.approx((0, 8 * factor), abs=1e-6)
        assert card.prompted
        assert card.differentiable
        assert "from random" in card.summary
        assert hash(card.preprocess) == hash(Preprocess(size=32))
        assert [path.name for path in rewards.check(card.name)] == [
            "model.safetensors",
            "merges.txt",
            "config.json",
        ]
        score = rewards.load(card.name)(pixels(), PROMPTS)
        torch.testing.assert_close(score, scorer.raw(pixels(), PROMPTS).detach() * factor)


def test_a_relative_path_is_where_one_stands(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(folder).parent)
    near: Any = rewards.load("scorer")
    assert near.card.name == "scorer"
    assert torch.equal(near(pixels(), PROMPTS), rewards.load(folder)(pixels(), PROMPTS))


def test_folders_are_rewards(folders: dict[str, str]) -> None:
    weights = parse_weights([f"{folders['clip']}=2.0", "brightness=1", f"{folders['imagereward']}=-1"])
    assert list(weights) == [folders["clip"], "brightness", folders["imagereward"]]
    assert list(weights.values()) == [2.0, 1.0, -1.0]
    scorers = load_all(list(weights), files={}, device="cpu", dtype=torch.float32)
    mixed = Mix(scorers, weights, "card")(pixels().requires_grad_(), PROMPTS)
    columns = [scorer(pixels(), PROMPTS) for scorer in scorers]
    clip, imagereward = columns[0], columns[2]  # their cards have mean 0 and deviation 1
    torch.testing.assert_close(mixed.rewards, 2 * clip + (columns[1] - 0.5) / 0.15 - imagereward)


def test_folders_are_columns_of_a_table(folders: dict[str, str], root: Path, tmp_path: Path) -> None:
    names = list(folders.values())
    argv = ["--data", str(root / "images"), "--output-dir", str(tmp_path / "scored"), "--workers", "0"]
    score.main(parse(score.Config, [*argv, "--rewards", *names]))
    table = pyarrow.parquet.read_table(tmp_path / "scored" / "scores.parquet")
    assert table.column_names == ["file", "member", "text", *names]
    summary = json.loads((tmp_path / "scored" / "summary.json").read_text())
    for name in names:
        assert summary["scores"][name]["mean"] == pytest.approx(
            sum(table[name].to_pylist()) / len(table), rel=1e-5
        )
    assert (tmp_path / "scored" / "best_worst.png").is_file()


@pytest.mark.usefixtures("cpu")
def test_a_driver_is_tuned_by_a_folder(folders: dict[str, str], root: Path, tmp_path: Path) -> None:
    flags = [
        "--rewards",
        f"{folders['clip']}=1.0",
        "--reward-normalization",
        "card",
        "--max-train-steps",
        "1",
    ]
    assert recorded.train("refl", [*recorded.arguments("refl", root, tmp_path / "run"), *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["grad_norm"] > 0


# ---------------------------------------------------------------- freezing


def frozen_layers(scorer: Any) -> tuple[str, str]:
    """For each tower e.g. "E..LR": frozen embeddings, dots for frozen layers, L for a trained one, R for a trained rest."""

    def open_(part: nn.Module) -> bool:
        states = {weight.requires_grad for weight in part.parameters()}
        assert len(states) == 1
        return states.pop()

    def sketch(tower: Any) -> str:
        parts = [*("e" if open_(part) else "." for part in tower.embeddings)]
        parts += ["L" if open_(part) else "." for part in tower.layers]
        return "".join([*parts, *("R" if open_(part) else "." for part in tower.rest)])

    image, text = scorer.towers()
    return sketch(image), sketch(text)


@pytest.mark.parametrize(
    ("rule", "image", "text"),
    [
        ({}, "eeLLLRR", "eLLRR"),
        ({"share": 0.0}, "eeLLLRR", "eLLRR"),
        ({"share": 0.1}, "..LLLRR", ".LLRR"),
        ({"share": 0.7}, "....LRR", "..LRR"),  # int(2.1) and int(1.4) layers
        ({"share": 1.0}, ".....RR", "...RR"),
        ({"last": (3, 2)}, "..LLLRR", ".LLRR"),
        ({"last": (1, 0)}, "....LRR", "...RR"),
    ],
)
def test_freezing_by_hand(rule: dict[str, Any], image: str, text: str, root: Path) -> None:
    """Two embeddings, three layers, norm and projection; one embedding, two layers, norm and projection."""
    scorer = build(root)
    freeze(scorer, **rule)
    assert frozen_layers(scorer) == (image, text)
    assert scorer.logit_scale.requires_grad


def test_every_weight_of_a_clip_is_in_a_tower(root: Path) -> None:
    scorer = build(root)
    for tower in scorer.towers():
        for part in (*tower.embeddings, *tower.layers, *tower.rest):
            part.requires_grad_(False)
    assert [name for name, weight in scorer.named_parameters() if weight.requires_grad] == ["logit_scale"]


def test_freezing_an_imagereward_leaves_its_head(root: Path) -> None:
    for share, sketch in ((0.0, ("eLR", "eL")), (1.0, ("..R", ".."))):
        scorer: Any = load_trainable(str(root / "scorer"))
        freeze(scorer, share)
        assert frozen_layers(scorer) == sketch
        assert all(weight.requires_grad for weight in scorer.mlp.parameters())
        assert not any(weight.requires_grad for weight in scorer.text_proj.parameters())


def test_freezing_a_clip_leaves_its_head(folders: dict[str, str]) -> None:
    scorer: Any = load_trainable(folders["clip"], head="mlp")
    freeze(scorer, share=1.0)
    assert frozen_layers(scorer) == (".....RR", "...RR")
    assert all(weight.requires_grad for weight in scorer.mlp.parameters())


def test_what_cannot_be_frozen(root: Path) -> None:
    scorer = build(root)
    for rule, words in (
        ({"share": 1.5}, r"the frozen share must lie in \[0, 1\], got 1.5"),
        ({"share": 0.5, "last": (1, 1)}, "not both"),
        ({"last": (4, 1)}, "last layers of the image tower must be 0 to 3, got 4"),
        ({"last": (1, -1)}, "last layers of the text tower must be 0 to 2, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            freeze(scorer, **rule)  # type: ignore[arg-type]


# ---------------------------------------------------------------- starts


def test_blip_starts_an_imagereward_with_a_new_head(tmp_path: Path) -> None:
    golden = json.loads((FOLDER / "blipscore_tiny.json").read_text(encoding="utf-8"))
    shapes = {
        name.removeprefix("blip."): shape
        for name, shape in BLIP["shapes"].items()
        if name.startswith("blip.")
    }
    torch.save({"model": fill(shapes, golden["weights_seed"])}, tmp_path / "tiny.pth")
    config = replace(FULL_SIZE, **BLIP["config"])
    first, same, other = (
        blipscore.start(CARDS["blipscore"], tmp_path / "tiny.pth", seed, config) for seed in (0, 0, 1)
    )
    blip = blipscore.load(CARDS["blipscore"], tmp_path / "tiny.pth", config).blip.state_dict()
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in blip.items())
    heads = [scorer.mlp.state_dict() for scorer in (first, same, other)]
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert not torch.equal(heads[0]["0.weight"], heads[2]["0.weight"])
    assert heads[0]["0.weight"].std().item() == pytest.approx(1 / (config.text_width + 1), rel=0.05)
    assert heads[0].keys() == ImageReward(config, first.vocab).mlp.state_dict().keys()
    assert (first.config.mean, first.config.std) == (0.0, 1.0)
    first.save(tmp_path / "scorer")
    card = rewards.find_card(str(tmp_path / "scorer"))
    assert card.preprocess == first.card.preprocess
    assert card.summary.endswith("from blipscore")
    assert card.licence == "BSD-3-Clause"
    assert (card.mean, card.std, card.typical_range) == (0.0, 1.0, (-2.0, 2.0)), "no cosine any more"


def test_the_table_gives_starts_and_says_which(tmp_path: Path) -> None:
    assert load_trainable("imagereward-tiny").card is CARDS["imagereward-tiny"]
    for name in ("shapes", "brightness", "aesthetic"):
        with pytest.raises(
            ValueError, match=f"{name} cannot be trained here; one of imagereward, imagereward-tiny, hpsv1"
        ):
            load_trainable(name)
    with pytest.raises(ValueError, match=r"unknown scorer 'gone'; one of brightness.* or the folder of one"):
        load_trainable("gone")


# ---------------------------------------------------------------- a head on a CLIP


def test_a_head_is_drawn_from_the_seed_as_imagerewards(folders: dict[str, str]) -> None:
    trained: Any = load_trainable(folders["clip"])
    trained.set_statistics(4.0, 2.0)
    trained.save(Path(folders["clip"]))
    before = torch.get_rng_state()
    first, same, other = (load_trainable(folders["clip"], seed=seed, head="mlp") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    start: Any = load_trainable(folders["clip"])
    heads: list[Any] = [scorer.mlp.state_dict() for scorer in (first, same, other)]  # type: ignore[attr-defined]
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert not torch.equal(heads[0]["0.weight"], heads[2]["0.weight"])
    shapes = {key: tuple(value.shape) for key, value in heads[0].items() if key.endswith("weight")}
    assert shapes == {
        "0.weight": (1024, 16), "2.weight": (128, 1024), "4.weight": (64, 128), "6.weight": (16, 64), "7.weight": (1, 16)
    }  # fmt: skip
    for key, value in heads[0].items():
        assert (
            not value.any() if key.endswith("bias") else value.std().item() == pytest.approx(1 / 17, rel=0.5)
        )
    assert heads[0]["2.weight"].std().item() == pytest.approx(1 / 17, rel=0.01)
    scorer: Any = first
    assert [layer.p for layer in scorer.mlp if isinstance(layer, nn.Dropout)] == [0.2, 0.2, 0.1]
    assert all(torch.equal(value, scorer.state_dict()[key]) for key, value in start.state_dict().items())
    assert start.card.std == pytest.approx(0.1)
    card = scorer.card
    assert (card.mean, card.std, card.typical_range) == (0.0, 1.0, (-2.0, 2.0)), (
        "nothing is known about its scores"
    )


def test_a_head_reads_the_product_of_both_vectors(folders: dict[str, str]) -> None:
    """Without activations it is one row w of 16 numbers: raw = 16 (v * t) . w + b; equal weights would give the cosine."""
    scorer: Any = louder(load_trainable(folders["clip"], head="mlp")).eval()
    with torch.no_grad():
        images, texts = scorer.vision(pixels()), scorer.text(PROMPTS)
        bias = scorer.mlp(torch.zeros(1, 16)).item()
        row = scorer.mlp(torch.eye(16)).squeeze(1) - bias
        raw = scorer.raw(pixels(), PROMPTS)
        torch.testing.assert_close(raw, 16 * (images * texts) @ row + bias)
        torch.testing.assert_close(scorer(pixels(), PROMPTS), raw)
        swapped = scorer.raw(pixels(), [PROMPTS[2], PROMPTS[1], PROMPTS[0]])
    # Of vectors side by side, a linear head's sum over images would not change with the prompts' order.
    assert (swapped.sum() - raw.sum()).abs() > 1e-3


def test_a_head_learns(folders: dict[str, str]) -> None:
    """From its published first weights, all near 0: the second image before the first, for the same prompt."""
    scorer: Any = load_trainable(folders["clip"], head="mlp", dropout=0.0)
    freeze(scorer, share=1.0)
    optimizer = torch.optim.Adam(scorer.mlp.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        first, second, _ = scorer.raw(pixels(), PROMPTS)
        loss = nn.functional.softplus(first - second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert losses[-1] < 0.35, losses


def test_the_dropout_of_a_head(folders: dict[str, str], tmp_path: Path) -> None:
    """It acts in training, is what was asked for, and is kept; the towers' own is another matter."""
    for name, head in (("clip", "mlp"), ("imagereward", "own")):
        for dropout, alike in ((0.0, True), (0.5, False), (None, name == "imagereward")):
            scorer: Any = louder(load_trainable(folders[name], head=head, dropout=dropout))  # type: ignore[arg-type]
            with torch.no_grad():
                assert torch.equal(scorer.raw(pixels(), PROMPTS), scorer.raw(pixels(), PROMPTS)) == alike
            expected = {None: [0.2, 0.2, 0.1] if name == "clip" else [0.0] * 3}.get(dropout, [dropout] * 3)
            scorer.save(tmp_path / "scorer")
            for kept in (scorer, load_trainable(str(tmp_path / "scorer"))):
                assert [layer.p for layer in kept.mlp if isinstance(layer, nn.Dropout)] == expected
            again: Any = load_trainable(str(tmp_path / "scorer"), dropout=0.25)
            assert [layer.p for layer in again.mlp if isinstance(layer, nn.Dropout)] == [0.25] * 3
            assert all(p == 0 for p in dropouts(again.towers()))


def dropouts(towers: tuple[Any, Any]) -> list[float]:
    """The probabilities of all dropout in two towers."""
    parts = [
        module for tower in towers for part in (*tower.embeddings, *tower.layers) for module in part.modules()
    ]
    return [module.p for module in parts if isinstance(module, nn.Dropout)]


def test_a_clip_with_a_head_comes_back(folders: dict[str, str], tmp_path: Path) -> None:
    scorer: Any = louder(load_trainable(folders["clip"], seed=3, head="mlp")).eval()
    scorer.set_statistics(0.25, 0.5)
    scorer.save(tmp_path / "again")
    again: Any = load_trainable(str(tmp_path / "again")).eval()
    frozen: Any = rewards.load(str(tmp_path / "again"))
    with torch.no_grad():
        raw = scorer.raw(pixels(), PROMPTS)
        assert len(set(raw.tolist())) == 3
        assert torch.equal(scorer(pixels(), PROMPTS), raw)
        for score in (again.raw, again, frozen.raw, frozen):
            # Not to the last bit: where tensors begin in memory, sums over them may be taken in another order.
            torch.testing.assert_close(score(pixels(), PROMPTS), raw, rtol=1e-6, atol=1e-6)
    assert again.state_dict().keys() == frozen.state_dict().keys() == scorer.state_dict().keys()
    for key, value in scorer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(frozen.state_dict()[key], value)
    with torch.no_grad():
        half: Any = rewards.load(str(tmp_path / "again"), dtype=torch.bfloat16)
        assert half.mlp[0].weight.dtype == torch.float32
        assert 0 < (half(pixels(), PROMPTS) - raw).abs().max() < 0.5
    card = frozen.card
    assert card == again.card == rewards.find_card(str(tmp_path / "again"))
    assert (card.mean, card.std, card.typical_range) == (0.25, 0.5, (-0.75, 1.25))  # in the units of calls
    assert card.summary == f"a CLIP that was trained here, from {folders['clip']}"
    saved, start = (load_file(f"{path}/model.safetensors") for path in (tmp_path / "again", folders["clip"]))
    head = {f"mlp.layers.{index}.{kind}" for index in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert saved.keys() - start.keys() == head
    assert all(torch.equal(saved[key], value) for key, value in start.items())


def test_a_clip_without_a_head_is_written_as_ever(
    folders: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """Folders from before there were heads are what they would be today, so they load today."""
    values = json.loads((Path(folders["clip"]) / "config.json").read_text())
    assert values["clip"] == {
        "embed": 16, "vision_width": 32, "vision_layers": 3, "vision_heads": 2, "patch": 16, "text_width": 32,
        "text_layers": 2, "text_heads": 2, "activation": "gelu", "eps": 1e-05, "tokenizer": "transformers", "context": 40,
        "vocab_size": 514, "scaled": False,
    }  # fmt: skip
    assert load_trainable(folders["clip"]).card.clip == TINY
    other = build(root, tokenizer="openai")
    other.save(tmp_path / "openai")
    louder(load_trainable(str(tmp_path / "openai"), head="mlp")).save(tmp_path / "headed")
    saved, start = (load_file(tmp_path / name / "model.safetensors") for name in ("headed", "openai"))
    assert "visual.proj" in start
    assert all(torch.equal(saved[key], value) for key, value in start.items())


def test_a_head_runs_in_float32_under_autocast(folders: dict[str, str]) -> None:
    scorer: Any = louder(load_trainable(folders["clip"], head="mlp")).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw = scorer.raw(pixels(), PROMPTS)
        images, texts = scorer.vision(pixels()), scorer.texts(PROMPTS)
    assert raw.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(raw, scorer.mlp(16 * images * texts).squeeze(1))
    assert (raw != raw.bfloat16().float()).all()


def test_a_frozen_clip_with_a_head_reads_a_prompt_once(folders: dict[str, str], tmp_path: Path) -> None:
    """And one that is trained reads it each time, though its scale has no gradient."""
    scorer: Any = louder(load_trainable(folders["clip"], head="mlp")).eval()
    freeze(scorer)
    before = scorer(pixels(), PROMPTS)
    with torch.no_grad():
        scorer.text.text_projection.weight += 0.1
    assert not torch.equal(scorer(pixels(), PROMPTS), before)
    assert not scorer.cache.known
    scorer.save(tmp_path / "scorer")
    frozen: Any = rewards.load(str(tmp_path / "scorer"))
    frozen(pixels(), PROMPTS)
    assert list(frozen.cache.known) == ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "imagereward",
            {"head": "mlp"},
            "head 'mlp' is for a CLIP without one; .*scorer has such a head of its own",
        ),
        ("blipscore", {"head": "mlp"}, "blipscore has such a head of its own"),
        ("headed", {"head": "mlp"}, "headed has such a head of its own"),
        (
            "clip",
            {"dropout": 0.1},
            "scorer has no head, whose dropout could be 0.1; head 'mlp' puts one on it",
        ),
        ("clip", {"head": "mlp", "dropout": 1.0}, r"the dropout of a head must lie in \[0, 1\), got 1.0"),
        ("imagereward", {"dropout": -0.1}, r"must lie in \[0, 1\), got -0.1"),
        ("headed", {"dropout": math.nan}, r"must lie in \[0, 1\), got nan"),
        ("clip", {"head": "linear"}, "unknown head 'linear'; one of own, mlp"),
    ],
)
def test_what_no_head_can_be(
    name: str,
    settings: Any,
    words: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_trainable(folders["clip"], head="mlp").save(tmp_path / "headed")
    monkeypatch.setattr("rewards.load", None)  # no weights are read
    for call in (check_trainable, load_trainable):
        with pytest.raises(ValueError, match=words):
            call((folders | {"headed": str(tmp_path / "headed")}).get(name, name), **settings)


def test_what_a_head_can_be(folders: dict[str, str], tmp_path: Path) -> None:
    load_trainable(folders["clip"], head="mlp").save(tmp_path / "headed")
    check_trainable(folders["clip"], head="mlp", dropout=0)
    check_trainable(folders["imagereward"], dropout=0.9)
    check_trainable(str(tmp_path / "headed"), dropout=0.0)


# ---------------------------------------------------------------- killed while it is written


class KilledError(BaseException):
    """In place of a signal that no program can catch."""


class Steps:
    """Counts calls that change the disk, and dies instead of call number `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for place, name in (
            (os, "rename"), (os, "link"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "fsync"),
            (Path, "write_text"), (rewards_weights, "save_file"),
        ):  # fmt: skip
            monkeypatch.setattr(place, name, self.counted(getattr(place, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count >= self.last:
                raise KilledError
            return function(*arguments, **keywords)

        return call


def content(folder: Path) -> tuple[float, float, str, str]:
    """One weight and one statistic, which change together, and what others have put there."""
    scorer: Any = rewards.load(str(folder))
    with torch.no_grad():
        bias = scorer.mlp[7].bias.item()
    return (
        bias,
        scorer.config.mean,
        (folder / "notes.txt").read_text(),
        (folder / "plots" / "a.txt").read_text(),
    )


def test_a_kill_leaves_no_mixture(root: Path, tmp_path: Path) -> None:
    """Before every call that changes the disk: the old folder or the new one, or none that could be mistaken for one."""
    scorer: Any = load_trainable(str(root / "scorer"))
    folder = tmp_path / "run" / "scorer"

    def save(number: float) -> None:
        with torch.no_grad():
            scorer.mlp[7].bias.fill_(number)
        scorer.set_statistics(number, 1.0)
        scorer.save(folder)

    def expected(number: float) -> tuple[float, float, str, str]:
        return number, number, "mine", "mine too"

    seen, step, killed = set(), 0, True
    while killed:
        step, killed = step + 1, False
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        save(1.0)
        (folder / "notes.txt").write_text("mine")
        (folder / "plots").mkdir()
        (folder / "plots" / "a.txt").write_text("mine too")
        with pytest.MonkeyPatch.context() as patch:
            Steps(step).patch(patch)
            try:
                save(2.0)
            except KilledError:
                killed = True
        if folder.exists():
            found = content(folder)
            assert found in (expected(1.0), expected(2.0)), step
            seen.add(found[0])
        else:
            with pytest.raises(
                ValueError, match=r"a write of it was cut short; its last state is .*rename it to"
            ):
                rewards.load(str(folder))
            previous = left_behind(folder)
            assert previous is not None
            assert content(previous) == expected(1.0)
            seen.add(0.0)
        save(3.0)
        assert content(folder) == expected(3.0)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["scorer"], "left-overs are gone"
        assert left_behind(folder) is None
    assert seen == {1.0, 2.0, 0.0}, "kills came before, after and between the renames"
    assert step > 20


def test_files_of_others_stay(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what comes while the weights are written, a link, and where the file system knows no second names."""
    scorer: Any = load_trainable(str(root / "scorer"))
    folder = tmp_path / "scorer"
    for link in (os.link, None):
        scorer.save(folder)
        (folder / "elsewhere").unlink(missing_ok=True)
        (folder / "elsewhere").symlink_to("/nowhere")
        (folder / "notes.txt").unlink(missing_ok=True)
        save_file = rewards_weights.save_file

        def slow(state: Any, path: Path, save_file: Any = save_file) -> None:
            save_file(state, path)
            (folder / "notes.txt").write_text("mine")

        def none(source: str, target: str) -> None:
            raise OSError("no second names")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rewards_weights, "save_file", slow)
            patch.setattr(os, "link", link or none)
            scorer.save(folder)
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "elsewhere").readlink() == Path("/nowhere")
        assert [path.name for path in tmp_path.iterdir()] == ["scorer"]


def test_a_link_stays_and_a_file_is_refused(root: Path, tmp_path: Path) -> None:
    scorer: Any = load_trainable(str(root / "scorer"))
    (tmp_path / "far").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "scorer").symlink_to(tmp_path / "far" / "scorer")
    for number in (1.0, 2.0):  # where there is nothing yet, and again
        scorer.set_statistics(number, 1.0)
        scorer.save(tmp_path / "here" / "scorer")
        assert (tmp_path / "here" / "scorer").is_symlink()
        assert ImageReward.load(tmp_path / "far" / "scorer").config.mean == number
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["scorer"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, where a folder is to be written; move it away"):
        scorer.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- wrong folders


def change(key: str, value: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values[key] = values[key] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(values))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"lacks config\.json; .* in a run it is called scorer"),
        (lambda folder: (folder / "merges.txt").unlink(), r"lacks merges\.txt;"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"lacks model\.safetensors;"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json line 1 is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, not a list"),
        (lambda folder: (folder / "config.json").write_text('{"clip": 1}'), "must have exactly the fields"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"lacks vocab\.txt"),
        (change("colour", 1), "different: colour"),
        (change("clip", 1), r"config\.json is not that of a trained scorer"),
        (change("clip", {"depth": 3}), "clip must have exactly the fields .* different: depth"),
        (change("std", 0), "std must be > 0, got 0"),
        (change("clip", {"activation": "relu"}), "activation must be gelu or quick_gelu, got 'relu'"),
        (change("clip", {"tokenizer": "bert"}), "unknown tokenizer 'bert'; one of openai"),
        (change("clip", {"vocab_size": 600}), "has 0 merges, not the 86 pairs of a vocabulary of 600 tokens"),
        (change("clip", {"head_dropout": [0.1, 0.1]}), "head_dropout must be three numbers in"),
        (change("clip", {"head_dropout": [0.1, 0.1, 1.0]}), r"head_dropout must be three numbers in .* got \(0.1, 0.1, 1.0\)"),
        (change("clip", {"head_dropout": 0.1}), r"config\.json is not that of a trained scorer"),
        (change("clip", {"head_dropout": [0.1, 0.1, 0.1]}), "with head_dropout, scaled must be true"),
        (change("clip", {"head_dropout": [0.1] * 3, "scaled": True}), r"missing: mlp\.layers\.0\.bias.* and 6 more"),
        (change("head_dropout", None), "different: head_dropout"),
        (change("clip", {"vision_layers": 2}), "does not hold the CLIP of .*; unexpected: vision_model"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20),
            r"model\.safetensors is not a readable weights file",
        ),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_a_clear_error(
    spoil: Callable[[Path], object], words: str, folders: dict[str, str]
) -> None:
    spoil(Path(folders["clip"]))
    for load in (rewards.load, load_trainable):
        with pytest.raises(ValueError, match=words):
            load(folders["clip"])


def test_a_folder_takes_no_other_weights(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has weights of its own, but x\.pt was given for it"):
        rewards.load(folder, weights=Path("x.pt"))
    assert parse_weights([folder]) == {folder: 1.0}
    (tmp_path / "lr=1").symlink_to(Path(folder).resolve())
    assert parse_weights([f"{tmp_path}/lr=1"]) == {f"{tmp_path}/lr=1": 1.0}, "a folder with a = in its name"
    assert parse_weights([f"{tmp_path}/lr=1=2"]) == {f"{tmp_path}/lr=1": 2.0}
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        parse_weights([f"{tmp_path}=1"])


# ---------------------------------------------------------------- pre-training


def test_near_misses_are_one_more_column_by_hand() -> None:
    """Logits [[2, 0], [1.2, 1.6]]; the first image's near miss has 1, the second has none."""
    logits, misses = torch.tensor([[2.0, 0.0], [1.2, 1.6]]), torch.tensor([1.0, -torch.inf])
    logits.requires_grad_()
    by_row = (math.log(1 + math.exp(-2) + math.exp(-1)) + math.log(1 + math.exp(-0.4))) / 2
    by_column = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    loss = pretrain_scorer.by_row_and_column(logits, misses)
    assert loss.item() == pytest.approx((by_row + by_column) / 2, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def pretrain(root: Path, output: Path, *flags: str) -> list[dict[str, float]]:
    """Up to three updates of a tiny CLIP."""
    argv = [
        *recorded.arguments("pretrain_scorer", root, output), "--architecture", "clip",
        "--vocab", str(root / "pipeline" / "tokenizer" / "merges.txt"), "--sizes.head", "128", "64", "32", "16",
        *flags,
    ]  # fmt: skip
    assert recorded.train("pretrain_scorer", argv) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("cpu")
def test_a_clip_is_pretrained(root: Path, tmp_path: Path) -> None:
    """From a temperature of 0.001 its scale is brought down to 100 at once."""
    rows = pretrain(root, tmp_path / "run", "--temperature", "0.001", "--max-train-steps", "1")
    assert all(row["loss"] == row["contrast"] and row["grad_norm"] > 0 for row in rows)
    scorer: Any = load_trainable(str(tmp_path / "run" / "scorer"))
    assert scorer.logit_scale.item() == pytest.approx(math.log(100), abs=1e-6)
    start = pretrain_scorer.Contrast(scorer)
    losses, right = start(pixels(), PROMPTS, ["a red square", None, "a blue circle"])
    logits = 100 * scorer.vision(pixels()) @ scorer.text(PROMPTS).T
    near = 100 * (scorer.vision(pixels()) * scorer.text(["a red square", "", "a blue circle"])).sum(1)
    near[1] = -torch.inf
    torch.testing.assert_close(losses["contrast"], pretrain_scorer.by_row_and_column(logits, near))
    near[1] = logits[1, 2]  # the only caption in the batch with other words
    assert right.item() == pytest.approx((logits.diagonal() > near).float().mean().item())


@pytest.mark.usefixtures("cpu")
def test_settings_of_the_other_architecture_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        (["--sizes.head", "8", "8", "8", "8"], "--sizes.head (8, 8, 8, 8) is of an ImageReward"),
        (["--vocab", str(root / "pipeline" / "model_index.json")], "is no list of merges"),
    ):
        with pytest.raises(SystemExit) as stop:
            pretrain(root, tmp_path / "refused", *flags)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
