"""Measure the embedded model and scorer: gold score on held-out captions, and pair accuracy against the
noiseless judge.

    python assets/tiny/measure.py --rankings data/held_rendered data/held_drawn

Use rankings that the scorer was not trained on (another --seed of data_build/simulate_rankings.py). A pair
is two images of one ranking with different gold; a tie of the scorer counts as wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from preftune import families
from preftune.cli import parse
from preftune.images import load_pixels
from preftune.prompts import read_prompts
from preftune.records import Ranking, read_rankings
from preftune.sampling import Sampling, sample
from rewards.imagereward import ImageReward
from rewards.shapes import SIZE
from rewards.shapes_judge import judge

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the embedded model and scorer."""

    rankings: tuple[Path, ...] = ()
    """Folders with rankings.jsonl that the scorer was not trained on."""
    model: Path = HERE / "pipeline"
    """Pipeline folder."""
    scorer: Path = HERE / "imagereward"
    """Scorer folder."""
    prompts: Path = HERE / "held_out.txt"
    """Captions to sample; each with the seed of its line."""


@torch.no_grad()
def accuracies(scorer: ImageReward, rankings: list[Ranking]) -> dict[str, float]:
    """Return the share of pairs that the scorer, and the annotator, order as the judge does."""
    right = annotator = number = 0
    for ranking in rankings:
        pixels = torch.stack([load_pixels(path) for path in ranking.paths])
        prompts = [ranking.prompt] * len(pixels)
        gold, scores = judge(pixels, prompts).gold.tolist(), scorer(pixels, prompts).tolist()
        for i, better in enumerate(gold):
            for j, worse in enumerate(gold):
                if better > worse:
                    number += 1
                    right += scores[i] > scores[j]
                    annotator += ranking.ranks[i] < ranking.ranks[j]
    return {"pairs": number, "scorer": right / number, "annotator": annotator / number}


def gold(config: Config, guidance: float) -> dict[str, float]:
    """Return the mean alignment, fidelity and gold of images generated at this guidance."""
    prompts = read_prompts(config.prompts)
    sampling = Sampling(
        num_inference_steps=25, guidance_scale=guidance, solver="ddim", resolution=str(SIZE), batch_size=64
    )
    family = families.load(config.model)
    batches = sample(family, prompts, range(len(prompts)), sampling, progress=f"guidance {guidance:g}")
    judgements, start = [], 0
    for pixels in batches:
        judgements.append(judge(pixels, prompts[start : start + len(pixels)]))
        start += len(pixels)
    return {
        name: float(torch.cat([getattr(one, name) for one in judgements]).mean())
        for name in ("alignment", "fidelity", "gold")
    }


def main(config: Config) -> None:
    """Print one JSON line for each measurement."""
    for guidance in (1.0, 3.0):
        print(json.dumps({"guidance": guidance, **gold(config, guidance)}))  # noqa: T201
    if config.rankings:
        scorer = ImageReward.load(config.scorer).eval()
        for folder in config.rankings:
            print(json.dumps({"rankings": str(folder), **accuracies(scorer, read_rankings(folder))}))  # noqa: T201


if __name__ == "__main__":
    main(parse(Config))
