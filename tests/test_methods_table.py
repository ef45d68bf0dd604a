"""The methods table of the shapes world, from its shipped configuration: in small here, and in full as a slow test."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_build import diffusiondb, generate, simulate_rankings
from eval import compare_methods
from eval.trainings import split_named
from preftune import cli

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "eval/configs/compare_methods/tiny.yaml"
PARTS = (  # as docs/methods.md and docs/shapes.md print it
    "--model assets/tiny/pipeline --prompts assets/tiny/prompts.txt --output-dir data/parts --sample.resolution 64"
    " --sample.guidance-scale 2 --sample.num-inference-steps 4 --sample.solver ddim --sample.batch-size 64"
)
FILTERED = "--data data/parts --rewards imagereward-tiny --scale 3 --output-dir data/filtered"
SCORED = "--data data/parts --rewards imagereward-tiny --rule threshold --high -1000 --output-dir data/scored"
PAIRS = "--model assets/tiny/pipeline --guidance-scales 2 --step-counts 4 --output-dir data/pairs"
EPOCH = "--prompts-per-epoch 2 --images-per-prompt 2 --timesteps-per-image 1"
LESS = {
    "ddpo": "--prompts-per-rollout 2 --images-per-prompt 2 --prompt-buffer-min-count 2 --gradient-accumulation-steps 2",
    "nft": EPOCH,
    "awm": EPOCH,
    "raft_3": "--prompts-per-iteration 4 --images-per-prompt 2",
}
"""Flags that leave a method little to do."""


def build(*flags: str, pairs: str) -> None:
    """What the pages build for it: generated parts, the filtered set, everything scored, and pairs."""
    generate.main(cli.parse(generate.Config, [*PARTS.split(), *flags]))
    for words in (FILTERED, SCORED):
        diffusiondb.main(cli.parse(diffusiondb.Config, [*words.split(), "--workers", "0"]))
    simulate_rankings.main(cli.parse(simulate_rankings.Config, [*PAIRS.split(), *pairs.split()]))


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """The table's rows for the judge, by method."""
    with path.open() as file:
        return {row["method"]: row for row in csv.DictReader(file) if row["scorer"] == "shapes"}


@pytest.mark.usefixtures("trained_here")
@pytest.mark.parametrize(
    "left_out",
    [
        {"draft", "drtune", "flowbp", "ddpo", "nft", "awm", "dpo"},
        pytest.param(set[str](), marks=pytest.mark.slow),
    ],
)
def test_the_table_in_small(left_out: set[str], checkout: Path) -> None:
    build("--count", "8", "--images", "8", pairs="--count 4 --images 2")
    settings = yaml.safe_load(CONFIG.read_text())
    own = dict(map(split_named, settings["methods"]))
    names = [name for name in own if name not in left_out]
    methods = []
    for name in names:
        short = f"--max-train-steps 3 --train-batch-size 4 --num-validation-prompts 2 --threads 1 --sample.num-inference-steps 2 {LESS.get(name, '')}"
        methods.append(f"{name}=raft_3@1" if "@" in own[name] else f"{name}={own[name]} {short}")
    argv = [
        "--config",
        str(CONFIG),
        "--methods",
        *methods,
        "--seeds",
        "0",
        "--count",
        "6",
        "--concurrency",
        "1",
    ]
    assert compare_methods.main(cli.parse(compare_methods.Config, argv)) == 0
    rows = read_table(checkout / "runs/compare/table.csv")
    assert list(rows) == ["base", *names]
    images = {name: int(row["images"]) for name, row in rows.items()}
    expected = dict.fromkeys(names, 12) | {"base": 0, "raft_1": 4, "ddpo": 24}
    assert images == {name: expected[name] for name in ("base", *names)}
    means = {name: float(row["mean"]) for name, row in rows.items()}
    assert len(set(means.values())) == len(means), "no two methods give the same images"
    assert all(0 < mean < 1 for mean in means.values())


@pytest.mark.slow
def test_the_table_in_full(checkout: Path) -> None:
    """About seventy minutes on two cores, estimated from one seed: the numbers are in LOG.md. Started as a user would."""
    build("--count", "500", "--images", "8", pairs="--count 1000 --images 4")
    command = [sys.executable, "eval/compare_methods.py", "--config", str(CONFIG)]
    subprocess.run(command, check=True)
    rows = read_table(checkout / "runs/compare/table.csv")
    assert len(rows) == 13
    assert all(math.isfinite(float(row["win_rate"])) for name, row in rows.items() if name != "base")
    changes = {name: float(row["change"]) for name, row in rows.items() if name != "base"}
    assert min(changes["nft"], changes["awm"]) > changes["refl"] > changes["reward_weighted"]
