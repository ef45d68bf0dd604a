"""Rankings as training data of reward models: grouped by images, and converted to pairs, choices or shares
of votes.

The *row* of an image is its index among all images of a batch of rankings, in their order. N pairs or
choices.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.cli import exit_on_user_error
from preftune.images import opened
from preftune.records import Ranking
from preftune.training import decoding
from preftune.training.run import Run
from preftune.worker_processes import WorkerProcesses
from rewards import Preprocess
from rewards.pixels import from_pil


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Images of one prompt and the ranks given by all annotators."""

    prompt: str
    paths: tuple[Path, ...]
    """n images."""
    ranks: tuple[tuple[int, ...], ...]
    """For each annotator n ranks, 1 = best; equal ranks are ties."""
    weights: tuple[float, ...]
    """Weight of each annotator."""


class _OfPrompt(Protocol):
    @property
    def prompt(self) -> str: ...


OfPrompt = TypeVar("OfPrompt", bound=_OfPrompt)


def by_images(rankings: Sequence[Ranking]) -> list[Ranked]:
    """Return the rankings, those of the same prompt and images in one, in the order of their first."""
    found: dict[tuple[str, tuple[Path, ...]], list[Ranking]] = {}
    for ranking in rankings:
        found.setdefault((ranking.prompt, ranking.paths), []).append(ranking)
    return [
        Ranked(
            prompt=prompt,
            paths=paths,
            ranks=tuple(ranking.ranks for ranking in same),
            weights=tuple(ranking.weight for ranking in same),
        )
        for (prompt, paths), same in found.items()
    ]


def split(rankings: list[OfPrompt], share: float, seed: int) -> tuple[list[OfPrompt], list[OfPrompt]]:
    """Return training and held-out rankings, or pairs: all of one prompt fall on one side.

    The order of prompts depends on each prompt and the seed alone, and the first ones are held out: with
    more data, or a smaller share in a later training, few prompts move from one side to the other.
    """
    order = {
        ranking.prompt: hashlib.sha256(f"{seed} {ranking.prompt}".encode()).digest() for ranking in rankings
    }
    prompts = sorted(order, key=lambda prompt: order[prompt])
    held = set(prompts[: max(1, round(share * len(prompts)))])
    train = [ranking for ranking in rankings if ranking.prompt not in held]
    if not train:
        raise ValueError(
            f"all {len(prompts)} prompts would be held out; give more rankings or a smaller --validation-share"
        )
    return train, [ranking for ranking in rankings if ranking.prompt in held]


def check_split(train: list[Ranked], held: list[Ranked], objective: str) -> None:
    """Raise ValueError where the training rankings have nothing to learn for this objective, or the held-out ones nothing to measure."""
    if not len(untied(held)[1]):
        raise ValueError(
            f"all {len(held)} held-out rankings are ties, so that no accuracy can be measured; raise --validation-share"
        )
    if objective == "pairs" and not len(untied(train)[1]):
        raise ValueError(f"all {len(train)} rankings are ties; --objective soft can learn from them")
    if objective == "choice" and not len(choices(train)[2]):
        raise ValueError(
            f"none of {len(train)} rankings puts one image before all others; try --objective pairs"
        )


@contextmanager
def loader(
    run: Run, rankings: Sequence[Ranked], preprocess: Preprocess
) -> Iterator[Callable[[Sequence[Ranked]], tuple[Tensor, list[str]]]]:
    """Yield `load` for the rankings of the updates that are still to do, one batch a pass, whose images are read ahead."""
    workers = decoding.workers(run.config, run.device)
    with WorkerProcesses(partial(_read, preprocess=preprocess), workers) as read:
        batches = decoding.upcoming(run, rankings)
        read.expect([path for ranking in batch for path in ranking.paths] for batch in batches)
        yield partial(load, preprocess=preprocess, workers=read)


def _read(path: Path, preprocess: Preprocess) -> NDArray[np.float32]:
    """Return an image file as a scorer prepares it, (3, S, S) in [0, 1]."""
    with opened(path) as image:
        return from_pil(image, preprocess).numpy()


def load(
    rankings: Sequence[Ranked],
    preprocess: Preprocess,
    workers: WorkerProcesses[Path, NDArray[np.float32]] | None = None,
) -> tuple[Tensor, list[str]]:
    """Return the images of these rankings as a scorer prepares files, (sum of n, 3, S, S) in [0, 1], and their prompts.

    `workers`: the next batch of worker processes, if there are any.
    """
    paths = [path for ranking in rankings for path in ranking.paths]
    with exit_on_user_error():  # an image that was sound when the run began may be gone
        if workers is not None and workers.number:
            images = workers.take(paths)
        else:  # decoding and resizing let other threads run
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
                images = [*threads.map(partial(_read, preprocess=preprocess), paths)]
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.paths]
    return torch.from_numpy(np.stack(images)), prompts


def pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return all (better, worse) places of a ranking, 1 = best; ties give none."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def untied(rankings: Sequence[Ranked]) -> tuple[Tensor, Tensor]:
    """Return the rows of better and worse images, (2, N), of all annotators' untied pairs, and their weights (N,)."""
    found, weights, start = [], [], 0
    for ranking in rankings:
        for ranks, weight in zip(ranking.ranks, ranking.weights, strict=True):
            new = [(start + i, start + j) for i, j in pairs(ranks)]
            found += new
            weights += [weight] * len(new)
        start += len(ranking.paths)
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2).T, torch.tensor(weights)


def choices(rankings: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (N, most images), -1 = none, the column of the best image (N,), and weights (N,).

    One for each annotator who puts one image before all others; where the first place is shared nothing is chosen.
    """
    rows, best, weights, start = [], [], [], 0
    most = max(len(ranking.paths) for ranking in rankings)
    for ranking in rankings:
        number = len(ranking.paths)
        for ranks, weight in zip(ranking.ranks, ranking.weights, strict=True):
            if ranks.count(min(ranks)) == 1:
                rows.append([*range(start, start + number), *[-1] * (most - number)])
                best.append(ranks.index(min(ranks)))
                weights.append(weight)
        start += number
    return (
        torch.tensor(rows, dtype=torch.long).reshape(-1, most),
        torch.tensor(best, dtype=torch.long),
        torch.tensor(weights),
    )


def votes(rankings: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of all pairs of images, (2, N), the share of weight that finds the first better, ties half, and its sum."""
    found, shares, weights, start = [], [], [], 0
    for ranking in rankings:
        number, total = len(ranking.paths), sum(ranking.weights)
        for i in range(number):
            for j in range(i + 1, number):
                won = sum(
                    weight * (0.5 if ranks[i] == ranks[j] else ranks[i] < ranks[j])
                    for ranks, weight in zip(ranking.ranks, ranking.weights, strict=True)
                )
                found.append((start + i, start + j))
                shares.append(won / total)
                weights.append(total)
        start += number
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2).T, torch.tensor(shares), torch.tensor(weights)
