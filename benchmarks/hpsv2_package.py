"""The hpsv2 package beside our scorer on the same files and weights: scores, and time of each image.

    python benchmarks/hpsv2_package.py --images 2                     # ViT-H: 9 GB of memory, 4 GB of disk while it runs
    python benchmarks/hpsv2_package.py --images 4 --layers 2          # towers of two layers: a trial anywhere

Needs hpsv2 1.2.0 and what it imports (pip install --no-deps hpsv2 torchvision timm clint requests), in an environment of its
own, since it pins old versions. As it is published it does not run; three repairs are made here, none of which changes a number: its
tokeniser's vocabulary, which its wheel leaves out, is read from ours; operators of torchvision that a torch for the CPU
lacks are declared; and its model is built without downloading LAION's weights, which the checkpoint replaces at once.

`per call` is hpsv2.score(file, prompt), which loads the checkpoint each time; `list` is hpsv2.score([files], prompt), which
takes the files one by one and all with one prompt; `ours` is data_build's way, files of a batch together. CPU seconds an
image are those of this process. Weights are random: scores are compared, not meant.
"""

import functools
import gzip
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paths import check_file
from preftune.cli import exit_on_user_error, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the hpsv2 package and our HPS v2 in turns."""

    images: int = 2
    """Image files, 512 x 512."""
    repeats: int = 2
    """Turns; the least time of each counts."""
    layers: int | None = None
    """Layers of both towers; None = the published 32 and 24."""
    output: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_file(self.output)
        for name in ("images", "repeats", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def declare_operators() -> None:
    """Declare the operators that torchvision registers kernels for, where torch's build has none of them."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_LIBRARY"] = library  # what it declares goes when it does
    except ImportError:
        pass


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)
    declare_operators()  # before transformers imports torchvision

import torch

from benchmarks.hardware import name_of_machine, write_json
from benchmarks.score import write_images
from preftune.images import opened
from rewards import CARDS, Card
from rewards.clip import ClipScorer, load_scorer
from rewards.clip_state_dict import to_authors
from rewards.clip_tokenizer import MERGES
from rewards.pixels import from_pil

PROMPT = "a red circle above a blue square, highly detailed"


def card_of(layers: int | None) -> Card:
    """Return the card of HPS v2, with towers of so many layers."""
    card = CARDS["hpsv2"]
    if layers is None or card.clip is None:
        return card
    return replace(card, clip=replace(card.clip, vision_layers=layers, text_layers=layers))


def write_checkpoint(card: Card, file: Path) -> None:
    """Write random weights in the published layout."""
    torch.manual_seed(0)
    scorer = ClipScorer.build(card, MERGES, seed=0, temperature=0.07)
    torch.save({"state_dict": to_authors(scorer.named_weights())}, file)


def repaired(layers: int | None) -> Any:
    """Return the module hpsv2.img_score, able to run. ValueError where the package is not installed."""
    spec = importlib.util.find_spec("hpsv2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the hpsv2 package is not installed; pip install --no-deps hpsv2==1.2.0 torchvision timm clint requests"
        )
    original = gzip.open
    gzip.open = functools.partial(vocabulary_or, original)  # type: ignore[assignment]
    try:
        package = importlib.import_module("hpsv2.src.open_clip")
        module = importlib.import_module("hpsv2.img_score")
    finally:
        gzip.open = original
    if layers is not None:
        sizes = importlib.import_module("hpsv2.src.open_clip.factory")._MODEL_CONFIGS["ViT-H-14"]
        sizes["vision_cfg"]["layers"] = sizes["text_cfg"]["layers"] = layers
    arguments = {"precision": "amp", "device": module.device, "light_augmentation": True, "output_dict": True}
    model, _, preprocess = package.create_model_and_transforms("ViT-H-14", None, **arguments)
    module.model_dict.update(model=model, preprocess_val=preprocess)
    return module


def vocabulary_or(original: Callable[..., Any], path: Any, *arguments: Any, **named: Any) -> Any:
    """Open a gzip file, and our list of merges in place of the missing one of the package."""
    if not Path(path).is_file() and Path(path).name == "bpe_simple_vocab_16e6.txt.gz":
        return MERGES.open("rb")
    return original(path, *arguments, **named)


def ours(scorer: ClipScorer, files: Sequence[Path]) -> list[float]:
    """Return our scores."""
    images = []
    for file in files:
        with opened(file) as image:
            images.append(from_pil(image, scorer.card.preprocess))
    return scorer(torch.stack(images), [PROMPT] * len(images)).tolist()


@torch.no_grad()
def measure(config: Config, module: Any, card: Card, scratch: Path) -> dict[str, Any]:
    """Return CPU seconds an image of each way, and the largest difference of scores."""
    checkpoint = scratch / "weights.pt"
    write_checkpoint(card, checkpoint)
    files = sorted(write_images(scratch / "images", config.images).glob("*.png"))
    scorer = load_scorer(card, checkpoint, module.device, torch.float32)
    names = [str(file) for file in files]
    ways: dict[str, Callable[[], list[Any]]] = {
        "per call": lambda: [module.score(name, PROMPT, cp=str(checkpoint))[0] for name in names],
        "list": lambda: module.score(names, PROMPT, cp=str(checkpoint)),
        "ours": lambda: ours(scorer, files),
    }
    least, scores = dict.fromkeys(ways, float("inf")), {}
    for _ in range(config.repeats):
        for name, way in ways.items():
            scorer.to(module.device)  # empties the cache of texts
            began = time.process_time()
            scores[name] = [float(value) for value in way()]
            least[name] = min(least[name], (time.process_time() - began) / len(files))
    pairs = [zip(scores[name], scores["ours"], strict=True) for name in ("per call", "list")]
    return {
        "cpu_seconds_per_image": least,
        "speed_up": {name: least[name] / least["ours"] for name in ("per call", "list")},
        "largest_difference": max(abs(a - b) for pair in pairs for a, b in pair),
    }


def main(config: Config) -> int:
    """Measure, print, write JSON."""
    with exit_on_user_error():
        module = repaired(config.layers)
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(config, module, card_of(config.layers), Path(scratch))
    machine = name_of_machine(torch.cuda.is_available())
    print(f"{machine}; hpsv2 beside ours, {config.images} files, layers {config.layers or 'as published'}")
    for name, value in row["cpu_seconds_per_image"].items():
        print(f"{name:9s} {value:8.3f} CPU s an image   {row['speed_up'].get(name, 1.0):6.2f} times ours")
    print(f"scores differ by at most {row['largest_difference']:.1e}")
    if config.output is not None:
        write_json(config.output, {"hardware": machine, "config": vars(config), **row})
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
