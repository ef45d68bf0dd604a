"""Option groups that the training programs share, each with the checks that need no weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

import rewards
from preftune import resolution as resolutions
from preftune.cli.scorer_flags import Files, Weighted
from preftune.families import Defaults, Pretrained, check, lora_layers, vae_folder
from preftune.lora.config import LoRA
from preftune.prompts import read_prompts
from preftune.resolution import Resolution
from preftune.sampling_config import Sampling
from preftune.training.guard_config import GuardConfig
from rewards.terms import Combination, Normalization, parse_files, parse_weights, units


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, which of its weights are trained, and the training resolution."""

    pretrained: Annotated[Pretrained, tyro.conf.arg(name="")]
    vae: Path | None = None
    """Folder or hub id of an autoencoder to use instead of the pipeline's, such as madebyollin/sdxl-vae-fp16-fix for SDXL in fp16."""
    train: Literal["lora", "full"] = "lora"
    """Trained weights: a LoRA, or all weights of the denoiser."""
    lora: LoRA = field(default_factory=LoRA)
    lora_start: Path | None = None
    """LoRA to start from: a file of kohya's, diffusers' or peft's layout, or a folder or run with one. It is merged into the model, text
    encoders included; what is saved is its sum with the LoRA trained here, for the model of --model.
    """
    export: Literal["kohya"] | None = None
    """kohya = also write RUN/lora_kohya.safetensors at the end, for AUTOMATIC1111's web UI, ComfyUI and sd-scripts."""
    resolution: str | None = None
    """Training resolution in pixels: 512, or WIDTHxHEIGHT as 768x512; None = the model's own."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's activations in the backward pass."""
    vae_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass; at 512 px they are most of ReFL's memory."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernel of the denoiser."""
    quantization: Literal["4bit", "8bit", "fp8"] | None = None
    """Hold the linear layers of the denoiser in 4 or 8 bits under the LoRA: 4bit (NF4) and 8bit need bitsandbytes, fp8 needs torchao.
    Less memory, no more speed; the model before training is another one, a little worse. fp8 needs --gradient-checkpointing to save
    anything: torchao's backward pass keeps the weights of all layers in half precision otherwise.
    """
    offload: bool = False
    """Keep scorers and frozen text encoders in the CPU's memory except while they are used; each use copies them to the GPU."""

    def __post_init__(self) -> None:
        if self.resolution is not None:
            try:
                resolutions.parse(self.resolution)
            except ValueError as error:
                raise ValueError(f"--resolution: {error}") from error
        if self.quantization is not None and self.train == "full":
            raise ValueError(
                f"--quantization {self.quantization} freezes the weights that --train full trains; use --train lora"
            )

    def tuned(self) -> LoRA | None:
        """Return the LoRA that is trained, or None for all weights."""
        return self.lora if self.train == "lora" else None

    def lora_settings(self) -> dict[str, object]:
        """Return what of the LoRA a resume must not change, besides the shapes of its weights."""
        lora = self.tuned()
        return {"lora scale": lora and (lora.alpha or lora.rank) / lora.rank}

    def check(self, lora: LoRA | None = None) -> Defaults:
        """Return the model's defaults, in milliseconds once it is on this machine; ValueError for what is no model of a known family.

        ValueError, too, for settings of a LoRA where all weights are trained; `lora` is the program's own default.
        """
        from preftune.families import quantization
        from preftune.lora import files as lora_files  # these need torch, which the flags do not

        if self.train == "full" and self.lora not in (LoRA(), lora):
            raise ValueError(
                "--lora settings do nothing with --train full; leave them out, or choose --train lora"
            )
        if self.train == "full" and self.export is not None:
            raise ValueError(
                f"--export {self.export} writes a LoRA, which --train full has not; use --train lora"
            )
        if self.quantization is not None:
            quantization.check(self.quantization)
        if self.vae is not None:  # before a model is downloaded
            vae_folder(str(self.vae))
        if self.lora_start is not None:
            lora_files.find_some(self.lora_start)
        defaults = check(self.pretrained.source(), self.vae)
        if self.lora_start is not None:
            others = lora_files.read(self.lora_start, lora_layers(self.pretrained.source())).keys() - {"unet"}
            if self.train == "full" and others:
                raise ValueError(
                    f"--lora-start {self.lora_start} also updates {' and '.join(sorted(others))}, which --train full does not"
                    " save; use --train lora"
                )
        return defaults

    def size(self, defaults: Defaults) -> Resolution:
        """Return the resolution in training."""
        return defaults.resolution if self.resolution is None else resolutions.parse(self.resolution)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Scorers, their weights, how their scores become one reward, and what watches it."""

    rewards: Weighted = ()
    reward_files: Files = ()
    reward_normalization: Normalization = "none"
    """none = raw scores; card, dataset = scale each scorer to mean 0 and standard deviation 1."""
    reward_combination: Combination = "sum"
    """sum = weighted sum; min = the least weighted score, which what fools one scorer alone does not raise. It needs scores in one unit."""
    reward_stats: Path | None = None
    """summary.json of `preftune score` with the statistics for --reward-normalization dataset."""
    reward_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Floating-point precision of the scorers."""
    guard: Annotated[GuardConfig, tyro.conf.arg(name="")] = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        self.guard.check(self.weights())
        self.files()
        if self.reward_combination == "min" and (
            len(self.weights()) < 2 or self.reward_normalization == "none"
        ):
            raise ValueError(
                "--reward-combination min is the least of several scores in one unit; give two or more --rewards and"
                " --reward-normalization card or dataset"
            )

    def weights(self) -> dict[str, float]:
        """Return scorer name -> weight; ValueError for a wrong term."""
        return parse_weights(self.rewards) if self.rewards else {}

    def files(self) -> dict[str, Path]:
        """Return scorer name -> weights on disk, of held-out ones, too; ValueError for a wrong term."""
        return parse_files(self.reward_files, [*self.weights(), *self.guard.weights()])

    def check_names(self, *, differentiable: bool = False) -> None:
        """Raise ValueError for unknown scorers or wrong statistics, and for a scorer without the gradient that is needed."""
        names = list(self.weights())
        units([rewards.find_card(name) for name in names], self.reward_normalization, self.reward_stats)
        if differentiable:
            for name in names:
                rewards.check_differentiable(name, "--rewards")

    def check(self) -> None:
        """Raise ValueError for missing or altered files of scorers."""
        rewards.check_all([*self.weights(), *self.guard.weights()], self.files(), download=False)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation prompts and the sampling settings of their images."""

    validation_prompts: Path | None = None
    """Prompts whose images are generated and scored during training; None = the first training prompts."""
    num_validation_prompts: int | None = None
    """Maximum number of validation prompts; None = 256 of --validation-prompts, 8 of the training prompts."""
    sample: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.num_validation_prompts is not None and self.num_validation_prompts < 1:
            raise ValueError(
                f"--num-validation-prompts must be at least 1, got {self.num_validation_prompts}"
            )

    def check(self, defaults: Defaults) -> None:
        """Raise ValueError for settings that the model cannot be sampled with."""
        self.sample.resolved(defaults)

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """Return the prompts: those of --validation-prompts, else the first different ones of texts."""
        return self.named() or self.first(texts)

    def named(self) -> list[str] | None:
        """Return the prompts of --validation-prompts, None without it; ValueError for a file that cannot be read."""
        if self.validation_prompts is None:
            return None
        return read_prompts(self.validation_prompts)[: self.num_validation_prompts or 256]

    def first(self, texts: Sequence[str]) -> list[str]:
        """Return the first different ones of texts."""
        return list(dict.fromkeys(texts))[: self.num_validation_prompts or 8]


def check_base_distance(weight: float, train: Literal["lora", "full"]) -> None:
    """Raise ValueError for a weight of the distance to the base model that is none, and where there is no base model to compare with."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"--base-distance must be 0 or more and finite, got {weight}")
    if weight and train == "full":
        raise ValueError(
            f"--base-distance {weight} compares with the model whose LoRA is off, and --train full has none; use --train lora"
        )


def check_guidance(scale: float, name: str = "--guidance-scale") -> None:
    """Raise ValueError unless training can use this guidance: 1 for none, or more."""
    if not (1 <= scale < math.inf):
        raise ValueError(f"{name} must be 1 (no guidance) or more in training, got {scale:g}")


def check_dropout(share: float) -> None:
    """Raise ValueError for an invalid share of captions."""
    if not 0 <= share < 1:
        raise ValueError(f"--caption-dropout must lie in [0, 1), got {share}")
