"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel, AutoencoderKL and one CLIP text encoder, in diffusers' folder format."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from preftune.families import configs, parts, quantization, text, vp
from preftune.families import unet as unets
from preftune.families.base import Cond, Defaults
from preftune.families.lean import Lean
from preftune.families.source import Source
from preftune.lora import tuning as loras
from preftune.lora.names import Layers
from preftune.noise import Prediction, predict_from
from preftune.resolution import Framing, Resolution
from preftune.solver_names import PredictionType, SolverName
from rewards.on_device import upload


def check(source: Source, vae: Path | None = None) -> Defaults:
    """Return the defaults of a Stable Diffusion model; reads the JSON files of its configurations alone.

    ValueError in one sentence for what it is instead. `vae` is the folder of another autoencoder, as in `load`.
    """
    folder, index = source.folder, source.index()
    configs.check_parts(folder, index)
    if index.get("text_encoder_2") not in (None, [None, None]):
        raise ValueError(
            f"{folder} has a text_encoder_2; expected one text encoder in a {index['_class_name']}"
        )
    noise = vp.read(source.scheduler_config(), folder / "scheduler")
    autoencoder = configs.check_vae(folder / "vae")
    encoder = configs.check_text_encoder(folder / "text_encoder", "CLIPTextModel")
    denoiser = configs.read_model(folder / "unet", "UNet2DConditionModel")
    configs.check_unet(folder, denoiser, autoencoder, encoder["hidden_size"], addition=None)
    if source.file is None:
        configs.check_tokenizer(folder / "tokenizer")
    if vae is not None:
        configs.check_vae(vae, autoencoder)
    return _defaults(denoiser, autoencoder, noise)


def _defaults(denoiser: Mapping[str, Any], autoencoder: Mapping[str, Any], noise: vp.VP) -> Defaults:
    """50 steps of PNDM at 7.5, as the pipeline; of DDIM at zero terminal SNR, where PNDM cannot start."""
    return unets.defaults(
        denoiser,
        autoencoder,
        noise,
        family="sd",
        latent_size=64,
        guidance_scale=7.5,
        solver="ddim" if noise.zero_snr else "pndm",
    )


def lora_layers(folder: Path) -> Layers:
    """Return the layers of a checked pipeline folder that a LoRA can update."""
    return unets.layers_of_folder(folder, {"text_encoder": CLIPTextModel})


