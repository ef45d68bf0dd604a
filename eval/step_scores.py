"""Scores of the image predicted at each denoising step, and their rank correlation with the final ones.

P prompts, K seeds of each, T steps, S scorers. Index t of 0..T-1 is the image predicted at step t, T the image itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from eval.win_rates import csv_text
from preftune import ahead
from preftune.families.base import Family
from preftune.grid import captioned_grid
from preftune.images import save_figure
from preftune.sampling import decoded_parts
from preftune.sampling_config import Resolved
from preftune.statistics import bootstrap
from preftune.statistics.bootstrap import interval
from rewards import Scorer
from rewards.shared_towers import score_all

Floats = NDArray[np.float64]
_RESAMPLES = 2000
_SHOWN = 8  # steps in predictions.png, the final image included


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured."""

    scorers: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[Sequence[int]]
    """(P, K)."""
    scores: Floats
    """(T + 1, P, K, S), raw units."""
    correlations: Floats
    """(T, S, 3): rank correlation with the final score, and the bounds of its 95 % interval; NaN where there are none."""
    shown: Sequence[Tensor]
    """(T + 1, 3, H, W) in [0, 1] of the first seed of each of the first prompts."""


def measure(
    family: Family,
    scorers: Sequence[Scorer],
    prompts: Sequence[str],
    seeds: Sequence[Sequence[int]],
    sampling: Resolved,
    *,
    keep: int,
) -> Measured:
    """Sample every prompt with its seeds (P, K), and score the image predicted at each step; `keep` prompts' images are kept."""
    flat = [(prompt, seed) for prompt, some in zip(prompts, seeds, strict=True) for seed in some]
    rows: list[Floats] = []
    shown: list[Tensor] = []
    per_prompt = len(seeds[0])
    with tqdm(total=len(flat), desc="sampling", unit="image", mininterval=1) as bar:
        for start in range(0, len(flat), sampling.batch_size):
            batch = flat[start : start + sampling.batch_size]
            firsts = [
                place
                for place in range(len(batch))
                if (start + place) % per_prompt == 0 and (start + place) // per_prompt < keep
            ]
            scores, images = score_steps(
                family,
                scorers,
                [prompt for prompt, _ in batch],
                [seed for _, seed in batch],
                sampling,
                firsts,
            )
            rows.append(scores)
            shown += images
            bar.update(len(batch))
    scores = np.concatenate(rows, axis=1).reshape(-1, len(prompts), per_prompt, len(scorers))
    return Measured(
        scorers=[scorer.card.name for scorer in scorers],
        prompts=prompts,
        seeds=seeds,
        scores=scores,
        correlations=correlations(scores),
        shown=shown,
    )


@torch.no_grad()
def score_steps(
    family: Family,
    scorers: Sequence[Scorer],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Resolved,
    keep: Sequence[int] = (),
) -> tuple[Floats, list[Tensor]]:
    """Return the scores (T + 1, B, S) of the images predicted at each step and of the final ones, and the images (T + 1, 3, H, W)
    at the places `keep`. FloatingPointError for a score that is no finite number. They are those of `preftune.sampling.sample`, and of `preftune refl` at the same settings.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cond = family.encode(prompts)
    grid = family.timesteps(sampling.num_inference_steps, sampling.solver, sampling.resolution)
    shape = family.latent_shape(sampling.resolution)
    table: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in keep]

    def score(latents: Tensor) -> None:
        pixels = torch.cat([*decoded_parts(family, latents, sampling.resolution)])
        table.append(torch.stack([one.float() for one in score_all(scorers, pixels, prompts)], dim=1))
        for images, place in zip(kept, keep, strict=True):
            images.append(pixels[place].cpu())

    with family.lean():
        x, _, steps = ahead.trajectory(family, grid, sampling.solver, shape, generators)
        for now in steps:
            prediction = family.predict(x, now.t, cond, sampling.guidance_scale)
            score(prediction.x0)
            x = ahead.step(prediction, now, sampling.solver)
        score(x)
    scores = torch.stack(table).double().cpu().numpy()
    check_finite(scores, scorers, prompts, seeds)
    return scores, [torch.stack(images) for images in kept]


def check_finite(
    scores: Floats, scorers: Sequence[Scorer], prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Raise FloatingPointError for scores (T + 1, B, S) that are no finite numbers; names scorer, step and image of the first."""
    for step, image, column in np.argwhere(~np.isfinite(scores)).tolist():
        raise FloatingPointError(
            f"{scorers[column].card.name} gave {scores[step, image, column]} at step {step} of {len(scores) - 1} for the prompt"
            f" {prompts[image]!r} with seed {seeds[image]}"
        )


def correlations(scores: Floats) -> Floats:
    """Return the rank correlation of each step with the end, (T, S, 3): of scores (T + 1, P, K, S), with its 95 % interval over prompts.

    Spearman's, within prompts: the ranks of a prompt's seeds (ties share theirs) less their mean, of all prompts together. Where no
    seeds tie that is the mean over prompts of Spearman's. NaN where all final scores, or all of a step, are alike.
    """
    ranks = stats.rankdata(scores, axis=2)
    ranks -= ranks.mean(2, keepdims=True)
    now, end = ranks[:-1], ranks[-1:]
    sums = [(one * other).sum(2) for one, other in ((now, end), (now, now), (end, end))]  # (T or 1, P, S)
    found = np.full((*sums[0].shape[::2], 3), np.nan)
    found[:, :, 0] = _ratio(*(one.sum(1) for one in sums))
    if scores.shape[1] > 1:
        resampled = np.empty((_RESAMPLES, *found.shape[:2]))
        for rows, times in bootstrap.counts(scores.shape[1], resamples=_RESAMPLES):
            resampled[rows] = _ratio(*(np.einsum("rp,tps->rts", times, one) for one in sums))
        known = ~np.isnan(found[:, :, 0])
        found[known, 1:] = np.nanpercentile(resampled[:, known], [2.5, 97.5], axis=0).T
    return found


