r"""Measure an embedded model, and scorers: gold of held-out captions over guidance scales and step counts, a picture with the
judge's numbers, and pair accuracy against the noiseless judge.

    python assets/tiny/measure.py
    python assets/tiny/measure.py --guidance-scales --picture held_out.png --picture-guidance-scale 3
    python assets/tiny/measure.py --guidance-scales --rankings data/held_rendered data/held_drawn \
        --scorers imagereward-tiny runs/reward_model/scorer

Prints each measurement as a line of JSON, and after each kind a Markdown table of it. `--guidance-scales` without a value leaves
the first table out, which takes ten minutes on one core. Of rankings, take those that no scorer was trained on (another --seed of data_build/simulate_rankings.py).
A pair is two images of one ranking with different gold; a tie of a scorer counts as wrong. Pairs are also counted by their
difference of gold, since hardly anybody can order those that differ by less than 0.05.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import rewards
from preftune import families, seeds
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here
from preftune.cli.printable import show
from preftune.cli.scorer_flags import Measured
from preftune.families.base import Family
from preftune.grid import captioned_grid
from preftune.images import load_pixels, save_image
from preftune.prompts import read_prompts
from preftune.records import Ranking, read_rankings
from preftune.sampling import Sampling, sample
from preftune.solver_names import SolverName
from rewards import Scorer
from rewards.shapes import SIZE
from rewards.shapes_judge import DIFFERENCES, Judgement, judge
from rewards.terms import parse_names

HERE = Path(__file__).parent
COLUMNS = 8
"""Images in a row of the picture."""
BINS = ("0-0.05", "0.05-0.15", "0.15-0.3", ">0.3")
ANNOTATOR = "annotator"
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure an embedded model and scorers."""

    model: Path = HERE / "pipeline"
    """Pipeline folder."""
    prompts: Path = HERE / "held_out.txt"
    """Captions to sample; each with the seed of its line."""
    count: int | None = None
    """Captions of the table, from the start of the file; None = all."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance scales of the table; none = no table."""
    step_counts: tuple[int, ...] = (4, 8, 16, 25, 50)
    """Values of num_inference_steps of the table."""
    solver: SolverName = "ddim"
    """Solver of the table and the picture."""
    picture: Path | None = None
    """PNG file to write: images of random captions, with the judge's numbers."""
    picture_count: int = 64
    """Images in the picture."""
    picture_guidance_scale: float = 3.0
    """Guidance scale of the picture."""
    picture_steps: int = 25
    """num_inference_steps of the picture."""
    seed: int = 0
    """Of the choice of the picture's captions."""
    rankings: tuple[Path, ...] = ()
    """Folders with rankings.jsonl that the scorers were not trained on."""
    scorers: Measured = ("imagereward-tiny",)

    def __post_init__(self) -> None:
        for name, values, least in (
            ("count", (1 if self.count is None else self.count,), 1),
            ("picture-count", (self.picture_count,), 1),
            ("guidance-scales", (*self.guidance_scales, self.picture_guidance_scale), 0),
            ("step-counts", (*self.step_counts, self.picture_steps), 1),
        ):
            if min(values) < least:
                raise ValueError(f"--{name} must be at least {least}, got {min(values)}")
        if self.picture is not None and self.picture.suffix != ".png":
            raise ValueError(f"--picture must end in .png, got {self.picture}")
        if self.rankings:
            parse_names(self.scorers)


def generate(
    family: Family,
    prompts: Sequence[str],
    rows: Sequence[int],
    guidance: float,
    steps: int,
    solver: SolverName,
) -> tuple[Tensor, Judgement]:
    """Return the images of these rows of the prompts, each with the seed of its row, and what the judge says of them."""
    sampling = Sampling(
        num_inference_steps=steps,
        guidance_scale=guidance,
        solver=solver,
        resolution=str(SIZE),
        batch_size=64,
    )
    chosen = [prompts[row] for row in rows]
    pixels = torch.cat(
        [*sample(family, chosen, rows, sampling, progress=f"guidance {guidance:g}, {steps} steps")]
    )
    return pixels, judge(pixels, chosen)