class SD:
    """The Family of Stable Diffusion 1.x and 2.x; see preftune.families.base for what each method promises."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: unets.Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        scheduler_config: Mapping[str, object],
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.text_encoders: Sequence[nn.Module] = (text_encoder,)
        self.tokenizers: Sequence[Any] = (tokenizer,)
        self.denoiser: nn.Module = unet
        self.device: torch.device = vae.device
        self._scheduler_config = scheduler_config
        self.noise = vp.read(scheduler_config, "scheduler_config")
        self.prediction_type: PredictionType = self.noise.prediction_type
        self.defaults: Defaults = _defaults(unet.config, vae.config, self.noise)
        self._negatives: dict[str, Tensor] = {}
        tuned = {"unet": unet, "text_encoder": text_encoder}
        unets.keep_layout(vae)
        self._lean = Lean(unet)
        self._tuned = unets.Tuned(tuned, changed=(self._negatives.clear, self._lean.changed))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move all parts, and cast those that are frozen."""
        self._lean.casting_to(dtype)
        for part in (self.unet, self.vae, self.text_encoder):
            unets.cast(part, device, dtype)
        self._lean.was_cast()
        self.device = self.vae.device
        for part in (self.unet, self.vae):
            unets.channels_last(part, self.device)
        self.noise = dataclasses.replace(self.noise, alphas_cumprod=self.noise.alphas_cumprod.to(self.device))
        self._negatives.clear()
        return self

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """Return (C, h, w)."""
        return unets.latent_shape(self.vae, resolution)

    def _embeds(self, prompts: Sequence[str]) -> Tensor:
        ids = text.token_ids(self.tokenizer, self.text_encoder, prompts, self.device)
        embeds: Tensor = self.text_encoder(ids)[0]
        return embeds

    def encode(
        self, prompts: Sequence[str], negative: str = "", framings: Sequence[Framing] | None = None
    ) -> Cond:
        """Return embeds (B, L, D), the last hidden layer, as the pipeline's own; framings play no part."""
        null = text.encoded_once(negative, self.text_encoders, self._embeds, self._negatives)
        return Cond(positive={"embeds": self._embeds(prompts)}, negative={"embeds": null})

    def framed(self, cond: Cond, framings: Sequence[Framing]) -> Cond:
        """Return the prompts as they are."""
        return cond

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Prediction:
        """Return the UNet's prediction in float32; with guidance, both passes in one batch."""

        def call(x: Tensor, t: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            return self._lean.call(self.denoiser, x, t, rows["embeds"])

        output = unets.guided(call, x, t, cond, guidance_scale)
        return predict_from(output, x, *self.schedule(t), self.prediction_type)

    def lean(self) -> AbstractContextManager[None]:
        """The UNet in the run's precision, its LoRA merged, without autocast."""
        return self._lean.on()

    def compile(self, *, graphs: bool = True, blocks: bool = False) -> None:
        """Say how the UNet of lean passes runs on a GPU."""
        self._lean.compile(graphs=graphs, blocks=blocks)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma)."""
        return vp.schedule(self.noise, t)

    def timesteps(self, num_inference_steps: int, solver: SolverName, resolution: Resolution) -> Tensor:
        """Return the solver's timesteps, which depend on no resolution here."""
        return vp.timesteps(self.noise, num_inference_steps, solver)

    def training_timesteps(self, generators: Sequence[Generator]) -> Tensor:
        """Return uniform timesteps."""
        return vp.training_timesteps(self.noise, generators)

    def scheduler(self, solver: SolverName, num_inference_steps: int) -> Any:
        """Return diffusers' pndm or dpm++ with this model's betas."""
        return vp.scheduler(self.noise, solver, num_inference_steps)

    def decode(self, x0: Tensor) -> Tensor:
        """Return pixels in float32, not clamped."""
        return unets.decode(self.vae, x0)

    def encode_pixels(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Return scaled latents in float32."""
        return self.latents_of(*self.moments(pixels), generators)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the posterior's mean and standard deviation."""
        return unets.moments(self.vae, upload(pixels, self.device))

    def latents_of(
        self, mean: Tensor, std: Tensor | None, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        """Return scaled latents in float32."""
        return unets.latents_of(self.vae, mean, std, generators)

    def quantize(self, kind: quantization.Kind, device: torch.device | str) -> None:
        """Hold the UNet's linear layers in 4 or 8 bits."""
        quantization.quantize(self.unet, kind, device)

    def trainable(self, lora: loras.LoRA | None, seed: int) -> nn.Module:
        """Freeze all parts, then open the UNet."""
        unets.freeze((self.unet, self.vae, self.text_encoder))
        return self._tuned.open(lora, seed)

    def open_text_encoders(self) -> None:
        """Train all weights of the text encoder."""
        self._negatives.clear()
        self.text_encoder.requires_grad_(True).train()

    def reference(self) -> AbstractContextManager[None]:
        """The LoRA off, where there is one, in the text encoders too."""
        return self._tuned.reference()

    def set_speed(self, attention: str, *, gradient_checkpointing: bool, vae_checkpointing: bool) -> None:
        """Choose the attention kernel, and what is computed again in the backward pass instead of kept."""
        unets.set_speed(
            self.unet,
            self.vae,
            attention,
            gradient_checkpointing=gradient_checkpointing,
            vae_checkpointing=vae_checkpointing,
        )

    def save_tuned(self, folder: Path, lora: loras.LoRA | None) -> None:
        """Write the LoRA, or the UNet in diffusers' folder format."""
        self._tuned.save(folder, lora)

    def load_tuned(self, folder: Path, weight: float = 1.0) -> None:
        """Load a LoRA or a UNet folder."""
        self._tuned.load(folder, weight)

    def start_from(self, path: Path) -> None:
        """Merge a LoRA into the model."""
        self._tuned.start_from(path)

    def lora_layers(self) -> Layers:
        """Return the layers of the UNet and of the text encoders."""
        return self._tuned.layers()

    def pipeline(self) -> Any:
        """Return a StableDiffusionPipeline, without a safety checker."""
        return self._pipeline(vp.own_scheduler(self._scheduler_config) or self._sampler())

    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline in diffusers' folder format, with Stable Diffusion's own sampler (DDIM at zero SNR)."""
        text.to_save(self.tokenizer)
        self._pipeline(self._sampler()).save_pretrained(folder)

    def _sampler(self) -> Any:
        """Stable Diffusion's own sampler with this model's noise."""
        if self.noise.trailing and not self.noise.zero_snr:
            return vp.trailing_scheduler(self.noise)
        settings = {
            **self.noise.betas,
            "prediction_type": self.prediction_type,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        return (
            DDIMScheduler(
                **settings, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
            )
            if self.noise.zero_snr
            else PNDMScheduler(**settings, skip_prk_steps=True)
        )

    def _pipeline(self, scheduler: Any) -> Any:
        return StableDiffusionPipeline(
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def load(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: Path | None = None,
) -> SD:
    """Load a checked model, all parts frozen and in eval mode; `vae` is the folder of another autoencoder."""
    classes = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    found = parts.load(source, StableDiffusionPipeline, classes, dtype, vae=vae)
    family = SD(
        **{name: found[name] for name in ("vae", *classes)}, scheduler_config=source.scheduler_config()
    )
    unets.freeze((family.unet, family.vae, family.text_encoder))
    return family.to(device)
