"""Statistics of studies: published examples, calculations by hand, and simulated annotators whose behaviour is known."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from data_build.annotation_server import PAGES
from preftune.annotation import statistics, votes
from preftune.annotation.items import Item, Picture, item_of
from preftune.annotation.storage import Answer
from preftune.pages import render
from preftune.statistics import krippendorff

NAN = math.nan
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)
"""Four observers, twelve units: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part E."""


# ---------------------------------------------------------------- Krippendorff's alpha


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level: krippendorff.Level, alpha: float) -> None:
    assert krippendorff.alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_two_observers_by_hand() -> None:
    """Ten units of 0 and 1: both 0 in six, both 1 in one, different in three. o_01 + o_10 = 6, n_0 = 15, n_1 = 5, n = 20:
    alpha = 1 - 19 * 6 / (2 * 15 * 5) = 0.24.
    """
    one, other = [0] * 6 + [1] + [0, 0, 1], [0] * 6 + [1] + [1, 1, 0]
    assert krippendorff.alpha(np.array([one, other], dtype=float), "nominal") == pytest.approx(0.24)


def test_alpha_at_its_ends() -> None:
    same = np.array([[1.0, 2, 3, 4]] * 3)
    assert krippendorff.alpha(same, "ordinal") == 1
    assert math.isnan(krippendorff.alpha(np.ones((3, 4)), "nominal"))
    assert math.isnan(krippendorff.alpha(np.array([[1.0, NAN], [NAN, 2]]), "nominal"))
    assert krippendorff.alpha(np.array([[1.0, 2], [2, 1]]), "nominal") < 0
    value, low, high = krippendorff.with_interval(np.array([[1.0, 2, NAN], [1, NAN, 3]]), "nominal")
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(value)


def test_alpha_of_chance_is_zero_and_its_interval_is_honest() -> None:
    """Of 100 studies by chance, about 95 intervals hold 0."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(100):
        _, low, high = krippendorff.with_interval(rng.integers(1, 8, (3, 60)).astype(float), "ordinal")
        inside += low <= 0 <= high
    assert 87 <= inside <= 99
    assert abs(krippendorff.alpha(rng.integers(0, 3, (4, 20_000)).astype(float), "nominal")) < 0.01


# ---------------------------------------------------------------- votes


def picture(name: str, group: str, **scores: float) -> Picture:
    return Picture(file=f"images/{name}.png", group=group, scores=scores)


def given(name: str, item: Item, answer: dict[str, Any], visit: int = 0, **more: Any) -> Answer:
    values = {"seconds": 2.0, "state": "given", "note": "", "inspector": "", "revision": 1, "at": ""} | more
    return Answer(annotator=name, item=item.id, visit=visit, answer=answer, **values)


def pairs(number: int) -> dict[str, Item]:
    found = [
        item_of("choice", f"prompt {at}", [picture(f"{at}b", "base", m=1), picture(f"{at}a", "tuned", m=at)])
        for at in range(number)
    ]
    return {item.id: item for item in found}


def study(items: dict[str, Item], **choices: Sequence[int]) -> list[Answer]:
    """name=[1, -1, 0, ...]: who prefers the tuned image, the base's, or neither, item by item."""
    ranks = {1: [2, 1], -1: [1, 2], 0: [1, 1]}
    return [
        given(name, item, {"ranks": ranks[value]})
        for name, values in choices.items()
        for item, value in zip(items.values(), values, strict=False)
    ]


def test_win_rate_by_hand() -> None:
    """Two people, four prompts: 4 wins, 1 tie, 3 losses: (4 + 1/2) / 8. Prompts: two better, one tied, one worse."""
    items = pairs(4)
    answers = study(items, ann=[1, 1, -1, -1], bob=[1, 0, 1, -1])
    (row,) = statistics.win_rates(votes.outcomes(items, answers))
    assert row.kind == "choice"
    assert (row.group, row.against, row.wins, row.ties, row.losses) == ("tuned", "base", 4, 1, 3)
    assert row.rate == pytest.approx(4.5 / 8)
    assert 0 <= row.low < row.rate < row.high <= 1
    assert row.prompts == 4
    assert row.p == 1.0, "two of three prompts"
    assert row.method == "Wilson", "four prompts are too few for a bootstrap"


