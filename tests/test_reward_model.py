"""Losses of scorer training by hand, and how rankings become pairs and splits."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from finetune import pretrain_scorer, reward_model
from finetune.reward_model import Ranked, by_pictures, pairs, places, ranking_loss, split
from preftune.records import Ranking, Sample
from rewards.imagereward import ImageReward


def test_ranking_loss_by_hand() -> None:
    """-log sigmoid(d) of d = 2, -1, 0: 0.126928 + 1.313262 + 0.693147, a third of it."""
    better, worse = torch.tensor([3.0, -1.0, 5.0]), torch.tensor([1.0, 0.0, 5.0])
    assert ranking_loss(better, worse).item() == pytest.approx((0.126928 + 1.313262 + 0.693147) / 3, abs=1e-6)
    assert ranking_loss(better, better).item() == pytest.approx(math.log(2))
    assert ranking_loss(torch.tensor([100.0]), torch.tensor([-100.0])).item() == 0.0
    assert ranking_loss(torch.tensor([-100.0]), torch.tensor([100.0])).item() == pytest.approx(200.0)


def test_pairs_leave_ties_out() -> None:
    assert set(pairs([2, 1, 3])) == {(1, 0), (1, 2), (0, 2)}
    assert set(pairs([1, 2, 2])) == {(0, 1), (0, 2)}
    assert pairs([1, 1]) == []


def ranking(prompt: str, names: str, ranks: tuple[int, ...], source: str = "") -> Ranking:
    return Ranking(prompt=prompt, paths=tuple(map(Path, names)), ranks=ranks, source=source)


def test_annotators_of_the_same_pictures_are_read_as_one() -> None:
    read = [
        ranking("p", "ab", (1, 2), "annotator 0"),
        ranking("q", "ab", (1, 2)),
        ranking("p", "ab", (2, 1), "annotator 1"),
        ranking("p", "ac", (1, 1)),
    ]
    merged = by_pictures(read)
    assert [(item.prompt, "".join(map(str, item.paths)), item.ranks) for item in merged] == [
        ("p", "ab", ((1, 2), (2, 1))),
        ("q", "ab", ((1, 2),)),
        ("p", "ac", ((1, 1),)),
    ]
    better, worse = places([merged[1], merged[0], merged[2]]).tolist()
    assert list(zip(better, worse, strict=True)) == [(0, 1), (2, 3), (3, 2)], "rows count on over pictures"
    assert places([merged[2]]).shape == (2, 0)


def test_no_prompt_is_on_both_sides() -> None:
    items = [
        Ranked(prompt=f"p{k % 20}", paths=(Path(f"{k}a"), Path(f"{k}b")), ranks=((1, 2),)) for k in range(60)
    ]
    train, held = split(items, 0.1, seed=0)
    assert len({item.prompt for item in held}) == 2
    assert len(held) == 6
    assert not {item.prompt for item in held} & {item.prompt for item in train}
    assert sorted(train + held, key=items.index) == items
    assert split(items, 0.1, seed=1)[1] != held
    with pytest.raises(ValueError, match="all 1 prompts would be held out"):
        split(items[:1], 0.5, seed=0)


def test_freezing_goes_from_the_bottom(root: Path) -> None:
    for share, vision, text in ((0.0, True, True), (1.0, False, False)):
        scorer = ImageReward.load(root / "scorer")
        reward_model.freeze(scorer, share)
        assert all(p.requires_grad == vision for p in scorer.vision_model.encoder.layers.parameters())
        assert all(p.requires_grad == text for p in scorer.text_model.encoder.layer.parameters())
        assert all(p.requires_grad == vision for p in scorer.vision_model.embeddings.parameters())
        assert all(p.requires_grad for p in scorer.mlp.parameters())
        assert not any(p.requires_grad for p in scorer.text_proj.parameters()), "no score depends on it"


def test_the_best_accuracy_outlives_a_stop(tmp_path: Path) -> None:
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "valid_accuracy": 0.7}, {"step": 2, "valid_accuracy": 0.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reward_model.best_so_far(tmp_path) == 0.7
    (tmp_path / "metrics.jsonl").write_text("")
    assert reward_model.best_so_far(tmp_path) == 0.0


def test_contrast_by_hand() -> None:
    """Two pictures, two captions, likenesses [[1, 0], [0.6, 0.8]], temperature 0.5."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.eye(2)
    by_row = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))) / 2
    by_column = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    loss = pretrain_scorer.contrastive_loss(images, texts, 0.5)
    assert loss.item() == pytest.approx((by_row + by_column) / 2, abs=1e-6)


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
    assert (logits[0] - logits[2]).abs().max() > 1e-4, "the picture is read"


def test_negative_captions() -> None:
    images, texts = torch.eye(3), torch.tensor([[1.0, 0.9, 0.0], [0.8, 1.0, 0.1], [0.7, 0.2, 1.0]])
    assert pretrain_scorer.hardest(images, texts, ["a", "b", "c"]) == [1, 0, 1], (
        "the likest caption that is not the picture's own"
    )
    assert pretrain_scorer.hardest(images, texts, ["a", "a", "c"]) == [2, 2, 1], "nor in the same words"
    row = Sample(path=Path("a"), text="a", extra={"near_misses": ["b", "c"]})
    drawn = {pretrain_scorer.near_miss(row, torch.Generator().manual_seed(seed)) for seed in range(20)}
    assert drawn == {"b", "c"}
    bare = Sample(path=Path("a"), text="a", extra={})
    assert pretrain_scorer.near_miss(bare, torch.Generator()) is None
