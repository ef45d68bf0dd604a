r"""Generate the images of a benchmark: the prompts of a protocol, or of a file, with each of several models.

Columns are TITLE=WHAT as in eval/grid.py: WHAT is empty (the model itself), a LoRA, a run, a UNet folder or another model. All
columns have the same prompts, seeds and settings, so images of one (prompt, seed) start from the same noise. Written into
--output-dir:

    TITLE/0000.png ...       image k of prompt i, with the seed seed + i * num_images_per_prompt + k
    TITLE/metadata.jsonl     file_name, text, seed and, where the protocol has several, group: written last
    TITLE/generated.json     digests of the weights and prompts, seeds and sampling settings

    preftune benchmark-images --columns base= tuned=runs/refl-tiny --count 32 --output-dir images
    preftune benchmark --folders images/base images/tuned

    preftune benchmark-images --model SD_FOLDER --columns base= tuned=runs/refl --protocol parti --precision fp16
    accelerate launch --num_processes 8 eval/generate.py --protocol hpsv2 --prompts HPDv2/benchmark --model SD_FOLDER

The same command goes on where one was stopped or killed, image by image, and gives the same bytes: images are written as they are
generated, and a batch that lacks one is generated again as a whole. Memory does not grow with the number of images. Several
processes, one for each GPU, share the batches of every model.

Hardware: the embedded model generates 25 images/s on one CPU core at 16 steps; Stable Diffusion needs a GPU in practice.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eval.columns_config import ColumnsConfig
from eval.protocol import ALL, Protocol, first, load_protocol, read_lists
from preftune.cli import exit_on_user_error, parse
from preftune.prompts import read_prompts

EMBEDDED_PROMPTS = Path("assets/tiny/held_out.txt")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Generate the prompts of a protocol, or of a file, with several models into a folder each."""

    models: Annotated[ColumnsConfig, tyro.conf.arg(name="")] = field(default_factory=ColumnsConfig)
    protocol: str | None = None
    """hpsv2, hpsv2.1, drawbench, imagereward, pickscore, lpo, parti or geneval_prompts, or a YAML file; None = the prompts of --prompts."""
    prompts: Path | None = None
    """Prompt file, or the file or folder of a protocol's prompts; None = those that come with the protocol, else of the shapes world."""
    count: int | None = None
    """Maximum number of prompts, of each group, from the start of the file; None = all."""
    num_images_per_prompt: int | None = None
    """Images per prompt; None = the protocol's number, else 1."""
    seed: int | None = None
    """Image k of prompt i has the seed seed + i * num_images_per_prompt + k; None = the protocol's, else 0."""
    output_dir: Path = Path("images")
    """Folder of the folders of images; what is there is kept."""
    overwrite_output_dir: bool = False
    """Replace images generated with other weights, prompts, seeds or settings."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("count", self.count, 1), ("num-images-per-prompt", self.num_images_per_prompt, 1), ("seed", self.seed, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        self.followed()

    def followed(self) -> Protocol | None:
        """Return the protocol, None without one; ValueError for one that is not there."""
        return None if self.protocol is None else load_protocol(self.protocol)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from eval.generated import Request, generate, missing_columns
from eval.models import check_column, parse_column
from preftune import families
from preftune.cli.notes import counted
from preftune.cli.printable import show
from preftune.files import check_writable
from preftune.files.one_writer import one_writer
from preftune.processes import joined, own_device
from rewards import embedded


def check_inputs(config: Config) -> Request:
    """Return what to generate; ValueError before any weight loads."""
    models = config.models
    protocol, chosen, each, begin = config.followed(), models.sample, 1, 0
    if protocol is None or config.protocol is None:
        lists = {ALL: read_prompts(embedded.find(config.prompts or EMBEDDED_PROMPTS))}
    else:
        lists = read_lists(config.protocol, protocol, config.prompts)
        chosen, each, begin = (
            protocol.sampling(models.sample),
            protocol.num_images_per_prompt,
            protocol.seed,
        )
    lists = first(lists, config.count)
    for term in models.columns:
        check_column(term)
    if models.vae is not None:
        families.vae_folder(str(models.vae))
    source = models.model.source()
    sampling = chosen.resolved(families.check(source, models.vae))
    if models.negative and sampling.guidance_scale <= 1:
        raise ValueError(
            f"--negative does nothing at --sample.guidance-scale {sampling.guidance_scale:g}; choose another, such as 3"
        )
    columns = [parse_column(term, source) for term in models.columns]
    for column in columns:
        chosen.resolved(families.check(column.pipeline, models.vae))
    check_writable(config.output_dir)
    each = config.num_images_per_prompt or each
    begin = begin if config.seed is None else config.seed
    images = [(group, prompt) for group, prompts in lists.items() for prompt in prompts for _ in range(each)]
    return Request(
        folder=config.output_dir,
        columns=columns,
        prompts=[prompt for _, prompt in images],
        seeds=range(begin, begin + len(images)),
        sampling=sampling,
        negatives={column.title: models.negative for column in columns},
        precision=models.precision,
        vae=models.vae,
        groups=[group for group, _ in images] if len(lists) > 1 else (),
    )


@one_writer
def main(config: Config) -> int:
    """Generate what is missing."""
    with joined() as processes:
        with exit_on_user_error():
            request = check_inputs(config)
            missing = missing_columns(request, overwrite=config.overwrite_output_dir)
        protocol = config.followed()
        if protocol is not None and processes.is_main:
            show(protocol.summary(str(config.protocol)))
        generate(request, missing, own_device(), processes)
        if processes.is_main:
            for column in request.columns:
                folder = request.folder_of(column.title)
                show(f"{column.title}: {counted(len(request.prompts), 'image')} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
