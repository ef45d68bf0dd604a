"""Computations of eval/selection.py: which of n images each scorer picks, and how often a judge prefers it to a random one.

Letters: N images in all, n images of a pool, A annotators of a pool (a judging scorer is one), R scorers, P prompts.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.compared_folders import ModelFolder
from eval.folder_scores import images_by_prompt
from eval.heat_maps import heat_map
from eval.rankings import RankedImages
from eval.view_scores import PromptedImage
from eval.win_rates import csv_text, percent
from preftune.grid import captioned_grid
from preftune.images import save_figure
from preftune.json_values import json_value
from preftune.statistics import best_of_n, bootstrap, paired
from preftune.statistics.bootstrap import interval

Floats = NDArray[np.float64]
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Images of a prompt to choose from."""

    prompt: str
    rows: tuple[int, ...]
    """n numbers in the list of all images."""
    ranks: Floats | None = None
    """(A, n) by people, 1 is best; None where they have not ranked these."""


@dataclass(frozen=True, kw_only=True)
class PickRow:
    """A line of the table: a scorer's picks, by the judge."""

    scorer: str
    win_rate: float
    """Of its pick against the other images of the pool, ties half: against random choice."""
    low: float
    high: float
    wins: int
    """Prompts whose picks win more than half."""
    losses: int
    p_value: float
    """Exact sign test over prompts, adjusted for all scorers (Holm)."""
    best: float
    """Share of pools whose best image by the judge, or one of them, it picks."""


@dataclass(frozen=True, kw_only=True)
class Picks:
    """What was picked."""

    pools: Sequence[Pool]
    images: Sequence[PromptedImage]
    scores: Mapping[str, Floats]
    """Scorer -> (N,)."""
    quality: Sequence[Floats] | None
    """(n,) for each pool: how often the judge prefers each image to the others of the pool; None without a judge."""
    judge: str
    """Who judges, in words; empty for nobody."""

    def of(self, scorer: str) -> list[int]:
        """Return the place in its pool of the image with the highest score, the first of equals, for each pool."""
        return [int(np.argmax(self.scores[scorer][list(pool.rows)])) for pool in self.pools]


def pools_of_folder(
    folder: ModelFolder, count: int | None, most: int | None
) -> tuple[list[PromptedImage], list[Pool]]:
    """Return the images and pools of the first `count` prompts, at most `most` images of each, by seed. ValueError for a prompt with
    a single image.
    """
    by_prompt = images_by_prompt(folder)
    images: list[PromptedImage] = []
    pools = []
    for text, some in itertools.islice(by_prompt.items(), count):
        mine = some[:most]
        if len(mine) < 2:
            raise ValueError(
                f"{folder.folder} has one image of {text[:80]!r}, and nothing to choose from; generate several of each prompt:"
                " preftune benchmark-images --num-images-per-prompt 16"
            )
        pools.append(Pool(prompt=text, rows=tuple(range(len(images), len(images) + len(mine)))))
        images += mine
    return images, pools


def pools_of_rankings(ranked: RankedImages) -> list[Pool]:
    """Return a pool for each set of images that people ranked."""
    return [
        Pool(prompt=ranked.prompts[one.prompt], rows=tuple(one.rows.tolist()), ranks=one.ranks)
        for one in ranked.judged
    ]


def quality(values: Floats) -> Floats:
    """Return how often each of n images is preferred to one of the others, (n,) in [0, 1], of values (A, n), more is better.

    Ties count half; the mean over annotators. The mean over images is 1/2.
    """
    count = values.shape[1]
    better = np.sign(values[:, :, None] - values[:, None, :]) / 2 + 0.5
    found: Floats = (better.sum(2) - 0.5).mean(0) / (count - 1)
    return found


def table(picks: Picks, scorers: Sequence[str]) -> list[PickRow]:
    """Return a row for each of these scorers, whose p-values are adjusted for all of them; none without a judge."""
    if picks.quality is None:
        return []
    prompts = list(dict.fromkeys(pool.prompt for pool in picks.pools))
    numbers = np.array([prompts.index(pool.prompt) for pool in picks.pools])
    totals = np.bincount(numbers).astype(np.float64)
    shares = {
        name: np.array([found[place] for found, place in zip(picks.quality, picks.of(name), strict=True)])
        for name in scorers
    }
    sums = np.stack([np.bincount(numbers, mine).astype(np.float64) for mine in shares.values()])
    intervals = bootstrap.ratios(sums, np.tile(totals, (len(shares), 1)))
    counts = [paired.wins_ties_losses(mine / totals - 0.5) for mine in sums]
    p_values = paired.holm([paired.sign_test(wins, losses) for wins, _, losses in counts])
    rows = []
    for number, (name, (wins, _, losses)) in enumerate(zip(shares, counts, strict=True)):
        rate, low, high = intervals[number].tolist()
        best = [found.max() == mine for found, mine in zip(picks.quality, shares[name], strict=True)]
        rows.append(
            PickRow(
                scorer=name, win_rate=rate, low=low, high=high, wins=wins, losses=losses, p_value=p_values[number],
                best=float(np.mean(best)),
            )
        )  # fmt: skip
    return rows


def curve(picks: Picks, scorer: str) -> Floats:
    """Return the win rate against random choice of the pick from 1, 2, ... n images, n those of the smallest pool.

    Unbiased, from all images of each pool: the weights of best of n, on the judge's quality in the order of the scorer. For n = 1 it is
    1/2. A judge's own curve is the most that choosing can give.
    """
    assert picks.quality is not None, "somebody judges"
    most = min(len(pool.rows) for pool in picks.pools)
    found = np.zeros(most)
    for pool, mine in zip(picks.pools, picks.quality, strict=True):
        order = np.argsort(picks.scores[scorer][list(pool.rows)], kind="stable")
        found += [best_of_n.weights(len(order), n) @ mine[order] for n in range(1, most + 1)]
    return found / len(picks.pools)


