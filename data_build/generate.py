r"""Generate several images per prompt with a pipeline, in the layout of DiffusionDB.

The result is an input of data_build/diffusiondb.py and of finetune/reward_weighted.py (after scoring), or
can be ranked by people. A part is `part-000001.zip` with PNG images and a JSON {file name: {p: prompt, se:
seed, c: guidance, st: steps, sa: sampler}}. An image is a function of (model, prompt, seed) alone; all
images of a prompt are in one part. Parts are written atomically, and existing parts are not generated
again.

    python data_build/generate.py --model assets/tiny/pipeline --prompts assets/tiny/prompts.txt --count 400 --images 8 \
        --output-dir data/parts --sample.resolution 64 --sample.guidance-scale 2 --sample.num-inference-steps 16 \
        --sample.solver ddim

Hardware: the embedded model generates 25 images/s on one CPU core at 16 steps; Stable Diffusion needs a GPU.
"""

import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.cli.precision import device_here
from preftune.families import Pretrained
from preftune.sampling_config import Resolved, Sampling

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of all members, so that equal images make equal archives."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate several images of each prompt, in zip files like DiffusionDB's."""

    model: Annotated[Pretrained, tyro.conf.arg(name="")]
    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    output_dir: Path
    """Folder of the parts; existing parts are kept if their settings are the same."""
    count: int = 1000
    """Maximum number of prompts, from the start of the file."""
    images: int = 8
    """Images of each prompt."""
    prompts_per_part: int = 100
    """Prompts whose images share a zip file."""
    seed: int = 0
    """Image seeds are derived from it, the index of the prompt and the index of the image."""
    sample: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("count", "images", "prompts_per_part"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must lie in [0, 2**32), got {self.seed}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from tqdm import tqdm

from preftune import families, seeds
from preftune.cli.printable import show
from preftune.families.base import Family
from preftune.families.digest import digest
from preftune.files import is_leftover, replacing, tidy
from preftune.files.lock import is_lock
from preftune.files.one_writer import one_writer
from preftune.images import to_pil
from preftune.prompts import read_prompts
from preftune.records import write_lines
from preftune.sampling import sample


def seed_of(seed: int, prompt: int, image: int) -> int:
    """Return the seed of an image, in the range of DiffusionDB's, [0, 2**32)."""
    return seeds.word(seed, prompt, image, bits=32)


def check_folder(config: Config) -> tuple[list[str], dict[str, str]]:
    """Return the prompts, and what decides the images, for the folder's record; touches nothing.

    ValueError for what is wrong, before the model loads.
    """
    prompts = read_prompts(config.prompts)[: config.count]
    begun = _begun(config.output_dir)
    sampling = config.sample.resolved(families.check(config.model.source()))
    settings = {
        key: str(value)
        for key, value in (asdict(config) | asdict(config.model)).items()
        if key not in ("output_dir", "sample") and value is not None
    }
    settings["sample"] = str(_settings(sampling))
    settings["text of prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    settings["digest of model"] = digest(config.model.source())
    folder = config.output_dir
    if begun is not None and any(folder.glob("part-*.zip")):  # without a part, another job may begin
        for key, value in settings.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{folder} was begun with {key} {begun.get(key)}, not {value}; choose another --output-dir"
                )
    return prompts, settings


def _begun(folder: Path) -> dict[str, str] | None:
    """What a folder was begun with; None where there is no record, ValueError where there is something else."""
    record = folder / "job.json"
    if not record.is_file():
        others = folder.iterdir() if folder.exists() else ()
        if not all(is_leftover(path) or is_lock(path) for path in others):
            raise ValueError(f"{folder} exists and holds something else; choose another --output-dir")
        return None
    try:
        begun: dict[str, str] = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record} is damaged; choose another --output-dir, or remove the folder") from error
    return begun


def begin_folder(config: Config, settings: Mapping[str, str]) -> None:
    """Make the folder and its record, or find them as they are."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    tidy(config.output_dir)
    write_lines(config.output_dir / "job.json", json.dumps(settings, indent=1).splitlines())


def _settings(sampling: Resolved) -> dict[str, object]:
    """What decides how an image looks: all but the batch size."""
    return {key: value for key, value in asdict(sampling).items() if key != "batch_size"}


def write_part(config: Config, family: Family, prompts: list[str], part: int, path: Path) -> None:
    """Generate and write part `part` (from 0) in one piece."""
    numbers = range(part * config.prompts_per_part, min((part + 1) * config.prompts_per_part, len(prompts)))
    wanted = [(number, seed_of(config.seed, number, k)) for number in numbers for k in range(config.images)]
    texts, image_seeds = [prompts[number] for number, _ in wanted], [seed for _, seed in wanted]
    notes = {}
    sampling = config.sample.resolved(family.defaults)
    batches = sample(family, texts, image_seeds, config.sample, progress=path.name)
    images = itertools.chain.from_iterable(batches)
    with (
        replacing(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
    ):  # stored: a PNG does not shrink
        for row, ((number, seed), pixels) in enumerate(zip(wanted, images, strict=True)):
            name = f"{number:06d}-{row % config.images:02d}.png"
            content = io.BytesIO()
            to_pil(pixels).save(content, format="PNG")
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content.getvalue())
            notes[name] = {
                "p": texts[row],
                "se": seed,
                "c": sampling.guidance_scale,
                "st": sampling.num_inference_steps,
                "sa": sampling.solver,
            }
        archive.writestr(zipfile.ZipInfo(f"{path.stem}.json", _EPOCH), json.dumps(notes))


@one_writer
def main(config: Config) -> None:
    """Generate the parts that are not there."""
    device = device_here()
    with exit_on_user_error():
        prompts, settings = check_folder(config)
        family = families.load(config.model.source(), device)
    begin_folder(config, settings)
    for part in tqdm(range(-(-len(prompts) // config.prompts_per_part)), desc="parts", unit="part"):
        path = config.output_dir / f"part-{part + 1:06d}.zip"
        if not path.is_file():
            write_part(config, family, prompts, part, path)
    show(f"{len(prompts) * config.images} images of {len(prompts)} prompts: {config.output_dir}")


if __name__ == "__main__":
    main(CONFIG)
