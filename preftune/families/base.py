"""The interface of a model family. Programs use only this interface, never an architecture directly.

B batch, C h w latents, H W pixels, L tokens, D width of the text states. A timestep t is an integer in [0,
1000); 0 is the lowest noise level, and t = -1 means no noise.
"""

from __future__ import annotations  # torch is named in annotations alone, so that flags are read without it

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from preftune.lora.config import LoRA
from preftune.lora.names import Layers
from preftune.resolution import Framing, Resolution
from preftune.solver_names import PredictionType, SolverName

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from preftune.families.quantization import Kind as QuantizationKind
    from preftune.noise import Prediction


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default settings of a model; those of its training are in preftune/training/defaults.py."""

    family: str
    """Name of its module in preftune.families: sd, sdxl."""
    distilled: bool
    """Made for a few steps without guidance, as SD-Turbo and SDXL-Turbo."""
    resolution: Resolution
    num_inference_steps: int
    guidance_scale: float
    solver: SolverName
    lora_target_modules: tuple[str, ...]
    prediction_type: PredictionType
    zero_snr: bool
    """The last timestep is pure noise, where some solvers cannot start."""
    num_train_timesteps: int

    def check_solver(
        self, name: SolverName, num_inference_steps: int, flag: str = "--num-inference-steps"
    ) -> None:
        """Raise ValueError, before any weight loads, for a solver or a number of steps that the model cannot be sampled with; flag is
        that of the number.
        """
        from preftune import solvers

        solvers.check(
            name, num_inference_steps, self.prediction_type, self.zero_snr, self.num_train_timesteps, flag
        )


@dataclass(frozen=True, kw_only=True)
class Cond:
    """Encoded prompts. The tensors depend on the family; programs only select rows and concatenate.

    `positive` has a tensor (B, ...) by name. `negative` has those of the negative prompt: (1, ...),
    the same names, except for tensors that do not depend on the prompt.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Return B."""
        return len(next(iter(self.positive.values())))

    def rows(self, index: slice | Sequence[int]) -> Cond:
        """Return some of the prompts, in this order, with the same negative. A GPU is not waited for, as by a list as an index."""
        import torch

        from rewards.on_device import upload

        chosen: slice | Tensor
        if isinstance(index, slice):
            chosen = index
        else:
            device = next(iter(self.positive.values())).device
            chosen = upload(torch.tensor(index, dtype=torch.int64), device)
        return Cond(
            positive={name: value[chosen] for name, value in self.positive.items()}, negative=self.negative
        )

    def unconditional(self) -> Cond:
        """Return as many negative prompts in place of the prompts."""
        alone = {
            name: self.negative[name].expand_as(value) if name in self.negative else value
            for name, value in self.positive.items()
        }
        return Cond(positive=alone, negative=self.negative)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Return all prompts in one. ValueError unless they have the same names and the same negative."""
        import torch

        first = conds[0]
        for other in conds[1:]:
            if other.positive.keys() != first.positive.keys():
                raise ValueError(f"prompts encoded as {sorted(first.positive)} and {sorted(other.positive)}")
            if other.negative.keys() != first.negative.keys() or not all(
                torch.equal(value, other.negative[name]) for name, value in first.negative.items()
            ):
                raise ValueError("prompts with different negative prompts cannot be joined")
        positive = {name: torch.cat([cond.positive[name] for cond in conds]) for name in first.positive}
        return Cond(positive=positive, negative=first.negative)


