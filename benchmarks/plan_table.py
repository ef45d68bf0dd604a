"""The page of what fits: for each model, method and size of memory the flags with which it does, and the peak with them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks.cards import CARDS
from benchmarks.drivers import build
from benchmarks.prediction import (
    CONTEXT_GIB,
    FRAGMENTATION,
    GIB,
    Phase,
    count_images,
    count_update,
    counting,
    fits,
)
from benchmarks.setting import (
    FORWARD,
    GENERATED,
    REFERENCED,
    SCORED,
    THROUGH_PIXELS,
    Method,
    Model,
    RewardPrecision,
    Setting,
    Train,
)
from preftune.training.workspace import DTYPES

SIZES = (8, 12, 16, 24, 40, 80)
"""Memory of a GPU in GB, as the vendors name it."""
IMAGES = 8
"""Images in an update, in passes of --train-batch-size."""
METHODS: dict[Method, str] = {
    "refl": "refl",
    "raft": "raft",
    "pretrain": "pretrain, reward_weighted, weird_lora",
    "dpo": "dpo",
    "ddpo": "ddpo",
    "awm": "awm, nft",
}
"""Methods that differ in memory -> all that share the row."""
MODELS: dict[Model, str] = {
    "sd1": "Stable Diffusion 1.x, 512 px",
    "sdxl": "Stable Diffusion XL, 1024 px",
}


def ladder(model: Model, method: Method, train: Train) -> Iterator[Setting]:
    """Yield settings, the fastest first, each with less memory than the one before."""
    base = Setting(model=model, method=method, train=train)
    off, on = replace(base, checkpointing="off"), replace(base, checkpointing="on")
    yield replace(off, train_batch_size=IMAGES)
    for batch in (IMAGES, 4, 2, 1):
        yield replace(on, train_batch_size=batch)
    smallest = replace(on, train_batch_size=1)
    if method in SCORED:
        smallest = replace(smallest, reward_precision="bf16")
        yield smallest
    if train == "full":
        yield replace(smallest, use_8bit_adam=True)


@functools.cache
def counted(setting: Setting) -> Phase:
    """Return an update."""
    return count_update(setting)[0]


@functools.cache
def loading_bytes(setting: Setting) -> int:
    """Return the peak in bytes while a setting loads, which needs no update."""
    with counting(setting) as (_, _, loading):
        return loading


@functools.cache
def image_bytes(model: Model, train: Train, use_8bit_adam: bool, number: int) -> int:
    """Return the peak of so many validation images, bytes, without a scorer."""
    setting = Setting(model=model, method="pretrain", train=train, use_8bit_adam=use_8bit_adam)
    return count_images(replace(setting, sample_batch_size=number)).peak


@functools.cache
def scorer_bytes(precision: RewardPrecision) -> int:
    """Return the size of ImageReward's weights."""
    scorer = build(Setting(method="raft")).scorer
    assert scorer is not None
    return sum(weight.numel() for weight in scorer.parameters()) * DTYPES[precision].itemsize


@functools.cache
def held_bytes(model: Model, method: Method, train: Train) -> int:
    """Return the size of the denoisers that a method holds besides the trained one: the model before tuning, an earlier policy."""
    loaded = build(Setting(model=model, method=method, train=train))
    second = 0 if loaded.second is None else sum(weight.numel() for weight in loaded.second.parameters())
    trained = sum(weight.numel() for weight in loaded.family.denoiser.parameters() if weight.requires_grad)
    precisions = DTYPES[loaded.setting.mixed_precision].itemsize, torch.float32.itemsize
    return precisions[0] * second + precisions[1] * trained * (method in FORWARD)


def between(batch: int, figure: Callable[[int], float]) -> float:
    """Return a figure of a batch size from 1 to 8 from those of 1 and 8: of a convex function, as peaks and times are, this is no less."""
    if batch in (1, IMAGES):
        return figure(batch)
    share = (batch - 1) / (IMAGES - 1)
    return (1 - share) * figure(1) + share * figure(IMAGES)


def basis(setting: Setting, batch: int) -> Setting:
    """Return the setting that is counted for an update: raft's and pretrain's are the same, but for a scorer in memory; the precision of
    a scorer that the update does not ask makes no other difference, and the number of validation images makes none.
    """
    if setting.method == "raft":
        setting = replace(setting, method="pretrain")
    if setting.method not in THROUGH_PIXELS:
        setting = replace(setting, reward_precision="fp32")
    return replace(setting, train_batch_size=batch, sample_batch_size=Setting().sample_batch_size)


