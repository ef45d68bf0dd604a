"""The page of what fits: for each model, method and size of memory the flags with which it does, and the peak with them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.cards import CARDS
from benchmarks.drivers import build
from benchmarks.prediction import CONTEXT_GIB, FRAGMENTATION, GIB, Phase, count_images, count_update, fits
from benchmarks.setting import SCORED, Method, Model, RewardPrecision, Setting, Train
from preftune.training.workspace import DTYPES

SIZES = (8, 12, 16, 24, 40, 80)
"""Memory of a GPU in GB, as the vendors name it."""
IMAGES = 8
"""Images in an update, in passes of --train-batch-size."""
METHODS: dict[Method, str] = {
    "refl": "refl",
    "raft": "raft",
    "pretrain": "pretrain, reward_weighted, weird_lora",
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
def counted(setting: Setting) -> tuple[Phase, int]:
    """Return an update and the peak in bytes while it loads."""
    found, loading = count_update(setting)
    return found, loading["loading"]


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


def between(batch: int, figure: Callable[[int], float]) -> float:
    """Return a figure of a batch size from 1 to 8 from those of 1 and 8: of a convex function, as peaks and times are, this is no less."""
    if batch in (1, IMAGES):
        return figure(batch)
    share = (batch - 1) / (IMAGES - 1)
    return (1 - share) * figure(1) + share * figure(IMAGES)


def basis(setting: Setting, batch: int) -> Setting:
    """Return the setting that is counted for an update: raft's and pretrain's are the same, but for a scorer in memory."""
    if setting.method == "raft":
        setting = replace(setting, method="pretrain", reward_precision="fp32")
    return replace(setting, train_batch_size=batch)


def update_gib(setting: Setting) -> float:
    """Return the peak of loading and of an update."""
    peak = between(setting.train_batch_size, lambda batch: counted(basis(setting, batch))[0].peak)
    scorer = scorer_bytes(setting.reward_precision) if setting.method == "raft" else 0
    return (max(peak, counted(basis(setting, 1))[1]) + scorer) / GIB


def images_gib(setting: Setting, number: int) -> float:
    """Return the peak of so many validation images: pretrain's, with a scorer in memory for the others."""
    peak = image_bytes(setting.model, setting.train, setting.use_8bit_adam, number)
    return (peak + (0 if setting.method == "pretrain" else scorer_bytes(setting.reward_precision))) / GIB


def images_per_s(setting: Setting) -> float:
    """Return the modelled images/s of updates on an H100."""

    def seconds(batch: int) -> float:
        return batch / counted(basis(setting, batch))[0].images_per_s(CARDS["H100"])["modelled"]

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
        "makes this page in a checkout, without a GPU. bf16, updates of 8 images, LoRA of rank 4, ImageReward in float32 for refl and raft. The peak",
        "is the largest of loading the models, an update, and generating validation images; a GPU suffices where the peak,",
        f"{FRAGMENTATION:.0%} for holes between tensors and {CONTEXT_GIB:g} GiB for CUDA and its libraries are no more than its memory. Of the settings that fit, the fastest",
        "is shown; all other flags are the defaults. Images/s are of updates on an H100, modelled from kernels and bytes, not measured.",
    )
    for model in models:
        yield from ("", f"## {MODELS[model]}", "")
        yield from ("| method | GB | flags | peak, GiB | images/s |", "|---|---|---|---|---|")
        for method in METHODS:
            for train in ("lora", "full"):
                yield from rows(model, method, train)
    yield from (
        "",
        "Not in the tables: `draft`, `drtune`, `flowbp` and `dpo`. `python benchmarks/plan.py --method draft dpo --train-batch-size 1` counts a setting of them, with their",
        "defaults; what was counted so far is in [methods](methods.md#through-several-steps) and [preference pairs](preference-pairs.md#run-it). Nothing of it was measured.",
    )
