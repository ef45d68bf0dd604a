"""Memory, work and time of a method, from the driver's own functions on fake tensors.

Counted: peak memory, operations, kernels, bytes. Modelled from them: times, by `seconds`. An update's trajectory is counted with
one step without gradient, which is then taken as often as the trajectory has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import models, sdxl
from benchmarks.cards import CARDS, Card
from benchmarks.counter import GIB, Counter, Kernel, cuda_autocast, fake, marked, totals
from benchmarks.setting import Setting
from finetune import refl
from preftune.diffusion_loss import captioned_loss
from preftune.families import Family, Pretrained, tiny
from preftune.families.sd import SD
from preftune.families.sdxl import SDXL, vae_dtype
from preftune.lora.config import LoRA
from preftune.sampling import Sampling, sample
from preftune.training.config import ModelConfig
from preftune.training.optimizer import EMA, adamw
from preftune.training.run_config import RunConfig
from preftune.training.workspace import DTYPES
from rewards.imagereward import FULL_SIZE, VOCAB, ImageReward

CONTEXT_GIB = 1.0
"""What a process takes on a GPU besides its tensors: CUDA's context, kernels, workspaces of the libraries."""
FRAGMENTATION = 0.05
"""Share of the peak that the allocator may hold in holes."""
MATMUL, ATTENTION, BANDWIDTH = 0.56, 0.36, 0.8
"""Shares of the nominal peak and bandwidth that the model of time assumes: large products reach 0.8 of the peak, those of these
models 0.7 of that, attention 0.45.
"""
LAUNCH, SHORTEST = 8e-6, 3e-6
"""Seconds that the host needs to start a kernel, and that the shortest kernel takes."""
ASSUMPTIONS = {
    "context_gib": CONTEXT_GIB, "fragmentation": FRAGMENTATION, "matmul": MATMUL, "attention": ATTENTION, "bandwidth": BANDWIDTH,
    "launch_s": LAUNCH, "shortest_s": SHORTEST,
}  # fmt: skip
"""Of what is modelled, for JSON."""
_PROMPT = "a red fox in the snow, digital art"


def build(setting: Setting) -> Family:
    """Return the model at real size with parts on the meta device."""
    tokenizer = models.tokenizer()
    with torch.device("meta"):
        if setting.model == "sd1":
            return SD(
                unet=models.unet(), vae=models.autoencoder(), text_encoder=models.text_encoder(),
                tokenizer=tokenizer, scheduler_config=tiny.SCHEDULER_CONFIG,
            )  # fmt: skip
        return SDXL(
            unet=sdxl.unet(), vae=sdxl.autoencoder(), text_encoder=sdxl.text_encoder(),
            text_encoder_2=sdxl.text_encoder_2(), tokenizer=tokenizer, tokenizer_2=tokenizer,
            scheduler_config=tiny.SCHEDULER_CONFIG,
        )  # fmt: skip


@dataclass(kw_only=True)
class Parts:
    """What a driver holds in memory, as fake tensors."""

    setting: Setting
    family: Any
    scorer: ImageReward | None
    optimizer: torch.optim.Optimizer
    ema: EMA
    loading: int
    """Bytes while the models load: float32, before the frozen weights are cast."""
    tensors: list[Tensor]
    """Weights, buffers, the optimizer's moments, and the EMA."""

    def counter(self) -> Counter:
        """Return a counter that knows the tensors."""
        counter = Counter()
        for tensor in self.tensors:
            counter.add(tensor)
        return counter

    def prompts(self, number: int) -> tuple[list[str], list[torch.Generator]]:
        """Return prompts and generators of so many images."""
        return [_PROMPT] * number, [torch.Generator().manual_seed(i) for i in range(number)]


def run_config(setting: Setting) -> RunConfig:
    """Return the driver's options of the run."""
    return RunConfig(
        train_batch_size=setting.train_batch_size,
        mixed_precision=setting.mixed_precision,
        ema_decay=setting.ema_decay,
    )


