"""From aspects to rankings, by hand; agreement of two orders and position bias of annotators whose faults are known."""

import itertools
import random

import pytest

from data_build.aspect_rules import averaged, of_preferences, of_scores, ranked
from data_build.mllm_quality import Quality, in_words, mean_interval, preferences
from data_build.mllm_tasks import Answer, Group, Task, shuffled, tasks_of
from preftune.mllm.templates import OURS, load

A = {
    "following": of_scores([5, 4, 3, 3]),
    "beauty": of_scores([1, 4, 5, 5]),
    "fidelity": of_scores([3, 3, 1, 1]),
}


def test_sum_mean_and_aspect() -> None:
    """Sums 9, 11, 9, 9."""
    assert ranked(A, "sum") == ranked(A, "mean") == ([0, 1, 2, 3], [2, 1, 2, 2])
    assert ranked(A, "beauty") == ([0, 1, 2, 3], [4, 3, 1, 1])


def test_majority() -> None:
    """0 beats 1 once, loses once, ties once: half; 0 beats 2 and 3 by two aspects of three; 1 beats them by two; 2 and 3 are equal."""
    assert ranked(A, "majority") == ([0, 1, 2, 3], [1, 1, 3, 3])
    assert ranked(A, "majority") != ranked(A, "sum")


def test_an_answer_that_is_missing_is_no_score() -> None:
    with_gap = {**A, "beauty": of_scores([1, None, 5, 5])}
    assert ranked(with_gap, "sum") == ([0, 2, 3], [1, 1, 1]), "9, 9, 9: the image without a score is left out"
    assert ranked(with_gap, "beauty") == ([0, 2, 3], [3, 1, 1])
    assert ranked(with_gap, "mean") == ([0, 1, 2, 3], [1, 2, 3, 3]), (
        "8, 7, 4, 4 of the two aspects that are whole"
    )
    assert ranked(with_gap, "majority") == ([0, 1, 2, 3], [1, 2, 3, 3])
    nothing = {"one": of_scores([None, 2]), "two": of_scores([1, None])}
    assert ranked(nothing, "sum") == ranked(nothing, "mean") == ranked(nothing, "majority") == ([], [])
    assert averaged([None, 2, None, 3]) == 2.5
    assert averaged([None]) is None


def test_preferences_and_scores() -> None:
    one = of_preferences(3, {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.25})
    assert one.scores == (1.5, 0.25, 1.25)
    assert of_preferences(3, {(0, 1): 1.0, (0, 2): None, (1, 2): 0.0}).scores == (None, 0.0, None)
    assert of_preferences(2, {(0, 1): None}).scores == (None, None)
    assert of_scores([3, 3, 1]).preferences == {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 1.0}
    assert of_scores([3, None]).preferences == {(0, 1): None}


