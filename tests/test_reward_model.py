"""Losses of scorer training by hand, and how rankings become pairs and splits."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import record_trajectories as recorded
import rewards
from finetune import pretrain_scorer, reward_model
from finetune.reward_model import Config, Stable
from preftune import cli
from preftune.files import manifest
from preftune.records import CaptionedImage, Ranking, read_jsonl
from preftune.training import checkpoint
from preftune.training.optimizer import adamw
from preftune.training.preference_losses import weighted_mean
from preftune.training.rankings import Ranked, by_images, check_split, choices, pairs, split, untied, votes
from preftune.training.run_config import RunConfig
from rewards import Preprocess
from rewards.clip import ClipScorer
from rewards.imagereward import ImageReward
from rewards.towers import Tower
from rewards.training import load_trainable


def ranking(
    prompt: str, names: str, ranks: tuple[int, ...], source: str = "", weight: float = 1.0
) -> Ranking:
    return Ranking(prompt=prompt, paths=tuple(map(Path, names)), ranks=ranks, source=source, weight=weight)


def test_pairs_leave_ties_out() -> None:
    assert set(pairs([2, 1, 3])) == {(1, 0), (1, 2), (0, 2)}
    assert set(pairs([1, 2, 2])) == {(0, 1), (0, 2)}
    assert pairs([1, 1]) == []


def test_annotators_of_the_same_images_are_read_as_one() -> None:
    read = [
        ranking("p", "ab", (1, 2), "annotator 0"),
        ranking("q", "ab", (1, 2), weight=0.5),
        ranking("p", "ab", (2, 1), "annotator 1"),
        ranking("p", "ac", (1, 1)),
    ]
    merged = by_images(read)
    assert [(item.prompt, "".join(map(str, item.paths)), item.ranks, item.weights) for item in merged] == [
        ("p", "ab", ((1, 2), (2, 1)), (1.0, 1.0)),
        ("q", "ab", ((1, 2),), (0.5,)),
        ("p", "ac", ((1, 1),), (1.0,)),
    ]
    (better, worse), weights = untied([merged[1], merged[0], merged[2]])
    rows = list(zip(better.tolist(), worse.tolist(), strict=True))
    assert rows == [(0, 1), (2, 3), (3, 2)], "rows count on over images"
    assert weights.tolist() == [0.5, 1.0, 1.0]
    assert untied([merged[2]])[0].shape == (2, 0)


def test_choices_and_votes_by_hand() -> None:
    """Three images by three people, the third of whom cannot choose, then two images by one."""
    three = [ranking("p", "abc", ranks, str(i)) for i, ranks in enumerate([(2, 1, 3), (1, 2, 2), (1, 1, 2)])]
    chosen = by_images([*three, ranking("q", "de", (2, 1), weight=0.25)])
    rows, best, weights = choices(chosen)
    assert rows.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, -1]]
    assert best.tolist() == [1, 0, 1]
    assert weights.tolist() == [1.0, 1.0, 0.25]
    (first, second), shares, weights = votes(chosen)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert shares.tolist() == pytest.approx([1.5 / 3, 1.0, 2.5 / 3, 0.0])
    assert weights.tolist() == [3.0, 3.0, 3.0, 0.25]


def settings(**values: object) -> Config:
    """A configuration whose training is long enough for both stages, an update being one pass."""
    values.setdefault("run", RunConfig(max_train_steps=2000, gradient_accumulation_steps=1))
    stable = {key: values.pop(key) for key in tuple(values) if key in Stable.__dataclass_fields__}
    return Config(model="x", data=(Path("x"),), stable=Stable(**stable), **values)  # type: ignore[arg-type]


def loss_of(raw: torch.Tensor, chosen: list[Ranked], config: Config, step: int) -> torch.Tensor:
    losses, logits = reward_model.losses_of(raw, chosen, config, step)
    return weighted_mean(losses, logits, logits.logsumexp(0))


PAIRED = by_images([ranking("p", "ab", (1, 2)), ranking("q", "cd", (2, 1), weight=3.0)])
RAW = torch.tensor([[0.5, 0.2], [0.1, 0.3], [1.0, 0.9], [-1.0, -0.5]])
"""Scores of the four images and of one weak view each: the first pair is right by 0.4, the second wrong by 2."""


def test_losses_of_a_batch_by_hand() -> None:
    right, wrong = math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(2))
    own = RAW[:, :1]
    assert loss_of(own, PAIRED, settings(), 0).item() == pytest.approx((right + 3 * wrong) / 4)
    equal = loss_of(torch.zeros(4, 1), PAIRED, settings(), 0)
    assert equal.item() == pytest.approx(math.log(2))
    for objective in ("choice", "soft"):  # with two images and one annotator they are the same
        assert loss_of(own, PAIRED, settings(objective=objective), 0).item() == pytest.approx(
            (right + 3 * wrong) / 4
        )
    interference = [
        math.log(1 + math.exp((0.3 + 0.2) / 2 - (0.2 - 0.3))),
        math.log(1 + math.exp((0.5 + 0.1) / 2 - (-1.0 - 1.0))),
    ]
    both = loss_of(RAW, PAIRED, settings(views=1), 0).item()
    assert both == pytest.approx((right + interference[0] + 3 * (wrong + interference[1])) / 4)


def test_stages_of_a_batch_by_hand() -> None:
    """Weights of eq. 7 with b 0.3 and tau 0.2, then of eq. 8; the switch is at update 5."""
    chosen = by_images([ranking("p", "ab", (1, 2)), ranking("q", "cd", (2, 1))])
    own = RAW[:, :1]
    right, wrong = math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(2))
    config = settings(weighting="two-stage", first_stage_steps=5)
    first = (right / (1 + math.exp(0.5)) + wrong / (1 + math.exp(-11.5))) / 2
    assert loss_of(own, chosen, config, 4).item() == pytest.approx(first, rel=1e-5)
    e = [math.exp(0.4), math.exp(-2)]
    second = (e[0] * right + e[1] * wrong) / sum(e)
    assert loss_of(own, chosen, config, 5).item() == pytest.approx(second, rel=1e-5)
    weighed = (e[0] * right + 3 * e[1] * wrong) / (e[0] + 3 * e[1])
    assert loss_of(own, PAIRED, config, 5).item() == pytest.approx(weighed, rel=1e-5), (
        "the data's own weights, too"
    )
    for favour, sign in (("equal", 0), ("smaller", -1)):
        e = [math.exp(sign * 0.4), math.exp(sign * -2)]
        config = settings(weighting="two-stage", first_stage_steps=0, favour=favour)
        assert loss_of(own, chosen, config, 0).item() == pytest.approx(
            (e[0] * right + e[1] * wrong) / sum(e), rel=1e-5
        )


def test_weights_are_constants_unless_asked() -> None:
    """Through eq. 8 the wrong pair could lower the loss by going wrong further; as a constant it cannot."""
    chosen = by_images([ranking("p", "ab", (1, 2)), ranking("q", "cd", (2, 1))])

    def gradient(through: bool) -> torch.Tensor:
        raw = RAW[:, :1].clone().requires_grad_()
        config = settings(weighting="two-stage", first_stage_steps=0, through_weights=through)
        return torch.autograd.grad(loss_of(raw, chosen, config, 0), raw)[0][:, 0]

    e = [math.exp(0.4), math.exp(-2)]
    slopes = [
        w / sum(e) * -torch.sigmoid(torch.tensor(-d)).item() for w, d in zip(e, (0.4, -2.0), strict=True)
    ]
    expected = [slopes[0], -slopes[0], -slopes[1], slopes[1]]
    assert gradient(through=False).tolist() == pytest.approx(expected, rel=1e-5)
    assert gradient(through=False)[3] < 0, "the better image of the wrong pair is to rise"
    assert gradient(through=True)[3] > 0, "and here to fall"


def test_a_batch_of_ties_teaches_nothing() -> None:
    tied = by_images([ranking("p", "ab", (1, 1))])
    raw = torch.randn(2, 1, requires_grad=True)
    for objective in ("pairs", "choice"):
        loss = loss_of(raw, tied, settings(objective=objective), 0)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, raw)[0] == 0).all()
    assert loss_of(raw, tied, settings(objective="soft"), 0).item() > 0, "a tie that is not scored as one"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"views": -1}, "--stable.views"),
        ({"least_area": 0.0}, "--stable.least-area must lie in"),
        ({"tau": 0.0}, "--stable.tau must be above 0"),
        ({"views": 3, "objective": "soft"}, "--stable is about pairs, not --objective soft"),
        ({"frozen_share": 0.5, "last_layers": (1, 1)}, "both say what is frozen"),
        ({"frozen_share": 1.5}, "--frozen-share must lie in"),
        (
            {"weighting": "two-stage", "first_stage_steps": 2000},
            "must be below --max-train-steps .2000., or the second",
        ),
        (
            {"through_weights": True, "run": RunConfig(gradient_accumulation_steps=2)},
            "needs all pairs of an update in one pass",
        ),
    ],
)
def test_wrong_settings(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**values)


def test_no_prompt_is_on_both_sides() -> None:
    items = [
        Ranked(prompt=f"p{k % 20}", paths=(Path(f"{k}a"), Path(f"{k}b")), ranks=((1, 2),), weights=(1.0,))
        for k in range(60)
    ]
    train, held = split(items, 0.1, seed=0)
    assert len({item.prompt for item in held}) == 2
    assert len(held) == 6
    assert not {item.prompt for item in held} & {item.prompt for item in train}
    assert sorted(train + held, key=items.index) == items
    assert split(items, 0.1, seed=1)[1] != held
    more = [*items, replace(items[0], prompt="new")]
    assert {item.prompt for item in split(more, 0.05, seed=0)[1]} <= {item.prompt for item in held} | {
        "new"
    }, "a later training with more data holds out what an earlier one held out"
    with pytest.raises(ValueError, match="all 1 prompts would be held out"):
        split(items[:1], 0.5, seed=0)


def test_rankings_that_say_nothing_are_refused() -> None:
    tied, sound, shared = (
        Ranked(prompt="p", paths=(Path("a"), Path("b"), Path("c")), ranks=(ranks,), weights=(1.0,))
        for ranks in ((1, 1, 1), (1, 2, 3), (1, 1, 2))
    )
    check_split([sound], [shared], "choice")
    check_split([tied], [sound], "soft")
    with pytest.raises(ValueError, match="all 2 held-out rankings are ties"):
        check_split([sound], [tied, tied], "pairs")
    with pytest.raises(ValueError, match="all 1 rankings are ties; --objective soft"):
        check_split([tied], [sound], "pairs")
    with pytest.raises(ValueError, match="none of 2 rankings puts one image before all others"):
        check_split([tied, shared], [sound], "choice")


def test_the_best_accuracy_outlives_a_stop(root: Path, tmp_path: Path) -> None:
    """A run that resumes does not replace a scorer that was better: as if the first two updates had been luckier."""
    argv = recorded.arguments("reward_model", root, tmp_path)
    recorded.train("reward_model", argv)
    reached = [row["validation_accuracy"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert checkpoint.read(tmp_path / "step_000003")["driver"] == {"best": max(reached)}
    shutil.rmtree(tmp_path / "step_000003")
    earlier = tmp_path / "step_000002"
    torch.save(checkpoint.read(earlier) | {"driver": {"best": 1.5}}, earlier / "state.pt")
    (earlier / "scorer" / "model.safetensors").unlink()  # another name of the file in tmp_path/scorer
    (earlier / "scorer" / "model.safetensors").write_bytes(b"the lucky one")
    notes = {**manifest.verify(tmp_path / "step_000001"), "updates": 2}
    manifest.write(earlier, **notes)
    recorded.train("reward_model", [*argv, "--resume-from-checkpoint", "latest"])
    assert (tmp_path / "scorer" / "model.safetensors").read_bytes() == b"the lucky one"
    assert checkpoint.read(tmp_path / "step_000003")["driver"] == {"best": 1.5}


def test_contrast_by_hand() -> None:
    """Two images, two captions, likenesses [[1, 0], [0.6, 0.8]], temperature 0.5; then a near miss of likeness 0.5 for the second."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.eye(2)
    by_row = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))) / 2
    by_column = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    loss = pretrain_scorer.by_row_and_column(images @ texts.T / 0.5)
    assert loss.item() == pytest.approx((by_row + by_column) / 2, abs=1e-6)
    wrong = torch.tensor([[0.0, 1.0], [0.3, 0.4]])
    scale = torch.tensor(2.0, requires_grad=True)
    near = pretrain_scorer.own(scale * (images * wrong).sum(1), [None, "a near miss"])
    assert near.tolist() == [-math.inf, pytest.approx(1.0)]
    with_miss = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4) + math.exp(-0.6))) / 2
    loss = pretrain_scorer.by_row_and_column(images @ texts.T / 0.5, near)
    assert loss.item() == pytest.approx((with_miss + by_column) / 2, abs=1e-6)
    loss.backward()
    assert scale.grad is not None
    share = math.exp(1) / (math.exp(1.2) + math.exp(1.6) + math.exp(1))  # of the near miss in the second row
    assert scale.grad.item() == pytest.approx(0.5 * share / 4, rel=1e-5)