@contextmanager
def faked(setting: Setting) -> Iterator[Parts]:
    """Yield what the driver loads, inside the mode of fake tensors and CUDA's rules of autocast."""
    dtype = DTYPES[setting.mixed_precision]
    family: Any = build(setting)
    family.trainable(LoRA(rank=setting.rank) if setting.train == "lora" else None, 0)
    unet, vae = setting.checkpointed()
    family.set_speed("sdpa", gradient_checkpointing=unet, vae_checkpointing=vae)
    scorer = None
    if setting.method in ("refl", "raft"):
        with torch.device("meta"):
            scorer = ImageReward(FULL_SIZE, VOCAB.read_text(encoding="utf-8"))
        scorer.eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast():
        tensors = fake(scorer, DTYPES[setting.reward_precision]) if scorer is not None else []
        scorers = sum(tensor.nbytes for tensor in tensors)
        tensors += fake(family.vae, vae_dtype({"force_upcast": setting.model == "sdxl"}, dtype))
        for part in (family.unet, *family.text_encoders):
            tensors += fake(part, dtype)
        weights = sum(4 * one.numel() for part in (family.unet, family.vae, *family.text_encoders) for one in part.parameters())  # fmt: skip
        family.device = torch.device("cpu")
        if dtype != torch.float32:
            family.denoiser.forward = torch.autocast("cpu", dtype)(family.denoiser.forward)
        trained = [weight for weight in family.unet.parameters() if weight.requires_grad]
        optimizer, moments = optimizer_of(setting, trained)
        ema = EMA(run_config(setting), trained)
        yield Parts(
            setting=setting, family=family, scorer=scorer, optimizer=optimizer, ema=ema,
            loading=weights + scorers, tensors=[*tensors, *moments, *ema.weights],
        )  # fmt: skip