def test_an_interval_has_a_width() -> None:
    """Of prompts that are all alike, a bootstrap would be sure: it is Wilson's of their number, by hand 12 / (12 + 1.96^2)."""
    for number in (3, 12):
        items = pairs(number)
        (row,) = statistics.win_rates(votes.outcomes(items, study(items, ann=[1] * number, bob=[1] * number)))
        assert (row.rate, row.high, row.method) == (1, 1, "Wilson")
        assert row.low == pytest.approx(number / (number + 1.96**2), abs=1e-4)
    items = pairs(12)
    (row,) = statistics.win_rates(votes.outcomes(items, study(items, ann=[1] * 9 + [-1] * 3)))
    assert row.method == "bootstrap"
    assert row.low < 0.75 < row.high <= 1


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([3, 4, 5], "no interval: 3 prompts, fewer than 10"),
        ([4] * 12, "no interval: all prompts are alike"),
        ([3, 5] * 6, ""),
        ([3], "no interval: 1 prompt, fewer than 10"),
    ],
)  # fmt: skip
def test_points_of_few_prompts_have_no_interval_and_say_why(points: list[int], why: str) -> None:
    found = [item_of("rating", f"p{at}", [picture(f"p{at}", "base")]) for at in range(len(points))]
    answers = [given("ann", item, rating(value)) for item, value in zip(found, points, strict=True)]
    (row,) = statistics.points({item.id: item for item in found}, answers)
    value, low, high, said = row["overall"]
    assert (value, said) == (np.mean(points), why)
    assert math.isnan(low) == math.isnan(high) == bool(why)


@pytest.mark.parametrize(
    ("ann", "bob", "why"),
    [
        ([1, -1] * 6, [1, -1] * 5 + [1, 1], ""),
        ([1, -1] * 6, [1, -1] * 6, "no interval: all pairs of images are alike"),
        ([0] * 12, [0] * 12, "all answers are the same, by chance they would agree as often"),
        ([1, -1, 1], [1, 1, 1], "no interval: 3 pairs of images, fewer than 10"),
        ([1], [1], "no interval: 1 pair of images, fewer than 10"),
    ],
)
def test_alpha_says_why_there_is_none(ann: list[int], bob: list[int], why: str) -> None:
    items = pairs(len(ann))
    (row,) = statistics.alphas(items, study(items, ann=ann, bob=bob))
    assert row[-1] == why
    assert math.isnan(row[3]) == bool(why)


def test_alpha_of_annotators_who_share_nothing() -> None:
    items = pairs(2)
    answers = [
        given(name, item, {"ranks": [1, 2]})
        for name, item in zip(("ann", "bob"), items.values(), strict=True)
    ]
    ((what, _, alpha, _, _, why),) = statistics.alphas(items, answers)
    assert (what, math.isnan(alpha), why) == (
        "preferences",
        True,
        "no pair of images that two people answered",
    )


def test_win_rates_are_of_all_two_models_of_a_ranking() -> None:
    item = item_of(
        "ranking", "p", [picture("x", "b"), picture("y", "a"), picture("z", "c"), picture("w", "a")]
    )
    answers = [given("ann", item, {"ranks": [2, 1, 3, 2]})]
    rows = {
        (row.group, row.against): row
        for row in statistics.win_rates(votes.outcomes({item.id: item}, answers))
    }
    found = {names: (row.wins, row.ties, row.losses) for names, row in rows.items()}
    assert found == {("b", "a"): (0, 1, 1), ("c", "a"): (0, 0, 2), ("c", "b"): (0, 0, 1)}
    assert math.isnan(rows["c", "b"].low), "one prompt has no interval"


def test_intervals_of_win_rates_cover() -> None:
    """20 people of one opinion a prompt, of 60 prompts, true rate 0.6: about 95 of 100 intervals hold it. Votes taken as
    independent would give intervals that are far too short.
    """
    rng, inside, items = np.random.default_rng(0), 0, pairs(60)
    for _ in range(100):
        liked = rng.random(60) < 0.6
        answers = study(items, **{f"p{k}": [1 if one else -1 for one in liked] for k in range(5)})
        (row,) = statistics.win_rates(votes.outcomes(items, answers))
        inside += row.low <= 0.6 <= row.high
    assert 88 <= inside <= 99


def test_histogram_of_votes_by_hand() -> None:
    """Three voters; votes for tuned 3, 2, 0, 1 (and two ties): ties are votes for nobody."""
    items = pairs(4)
    (one,) = statistics.histograms(
        votes.outcomes(items, study(items, a=[1, 1, -1, 1], b=[1, 1, -1, 0], c=[1, -1, -1, 0]))
    )
    assert (one.group, one.voters, one.pairs) == ("tuned", 3, (1, 1, 1, 1))
    assert one.majority == 0.5


