"""Memory and floating-point operations of one ReFL update at real size, computed without weights, memory or
a GPU.

The driver's own functions run on fake tensors (torch's FakeTensorMode): shapes and dtypes are the real
ones, and nothing is computed. The program counts the bytes of all tensors that are alive at the same time,
and the floating-point operations (a multiplication and an addition are two). The update is bf16 training of
a LoRA: `--late` steps without gradient, one forward pass each, then one step with gradient, the decoder,
and ImageReward.

    python benchmarks/count.py --family sdxl --resolution 1024                  # a minute or two on one core
    python benchmarks/count.py --family sd1 --resolution 512 --train-batch-size 4 --no-checkpointing

Left out: the overhead of a real allocator, workspaces of kernels, and the caches of autocast.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import parse
from preftune.resolution import parse as parse_resolution

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count memory and operations of a ReFL update."""

    family: Literal["sd1", "sdxl"] = "sdxl"
    """Stable Diffusion 1.x or XL."""
    resolution: str = "1024"
    """Pixels: 1024, or WIDTHxHEIGHT."""
    train_batch_size: int = 1
    """Images in an update."""
    train: Literal["lora", "full"] = "lora"
    """Trained weights."""
    rank: int = 4
    """Of the LoRA."""
    checkpointing: bool = True
    """Recompute activations of UNet and decoder in the backward pass."""
    late: float = 34.5
    """Steps without gradient before the one with it; 34.5 is the mean of the published window 30..39."""


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import models, sdxl
from finetune import refl
from preftune.families import Family, Pretrained, tiny
from preftune.families.sd import SD
from preftune.families.sdxl import SDXL
from preftune.lora.tuning import LoRA
from preftune.resolution import Resolution
from preftune.training.config import ModelConfig
from rewards.imagereward import FULL_SIZE, VOCAB, ImageReward


class Memory(TorchDispatchMode):
    """The bytes of all tensors that were seen and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage in self.alive:
            return
        self.alive[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found


def build(family: Literal["sd1", "sdxl"]) -> Family:
    """Return the model at real size with parts on the meta device."""
    tokenizer = models.tokenizer()
    with torch.device("meta"):
        if family == "sd1":
            return SD(
                unet=models.unet(), vae=models.autoencoder(), text_encoder=models.text_encoder(),
                tokenizer=tokenizer, scheduler_config=tiny.SCHEDULER_CONFIG,
            )  # fmt: skip
        return SDXL(
            unet=sdxl.unet(), vae=sdxl.autoencoder(), text_encoder=sdxl.text_encoder(),
            text_encoder_2=sdxl.text_encoder_2(), tokenizer=tokenizer, tokenizer_2=tokenizer,
            scheduler_config=tiny.SCHEDULER_CONFIG,
        )  # fmt: skip


def fake(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Put fake tensors in place of a module's: float32 where they are trained, else of dtype. Return all of them."""
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None:
                kind = torch.float32 if old.requires_grad else dtype
                new = nn.Parameter(torch.empty(old.shape, dtype=kind), requires_grad=old.requires_grad)
                part._parameters[name] = new
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(
                    buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype
                )
    return [*module.parameters(), *module.buffers()]


@contextmanager
def counted(config: Config) -> Iterator[dict[str, Any]]:
    """Yield what the update needs, inside the mode of fake tensors."""
    dtype = torch.bfloat16
    family: Any = build(config.family)
    with torch.device("meta"):
        scorer = ImageReward(FULL_SIZE, VOCAB.read_text(encoding="utf-8"))
    family.trainable(LoRA(rank=config.rank) if config.train == "lora" else None, 0)
    family.set_speed(
        "sdpa", gradient_checkpointing=config.checkpointing, vae_checkpointing=config.checkpointing
    )
    scorer.eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = [family.unet, family.vae, *family.text_encoders]
        tensors = [tensor for part in parts for tensor in fake(part, dtype)]
        tensors += fake(scorer, torch.float32)
        family.device = torch.device("cpu")
        family.denoiser.forward = torch.autocast("cpu", dtype)(family.denoiser.forward)
        trained = [weight for weight in family.unet.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        yield {"family": family, "scorer": scorer, "tensors": tensors, "optimizer": optimizer}


def update(config: Config, family: Family, scorer: ImageReward, optimizer: torch.optim.Optimizer) -> None:
    """Make the step with gradient of an update; those before it have the cost of a forward pass each."""
    settings = refl.Config(
        prompts=Path("-"),
        num_inference_steps=40,
        solver="ddpm",
        pretraining="off",
        model=ModelConfig(pretrained=Pretrained(model="-"), resolution=config.resolution),
    )
    texts = ["a red fox in the snow, digital art"] * config.train_batch_size
    noise = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    pixels = refl.late_pixels(family, texts, noise, 0, parse_resolution(config.resolution), settings)
    refl.reward_loss(scorer(pixels, texts), settings.margin, scale=1.0).backward()
    optimizer.step()
    optimizer.zero_grad()


def counter() -> FlopCounterMode:
    """Return a counter of operations that also knows attention on a CPU, which torch's own leaves out."""
    ops = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            ),
            ops._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
            ),
        },
    )


def forward_pass(config: Config, family: Family, resolution: Resolution) -> float:
    """Return the operations of one call of the denoiser without gradient, TFLOP an image."""
    shape = (config.train_batch_size, *family.latent_shape(resolution))
    cond = family.encode(["a"] * shape[0])
    with torch.no_grad(), counter() as flops:
        family.predict(torch.empty(shape), torch.ones(shape[0], dtype=torch.int64), cond)
    return float(flops.get_total_flops()) / 1e12 / shape[0]


def main(config: Config) -> int:
    """Count and print."""
    with counted(config) as parts:
        tensors = parts.pop("tensors")
        update(config, **parts)  # the optimizer's moments are made in the first update
        memory = Memory()
        moments = [value for state in parts["optimizer"].state.values() for value in state.values()]
        for tensor in [*tensors, *moments]:
            memory.add(tensor)
        weights = memory.now
        with memory:
            update(config, **parts)
        with counter() as flops:
            update(config, **parts)
        once = float(flops.get_total_flops()) / 1e12 / config.train_batch_size
        single = forward_pass(config, parts["family"], parse_resolution(config.resolution))
    trained = f"LoRA rank {config.rank}" if config.train == "lora" else "all weights"
    print(
        f"{config.family} at {config.resolution} px, batch {config.train_batch_size}, {trained}, bf16,"
        f" checkpointing {'on' if config.checkpointing else 'off'} (counted, not measured)\n"
        f"weights and moments {weights / GIB:.1f} GiB, peak {memory.peak / GIB:.1f} GiB\n"
        f"a call of the denoiser {single:.2f} TFLOP an image; the step with gradient {once:.1f};"
        f" an update with {config.late:g} steps before it {once + config.late * single:.0f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG))