def optimizer_of(
    setting: Setting, trained: list[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """Return the driver's optimizer as it is on a CUDA device after its first step, and its moments.

    In 8 bits the moments are bytes, with a float32 for each 256 of them; the step of that kind needs bitsandbytes and is left out.
    """
    optimizer = adamw(run_config(setting), trained, 1e-4)
    if setting.use_8bit_adam:
        sizes = [weight.numel() for weight in trained for _ in range(2)]
        optimizer.step = lambda *_: None  # type: ignore[method-assign,assignment]
        return optimizer, [torch.empty(size + 4 * -(-size // 256), dtype=torch.uint8) for size in sizes]
    for group in optimizer.param_groups:
        group["foreach"] = not group["fused"]  # what torch itself chooses on a CUDA device
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, [value for state in optimizer.state.values() for value in state.values()]


def refl_loss(parts: Parts) -> Tensor:
    """Return the loss of an update of ReFL whose late step is the second."""
    setting = parts.setting
    assert parts.scorer is not None
    config = refl.Config(
        prompts=Path("-"),
        num_inference_steps=40,
        solver="ddpm",
        pretraining="off",
        model=ModelConfig(pretrained=Pretrained(model="-"), resolution=setting.resolution),
    )
    texts, noise = parts.prompts(setting.train_batch_size)
    pixels = refl.late_pixels(parts.family, texts, noise, 1, setting.size(), config)
    return refl.reward_loss(parts.scorer(pixels, texts), config.margin, scale=1.0)


def data_loss(parts: Parts, image: Path) -> Tensor:
    """Return the loss of an update of the methods that learn from images."""
    setting = parts.setting
    texts, generators = parts.prompts(setting.train_batch_size)
    losses = captioned_loss(
        parts.family, [image] * len(texts), texts, generators, resolution=setting.size(), caption_dropout=0.0
    )
    return losses.mean()


def update(parts: Parts, loss: Callable[[], Tensor]) -> None:
    """Do what `Run.update` does."""
    loss().backward()
    trained = [weight for group in parts.optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    parts.ema.update()


def validation(parts: Parts) -> None:
    """Generate a batch of validation images in two steps, and score them."""
    number = parts.setting.sample_batch_size
    settings = Sampling(num_inference_steps=2, solver="ddim", batch_size=number).at(parts.setting.size())
    texts, _ = parts.prompts(number)
    for pixels in sample(parts.family, texts, range(number), settings):
        if parts.scorer is not None:
            with torch.no_grad():
                parts.scorer(pixels, texts)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run: its peak, the kernels of a denoising step without gradient, and all others."""

    peak: int
    images: int
    steps: float
    """How many such steps it has."""
    step: list[Kernel]
    rest: list[Kernel]

    def per_image(self) -> dict[str, float]:
        """Return the totals, of one image, and how often a kernel is started for all."""
        one, other = totals(self.step), totals(self.rest)
        both = {name: value + self.steps * one[name] for name, value in other.items()}
        return {
            "tflop_per_image": both["gflop"] / 1e3 / self.images,
            "gb_per_image": both["gb"] / self.images,
            "kernels": both["kernels"],
            "casts": both["casts"],
            "kernels_of_a_step": one["kernels"],
        }

    def images_per_s(self, card: Card) -> dict[str, float]:
        """Return images/s: the limit (every kernel at the full peak or bandwidth), and as modelled."""
        limits, modelled = zip(*(seconds(kernels, card) for kernels in (self.step, self.rest)), strict=True)
        weights = self.steps, 1.0
        return {
            name: self.images / sum(weight * time for weight, time in zip(weights, times, strict=True))
            for name, times in (("roofline", limits), ("modelled", modelled))
        }


def seconds(kernels: Sequence[Kernel], card: Card) -> tuple[float, float]:
    """Return how long the kernels take, one after another: at best, and with the shares and the host's time as assumed above."""
    best = device = 0.0
    for kernel in kernels:
        peak = 1e12 * (card.tflops_float32 if kernel.dtype == torch.float32 else card.tflops)
        share = ATTENTION if "attention" in kernel.name else MATMUL
        moving = (kernel.read + kernel.written) / (1e12 * card.tb_per_s)
        best += max(kernel.flop / peak, moving)
        device += max(kernel.flop / (share * peak), moving / BANDWIDTH, SHORTEST)
    return best, max(device, LAUNCH * len(kernels))


def phase(parts: Parts, what: Callable[[], object], images: int, steps: Callable[[int], float]) -> Phase:
    """Count `what`; of the denoiser's calls all but the last are steps without gradient, of which the run has steps(calls)."""
    counter = parts.counter()
    with counter, marked(parts.family, "predict", counter) as marks:
        what()
    kernels, number = counter.kernels, len(marks) - 1
    step = kernels[marks[0] : marks[1]] if number else []
    rest = kernels[: marks[0]] + kernels[marks[number] :] if number else kernels
    assert number <= 1, "two calls of the denoiser at most"
    return Phase(peak=counter.peak, images=images, steps=steps(number), step=step, rest=rest)


def count_update(setting: Setting) -> tuple[Phase, dict[str, int]]:
    """Count an update. Return it, and the bytes of the weights at rest (with moments and EMA) and while they load."""
    with faked(setting) as parts, TemporaryDirectory() as folder:
        image, size = Path(folder) / "image.png", setting.size()
        Image.new("RGB", (size.width, size.height)).save(image)
        loss = refl_loss if setting.method == "refl" else lambda parts: data_loss(parts, image)
        found = phase(
            parts,
            lambda: update(parts, lambda: loss(parts)),
            setting.train_batch_size,
            lambda calls: setting.late * calls,
        )
        return found, {"weights": parts.counter().now, "loading": parts.loading}


def count_images(setting: Setting) -> Phase:
    """Count a batch of validation images: the model family's number of steps, with guidance."""
    with faked(setting) as parts:
        steps = parts.family.defaults.num_inference_steps - 1
        return phase(parts, lambda: validation(parts), setting.sample_batch_size, lambda _: steps)


def predict(setting: Setting) -> dict[str, Any]:
    """Return all that is known of a setting, as JSON takes it; GiB are 2^30 bytes."""
    updates, weights = count_update(setting)
    images = count_images(setting)
    peaks = {"loading": weights["loading"], "update": updates.peak, "images": images.peak}
    peak = max(peaks.values()) / GIB
    return {
        "setting": asdict(setting) | {"resolution": str(setting.size())},
        "flags": " ".join(setting.flags()),
        "weights_gib": weights["weights"] / GIB,
        "peak_gib": peak,
        "peaks_gib": {name: value / GIB for name, value in peaks.items()},
        "needed_gib": needed(peak),
        "update": updates.per_image(),
        "images": images.per_image(),
        "cards": {
            name: {
                "fits": fits(peak, card.gib),
                "update": updates.images_per_s(card),
                "images": images.images_per_s(card),
            }  # fmt: skip
            for name, card in CARDS.items()
        },
    }


def needed(peak_gib: float) -> float:
    """Return the memory, GiB, that a GPU must have for a peak of live tensors."""
    return peak_gib * (1 + FRAGMENTATION) + CONTEXT_GIB


def fits(peak_gib: float, gib: float) -> bool:
    """Whether a GPU of so many GiB is large enough for a peak of live tensors."""
    return needed(peak_gib) <= gib