def test_agreement_by_hand() -> None:
    """ann and bob share three pairs that neither ties, and agree on two; cem agrees with ann on 3 of 4 and with bob on 1 of 3."""
    items = pairs(4)
    people = votes.votes_by_rater(
        items, study(items, ann=[1, 1, 1, -1], bob=[1, -1, 0, -1], cem=[1, 1, 1, 1])
    )
    assert votes.shared(people["ann"], people["bob"]) == (2, 3)
    assert votes.shared(people["bob"], people["cem"]) == (1, 3)
    cell = votes.agreement([*combinations(people.values(), 2)])
    shares = [2 / 3, 3 / 4, 1 / 3]
    assert cell.mean == pytest.approx(np.mean(shares))
    assert cell.std == pytest.approx(np.std(shares, ddof=1))
    assert (cell.raters, cell.pairs) == (3, 10)


def test_table_of_agreement() -> None:
    """The model scores base 1 and tuned 0, 1, 2, 3: it prefers the base, neither, tuned, tuned."""
    items = pairs(4)
    answers = study(items, ann=[-1, 1, 1, 1], bob=[-1, 1, -1, 1], cem=[1, 1, 1, 1], eve=[-1, -1, 1, 1])
    people = votes.votes_by_rater(items, answers)
    table = votes.agreement_table(people, ["eve"], votes.votes_of_scores(items))
    assert table["annotator", "m"].mean == pytest.approx(np.mean([1, 2 / 3, 2 / 3]))
    assert table["inspector", "m"].mean == 1
    assert table["annotator", "inspector"].mean == pytest.approx(np.mean([3 / 4, 2 / 4, 2 / 4]))
    assert table["inspector", "ensemble"].mean == 3 / 4, "of base, tuned, tuned, tuned"
    assert table["ensemble", "m"].mean == 1
    # without ann: tie, tuned, tie, tuned; without bob: tie, tuned, tuned, tuned; without cem: base, tuned, tie, tuned
    assert table["annotator", "ensemble"].mean == pytest.approx(np.mean([2 / 2, 2 / 3, 2 / 3]))
    assert math.isnan(table["inspector", "inspector"].mean)


def test_agreement_of_simulated_annotators() -> None:
    """Two who follow the truth with probability q agree with probability q^2 + (1 - q)^2, with the truth with q."""
    rng, items = np.random.default_rng(1), pairs(3000)
    truth = rng.choice([-1, 1], 3000)
    noisy = {name: (truth * np.where(rng.random(3000) < 0.8, 1, -1)).tolist() for name in "abc"}
    people = votes.votes_by_rater(items, study(items, **noisy, eve=truth.tolist()))
    table = votes.agreement_table(people, ["eve"], {})
    assert table["annotator", "annotator"].mean == pytest.approx(0.68, abs=0.02)
    assert table["annotator", "inspector"].mean == pytest.approx(0.8, abs=0.02)
    assert table["inspector", "ensemble"].mean == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2, abs=0.02)
    alpha, low, high = votes.alpha_of_votes({name: people[name] for name in "abc"})
    assert alpha == pytest.approx(2 * 0.68 - 1, abs=0.03)
    assert low < alpha < high


def test_alpha_of_votes_does_not_know_which_image_is_first() -> None:
    """All prefer the same model on nine of ten pairs: half of the chance agreement is 1/2, whatever the names."""
    items = pairs(10)
    one = votes.votes_by_rater(items, study(items, a=[1] * 10, b=[1] * 9 + [-1]))
    other = votes.votes_by_rater(items, study(items, a=[-1, 1] * 5, b=[-1, 1] * 4 + [-1, -1]))
    values = [votes.alpha_of_votes(found)[0] for found in (one, other)]
    assert values[0] == pytest.approx(values[1])
    assert values[0] == pytest.approx(1 - 19 * 2 / (2 * 10 * 10))


def test_of_a_pair_in_two_items_the_votes_are_those_of_the_images() -> None:
    a, b, c = (picture(name, "g") for name in "abc")
    one, other = item_of("ranking", "p", [c, a, b]), item_of("choice", "p", [b, a])
    assert votes.votes_of_ranks(one, [1, 2, 3]) == {
        ("p", "a", "c"): -1,
        ("p", "b", "c"): -1,
        ("p", "a", "b"): 1,
    }
    assert votes.votes_of_ranks(other, [2, 1]) == {("p", "a", "b"): 1}


def test_images_without_a_score_have_no_votes() -> None:
    item = item_of("ranking", "p", [picture("a", "g", m=2), picture("b", "g"), picture("c", "g", m=3)])
    assert votes.votes_of_scores({item.id: item}) == {"m": {("p", "a", "c"): -1}}