def test_a_cycle_of_preferences_is_a_tie() -> None:
    cycle = {"a": of_preferences(3, {(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0})}
    assert ranked(cycle, "majority") == ranked(cycle, "sum") == ([0, 1, 2], [1, 1, 1])


def test_one_order_of_two_that_differ_is_half() -> None:
    """A pair that two orders decide differently has preference 0.5, and is a tie of the aspect."""
    halves = {"a": of_preferences(2, {(0, 1): averaged([1.0, 0.0])}), "b": of_preferences(2, {(0, 1): 0.0})}
    assert ranked({"a": halves["a"]}, "a") == ([0, 1], [1, 1])
    assert ranked(halves, "majority") == ([0, 1], [2, 1])


# ---------------------------------------------------------------- orders


def group(count: int, prompt: str = "p") -> Group:
    from pathlib import Path

    names = tuple(f"{number}.png" for number in range(count))
    return Group(prompt=prompt, names=names, paths=tuple(map(Path, names)))


TEMPLATES = [load(OURS, "rate", aspect) for aspect in ("aesthetic", "fidelity")]


def test_orders() -> None:
    tasks = list(tasks_of(group(4), TEMPLATES, "together", 2, seed=1))
    assert [(task.template.name, task.order) for task in tasks] == [
        ("aesthetic", 0), ("aesthetic", 1), ("fidelity", 0), ("fidelity", 1)
    ]  # fmt: skip
    assert tasks[1].shown == tasks[0].shown[::-1]
    assert all(sorted(task.shown) == [0, 1, 2, 3] for task in tasks)
    assert [task.names for task in tasks[:1]] == [[f"{place}.png" for place in tasks[0].shown]]
    assert len(list(tasks_of(group(4), TEMPLATES, "pairwise", 1, seed=1))) == 2 * 6
    assert [task.shown for task in tasks_of(group(2), TEMPLATES[:1], "pointwise", 1, seed=1)] == [(0,), (1,)]
    assert tasks == list(tasks_of(group(4), TEMPLATES, "together", 2, seed=1))


def test_orders_are_uniform_and_depend_on_the_seed() -> None:
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for number in range(3000):
        counts[shuffled(range(3), group(3, f"prompt {number}"), (0, "aesthetic"))] += 1
    assert all(abs(count - 500) < 5 * (3000 * 5 / 36) ** 0.5 for count in counts.values()), counts
    orders = {shuffled(range(6), group(6), (seed, "aesthetic")) for seed in range(20)}
    assert len(orders) > 15
    firsts = [shuffled((0, 1), group(2, f"prompt {n}"), (0,))[0] for n in range(1000)]
    assert abs(sum(firsts) - 500) < 5 * 250**0.5


# ---------------------------------------------------------------- quality


def answered(task: Task, scores: list[int]) -> tuple[Task, Answer]:
    shown = tuple(scores[place] for place in task.shown)
    return task, Answer(scores=shown, rationales=("",) * len(shown))


def test_agreement_by_hand() -> None:
    """Images 0, 1, 2. First order 3 2 2, second 1 2 2: of the pairs 01 and 02 are opposite, 12 is tied by both."""
    first, second = tasks_of(group(3), TEMPLATES[:1], "together", 2, seed=0)
    quality = Quality()
    quality.see([answered(first, [3, 2, 2]), answered(second, [1, 2, 2])])
    assert (quality.same, quality.opposite, quality.half, quality.tied) == (0, 2, 0, 1)
    quality.see([answered(first, [3, 2, 1]), answered(second, [3, 3, 1])])
    assert (quality.same, quality.opposite, quality.half, quality.tied) == (2, 2, 1, 1)
    found = quality.summary()
    assert found["agreement_of_orders"] == 0.5
    assert found["agreement_with_ties"] == 0.5
    assert found["pairs_in_two_orders"] == 6
    quality.see([answered(first, [5, 4, 1])])
    assert quality.summary()["pairs_in_two_orders"] == 6, "one order alone is compared with nothing"
    said = "\n".join(in_words(found))
    assert "two orders agree on 50.0 % of the pairs that both decide, on 50.0 % of 6 pairs with ties" in said


def test_choices_of_two_orders() -> None:
    templates = [load(OURS, "compare", "fidelity")]
    first, second = tasks_of(group(2), templates, "pairwise", 2, seed=0)

    def said(task: Task, choice: str) -> tuple[Task, Answer]:
        return task, Answer(choice=choice, rationales=("",))  # type: ignore[arg-type]

    assert preferences(*said(first, "first")) == {first.shown: 1.0}
    assert preferences(*said(second, "tie")) == {second.shown: 0.5}
    quality = Quality()
    quality.see([said(first, "first"), said(second, "second")])
    assert (quality.same, quality.earlier) == (1, [0.5]), "the same image, shown first and second"
    quality.see([said(first, "first"), said(second, "first")])
    assert (quality.opposite, quality.earlier) == (1, [0.5, 1.0])
    quality.see([said(first, "tie"), said(second, "tie")])
    assert (quality.tied, quality.earlier) == (1, [0.5, 1.0])
    assert quality.summary()["mean_score_by_place"] is None


@pytest.mark.parametrize("bonus", [0, 1])
def test_a_bias_of_position_is_found(bonus: int) -> None:
    """An annotator that gives the first image so much more, on images of random quality."""
    rng, quality = random.Random(0), Quality()
    for number in range(400):
        scores = [rng.randint(1, 4) for _ in range(4)]
        for task in tasks_of(group(4, f"prompt {number}"), TEMPLATES[:1], "together", 1, seed=0):
            shown = [scores[place] for place in task.shown]
            shown[0] += bonus
            quality.see([(task, Answer(scores=tuple(shown), rationales=("",) * 4))])
    found = quality.summary()
    mean, low, high = found["earlier_is_better"]
    assert low < mean < high
    assert (low <= 0.5 <= high) == (bonus == 0)
    places = found["mean_score_by_place"]
    assert places[0] - sum(places[1:]) / 3 == pytest.approx(bonus, abs=0.2)
    assert "position: mean score by place" in in_words(found)[0]


def test_mean_interval() -> None:
    """Of 0 and 1: 0.5 and 1.96 sqrt(0.5 / 2)."""
    assert mean_interval([0.0, 1.0]) == pytest.approx([0.5, 0.5 - 1.96 * 0.5, 0.5 + 1.96 * 0.5], abs=1e-4)
    assert mean_interval([0.25]) == [0.25, None, None]
    assert in_words(
        {"agreement_of_orders": None, "mean_score_by_place": None, "earlier_is_better": [0.25, None, None]}
    ) == ["position: the image that is shown earlier wins 25.0 % of decided pairs; 50 is no bias"]
