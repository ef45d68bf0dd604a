"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel, AutoencoderKL and one CLIP text encoder, in diffusers' folder format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from preftune import lora as loras
from preftune.families.base import Cond
from preftune.noise import Prediction

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def check(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a Stable Diffusion pipeline; reads its model_index.json only."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline folder: it has no model_index.json; save one with pipe.save_pretrained(folder)"
        )
    try:
        parts = json.loads(index.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    if not isinstance(parts, dict):
        raise ValueError(f"{index} holds no JSON object; save a pipeline with pipe.save_pretrained(folder)")
    missing = [part for part in PARTS if part not in parts or not (folder / part).is_dir()]
    if missing or "text_encoder_2" in parts:
        what = f"lacks {', '.join(missing)}" if missing else "has a second text encoder"
        raise ValueError(
            f"{folder} is not a Stable Diffusion 1.x or 2.x pipeline: it {what} (its class is {parts.get('_class_name')})"
        )


class SD:
    """The Family of Stable Diffusion 1.x and 2.x; see preftune.families.base for what each method promises."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        scheduler_config: Mapping[str, object],
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler_config = scheduler_config
        self.denoiser: nn.Module = unet
        self.device: torch.device = vae.device
        scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction: Prediction = scheduler.config["prediction_type"]
        self._abar: Tensor = scheduler.alphas_cumprod
        self._null: dict[str, Tensor] = {}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "SD":
        """Move all parts, and cast those that are frozen: trained weights stay float32."""
        for part in (self.unet, self.vae, self.text_encoder):
            part.to(device)
            for tensor in (*part.parameters(), *part.buffers()):
                if dtype is not None and tensor.is_floating_point() and not tensor.requires_grad:
                    tensor.data = tensor.data.to(dtype)
        self.device = self.vae.device
        self._abar = self._abar.to(device)
        self._null.clear()
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w)."""
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")
        return int(self.vae.config["latent_channels"]), height // factor, width // factor

    def _states(self, prompts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return self.text_encoder(batch.input_ids.to(self.device))[0]

    def encode(self, prompts: Sequence[str], negative: str = "") -> Cond:
        """Return states (B, L, D) of the last hidden layer, as the pipeline's own; the negative's are computed once."""
        if self.text_encoder.training:
            return Cond(states=self._states(prompts), negative=self._states([negative]))
        if negative not in self._null:
            with torch.no_grad():
                self._null[negative] = self._states([negative])
        return Cond(states=self._states(prompts), negative=self._null[negative])

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """Return the UNet's output in float32; with guidance, both passes in one batch."""
        dtype = cond.states.dtype
        if guidance == 1.0:
            return self.denoiser(x.to(dtype), t, cond.states).sample.float()
        states = torch.cat([cond.negative.expand(len(x), -1, -1), cond.states])
        output = self.denoiser(torch.cat([x, x]).to(dtype), torch.cat([t, t]), states).sample.float()
        without, given = output.chunk(2)
        return without + guidance * (given - without)

    def decode(self, x0: Tensor) -> Tensor:
        """Return pixels in float32, not clamped."""
        latents = (x0 / self.vae.config["scaling_factor"]).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float() / 2 + 0.5

    def encode_pixels(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Return scaled latents in float32."""
        posterior = self.vae.encode((pixels.to(self.device) * 2 - 1).to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generators is not None:
            noise = [torch.randn(latents.shape[1:], generator=generator) for generator in generators]
            latents = latents + posterior.std.float() * torch.stack(noise).to(latents)
        return latents * self.vae.config["scaling_factor"]

    def abar(self, t: Tensor) -> Tensor:
        """Return the cumulative alphas of training timesteps."""
        return self._abar[t.to(self._abar.device)]

    def trainable(self, lora: loras.LoRA, seed: int) -> nn.Module:
        """Freeze all parts, then open the UNet."""
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False).eval()
        if lora.rank:
            loras.inject(self.unet, lora, seed)
        else:
            self.unet.float().requires_grad_(True)
        return self.unet

    def set_speed(self, attention: str, *, checkpointing: bool, vae_checkpointing: bool) -> None:
        """Choose the attention kernel, and what is computed again in the backward pass instead of kept."""
        if attention == "xformers":
            try:
                self.unet.enable_xformers_memory_efficient_attention()
            except (ModuleNotFoundError, ValueError) as error:
                raise ValueError(
                    f'--attention xformers: {error}; pip install -e ".[xformers]" on a machine with a GPU, or use sdpa'
                ) from error
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        if vae_checkpointing:
            self.vae.enable_gradient_checkpointing()

    def save_tuned(self, folder: Path, lora: loras.LoRA) -> None:
        """Write `pytorch_lora_weights.safetensors`, or at rank 0 the UNet in diffusers' folder format."""
        if lora.rank:
            loras.save(self.unet, folder)
        else:
            self.unet.save_pretrained(folder)

    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline in diffusers' folder format, in float32."""
        StableDiffusionPipeline(
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=PNDMScheduler.from_config(self.scheduler_config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SD:
    """Load a pipeline folder, all parts frozen and in eval mode. ValueError where `check` finds it is none."""
    check(folder)
    family = SD(
        unet=UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype, local_files_only=True
        ),
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, local_files_only=True),
        text_encoder=CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=dtype, local_files_only=True
        ),
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True),
        scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
    )
    for part in (family.unet, family.vae, family.text_encoder):
        part.requires_grad_(False).eval()
    return family.to(device)
