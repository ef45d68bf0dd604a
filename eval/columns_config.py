"""Flags of the programs of eval/ that generate the same prompts and seeds with several models; needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.flags import split_term
from preftune.cli.precision import check_precision
from preftune.families import Pretrained
from preftune.sampling_config import Sampling


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """The models, and how they are sampled."""

    model: Annotated[Pretrained, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Pretrained(model="assets/tiny/pipeline")
    )
    vae: Path | None = None
    """Folder or hub id of an autoencoder to use instead of the pipelines', such as madebyollin/sdxl-vae-fp16-fix for SDXL in fp16."""
    columns: tuple[str, ...] = ("base=",)
    """TITLE=WHAT, where WHAT is empty, a LoRA file, a LoRA, run or UNet folder, or a model (of the hub: https://huggingface.co/OWNER/NAME); LoRA and run may end in @WEIGHT.
    """
    negative: str = ""
    """Negative prompt, such as "Weird image. "."""
    sample: Sampling = field(default_factory=Sampling)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the models; scorers, where there are any, stay in fp32."""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("--columns is empty; name at least one, as in --columns base= tuned=runs/refl")
        titles = self.titles()
        if repeated := {title for title in titles if titles.count(title) > 1}:
            raise ValueError(f"--columns repeats the title {min(repeated)}; give each column another")
        check_precision(self.precision)

    def titles(self) -> list[str]:
        """Return the titles of the columns; ValueError for one without."""
        return [split_term(term)[0] for term in self.columns]