def measure_model(config: Config, family: Family, prompts: Sequence[str]) -> None:
    """Print the means of alignment, fidelity and gold at each guidance scale and step count."""
    count = len(prompts[: config.count])
    cells: dict[tuple[float, int], str] = {}
    for guidance in config.guidance_scales:
        for steps in config.step_counts:
            judged = generate(family, prompts, range(count), guidance, steps, config.solver)[1]
            means = {name: float(getattr(judged, name).mean()) for name in ("alignment", "fidelity", "gold")}
            setting = {"guidance_scale": guidance, "steps": steps, "solver": config.solver, "count": count}
            show(json.dumps({**setting, **means}))
            cells[guidance, steps] = "{gold:.3f} ({alignment:.2f}, {fidelity:.2f})".format(**means)
    show(
        "\n"
        + table(
            [
                f"gold (alignment, fidelity), {config.solver}",
                *(f"{steps} steps" for steps in config.step_counts),
            ],
            [
                [f"guidance_scale {guidance:g}", *(cells[guidance, steps] for steps in config.step_counts)]
                for guidance in config.guidance_scales
            ],
        )
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def draw_picture(config: Config, family: Family, prompts: Sequence[str]) -> None:
    """Write a picture of random captions, with caption, alignment, fidelity and gold under each image."""
    assert config.picture is not None
    order = seeds.rng(config.seed).permutation(len(prompts))
    rows = sorted(order[: config.picture_count].tolist())
    pixels, judged = generate(
        family, prompts, rows, config.picture_guidance_scale, config.picture_steps, config.solver
    )
    texts = [
        f"{prompts[row]}\nalignment {alignment:.2f}, fidelity {fidelity:.2f}\ngold {gold:.2f}"
        for row, alignment, fidelity, gold in zip(
            rows, judged.alignment.tolist(), judged.fidelity.tolist(), judged.gold.tolist(), strict=True
        )
    ]
    starts = range(0, len(rows), COLUMNS)
    sheet = captioned_grid(
        [[*pixels[start : start + COLUMNS]] for start in starts],
        cell_captions=[texts[start : start + COLUMNS] for start in starts],
    )
    save_image(sheet, config.picture)


@torch.no_grad()
def compare(
    scorers: dict[str, Scorer], rankings: Sequence[Ranking]
) -> tuple[NDArray[np.float32], dict[str, Bools]]:
    """Return the gold difference of each pair, and which pairs each scorer, and the annotator, order as the judge does."""
    differences: list[float] = []
    right: dict[str, list[bool]] = {name: [] for name in (*scorers, ANNOTATOR)}
    for ranking in tqdm(rankings, desc="judging", unit="ranking", mininterval=1, leave=False):
        pixels = torch.stack([load_pixels(path) for path in ranking.paths])
        prompts = [ranking.prompt] * len(pixels)
        gold = judge(pixels, prompts).gold.tolist()
        scores = {name: scorer(pixels, prompts).tolist() for name, scorer in scorers.items()}
        scores[ANNOTATOR] = [-rank for rank in ranking.ranks]
        for i, better in enumerate(gold):
            for j, worse in enumerate(gold):
                if better > worse:
                    differences.append(better - worse)
                    for name, said in scores.items():
                        right[name].append(said[i] > said[j])
    return np.array(differences, np.float32), {name: np.array(row, bool) for name, row in right.items()}


def accuracies(differences: NDArray[np.float32], right: dict[str, Bools]) -> dict[str, dict[str, float]]:
    """Return the number of pairs and each one's share of right ones: of all pairs, and of those in each bin of differences."""
    bins = np.digitize(differences, DIFFERENCES[1:-1])
    masks = {"all": np.ones(len(differences), bool)} | {name: bins == k for k, name in enumerate(BINS)}
    return {
        name: {"pairs": int(mask.sum()), **{who: float(row[mask].mean()) for who, row in right.items()}}
        for name, mask in masks.items()
        if mask.any()
    }


def measure_scorers(config: Config) -> None:
    """Print the pair accuracies of the scorers on each folder of rankings."""
    with exit_on_user_error():
        names = parse_names(config.scorers)
        rankings = {folder: read_rankings(folder) for folder in config.rankings}
        scorers = {name: rewards.load(name) for name in names}
    rows = []
    for folder, read in rankings.items():
        found = accuracies(*compare(scorers, read))
        show(json.dumps({"rankings": str(folder), **found}))
        for difference, values in found.items():
            shares = [f"{values[who]:.3f}" for who in (*names, ANNOTATOR)]
            rows.append([str(folder), difference, str(values["pairs"]), *shares])
    show("\n" + table(["rankings", "difference of gold", "pairs", *names, "one annotator"], rows))


def main(config: Config) -> None:
    """Print what was asked for, and draw the picture."""
    if config.guidance_scales or config.picture is not None:
        with exit_on_user_error():
            prompts = read_prompts(config.prompts)
            family = families.load(config.model, device_here())
        if config.guidance_scales:
            measure_model(config, family, prompts)
        if config.picture is not None:
            draw_picture(config, family, prompts)
    if config.rankings:
        measure_scorers(config)


if __name__ == "__main__":
    main(parse(Config))