def _ratio(product: Floats, now: Floats, end: Floats) -> Floats:
    """The correlation of sums of products and of squares; NaN where one of the squares is 0."""
    below = np.sqrt(now * end)
    return np.divide(product, below, where=below > 0, out=np.full(below.shape, np.nan))


def first_step(correlation: Floats, threshold: float) -> int | None:
    """Return the first step from which on the correlation (T,) stays above the threshold; None where that is none before the last.

    The last step predicts the final image, up to rounding, and says nothing.
    """
    below = np.flatnonzero(~(correlation > threshold))
    first = int(below[-1]) + 1 if len(below) else 0
    return first if first < len(correlation) - 1 else None


def window_flags(measured: Measured, name: str, threshold: float, sampling: Resolved) -> str:
    """Return the recommended window of ReFL as flags, or why there is none."""
    found = measured.correlations[:, measured.scorers.index(name), 0]
    steps = len(found)
    first = first_step(found, threshold)
    if first is None:
        return (
            f"no step before the last stays above {threshold:g}: this scorer sees too late what images will be, or gives a prompt's"
            " images the same score; try more prompts and seeds"
        )
    flags = f"--window {first} {steps - 1} --num-inference-steps {steps} --solver {sampling.solver}"
    if sampling.guidance_scale > 1:
        flags += f" --guidance-scale {sampling.guidance_scale:g}"
    return flags


def to_text(measured: Measured, threshold: float) -> str:
    """Return the table as printed: a line for each step."""
    lines = [f"{'step':>5s} {'scorer':18s} {'mean':>8s} {'std':>8s} {'rank correlation':>16s}  95 % interval"]
    spread = measured.scores.std(2).mean(1)
    for column, name in enumerate(measured.scorers):
        for step, (value, low, high) in enumerate(measured.correlations[:, column].tolist()):
            mark = "*" if value > threshold else " "
            lines.append(
                f"{step:5d} {name:18s} {measured.scores[step, :, :, column].mean():8.3f} {spread[step, column]:8.3f}"
                f" {value:15.3f}{mark}  {interval(low, high, 'z.3f')}".rstrip()
            )
    return "\n".join(lines)


def to_csv(measured: Measured) -> str:
    """Return a line for each step and scorer; `std` is that of a prompt's seeds, the mean over prompts. The last step is the image."""
    spread = measured.scores.std(2).mean(1)
    steps = len(measured.correlations)
    none = [float("nan")] * 3
    rows = (
        [name, step, float(measured.scores[step, :, :, column].mean()), float(spread[step, column])]
        + (measured.correlations[step, column].tolist() if step < steps else none)
        for column, name in enumerate(measured.scorers)
        for step in range(steps + 1)
    )
    return csv_text(["scorer", "step", "mean", "std", "rank_correlation", "low", "high"], rows)


def scores_csv(measured: Measured) -> str:
    """Return every score as CSV, a line for each image and step."""
    rows = (
        [prompt, seed, step, *measured.scores[step, i, k].tolist()]
        for i, prompt in enumerate(measured.prompts)
        for k, seed in enumerate(measured.seeds[i])
        for step in range(len(measured.scores))
    )
    return csv_text(["prompt", "seed", "step", *measured.scorers], rows)


def curves(measured: Measured, threshold: float, path: Path) -> None:
    """Write the curves: above, the scores of the first prompt's seeds (ImageReward, Fig. 4); below, the rank correlation."""
    count, steps = len(measured.scorers), range(len(measured.scores))
    figure, axes = plt.subplots(
        2, count, figsize=(5.5 * count, 6.5), squeeze=False, sharex=True, layout="constrained"
    )
    for column, name in enumerate(measured.scorers):
        above, below = axes[:, column]
        above.plot(steps, measured.scores[:, 0, :, column], linewidth=1)
        above.set_title(f"{name}: seeds of the first prompt", fontsize=9)
        above.set_ylabel("score of the predicted image")
        values, low, high = measured.correlations[:, column].T
        below.plot(steps[:-1], values, color="black")
        below.fill_between(steps[:-1], low, high, color="black", alpha=0.15, linewidth=0)
        below.axhline(threshold, linestyle=":", color="grey")
        first = first_step(values, threshold)
        if first is not None:
            below.axvspan(first, steps[-2], color="tab:green", alpha=0.15)
        below.set_ylabel("rank correlation with the end")
        below.set_xlabel("denoising step (the last is the image)")
        below.set_ylim(min(-0.1, float(np.nanmin(values, initial=0))), 1.02)
    save_figure(figure, path)


def predictions(measured: Measured, rows: int) -> Image.Image:
    """Return the images predicted at some steps for the first seed of the first prompts, with their scores."""
    last = len(measured.scores) - 1
    chosen = sorted({round(index * last / (_SHOWN - 1)) for index in range(_SHOWN)})
    titles = ["image" if step == last else f"step {step}" for step in chosen]
    images = measured.shown[:rows]
    captions = [
        ["\n".join(f"{name} {value:.2f}" for name, value in zip(measured.scorers, measured.scores[step, i, 0], strict=True)) for step in chosen]
        for i in range(len(images))
    ]  # fmt: skip
    return captioned_grid(
        [[stack[step] for step in chosen] for stack in images],
        row_captions=[f"seed {measured.seeds[i][0]}\n{measured.prompts[i]}" for i in range(len(images))],
        column_titles=titles,
        cell_captions=captions,
    )
