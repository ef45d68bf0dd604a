r"""Make pages of numbered pairs of images for a blind comparison by eye.

    python assets/tiny/blind_pairs.py --output-dir blind --first.guidance-scale 1 --second.guidance-scale 5
    python assets/tiny/blind_pairs.py --output-dir blind --first.folder grid/images/base --second.folder grid/images/tuned

A source is a folder of images with captions (metadata.jsonl), or a model that is sampled. Both images of a pair are of one
caption; which of the two stands left is random. Someone who knows neither the sources nor the judge writes a line
for each pair into a file: its number, and L, R or = for no clear choice. `blind_agreement.py` compares this with the
judge. In the output folder:

    page_01.png ...                 20 pairs each: number, left and right image, caption; no scores
    images/001_L.png, 001_R.png     the images of pair 1
    key.json                        what the sources are, and which one stands where; not for the one who chooses
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from preftune import families, seeds
from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here
from preftune.files import replacing, write_text
from preftune.files.one_writer import one_writer
from preftune.images import load_pixels, save_image, to_pil
from preftune.prompts import read_prompts
from preftune.records import read_imagefolder
from preftune.sampling import Sampling, sample
from preftune.solver_names import SolverName
from rewards.shapes import SIZE, parse_caption

HERE = Path(__file__).parent
PAIRS, COLUMNS = 20, 4
"""Pairs on a page, and beside each other on it."""
SIDE, GAP, NUMBER, CAPTION, LINES = 160, 8, 34, 17, 3
"""Pixels of an image's side, between images, of a number and of a line of a caption; lines of a caption."""
LETTERS = 40
"""In a line of a caption."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the images of one side come from: a folder, or a model."""

    folder: Path | None = None
    """Folder of images with captions; None = sample the model."""
    model: Path = HERE / "pipeline"
    """Pipeline folder."""
    seed: int = 1
    """The image of prompt i is the model's for the seed 1000003 seed + i."""
    guidance_scale: float = 3.0
    """Guidance scale."""
    num_inference_steps: int = 25
    """Denoising steps."""
    solver: SolverName = "ddim"
    """Solver."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make pages of pairs of images whose order is random, and the key to them."""

    output_dir: Path
    """Folder to create; it must not exist yet."""
    first: Source = field(default_factory=Source)
    """One source of images."""
    second: Source = field(default_factory=lambda: Source(seed=2))
    """The other one."""
    prompts: Path = HERE / "held_out.txt"
    """Captions, where no source is a folder."""
    count: int = 100
    """Maximum number of pairs, of random captions."""
    seed: int = 0
    """Of the choice of captions and of the order of the two images."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        if self.first == self.second:
            raise ValueError(
                "--first and --second are the same source; name two, or give them different seeds"
            )


def files_of(source: Source) -> dict[str, Path] | None:
    """Return caption -> image of a folder, the first of each caption; None for a model."""
    if source.folder is None:
        return None
    files: dict[str, Path] = {}
    for image in read_imagefolder(source.folder):
        files.setdefault(image.text, image.path)
    return files


def choose(captions: Sequence[Sequence[str]], count: int, seed: int) -> list[str]:
    """Return at most count random captions of those that are in all lists, in random order."""
    common = [text for text in dict.fromkeys(captions[0]) if all(text in others for others in captions[1:])]
    if not common:
        raise ValueError("no caption is in both folders; both images of a pair are of one caption")
    return [common[index] for index in seeds.rng(seed).permutation(len(common))[:count]]


def images_of(source: Source, files: dict[str, Path] | None, prompts: Sequence[str]) -> list[Image.Image]:
    """Return an image of each prompt."""
    if files is not None:
        return [to_pil(load_pixels(files[prompt])) for prompt in prompts]
    sampling = Sampling(
        num_inference_steps=source.num_inference_steps,
        guidance_scale=source.guidance_scale,
        solver=source.solver,
        resolution=str(SIZE),
        batch_size=64,
    )
    image_seeds = [source.seed * 1_000_003 + index for index in range(len(prompts))]
    batches = sample(
        families.load(source.model, device_here()), prompts, image_seeds, sampling, progress="sampling"
    )
    return [to_pil(pixels) for batch in batches for pixels in batch]


def draw_page(pairs: Sequence[tuple[int, str, Image.Image, Image.Image]]) -> Image.Image:
    """Return a page of (number, caption, left, right)."""
    width, height = 2 * SIDE + 4 * GAP, NUMBER + SIDE + LINES * CAPTION + 2 * GAP
    rows = -(-len(pairs) // COLUMNS)
    page = Image.new("RGB", (min(len(pairs), COLUMNS) * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    number_font, letter_font, caption_font = (ImageFont.load_default(size) for size in (30, 18, 14))
    for place, (number, caption, left, right) in enumerate(pairs):
        x, y = place % COLUMNS * width, place // COLUMNS * height
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline="#bbbbbb")
        middle = x + width // 2
        draw.text((middle, y + 2), str(number), "black", number_font, "ma", stroke_width=0.5)
        for letter, image, at in (("L", left, x + GAP), ("R", right, x + 3 * GAP + SIDE)):
            draw.text((at + SIDE // 2, y + 10), letter, "#777777", letter_font, "ma")
            page.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (at, y + NUMBER))
            draw.rectangle((at - 1, y + NUMBER - 1, at + SIDE, y + NUMBER + SIDE), outline="#dddddd")
        lines = textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder=" ...")
        draw.text(
            (middle, y + NUMBER + SIDE + GAP), "\n".join(lines), "black", caption_font, "ma", align="center"
        )
    return page


def write_pairs(
    config: Config, prompts: Sequence[str], images: dict[str, list[Image.Image]], folder: Path
) -> None:
    """Write images, pages and the key."""
    swapped = seeds.rng(config.seed, 1).integers(2, size=len(prompts)).tolist()
    rows: list[dict[str, Any]] = []
    drawn = []
    for index, prompt in enumerate(prompts):
        left, right = ("second", "first") if swapped[index] else ("first", "second")
        number = index + 1
        files = {side: f"images/{number:03d}_{side}.png" for side in "LR"}
        for side, name in (("L", left), ("R", right)):
            save_image(images[name][index], folder / files[side])
        rows.append({"number": number, "prompt": prompt, "left": left, "right": right, "files": files})
        drawn.append((number, prompt, images[left][index], images[right][index]))
    for page, start in enumerate(range(0, len(drawn), PAIRS), 1):
        save_image(draw_page(drawn[start : start + PAIRS]), folder / f"page_{page:02d}.png")
    sources = {name: asdict(source) for name, source in (("first", config.first), ("second", config.second))}
    key = {**sources, "pairs": rows}
    write_text(folder / "key.json", json.dumps(key, indent=1, default=str) + "\n")


@one_writer
def main(config: Config) -> None:
    """Read or sample the images and write the pairs; the folder has its name only when it is complete."""
    sources = {"first": config.first, "second": config.second}
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        files = {name: files_of(source) for name, source in sources.items()}
        captions = [[*found] for found in files.values() if found is not None]
        prompts = choose(captions or [read_prompts(config.prompts)], config.count, config.seed)
        for prompt in prompts:
            parse_caption(prompt)  # what blind_agreement.py will judge
        images = {name: images_of(source, files[name], prompts) for name, source in sources.items()}
    with replacing(config.output_dir) as folder:
        write_pairs(config, prompts, images, folder)


if __name__ == "__main__":
    main(parse(Config))
