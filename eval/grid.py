"""Compare models side by side: a row is a prompt with a seed, a column a model, and scores stand under every image.

All images of a row start from the same noise, so what differs is the weights. Columns are TITLE=WHAT, where WHAT is empty
(the model itself), a LoRA folder, a run's folder, a folder with a whole UNet, or another pipeline; FOLDER@0.5 puts a LoRA on
at half strength. Writes OUTPUT.png, and OUTPUT.html that needs no other file; both give each column's mean scores, the page
also how often it wins against the first column.

    python eval/grid.py --columns base= tuned=runs/refl-tiny half=runs/refl-tiny@0.5
    python eval/grid.py --model SD_FOLDER --columns base= tuned=runs/refl --prompts refl_data.json --rewards imagereward=1 --guidance-scale 7.5

Defaults are for the embedded model. Hardware: that one runs on a CPU; Stable Diffusion wants a GPU, and uses one where
there is one. Left out: confidence intervals, since the few images one looks at are too few for a claim.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eval.models import (
    Column,
    base64_png,
    check_scorers,
    generate,
    own_side,
    parse_column,
    score,
    split_term,
    write_text,
)
from preftune import families
from preftune.cli import exit_on_user_error, parse
from preftune.images import captioned_grid, save_image
from preftune.prompts import read_prompts
from preftune.sampling import Sampling, SolverName
from rewards.mix import Mix, parse_files, parse_weights
from rewards.shared_towers import load_all

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEMPLATE = Path(__file__).with_suffix(".html.jinja")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate the same prompts and seeds with several models, score the images, and write a PNG and an HTML page."""

    model: Path = Path("assets/tiny/pipeline")
    """Pipeline folder in diffusers' format (Stable Diffusion 1.x or 2.x) that the columns build on."""
    columns: tuple[str, ...] = ("base=",)
    """TITLE=WHAT each: nothing, a LoRA folder, a run, a UNet folder or a pipeline; a LoRA or run may end in @WEIGHT."""
    prompts: Path = Path("assets/tiny/held_out.txt")
    """Prompt file: txt, json, jsonl, csv, tsv or parquet."""
    count: int = 8
    """At most so many prompts, the first of the file."""
    num_images_per_prompt: int = 1
    """Images of each prompt, a row each."""
    seed: int = 0
    """RankedImage k of prompt i has the seed seed + i * seeds_per_prompt + k."""
    rewards: tuple[str, ...] = ("imagereward-tiny=1.0", "shapes=1.0")
    """Scorers with weights; several also give a weighted sum. `--rewards` alone scores nothing."""
    reward_files: tuple[str, ...] = ()
    """Weights of scorers on disk, as imagereward=PATH; others come from this repository or the hub's cache."""
    negative: str = ""
    """Prompt that guidance points away from, such as "Weird image. "."""
    negative_columns: tuple[str, ...] = ()
    """Titles of the columns that have --negative; none = all."""
    guidance_scale: float = 3.0
    """Classifier-free guidance scale; 1 = none, 7.5 is Stable Diffusion's custom."""
    num_inference_steps: int = 25
    """Denoising steps."""
    solver: SolverName = "ddim"
    """Sampler; pndm is that of Stable Diffusion's pipeline."""
    resolution: str | None = None
    """Pixels: the side of a square, or WIDTHxHEIGHT; None = what the model was trained at."""
    batch_size: int = 8
    """Images in one pass; changes speed, not images."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the models; scorers stay in fp32."""
    output_dir: Path = Path("grid")
    """Name of the files to write, without .png and .html."""

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("num-images-per-prompt", self.num_images_per_prompt)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")
        if not self.columns:
            raise ValueError("--columns is empty; name at least one, as in --columns base= tuned=runs/refl")
        titles = [split_term(term)[0] for term in self.columns]
        if repeated := {title for title in titles if titles.count(title) > 1}:
            raise ValueError(f"--columns repeats the title {min(repeated)}; give each column its own")
        if self.negative and self.guidance_scale == 1:
            raise ValueError(
                "--negative does nothing at --guidance-scale 1; choose another guidance, such as 3"
            )
        if unknown := set(self.negative_columns) - set(titles if self.negative else ()):
            raise ValueError(
                f"--negative-columns names {min(unknown)}; it takes titles of --columns, and needs --negative"
            )
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("--precision fp16 needs a GPU; use fp32 or bf16")
        if self.output_dir.suffix in (".png", ".html") or not self.output_dir.name:
            raise ValueError(
                f"--output-dir {self.output_dir} must be a name without .png or .html; both are written"
            )
        self.weights()
        self.sampling(8)

    def sampling(self, own_side: int) -> Sampling:
        """Return how to sample, given the side in pixels that the model was trained at."""
        try:
            return Sampling(
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                solver=self.solver,
                resolution=str(own_side) if self.resolution is None else self.resolution,
                batch_size=self.batch_size,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("--sample.", "--")) from error

    def weights(self) -> dict[str, float]:
        """Return scorer name -> weight."""
        return parse_weights(self.rewards) if self.rewards else {}

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk."""
        return parse_files(self.reward_files, self.weights())


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What was generated and scored: C columns of N images, S scorers, M measures (the scorers; if several, their sum)."""

    columns: Sequence[Column]
    prompts: Sequence[str]  # N
    seeds: Sequence[int]  # N
    images: Sequence[Tensor]  # C of (N, 3, H, W) in [0, 1]
    scorers: Sequence[str]  # S
    measures: Sequence[str]  # M
    scores: NDArray[np.float64]  # (C, N, M)

    def means(self) -> NDArray[np.float64]:
        """Return the mean of each measure, (C, M)."""
        return self.scores.mean(1)

    def wins(self) -> NDArray[np.float64]:
        """Return the share of images that beat those of the first column, ties counted half, (C, M)."""
        return ((np.sign(self.scores - self.scores[:1]) + 1) / 2).mean(1)

    def best(self) -> NDArray[np.bool_]:
        """Return which scores are the best of their row, (C, N, M); none where all are equal."""
        best = self.scores == self.scores.max(0)
        return best & (best.sum(0) < len(self.columns))

    def lines(self, values: NDArray[np.float64]) -> list[str]:
        """Return a line for each scorer, of M values."""
        return [f"{name} {value:.3f}" for name, value in zip(self.scorers, values, strict=False)]