def against_each_other(picks: Picks) -> Floats:
    """Return (R, R): how often the judge prefers the row's pick to the column's, ties and equal picks half (ImageReward,
    arXiv 2304.05977, Fig. 5).
    """
    assert picks.quality is not None, "somebody judges"
    shares = np.array(
        [
            [found[place] for found, place in zip(picks.quality, picks.of(name), strict=True)]
            for name in picks.scores
        ]
    )
    return (np.sign(shares[:, None] - shares[None]) / 2 + 0.5).mean(2)


def plot(picks: Picks, path: Path) -> None:
    """Write the win rate against random choice over n, and the win rates of the scorers' picks against each other."""
    names = list(picks.scores)
    side = 0.9 * len(names) + 2
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6 + side, max(4.2, side + 0.6)), width_ratios=[5, side], layout="tight"
    )
    for name in names:
        found = curve(picks, name)
        left.plot(range(1, len(found) + 1), found, marker=".", label=name)
    left.axhline(0.5, linestyle=":", color="grey")
    left.set_xlabel("n, images to choose from")
    left.set_ylabel(f"win rate against random choice, by {picks.judge}")
    left.legend(fontsize=8)
    rates = against_each_other(picks)
    right.set_title("pick of row against pick of column", fontsize=9)
    heat_map(
        right,
        rates,
        names,
        limits=(-0.5, 1.5),
        words=percent,
        cells=itertools.permutations(range(len(names)), 2),
    )
    save_figure(figure, path)


def grid(picks: Picks, rows: int, seed: int) -> Image.Image:
    """Return the picks of the first pools: a random image, then each scorer's, with its score and the judge's preference."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[int]] = {RANDOM: [int(rng.integers(len(pool.rows))) for pool in picks.pools]}
    chosen |= {name: picks.of(name) for name in picks.scores}
    numbers = range(min(rows, len(picks.pools)))
    return captioned_grid(
        [[picks.images[picks.pools[i].rows[places[i]]].path for places in chosen.values()] for i in numbers],
        row_captions=[f"1 of {len(picks.pools[i].rows)}\n{picks.pools[i].prompt}" for i in numbers],
        column_titles=[f"{name} (judge)" if name == picks.judge else name for name in chosen],
        cell_captions=[
            [_caption(picks, i, name, places[i]) for name, places in chosen.items()] for i in numbers
        ],
    )


def _caption(picks: Picks, number: int, name: str, place: int) -> str:
    lines = []
    if name in picks.scores:
        lines.append(f"{picks.scores[name][picks.pools[number].rows[place]]:.3f}")
    if picks.quality is not None:
        lines.append(f"beats {100 * picks.quality[number][place]:.0f} % of others")
    return "\n".join(lines)


def to_text(rows: Sequence[PickRow]) -> str:
    """Return the table as printed."""
    lines = [
        f"{'scorer':18s} {'win rate':>8s} {'95 % interval':>16s} {'wins':>5s} {'losses':>6s} {'p (Holm)':>8s} {'picks the best':>14s}"
    ]
    for row in rows:
        bounds = interval(100 * row.low, 100 * row.high, ".1f")
        lines.append(
            f"{row.scorer:18s} {100 * row.win_rate:7.1f}% {bounds:>16s} {row.wins:5d} {row.losses:6d} {row.p_value:8.3g} {100 * row.best:13.1f}%"
        )
    return "\n".join(lines)


def sentence(row: PickRow, judge: str) -> str:
    """Return what a row says, in words."""
    if math.isnan(row.low):
        sure = "one prompt does not say how sure that is"
    elif row.low > 0.5 or row.high < 0.5:
        sure = "more than chance" if row.low > 0.5 else "worse than random choice"
    else:
        sure = "which may be chance"
    bounds = interval(100 * row.low, 100 * row.high, ".1f")
    return (
        f"By {judge}, what {row.scorer} picks is better than a random image in {100 * row.win_rate:.1f} % of cases {bounds}".rstrip()
        + f": {sure}."
    )


def to_csv(rows: Sequence[PickRow]) -> str:
    """Return the table as CSV."""
    names = ["scorer", "win_rate", "low", "high", "wins", "losses", "p_value", "best"]
    return csv_text(names, ([getattr(row, name) for name in names] for row in rows))


def to_json(picks: Picks, rows: Sequence[PickRow]) -> str:
    """Return table, curves and win rates of the picks against each other as JSON; null where there is no number."""
    judged = {} if picks.quality is None else {
        "curves": {name: curve(picks, name).tolist() for name in picks.scores},
        "against each other": against_each_other(picks).tolist(),
    }  # fmt: skip
    found = {
        "judge": picks.judge,
        "scorers": list(picks.scores),
        "rows": [asdict(row) for row in rows],
        **judged,
    }
    return json.dumps(json_value(found), indent=1) + "\n"


def picks_csv(picks: Picks) -> str:
    """Return every pick as CSV: prompt, scorer, image, score and how often the judge prefers it to the others."""
    lines = (
        [
            pool.prompt, name, str(picks.images[pool.rows[place]].path), float(picks.scores[name][pool.rows[place]]),
            math.nan if picks.quality is None else float(picks.quality[number][place]),
        ]
        for name in picks.scores
        for number, (pool, place) in enumerate(zip(picks.pools, picks.of(name), strict=True))
    )  # fmt: skip
    return csv_text(["prompt", "scorer", "image", "score", "preferred"], lines)