class Family(Protocol):
    """A text-to-image model as the programs see it."""

    defaults: Defaults
    denoiser: nn.Module
    """The module whose weights are trained; a program replaces it by the prepared (distributed) module."""
    device: torch.device
    prediction_type: PredictionType
    text_encoders: Sequence[nn.Module]
    """Frozen. An encoder that is trained gets gradients, and encodes the negative prompt in each call."""
    tokenizers: Sequence[Any]
    """One for each text encoder."""

    @property
    def vae(self) -> nn.Module:
        """The autoencoder, frozen."""
        ...

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """Return (C, h, w). ValueError for a size that is no multiple of the autoencoder's factor."""
        ...

    def encode(
        self, prompts: Sequence[str], negative: str = "", framings: Sequence[Framing] | None = None
    ) -> Cond:
        """Return the encoded prompts; framings, one for each prompt, say how training images were cropped."""
        ...

    def framed(self, cond: Cond, framings: Sequence[Framing]) -> Cond:
        """Return prompts that were encoded without framings as `encode` returns them with these."""
        ...

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Prediction:
        """Return the predicted clean latents and noise for latents x (B, C, h, w) at timesteps t (B,).

        A guidance_scale of 1 or less means no guidance: one forward pass, without the negative prompt.
        """
        ...

    def lean(self) -> AbstractContextManager[None]:
        """Context without gradient in which `predict` takes the fast way: see preftune/families/lean.py.

        It reads the trained weights as they are when it begins; those that training changes inside come into effect with the next.
        What `predict` returns inside may be used by autograd outside.
        """
        ...

    def compile(self, *, graphs: bool = True, blocks: bool = False) -> None:
        """Say how lean passes run on a GPU: replayed as CUDA graphs, as they are unless this says no; compiled block by block.

        The first pass of each shape takes longer: seconds for a graph, minutes to compile at Stable Diffusion's size.
        """
        ...

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) of x_t = alpha x_0 + sigma eps, float32, in the shape of t; (1, 0) where t is -1."""
        ...

    def timesteps(self, num_inference_steps: int, solver: SolverName, resolution: Resolution) -> Tensor:
        """Return (N + 1,) descending timesteps of a solver: N calls of the denoiser and the end."""
        ...

    def training_timesteps(self, generators: Sequence[Generator]) -> Tensor:
        """Return timesteps (B,), one from each generator, from the distribution that the family is trained with."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), about in [0, 1]: not clamped, since a clamp blocks a reward's gradient."""
        ...

    def encode_pixels(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Return latents (B, C, h, w) of pixels in [0, 1]: a sample of the posterior by each generator, or its mean."""
        ...

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the posterior's mean and standard deviation, (B, C, h, w), for pixels in [0, 1], in the autoencoder's precision.

        Without a posterior, as of AutoencoderTiny: the latents, and None.
        """
        ...

    def latents_of(
        self, mean: Tensor, std: Tensor | None, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        """Return the latents of a posterior, as `encode_pixels` does of pixels."""
        ...

    def quantize(self, kind: QuantizationKind, device: torch.device | str) -> None:
        """Hold the denoiser's linear layers in 4 or 8 bits on the device, before `trainable`, for a LoRA alone."""
        ...

    def trainable(self, lora: LoRA | None, seed: int) -> nn.Module:
        """Freeze all but the denoiser's LoRA, or with None all its weights; trained weights are float32."""
        ...

    def open_text_encoders(self) -> None:
        """Train those weights of the text encoders that an encoded prompt depends on; put the encoders into training mode."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Context in which the model is the one before tuning. ValueError if all weights were tuned."""
        ...

    def set_speed(self, attention: str, *, gradient_checkpointing: bool, vae_checkpointing: bool) -> None:
        """Set the attention kernel ("sdpa" or "xformers"; ValueError if missing) and checkpointing."""
        ...

    def save_tuned(self, folder: Path, lora: LoRA | None) -> None:
        """Write what was tuned: a LoRA that `pipe.load_lora_weights(folder)` loads, or the denoiser's folder."""
        ...

    def load_tuned(self, folder: Path, weight: float = 1.0) -> None:
        """Load the result of `save_tuned` or another LoRA file, frozen; weight scales a LoRA. ValueError if it does not fit.

        A LoRA of text encoders is loaded too: prompts that were encoded before are not those of the model any more.
        """
        ...

    def start_from(self, path: Path) -> None:
        """Merge a LoRA into the weights, before `trainable`; `save_tuned` then writes the sum of it and of the LoRA trained since.

        `reference` is the model with it. ValueError if it does not fit.
        """
        ...

    def lora_layers(self) -> Layers:
        """Return the layers that a LoRA can update."""
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline in diffusers' folder format."""
        ...

    def pipeline(self) -> Any:
        """Return the model as a pipeline of diffusers that holds these very parts, with the scheduler that its folder names."""
        ...

    def scheduler(self, solver: SolverName, num_inference_steps: int) -> Any:
        """Return diffusers' scheduler for a solver that is not ours (pndm, dpm++), set to its steps; it holds state."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move everything, and cast what is frozen: trained weights stay float32."""
        ...