def update_gib(setting: Setting) -> float:
    """Return the peak of loading and of an update."""
    peak = between(setting.train_batch_size, lambda batch: counted(basis(setting, batch)).peak)
    scorer = 0
    if setting.method in GENERATED:  # raft's update was counted without one, the others' with one in float32
        there = 0 if setting.method == "raft" else scorer_bytes("fp32")
        scorer = scorer_bytes(setting.reward_precision) - there
    return (max(peak, loading_bytes(replace(basis(setting, 1), checkpointing="on"))) + scorer) / GIB


def images_gib(setting: Setting, number: int) -> float:
    """Return the peak of so many validation images: pretrain's, with what the others have in memory besides, a scorer or denoisers."""
    peak = image_bytes(setting.model, setting.train, setting.use_8bit_adam, number)
    scorer = scorer_bytes(setting.reward_precision) if setting.method in SCORED else 0
    held = held_bytes(setting.model, setting.method, setting.train) if setting.method in REFERENCED else 0
    return (peak + scorer + held) / GIB


def images_per_s(setting: Setting) -> float:
    """Return the modelled images/s of updates on an H100."""

    def seconds(batch: int) -> float:
        return batch / counted(basis(setting, batch)).images_per_s(CARDS["H100"])["modelled"]

    return setting.train_batch_size / between(setting.train_batch_size, seconds)


def first_fit(model: Model, method: Method, train: Train, gib: int) -> tuple[Setting, float] | None:
    """Return the fastest setting of the ladder that fits, with as many validation images at once as do, and its peak."""
    for setting in ladder(model, method, train):
        if fits(update := update_gib(setting), gib):
            for number in (8, 4, 2, 1):
                if fits(images := images_gib(setting, number), gib):
                    return replace(setting, sample_batch_size=number), max(update, images)
    return None


def rows(model: Model, method: Method, train: Train) -> Iterator[str]:
    """Yield lines of a table, one for each size, neighbours with the same flags as one."""
    found = {size: first_fit(model, method, train, size) for size in SIZES}
    weights = "LoRA" if train == "lora" else "all weights"
    groups: dict[str, list[int]] = {}
    for size, fit in found.items():
        groups.setdefault("" if fit is None else " ".join(fit[0].flags()), []).append(size)
    for flags, sizes in groups.items():
        fit = found[sizes[0]]
        name = f"| {METHODS[method]}, {weights} | {', '.join(map(str, sizes))} |"
        if fit is None:
            yield f"{name} does not fit | | |"
            continue
        setting, peak = fit
        passes = IMAGES // setting.train_batch_size
        rate = images_per_s(setting)
        yield f"{name} `{flags} --gradient-accumulation-steps {passes}` | {peak:.1f} | {rate:.2g} |"


def page(models: Sequence[Model]) -> Iterator[str]:
    """Yield the lines of the page, Markdown, as they are known."""
    yield from (
        "# Will it fit",
        "",
        "Counted, not measured: the drivers' own functions on tensors without content. `python benchmarks/plan.py --model sd1 sdxl --table plan.md`",
        "makes this page in a checkout, without a GPU. bf16, updates of 8 images, LoRA of rank 4, ImageReward in float32 for refl, raft, ddpo, awm and nft. The peak",
        "is the largest of loading the models, an update, and generating validation images; a GPU suffices where the peak,",
        f"{FRAGMENTATION:.0%} for holes between tensors and {CONTEXT_GIB:g} GiB for CUDA and its libraries are no more than its memory. Of the settings that fit, the fastest",
        "is shown; all other flags are the defaults. Images/s are of updates on an H100, modelled from kernels and bytes, not measured. An image of dpo is",
        "a pair of images, one of ddpo an (image, step) pair with guidance, one of awm and nft an image at one noise level. The time to generate the images",
        "that raft, ddpo, awm and nft learn from is not in it.",
    )
    for model in models:
        yield from ("", f"## {MODELS[model]}", "")
        yield from ("| method | GB | flags | peak, GiB | images/s |", "|---|---|---|---|---|")
        for method in METHODS:
            for train in ("lora", "full"):
                yield from rows(model, method, train)
    yield from (
        "",
        "Not in the tables: `draft`, `drtune` and `flowbp`. `python benchmarks/plan.py --method draft --train-batch-size 1` counts a setting of them, with their",
        "defaults; what was counted so far is in [methods](methods.md#through-several-steps). Nothing of it was measured.",
    )
