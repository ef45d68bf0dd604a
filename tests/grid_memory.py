"""How much memory eval/grid.py takes, all its processes together, with a model of hardly any weights at full image size.

python tests/grid_memory.py FOLDER 13 256 1024      # columns, prompts, pixels; half an hour on two CPU cores
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import tiny
from preftune.families.sd import SD

ROOT = Path(__file__).parents[1]


def write_inputs(folder: Path, count: int, side: int) -> None:
    """Write folder/model, whose UNet and autoencoder do little work at side x side pixels, and folder/prompts.txt."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side // 8,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        sample_size=side,
        block_out_channels=(2, 2, 2, 2),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    vae.decoder.conv_out.weight.data *= 0.01  # nearly grey: a PNG of noise would take most of the time
    SD(
        unet=unet,
        vae=vae,
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(folder / "words"),
        scheduler_config={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    ).save_pipeline(folder / "model")  # fmt: skip
    (folder / "prompts.txt").write_text("".join(f"prompt {index}\n" for index in range(count)))


def memory(pid: int) -> int:
    """Return the bytes of a process and its children, pages that they share counted once."""
    total = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(memory(int(child)) for child in children.read_text().split())
    except (OSError, StopIteration):
        pass  # it has ended
    return total


def measure(folder: Path, *, columns: int, count: int, side: int) -> int:
    """Run the grid and return its peak in bytes."""
    write_inputs(folder, count, side)
    command = [sys.executable, str(ROOT / "eval" / "grid.py"), "--model", str(folder / "model")]
    command += [
        "--columns",
        *(f"c{index}=" for index in range(columns)),
        "--prompts",
        str(folder / "prompts.txt"),
    ]
    command += [
        "--count",
        str(count),
        "--rewards",
        "brightness=1",
        "--num-inference-steps",
        "1",
        "--solver",
        "ddim",
    ]
    command += ["--guidance-scale", "1", "--batch-size", "2", "--output-dir", str(folder / "grid")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.5)
    assert process.returncode == 0
    assert len(list((folder / "grid" / "images").glob("*/*.png"))) == columns * count
    return peak


if __name__ == "__main__":
    start = time.monotonic()
    found = measure(
        Path(sys.argv[1]), columns=int(sys.argv[2]), count=int(sys.argv[3]), side=int(sys.argv[4])
    )
    page = (Path(sys.argv[1]) / "grid" / "index.html").stat().st_size
    print(f"peak {found / 2**30:.3f} GiB, page {page / 2**20:.2f} MiB, {time.monotonic() - start:.0f} s")  # noqa: T201
