"""Tiny inputs for every driver, and three recorded updates of each: a driver whose arithmetic changes must say so.

    python tests/record_trajectories.py            # writes tests/golden/trajectories.json; say in the commit why it moved

A trajectory holds the losses and gradient norms of the updates, and digests of the trained weights: mean, standard deviation and
four fixed random projections of all of them after the last update, and of what moved since the first. Unlike a hash, these can
be compared with a tolerance, and so from machine to machine.
"""

import importlib
import json
import os
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}  # before the libraries are imported

import numpy as np
import torch
from PIL import Image

import tiny
from preftune.cli import parse
from preftune.records import write_jsonl
from preftune.training.checkpoint import read
from rewards.card import ImageRewardConfig
from rewards.imagereward import ImageReward
from rewards.shapes import COLOURS, SHAPES
from rewards.shapes_rendering import place, random_scene, render, to_bytes

GOLDEN = Path(__file__).parent / "golden" / "trajectories.json"
UPDATES = 3

# Adam divides a gradient by its own size, so that rounding decides the sign of the smallest; a large epsilon makes updates
# a smooth function of the gradient, which is what lets the numbers be compared between processors.
_RUN = "--max-train-steps 3 --train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-2 --adam-epsilon 1e-2 --threads 1 --checkpointing-steps 1 --checkpoints-total-limit 0"
_SAMPLE = "--sample.num-inference-steps 2 --sample.solver ddim --sample.resolution 32"

_DIRECT = (
    "--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --resolution 32 --num-inference-steps 4"
    " --guidance-scale 2 --max-grad-norm 1"
)

_SCORED = (
    "--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --resolution 32 --prompts-per-epoch 4"
    " --images-per-prompt 2 --timesteps-per-image 2"
)

_FLAGS = {
    "autoencoder": "--data {root}/images --resolution 32 --widths 8 8 16 16 --kl-weight 0.1",
    "ddpo": "--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --resolution 32 --num-inference-steps 4"
    " --window 1 2 --guidance-scale 2 --prompts-per-rollout 2 --images-per-prompt 2 --prompt-buffer-size 4"
    f" --prompt-buffer-min-count 2 --clip-range 0.1 --kl-weight 0.5 {_SAMPLE}",
    "awm": f"{_SCORED} --kl-weight 0.1 --ema-kl-weight 0.1 {_SAMPLE}",
    "dpo": f"--model {{root}}/pipeline --data {{root}}/rankings --resolution 32 --validation-share 0.25 --beta 20"
    f" --validation-prompts {{root}}/prompts.txt --num-validation-prompts 8 {_SAMPLE}",
    "draft": f"{_DIRECT} --last-steps 3 --eta 0.5 --guidance-gradient positive --jitter 2 --jitter-copies 2 {_SAMPLE}",
    "drtune": f"{_DIRECT} --active-steps 2 --early-stop 0.5 {_SAMPLE}",
    "flowbp": f"{_DIRECT} --surrogate lagrange --guidance-gradient both {_SAMPLE}",
    "nft": f"{_SCORED} --beta 0.5 --kl-weight 0.1 {_SAMPLE}",
    "pretrain": f"--model {{root}}/pipeline --data {{root}}/images --resolution 32 --train-text-encoder --train full {_SAMPLE}",
    "pretrain_scorer": "--data {root}/images --vocab {root}/vocab.txt --sizes.image 32 --sizes.patch 16 --sizes.width 32"
    " --sizes.vision-layers 1 --sizes.text-layers 1 --sizes.head 16 8 8 4",
    "raft": f"--model {{root}}/pipeline --prompts {{root}}/prompts.txt --rewards brightness=1 --resolution 32 --iterations 1"
    f" --prompts-per-iteration 4 --images-per-prompt 2 {_SAMPLE}",
    "refl": "--model {root}/pipeline --prompts {root}/prompts.txt --rewards brightness=1 --data {root}/images --resolution 32"
    f" --num-inference-steps 4 --window 1 2 --guidance-scale 2 --reward-scale 1 --pretraining alternate {_SAMPLE}",
    "reward_model": "--model {root}/scorer --data {root}/rankings --frozen-share 0 --validation-share 0.25",
    "reward_weighted": "--model {root}/pipeline --data {root}/images --score liking --pretraining-data {root}/images"
    f" --resolution 32 {_SAMPLE}",
    "weird_lora": "--model {root}/pipeline --data {root}/images --regularisation {root}/images --regularisation-share 0.3"
    f" --resolution 32 --lora.rank 4 {_SAMPLE}",
}