def test_matching_is_binary_cross_entropy() -> None:
    fits, misses = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    logits, truth = torch.cat([fits, misses]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(pretrain_scorer.matching_loss(fits, misses), expected)


def test_captioning_passes_over_padding() -> None:
    """Two captions of three and one tokens, vocabulary of four; -100 is padding."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 0, 3], [2, -100, -100]])
    log_p = logits.log_softmax(2)
    expected = -(log_p[0, 0, 1] + log_p[0, 1, 0] + log_p[0, 2, 3] + log_p[1, 0, 2]) / 4
    torch.testing.assert_close(pretrain_scorer.captioning_loss(logits, tokens), expected)


@torch.no_grad()
def test_a_captioner_reads_from_left_to_right(root: Path) -> None:
    scorer = ImageReward.load(root / "scorer").eval()
    tokens = scorer.image_tokens(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    logits, truth = scorer.next_tokens(["a red circle", "a red square", "a red circle"], tokens[[0, 0, 1]])
    assert logits.shape == (*truth.shape, scorer.config.vocab_size)
    ids, mask = scorer.tokenize(["a red circle"])
    assert truth[0, : mask.sum() - 1].tolist() == ids[0, 1 : mask.sum()].tolist(), "shifted by one"
    assert (truth[0, mask.sum() - 1 :] == -100).all(), "padding"
    torch.testing.assert_close(
        logits[0, :3], logits[1, :3]
    )  # the third word is not seen before it is predicted
    assert (logits[0, 3] - logits[1, 3]).abs().max() > 1e-3, "and is seen after"
    assert (logits[0] - logits[2]).abs().max() > 1e-4, "the image is read"


def test_negative_captions() -> None:
    images, texts = torch.eye(3), torch.tensor([[1.0, 0.9, 0.0], [0.8, 1.0, 0.1], [0.7, 0.2, 1.0]])
    assert pretrain_scorer.hardest(images, texts, ["a", "b", "c"]) == [1, 0, 1], (
        "the likest caption that is not the image's own"
    )
    assert pretrain_scorer.hardest(images, texts, ["a", "a", "c"]) == [2, 2, 1], "nor in the same words"
    row = CaptionedImage(path=Path("a"), text="a", extra={"near_misses": ["b", "c"]})
    drawn = {pretrain_scorer.near_miss(row, torch.Generator().manual_seed(seed)) for seed in range(20)}
    assert drawn == {"b", "c"}
    bare = CaptionedImage(path=Path("a"), text="a", extra={})
    assert pretrain_scorer.near_miss(bare, torch.Generator()) is None


SHORT = "--max-train-steps 2 --train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-2 --threads 1 --validation-share 0.25 --validation-steps 1 --no-decay-vectors"


@pytest.mark.parametrize(
    "flags",
    [
        "--objective choice --last-layers 1 0",
        "--objective soft --gradient-checkpointing",
        "--stable.views 2 --stable.weighting two-stage --stable.first-stage-steps 1 --stable.no-flip --jitter 1",
    ],
)
def test_every_objective_trains(flags: str, root: Path, tmp_path: Path) -> None:
    argv = ["--model", str(root / "scorer"), "--data", str(root / "rankings"), "--output-dir", str(tmp_path)]
    config = cli.parse(Config, [*argv, *SHORT.split(), *flags.split()])
    assert reward_model.main(config) == 0
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(0 <= row["validation_accuracy"] <= 1 for row in rows)
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.width > 800
    before, after = ImageReward.load(root / "scorer"), ImageReward.load(tmp_path / "scorer")
    moved = {
        name: not torch.equal(old, new)
        for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
    }
    assert moved["mlp.0.weight"]
    assert not moved["vision_proj.weight"], "no score depends on it"
    frozen = "--last-layers" in flags
    assert moved["text_model.encoder.layer.0.output.dense.weight"] != frozen
    assert moved["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert moved["vision_model.embeddings.patch_embedding.weight"] != frozen
    score = rewards.load(str(tmp_path / "scorer"))
    assert score(torch.rand(1, 3, 32, 32), ["a red circle"]).isfinite().all()


def test_a_clip_with_an_mlp_head_trains(root: Path, tmp_path: Path) -> None:
    clip = Path(__file__).parents[1] / "assets/tiny/pretrained/clip"
    argv = ["--model", str(clip), "--data", str(root / "rankings"), "--output-dir", str(tmp_path)]
    flags = [*SHORT.split(), "--head", "mlp", "--dropout", "0.3"]
    assert reward_model.main(cli.parse(Config, [*argv, *flags])) == 0
    scorer = load_trainable(str(tmp_path / "scorer"))
    assert isinstance(scorer, ClipScorer)
    assert scorer.mlp is not None, "the head is saved"
    assert [layer.p for layer in scorer.mlp if isinstance(layer, torch.nn.Dropout)] == [0.3] * 3
    start = load_trainable(str(clip), head="mlp")
    assert isinstance(start, ClipScorer)
    assert start.mlp is not None
    assert (scorer.mlp[0].weight - start.mlp[0].weight).abs().max() > 1e-3, "and has been trained"


def test_checkpointing_changes_no_gradient(root: Path) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        config = Config(
            model=str(root / "scorer"), data=(root,), gradient_checkpointing=checkpointing, frozen_share=0
        )
        scorer = reward_model.prepare(config)
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        scorer.raw(pixels, ["a red circle", "a blue cross"]).diff().sum().backward()
        assert isinstance(scorer, ImageReward)
        found = scorer.vision_model.encoder.layers[0].mlp.fc1.weight.grad
        assert found is not None
        assert found.abs().max() > 0
        return found

    torch.testing.assert_close(gradient(True), gradient(False))


def test_vectors_may_go_undecayed() -> None:
    weights = [
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(())),
    ]
    for decayed in (True, False):
        config = RunConfig(adam_weight_decay=0.5, decay_vectors=decayed)
        optimizer = adamw(config, weights, lr=0.1)
        for weight in weights:
            weight.data.fill_(1)
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        kept = [weight.flatten()[0].item() for weight in weights]
        assert kept == pytest.approx([0.95, 0.95 if decayed else 1.0, 0.95 if decayed else 1.0])


class Brightness(torch.nn.Module):
    """A scorer whose raw score can be worked out by hand: weight x mean pixel x words of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_scale = torch.nn.Parameter(torch.tensor(9.0))
        self.card = replace(rewards.CARDS["imagereward-tiny"], preprocess=Preprocess(size=8))
        self.saved: list[float] = []

    def raw(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        assert len(pixels) == len(prompts)
        words = torch.tensor([float(len(prompt.split())) for prompt in prompts])
        return self.weight * pixels.mean((1, 2, 3)) * words + 0 * self.logit_scale

    def towers(self) -> tuple[Tower, Tower]:
        return Tower((), (), ()), Tower((), (), ())

    def set_statistics(self, mean: float, std: float) -> None:
        self.statistics = (mean, std)

    def save(self, folder: Path) -> None:
        self.saved.append(self.weight.item())


GREYS = {"p": (51, 153, 102), "q q q": (0, 255, 204), "r r": (204, 51, 153), "s s": (51, 255, 0)}
"""Grey values of three images for each prompt of one, three, two and two words; the first is the best, the last the worst."""


@pytest.fixture
def grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: None) -> Brightness:
    """The scorer that the driver will train, and tmp_path/rankings to train it on."""
    folder, scorer = tmp_path / "rankings", Brightness()
    folder.mkdir()
    rows = []
    for number, (prompt, greys) in enumerate(GREYS.items()):
        names = [f"{number}_{place}.png" for place in range(3)]
        for name, value in zip(names, greys, strict=True):
            Image.new("L", (8, 8), value).save(folder / name)
        rows.append({"prompt": prompt, "generations": names, "ranking": [1, 2, 3]})
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(reward_model, "check_trainable", lambda *_, **__: None)
    monkeypatch.setattr(reward_model, "load_trainable", lambda *_, **__: scorer)
    return scorer


def train_grey(tmp_path: Path, flags: str) -> list[dict[str, float]]:
    """Train it with a learning rate so small that its weight stays 2, and return the metrics; one of four prompts is held out."""
    argv = [
        "--model",
        "imagereward-tiny",
        "--data",
        str(tmp_path / "rankings"),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    argv += "--validation-share 0.25 --max-train-steps 3 --learning-rate 1e-30 --threads 1 --validation-steps 1 --checkpointing-steps 3".split()  # noqa: SIM905
    config = cli.parse(Config, [*argv, *flags.split()])
    assert reward_model.main(config) == 0
    return read_jsonl(tmp_path / "run" / "metrics.jsonl")


def by_hand(step: int, first_stage_updates: int) -> tuple[float, float]:
    """The loss of an update over all training rankings, one view half as bright, and the accuracy on the held-out one."""
    read = [Ranked(prompt=prompt, paths=(Path(prompt),), ranks=((1,),), weights=(1.0,)) for prompt in GREYS]
    train, held = split(read, 0.25, 0)
    losses, weights = [], []
    for prompt in (ranked.prompt for ranked in train):
        own = [2 * value / 255 * len(prompt.split()) for value in GREYS[prompt]]
        for better, worse in ((0, 1), (0, 2), (1, 2)):
            high, low = own[better], own[worse]
            inter = min(high, high / 2) - max(low, low / 2)
            intra = (abs(high / 2) + abs(low / 2)) / 2
            loss = math.log(1 + math.exp(low - high)) + math.log(1 + math.exp(intra - inter))
            first = step < first_stage_updates
            losses.append(loss / (1 + math.exp((high - low - 0.3) / 0.2)) if first else loss)
            weights.append(1.0 if first else math.exp(high - low))
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    (kept,) = held
    greys = GREYS[kept.prompt]
    return mean, sum(greys[i] > greys[j] for i, j in ((0, 1), (0, 2), (1, 2))) / 3


@pytest.mark.parametrize(
    "division",
    [
        "--train-batch-size 3 --gradient-accumulation-steps 1",
        "--train-batch-size 1 --gradient-accumulation-steps 3",
    ],
)
def test_the_driver_by_hand(
    division: str, grey: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of the first stage, one of the second, over all three training rankings at once or one after another."""
    monkeypatch.setattr(reward_model, "weak_view", lambda pixels, *_: pixels / 2)
    stable = "--stable.views 1 --stable.weighting two-stage --stable.first-stage-steps 2"
    rows = train_grey(tmp_path, f"{division} {stable}")
    for step, row in enumerate(rows):
        loss, accuracy = by_hand(step, 2)
        assert row["loss"] == pytest.approx(loss, rel=1e-5), step
        assert row["validation_accuracy"] == pytest.approx(accuracy)
    assert rows[2]["loss"] != pytest.approx(rows[1]["loss"], rel=1e-2), "the stages differ"
    assert grey.logit_scale.item() == pytest.approx(math.log(100)), "brought back before each pass"
    (held,) = split(by_images([ranking(prompt, "abc", (1, 2, 3)) for prompt in GREYS]), 0.25, 0)[1]
    values = [2 * value / 255 * len(held.prompt.split()) for value in GREYS[held.prompt]]
    assert grey.statistics[0] == pytest.approx(sum(values) / 3)


def test_the_best_scorer_is_kept(grey: Brightness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.6, 0.7, 0.5])
    monkeypatch.setattr(reward_model, "validate", lambda *_: next(accuracies))
    rows = train_grey(tmp_path, "--train-batch-size 3 --gradient-accumulation-steps 1 --learning-rate 1e-2")
    assert [row["validation_accuracy"] for row in rows] == [0.6, 0.7, 0.5]
    assert len(grey.saved) == 2, "the third is worse than the second"
    assert grey.saved[1] != grey.saved[0]
    assert grey.saved[1] != grey.weight.item()


@pytest.mark.parametrize(
    "objective",
    [
        "--objective pairs",
        "--objective choice",
        "--objective soft",
        "--stable.weighting two-stage --stable.views 2 --jitter 1",
    ],
)
def test_an_update_does_not_depend_on_its_division(objective: str, root: Path, tmp_path: Path) -> None:
    """One pass of four rankings, two of two, four of one: rankings weigh differently and hold different numbers of pairs."""
    data = tmp_path / "data"
    shutil.copytree(root / "rankings", data)
    rows = read_jsonl(data / "rankings.jsonl")
    for number, row in enumerate(rows):
        row["weight"] = 1.0 + number % 3
        row["ranking"] = [
            1 + (place if number % 2 else min(place, 1)) for place in range(len(row["ranking"]))
        ]
    (data / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        output = tmp_path / f"{batch}"
        argv = [
            "--model",
            str(root / "scorer"),
            "--data",
            str(data),
            "--output-dir",
            str(output),
            *objective.split(),
        ]
        argv += f"--stable.first-stage-steps 1 --max-train-steps 2 --train-batch-size {batch} --gradient-accumulation-steps {accumulation}".split()
        argv += "--learning-rate 1e-3 --adam-epsilon 1e-2 --threads 1 --validation-share 0.25 --validation-steps 2".split()  # noqa: SIM905
        assert reward_model.main(cli.parse(Config, argv)) == 0
        found.append([(row["loss"], row["grad_norm"]) for row in read_jsonl(output / "metrics.jsonl")])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one == pytest.approx(two, rel=2e-4)