def check_inputs(config: Config) -> tuple[list[Column], list[str], list[int], Sampling]:
    """Return columns, the prompt and the seed of each image, and how to sample; ValueError before any weight loads."""
    families.check(config.model)
    columns = [parse_column(term, config.model) for term in config.columns]
    chosen = read_prompts(config.prompts)[: config.count]
    prompts = [prompt for prompt in chosen for _ in range(config.num_images_per_prompt)]
    seeds = [config.seed + index for index in range(len(prompts))]
    sampling = config.sampling(8 if config.resolution else own_side(config.model))
    check_scorers(config.weights(), config.files(), chosen, sampling, config.prompts)
    config.output_dir.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(config.output_dir.parent, os.W_OK):
        raise ValueError(
            f"--output-dir {config.output_dir}: the folder {config.output_dir.parent} cannot be written to"
        )
    return columns, prompts, seeds, sampling


def load_mix(config: Config, device: torch.device) -> Mix | None:
    """Return the scorers; None where there are none."""
    weights = config.weights()
    scorers = load_all(list(weights), files=config.files(), device=device, dtype=torch.float32)
    return Mix(scorers, weights, "raw") if scorers else None


def to_png(sheet: Sheet) -> Image.Image:
    """Return the grid as an image."""
    numbers = range(len(sheet.prompts))
    return captioned_grid(
        [[pixels[i] for pixels in sheet.images] for i in numbers],
        row_captions=[f"seed {sheet.seeds[i]}\n{sheet.prompts[i]}" for i in numbers],
        column_titles=[
            "\n".join([column.title, *sheet.lines(mean)])
            for column, mean in zip(sheet.columns, sheet.means(), strict=True)
        ],
        cell_captions=[["\n".join(sheet.lines(values[i])) for values in sheet.scores] for i in numbers],
        cell_size=256,
    )


def to_html(sheet: Sheet, config: Config, sampling: Sampling) -> str:
    """Return the page: means and wins, then the grid with its images inlined; prompts and titles are escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sheet=sheet, config=config, sampling=sampling, base64_png=base64_png)


def main(config: Config) -> int:
    """Generate, score and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with exit_on_user_error():
        columns, prompts, seeds, sampling = check_inputs(config)
        mix = load_mix(config, device)
    titles = config.negative_columns or [column.title for column in columns]
    generated = generate(
        columns,
        prompts,
        seeds,
        sampling,
        device,
        DTYPES[config.precision],
        dict.fromkeys(titles, config.negative),
    )
    images = [generated[column.title] for column in columns]
    names, scores = mix.names if mix else (), torch.empty(len(columns), len(prompts), 0)
    if mix:
        scores = torch.stack([score(pixels, prompts, mix, config.batch_size, device) for pixels in images])
    total = " + ".join(f"{weight:g} x {name}" for name, weight in config.weights().items())
    sheet = Sheet(
        columns=columns,
        prompts=prompts,
        seeds=seeds,
        images=images,
        scorers=names,
        measures=(*names, total) if len(names) > 1 else names,
        scores=scores.double().numpy(),
    )
    png, page = (config.output_dir.with_name(config.output_dir.name + suffix) for suffix in (".png", ".html"))
    save_image(to_png(sheet), png)
    write_text(page, to_html(sheet, config, sampling))
    for column, mean in zip(columns, sheet.means(), strict=True):
        print("  ".join([column.title, *sheet.lines(mean)]))  # noqa: T201
    print(f"{png} and {page}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Config)))