def arguments(driver: str, root: Path, output: Path) -> list[str]:
    """The command line of a driver that trains it on the inputs in root; KeyError for a driver without one."""
    return [*_FLAGS[driver].format(root=root).split(), *_RUN.split(), "--output-dir", str(output)]


def write_inputs(root: Path) -> None:
    """Write what the command lines name: pipeline, images with captions, prompts, vocabulary, scorer and rankings."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(12)]
    for folder in ("images", "rankings"):
        (root / folder).mkdir()
    for index, scene in enumerate(scenes):
        image = to_bytes(render(place(scene, rng), scene.background, rng, {}))
        for folder in ("images", "rankings"):
            Image.fromarray(image).save(root / folder / f"{index:02d}.png")
    captions = [scene.caption() for scene in scenes]
    rows = (
        {
            "file_name": f"{index:02d}.png",
            "text": text,
            "kind": ("preferred", "non_preferred")[index % 2],
            "liking": (index - 5) / 4,
        }
        for index, text in enumerate(captions)
    )
    write_jsonl(root / "images" / "metadata.jsonl", rows)
    rankings = (
        {
            "prompt": captions[3 * k],
            "generations": [f"{3 * k + j:02d}.png" for j in range(3)],
            "ranking": [1, 2, 2],
        }
        for k in range(4)
    )
    write_jsonl(root / "rankings" / "rankings.jsonl", rankings)
    (root / "prompts.txt").write_text("\n".join(captions) + "\n")
    tiny.pipeline_folder(root / "pipeline")
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *COLOURS,
        *SHAPES,
        "above",
        "left",
        "of",
        "on",
        *letters,
    ]
    (root / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    scorer(root / "vocab.txt").save(root / "scorer")


def scorer(vocab: Path) -> ImageReward:
    """An ImageReward of one layer in each tower, without dropout, whose head is wide enough to pass a gradient."""
    layout = ImageRewardConfig(
        image_size=32,
        patch_size=16,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        vocab_size=len(vocab.read_text().split()) + 2,
        max_positions=20,
        max_length=20,
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_intermediate=64,
        text_dropout=0.0,
        projection=16,
        head=(16, 8, 8, 4),
        head_dropout=(0.0, 0.0, 0.0),
    )
    model = ImageReward.build(layout, vocab, seed=0)
    with torch.no_grad():
        for weight in model.mlp.parameters():
            weight *= 10
    return model


def digest(weights: dict[str, torch.Tensor]) -> list[float]:
    """Mean, standard deviation and four random projections, of unit length on average, of all weights in their order."""
    flat = torch.cat([weight.flatten() for weight in weights.values()]).double().numpy()
    directions = np.random.default_rng(0).standard_normal((4, len(flat))) / len(flat) ** 0.5
    return [float(flat.mean()), float(flat.std()), *(directions @ flat).tolist()]


def train(driver: str, argv: list[str]) -> int:
    """Run a driver's command line in this process; returns its exit code."""
    module = importlib.import_module(f"finetune.{driver}")
    code: int = module.main(parse(module.Config, argv))
    return code


def trajectory(driver: str, root: Path, output: Path, *flags: str) -> dict[str, list[float]]:
    """Train a driver, with flags that do not change its updates, and describe what it did."""
    assert train(driver, [*arguments(driver, root, output), *flags]) == 0
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    names = [name for name in rows[0] if name.removeprefix("pretrain_") in ("loss", "grad_norm")]
    first, last = (read(output / f"step_{updates:06d}")["parameters"] for updates in (1, UPDATES))
    moved = {name: last[name] - first[name] for name in last}
    return {name: [row[name] for row in rows] for name in names} | {
        "weights": digest(last),
        "moved": digest(moved),
    }


def main() -> None:
    """Record all drivers."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(root)
        found = {driver: trajectory(driver, root, root / "runs" / driver) for driver in sorted(_FLAGS)}
    GOLDEN.write_text(json.dumps({"torch": torch.__version__, "trajectories": found}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
