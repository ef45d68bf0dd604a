"""The selection rules, against hand arithmetic on the formula of HPS (arXiv 2303.14420, section 6)."""

import math

import numpy as np
import pytest

from data_build.selection import KINDS, Chosen, Selection, groups, select

LN = math.log


def run(scores: list[float], rule: Selection | None = None, scale: float = 1.0) -> list[tuple[str, int]]:
    return [(one.kind, one.index) for one in chosen(scores, rule or Selection(), scale)]


def chosen(scores: list[float], rule: Selection, scale: float = 1.0) -> list[Chosen]:
    """Of one prompt."""
    prompts = np.ones(len(scores), np.uint64)
    return list(select(prompts, np.array(scores, np.float64), rule, scale))


def test_the_formula_by_hand() -> None:
    """Powers 1, 1, 2, 6: p = 6/10 > 2/4. Negated 1, 1, 1/2, 1/6: p = 1 / (8/3) = 3/8, which is not."""
    (best,) = chosen([0, 0, LN(2), LN(6)], Selection())
    assert (best.index, best.kind, best.group_size) == (3, "preferred", 4)
    assert best.confidence == pytest.approx(0.6, abs=1e-15)
    (worst,) = chosen([0, 0, -LN(2), -LN(6)], Selection())
    assert (worst.index, worst.kind) == (3, "non_preferred")
    assert worst.confidence == pytest.approx(0.6, abs=1e-15)


def test_both_ends_of_a_prompt() -> None:
    """Powers 16, 1, 1, 1, 1, 1/16: p = 16 / (20 + 1/16) for both ends, and alpha / n = 1/3."""
    both = chosen([LN(16), 0, 0, 0, 0, -LN(16)], Selection())
    assert [(one.kind, one.index) for one in both] == [("preferred", 0), ("non_preferred", 5)]
    assert [one.confidence for one in both] == pytest.approx([16 / (20 + 1 / 16)] * 2, abs=1e-15)


@pytest.mark.parametrize(("alpha", "taken"), [(2.39, 1), (2.41, 0), (1.0, 1), (4.0, 0), (400.0, 0)])
def test_alpha(alpha: float, taken: int) -> None:
    """p = 0.6 = 2.4 / 4; from alpha = n on nothing passes."""
    assert len(run([0, 0, LN(2), LN(6)], Selection(alpha=alpha))) == taken + (alpha == 1.0)


def test_p_must_be_greater() -> None:
    """Two images take all, p = 1/2 = 2/4 each; and p = 1 with alpha = n."""
    assert run([0, 0, -800, -800]) == []
    assert run([0, 0, -800, -800], Selection(alpha=1.999)) == [("preferred", 0), ("non_preferred", 2)]
    assert run([2000, 0, 0, 0], Selection(alpha=4)) == []


def test_scale_is_that_of_the_paper_s_scores() -> None:
    """Cosines 0.20, 0.20, 0.20, 0.22 are scores 20, 20, 20, 22: p = e^2 / (3 + e^2) = 0.711; as they are, p = 0.254."""
    cosines = [0.2, 0.2, 0.2, 0.22]
    assert run(cosines) == []
    (best,) = chosen(cosines, Selection(), 100)
    assert best.confidence == pytest.approx(math.exp(2) / (3 + math.exp(2)), abs=1e-12)


def test_an_image_is_never_both() -> None:
    for n in (1, 2, 5):
        for rule in ("softmax", "top-k"):
            assert run([3.0] * n, Selection(rule=rule, alpha=0.1, min_group=1)) == []


def test_of_equal_scores_the_first_stands() -> None:
    assert run([0, 5, 0, 5, 0, 0], Selection(alpha=1.9)) == [("preferred", 1)]
    assert run([5, 0, 5, 0, 5, 5], Selection(alpha=1.9)) == [("non_preferred", 1)]


def test_small_groups_are_left_out() -> None:
    assert run([0, 0, 9], Selection(alpha=1.9)) == []
    assert run([0, 0, 9], Selection(alpha=1.9, min_group=3)) == [("preferred", 2)]
    assert run([]) == []


def test_huge_scores_do_not_overflow() -> None:
    assert run([1e300, 0, 0, -1e300]) == [("preferred", 0), ("non_preferred", 3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match=f"score 2 is {value}"):
        run([0, 1, value, 3])


def test_top_k() -> None:
    scores = [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]
    assert run(scores, Selection(rule="top-k")) == [("preferred", 4), ("non_preferred", 3)]
    two = [("preferred", 4), ("preferred", 5), ("non_preferred", 3), ("non_preferred", 1)]
    assert run(scores, Selection(rule="top-k", k=2)) == two
    assert len(run(scores, Selection(rule="top-k", k=9))) == 6
    assert len(run(scores[:5], Selection(rule="top-k", k=9))) == 4
    tied = [("preferred", 0), ("preferred", 1), ("non_preferred", 3)]  # 2 is as good as the best
    assert run([1, 1, 1, 0], Selection(rule="top-k", k=2)) == tied


def test_thresholds() -> None:
    scores = [3.0, 1.0, 2.0, 0.0]
    both = Selection(rule="threshold", high=2.0, low=0.5)
    assert run(scores, both) == [("preferred", 0), ("preferred", 2), ("non_preferred", 3)]
    assert run(scores, Selection(rule="threshold", high=3.0)) == [("preferred", 0)]
    assert run(scores, Selection(rule="threshold", low=1.0)) == [("non_preferred", 1), ("non_preferred", 3)]
    confidences = [one.confidence for one in chosen(scores, both)]
    total = sum(math.exp(score) for score in scores)
    assert confidences[:2] == pytest.approx([math.exp(3) / total, math.exp(2) / total], abs=1e-15)


def test_prompts_are_kept_apart() -> None:
    """The same as each prompt alone, wherever its images stand."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 40, 500).astype(np.uint64)
    prompts[prompts == 0] = np.iinfo(np.uint64).max
    scores = rng.normal(0, 2, 500)
    found = {(one.index, one.kind, one.group_size) for one in select(prompts, scores, Selection(), 1.0)}
    expected = set()
    for prompt in set(prompts.tolist()):
        places = [place for place in range(500) if prompts[place] == prompt]
        for kind, sign in zip(KINDS, (1, -1), strict=True):
            powers = [math.exp(sign * scores[place]) for place in places]
            if len(places) >= 4 and max(powers) / sum(powers) > 2 / len(places):
                expected.add((places[powers.index(max(powers))], kind, len(places)))
    assert found == expected
    assert len(found) > 30
    assert [group.tolist() for group in groups(np.array([5, 3, 5, 3], np.uint64))] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, "--alpha must be a positive number"),
        ({"alpha": math.nan}, "--alpha"),
        ({"scale": -1.0}, "--scale must be a positive number"),
        ({"min_group": 0}, "--min-group must be at least 1"),
        ({"k": 0}, "--k must be at least 1"),
        ({"high": 1.0}, "--high is for --rule threshold, not softmax"),
        ({"rule": "threshold"}, "needs --high, --low or both"),
        ({"rule": "threshold", "high": math.inf}, "--high must be a finite number"),
        ({"rule": "threshold", "high": 1.0, "low": 1.0}, "--low must be less than --high"),
    ],
)
def test_wrong_numbers(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Selection(**settings)  # type: ignore[arg-type]
