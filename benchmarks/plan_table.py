"""The page of what fits: for each model, method and size of memory the flags with which it does, and the peak with them."""

import functools
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.cards import CARDS
from benchmarks.prediction import CONTEXT_GIB, FRAGMENTATION, GIB, Phase, count_images, count_update, fits
from benchmarks.setting import Method, Model, Setting, Train

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
    off = replace(base, gradient_checkpointing=False, vae_checkpointing=False)
    on = replace(base, gradient_checkpointing=True, vae_checkpointing=method == "refl")
    yield replace(off, train_batch_size=IMAGES)
    for batch in (IMAGES, 4, 2, 1):
        yield replace(on, train_batch_size=batch)
    smallest = replace(on, train_batch_size=1)
    if method in ("refl", "raft"):
        smallest = replace(smallest, reward_precision="bf16")
        yield smallest
    if train == "full":
        yield replace(smallest, use_8bit_adam=True)


counted_update = functools.cache(count_update)


@functools.cache
def counted_images(setting: Setting) -> Phase:
    """Count validation images; of settings with the same weights and scorers once."""
    return count_images(setting)


def peak_of(setting: Setting) -> float:
    """Return the peak of all phases, GiB."""
    update, weights = counted_update(replace(setting, sample_batch_size=8))
    same = replace(setting, train_batch_size=1, gradient_checkpointing=None, vae_checkpointing=None)
    images = counted_images(same if setting.method != "refl" else replace(same, method="raft"))
    return max(update.peak, images.peak, weights["loading"]) / GIB


def first_fit(model: Model, method: Method, train: Train, gib: int) -> tuple[Setting, float] | None:
    """Return the fastest setting of the ladder that fits, with as many validation images at once as do, and its peak."""
    for setting in ladder(model, method, train):
        update, weights = counted_update(setting)
        if not fits(max(update.peak, weights["loading"]) / GIB, gib):
            continue
        for number in (8, 4, 2, 1):
            found = replace(setting, sample_batch_size=number)
            if fits(peak := peak_of(found), gib):
                return found, peak
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
        update, _ = counted_update(replace(setting, sample_batch_size=8))
        rate = update.images_per_s(CARDS["H100"])["modelled"]
        yield f"{name} `{flags} --gradient-accumulation-steps {passes}` | {peak:.1f} | {rate:.2g} |"


def page() -> str:
    """Return the page, Markdown."""
    lines = [
        "# Will it fit",
        "",
        "Counted, not measured: the drivers' own functions on tensors without content (`python benchmarks/plan.py --table plan.md` makes this",
        "page in a checkout, without a GPU). bf16, updates of 8 images, LoRA of rank 4, ImageReward in float32 for refl and raft. The peak is the",
        "largest of loading the models, an update, and generating validation images; a GPU suffices where the peak,",
        f"{FRAGMENTATION:.0%} for holes between tensors and {CONTEXT_GIB:g} GiB for CUDA and its libraries are no more than its memory. Of the settings that fit, the fastest",
        "is shown; all others flags are the defaults. Images/s are of updates on an H100, modelled from kernels and bytes, not measured.",
    ]
    for model, title in MODELS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| method | GB | flags | peak, GiB | images/s |",
            "|---|---|---|---|---|",
        ]
        for method in METHODS:
            for train in ("lora", "full"):
                lines += rows(model, method, train)
    return "\n".join(lines) + "\n"