# ---------------------------------------------------------------- points, time, oneself


def rating(overall: int, *problems: str) -> dict[str, Any]:
    return {"alignment": 1, "fidelity": 2, "harmlessness": 7, "overall": overall, "problems": list(problems)}


def test_points_problems_and_oneself_by_hand() -> None:
    one, two = (item_of("rating", prompt, [picture(prompt, "base")]) for prompt in "pq")
    items = {one.id: one, two.id: two}
    answers = [
        given("ann", one, rating(2, "body")),
        given("bob", one, rating(4)),
        given("ann", two, rating(6, "body")),
        given("ann", one, rating(6), visit=1),
    ]
    (row,) = statistics.points(items, answers)
    assert row["ratings"] == 3
    assert row["overall"][0] == 4
    assert row["problems"]["body"] == pytest.approx(2 / 3)
    assert statistics.self_agreement(items, answers) == {"ann": {"points": 4, "off": 1.0}}
    levels = {name: (level, alpha) for name, level, alpha, *_ in statistics.alphas(items, answers)}
    assert levels["points: overall"][0] == "ordinal"
    assert levels["problem: body (rating)"][0] == "nominal"


def test_oneself_on_pairs_and_time_by_hand() -> None:
    items = pairs(3)
    first = study(items, ann=[1, 1, -1])
    second = [
        given("ann", item, {"ranks": ranks}, visit=1)
        for item, ranks in zip(items.values(), ([2, 1], [1, 2], [1, 1]), strict=True)
    ]
    assert statistics.self_agreement(items, first + second) == {"ann": {"pairs": 2, "same": 0.5}}
    timed = [
        given("ann", item, {"ranks": [1, 2]}, seconds=s)
        for item, s in zip(items.values(), (1, 2, 6), strict=True)
    ]
    assert statistics.times(items, timed) == [
        ("all", "choice", 3, 1.5, 2, 4),
        ("ann", "choice", 3, 1.5, 2, 4),
    ]


def test_what_was_sent_back_or_skipped_counts_for_nothing() -> None:
    items = pairs(3)
    answers = study(items, ann=[1, 1, 1])
    some = list(items.values())
    answers += [
        given("bob", some[0], {"ranks": [1, 2]}, state="returned"),
        given("bob", some[1], {"skip": "unable"}),
    ]
    found = statistics.summary(items, answers, [], {})
    assert (found["answers"], found["skipped"], found["returned"]) == (5, 1, 1)
    assert found["win_rates"][0]["wins"] == 3
    assert found["win_rates"][0]["losses"] == 0


# ---------------------------------------------------------------- the page


def test_the_page_of_every_kind_of_study() -> None:
    """Also of none; values of data are escaped."""
    kinds = pairs(4)
    prompt = item_of("prompt", "p", [])
    rated = item_of("rating", "p", [picture("x", "<script>alert(1)</script>")])
    items = kinds | {prompt.id: prompt, rated.id: rated}
    answers = study(kinds, ann=[1, 1, 0, -1], bob=[1, 1, 1, -1], eve=[1, 1, 1, 1])
    answers += [given("ann", prompt, {"category": "Arts", "problems": ["sexual"]})]
    answers += [given(name, rated, rating(3, "violent")) for name in ("ann", "bob")]
    for part in ([], answers):
        found = statistics.summary(items, part, ["eve"], {})
        page = render(PAGES / "statistics.html.jinja", found=found, style="../static/annotate.css")
        assert "<script>alert" not in page
        assert "nan" not in page.lower().replace("&lt;", "")
    assert "no item was answered a second time" in page
    assert "1 pair of raters,<br>3 pairs of images" in page, "ann and bob, of whom neither ties"
    assert "all answers are the same, by chance" in page
    assert "no interval: 4 pairs of images, fewer than 10" in page
    assert "(Wilson)" in page
    alone = render(
        PAGES / "statistics.html.jinja", found=statistics.summary(items, answers[:2], [], {}), style="x.css"
    )
    assert "it compares the answers of two or more annotators" in alone
    tied = [given("ann", next(iter(kinds.values())), {"ranks": [1, 1]}, visit=1)]
    found = statistics.summary(items, answers + tied, ["eve"], {})
    assert "of the 1 second answer none is" in render(
        PAGES / "statistics.html.jinja", found=found, style="x.css"
    )
    assert "&lt;script&gt;alert(1)" in page
    assert ">68.8 %<" in page, "tuned wins 5, ties 1, loses 2 of 8 votes of annotators"
