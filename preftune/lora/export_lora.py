"""Write a LoRA in the layout of another program: kohya's, diffusers' or peft's.

    python -m preftune.lora.export_lora --lora runs/refl --model SD_FOLDER --output refl.safetensors
    python -m preftune.lora.export_lora --lora other.safetensors --model SD_FOLDER --layout diffusers --output other

kohya's file is what AUTOMATIC1111's web UI, ComfyUI, sd-scripts and others read (preftune/lora/names.py says what each looks for). The
scale is in the weights, so a program that reads no metadata has it right. --lora is read in any of these layouts, text encoders
included; what cannot be taken whole is refused. Hardware: none; the model's weights are not read.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.families import Pretrained
from preftune.lora.names import Layout


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a LoRA in the layout of another program."""

    lora: Path
    """LoRA file, or a folder or run with one."""
    model: Annotated[Pretrained, tyro.conf.arg(name="")]
    """The model that it was trained on."""
    output: Path
    """What is written: a .safetensors file for kohya, a folder for diffusers and peft; it must not be there yet."""
    layout: Layout = "kohya"
    """kohya, diffusers (`pipe.load_lora_weights`) or peft (`PeftModel.from_pretrained`)."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the file; fp16 halves it and rounds the weights."""

    def __post_init__(self) -> None:
        if self.output.exists():
            raise ValueError(f"--output {self.output} is there already; choose another name, or remove it")
        if self.layout == "kohya" and self.output.suffix != ".safetensors":
            raise ValueError(f"--output {self.output} must end in .safetensors for --layout kohya")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch

from preftune import families
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import exit_on_failed_write
from preftune.lora import files as lora_files
from preftune.lora.write import write_diffusers, write_kohya, write_peft

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def main(config: Config) -> int:
    """Read, check and write."""
    with exit_on_user_error():
        lora_files.find_some(config.lora)  # before a model is downloaded
        layers = families.lora_layers(config.model.source())
        update = lora_files.read(config.lora, layers)
    dtype = DTYPES[config.precision]
    with exit_on_failed_write(config.output), exit_on_user_error(), replacing(config.output) as temporary:
        if config.layout == "kohya":
            write_kohya(temporary, update, layers, dtype)
        elif config.layout == "diffusers":
            write_diffusers(temporary, update, dtype)
        else:
            write_peft(temporary, update, dtype)
    counts = ", ".join(f"{len(pairs)} layers of {part}" for part, pairs in update.items())
    show(f"{config.output}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
