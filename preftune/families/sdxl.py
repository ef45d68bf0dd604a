"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a UNet with two CLIP text encoders and the image's size as an input.

The refiner, which has one text encoder and a score instead of the size, is not of this family.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
from rewards.on_device import filled, upload

_TIME_IDS = 6
"""Original height and width, top and left of the crop, target height and width."""


def check(source: Source, vae: Path | None = None) -> Defaults:
    """Return the defaults of a Stable Diffusion XL model; reads the JSON files of its configurations alone.

    ValueError in one sentence for what it is instead. `vae` is the folder of another autoencoder, as in `load`.
    """
    folder, index = source.folder, source.index()
    if index.get("text_encoder") == [None, None] and index.get("text_encoder_2"):
        raise ValueError(f"{folder} has text_encoder_2 alone (an SDXL refiner); expected two text encoders")
    configs.check_parts(folder, index)
    noise = vp.read(source.scheduler_config(), folder / "scheduler")
    autoencoder = configs.check_vae(folder / "vae")
    first = configs.check_text_encoder(folder / "text_encoder", "CLIPTextModel")
    second = configs.check_text_encoder(folder / "text_encoder_2", "CLIPTextModelWithProjection")
    denoiser = configs.read_model(folder / "unet", "UNet2DConditionModel")
    width = first["hidden_size"] + second["hidden_size"]
    configs.check_unet(folder, denoiser, autoencoder, width, addition="text_time")
    ids = denoiser.get("addition_time_embed_dim") or 0
    found, pooled = denoiser.get("projection_class_embeddings_input_dim"), second.get("projection_dim", 512)
    if found != _TIME_IDS * ids + pooled:
        raise ValueError(
            f"{folder}: its unet has projection_class_embeddings_input_dim {found} (an SDXL refiner has 5 times"
            f" addition_time_embed_dim in it); expected {_TIME_IDS} x {ids} + {pooled}, the pooled text"
        )
    if source.file is None:
        configs.check_tokenizer(folder / "tokenizer")
        configs.check_tokenizer(folder / "tokenizer_2")
    if vae is not None:
        configs.check_vae(vae, autoencoder)
    return _defaults(denoiser, autoencoder, noise)


def _defaults(denoiser: Mapping[str, Any], autoencoder: Mapping[str, Any], noise: vp.VP) -> Defaults:
    """50 steps of Euler at 5, as the pipeline."""
    return unets.defaults(
        denoiser,
        autoencoder,
        noise,
        family="sdxl",
        latent_size=128,
        guidance_scale=5.0,
        solver="euler",
    )


def lora_layers(folder: Path) -> Layers:
    """Return the layers of a checked pipeline folder that a LoRA can update."""
    return unets.layers_of_folder(
        folder, {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    )


class SDXL:
    """The Family of Stable Diffusion XL; see preftune.families.base for what each method promises."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: unets.Autoencoder,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: Any,
        tokenizer_2: Any,
        scheduler_config: Mapping[str, object],
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        self.unet, self.vae = unet, vae
        self.text_encoders: Sequence[nn.Module] = (text_encoder, text_encoder_2)
        self.tokenizers: Sequence[Any] = (tokenizer, tokenizer_2)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.denoiser: nn.Module = unet
        self.device: torch.device = vae.device
        self._scheduler_config = scheduler_config
        self.noise = vp.read(scheduler_config, "scheduler_config")
        self.prediction_type: PredictionType = self.noise.prediction_type
        self.defaults: Defaults = _defaults(unet.config, vae.config, self.noise)
        self._negatives: dict[str, dict[str, Tensor]] = {}
        tuned = {
            "unet": unet,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
        }
        unets.keep_layout(vae)
        self._lean = Lean(unet)
        self._tuned = unets.Tuned(tuned, changed=(self._negatives.clear, self._lean.changed))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move all parts, and cast those that are frozen; the autoencoder as `vae_dtype` says."""
        self._lean.casting_to(dtype)
        for part in (self.unet, *self.text_encoders):
            unets.cast(part, device, dtype)
        self._lean.was_cast()
        unets.cast(self.vae, device, None if dtype is None else vae_dtype(self.vae.config, dtype))
        self.device = self.vae.device
        for part in (self.unet, self.vae):
            unets.channels_last(part, self.device)
        self.noise = dataclasses.replace(self.noise, alphas_cumprod=self.noise.alphas_cumprod.to(self.device))
        self._negatives.clear()
        return self

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """Return (C, h, w)."""
        return unets.latent_shape(self.vae, resolution)

    def _encoded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The hidden states before the last layer of both encoders, side by side, and the second's projected text."""
        outputs = [
            encoder(text.token_ids(tokenizer, encoder, prompts, self.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"embeds": embeds, "pooled": outputs[1].text_embeds}

    def _negative(self, negative: str, positive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The negative prompt as the pipeline encodes it: zeros for an empty one, where the folder says so."""
        if not negative and self.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value[:1]) for name, value in positive.items()}
        return text.encoded_once(negative, self.text_encoders, self._encoded, self._negatives)

    def encode(
        self, prompts: Sequence[str], negative: str = "", framings: Sequence[Framing] | None = None
    ) -> Cond:
        """Return embeds (B, L, D) and pooled (B, P), and of framings (B, 4) original height and width, top and left.

        Without framings an image counts as one that was never resized nor cropped, as in the pipeline.
        """
        positive = self._encoded(prompts)
        null = self._negative(negative, positive)
        cond = Cond(positive=positive, negative=null)
        return cond if framings is None else self.framed(cond, framings)

    def framed(self, cond: Cond, framings: Sequence[Framing]) -> Cond:
        """Return the prompts with `framing` (B, 4): original height and width, top and left."""
        rows = [(*framing.original, framing.top, framing.left) for framing in framings]
        if len(rows) != len(cond):
            raise ValueError(f"{len(cond)} prompts but {len(rows)} framings")
        framing = upload(torch.tensor(rows, dtype=torch.float32), self.device)
        return Cond(positive={**cond.positive, "framing": framing}, negative=cond.negative)

    def time_ids(self, x: Tensor, framing: Tensor | None = None) -> Tensor:
        """Return (B, 6) float32 for latents x (B, C, h, w): (original height, width, top, left, target height, width).

        The target is the size of x in pixels, the framing (B, 4) by default (target height, target width, 0, 0).
        """
        factor = configs.vae_factor(self.vae.config)
        height, width = x.shape[-2] * factor, x.shape[-1] * factor
        ids = filled([height, width, 0, 0, height, width], x.device).repeat(len(x), 1)
        if framing is not None:
            ids[:, :4] = framing
        return ids

    def predict(self, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Prediction:
        """Return the UNet's prediction in float32; with guidance, both passes in one batch, with the same time ids."""

        def call(x: Tensor, t: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            added = {"text_embeds": rows["pooled"], "time_ids": self.time_ids(x, rows.get("framing"))}
            return self._lean.call(self.denoiser, x, t, rows["embeds"], added)

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
        with self._vae_precision():
            return unets.decode(self.vae, x0)

    def encode_pixels(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Return scaled latents in float32."""
        return self.latents_of(*self.moments(pixels), generators)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the posterior's mean and standard deviation."""
        with self._vae_precision():
            return unets.moments(self.vae, upload(pixels, self.device))

    def latents_of(
        self, mean: Tensor, std: Tensor | None, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        """Return scaled latents in float32."""
        return unets.latents_of(self.vae, mean, std, generators)

    def _vae_precision(self) -> AbstractContextManager[Any]:
        """No autocast to float16 around an autoencoder that overflows in it."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if vae_dtype(self.vae.config, dtype) != dtype:
                return torch.autocast(kind, enabled=False)
        return nullcontext()

    def quantize(self, kind: quantization.Kind, device: torch.device | str) -> None:
        """Hold the UNet's linear layers in 4 or 8 bits."""
        quantization.quantize(self.unet, kind, device)

    def trainable(self, lora: loras.LoRA | None, seed: int) -> nn.Module:
        """Freeze all parts, then open the UNet."""
        unets.freeze((self.unet, self.vae, *self.text_encoders))
        return self._tuned.open(lora, seed)

    def open_text_encoders(self) -> None:
        """Train the text encoders, but not what comes after the first one's last layer but one, whose states are read."""
        self._negatives.clear()
        for encoder in self.text_encoders:
            encoder.requires_grad_(True).train()
        first: Any = self.text_encoders[0]
        text_model = getattr(first, "text_model", first)  # transformers 5 has no such level
        text_model.encoder.layers[-1].requires_grad_(False)
        text_model.final_layer_norm.requires_grad_(False)

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
        """Return a StableDiffusionXLPipeline, without a watermark in its images; it casts its autoencoder up itself, to decode."""
        unets.cast(self.vae, self.device, self.unet.dtype)
        return self._pipeline(vp.own_scheduler(self._scheduler_config) or self._sampler())

    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline in diffusers' folder format, with SDXL's own sampler (Euler)."""
        for tokenizer in self.tokenizers:
            text.to_save(tokenizer)
        self._pipeline(self._sampler()).save_pretrained(folder)

    def _sampler(self) -> Any:
        """SDXL's own sampler with this model's noise."""
        if self.noise.trailing and not self.noise.zero_snr:
            return vp.trailing_scheduler(self.noise)
        return EulerDiscreteScheduler(
            **self.noise.betas,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.noise.zero_snr,
            timestep_spacing="trailing" if self.noise.zero_snr else "leading",
            steps_offset=1,
        )

    def _pipeline(self, scheduler: Any) -> Any:
        return StableDiffusionXLPipeline(
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return float32 for an autoencoder whose activations overflow in float16 (force_upcast), else dtype itself."""
    return torch.float32 if dtype == torch.float16 and configs.force_upcast(config) else dtype


def load(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: Path | None = None,
) -> SDXL:
    """Load a checked model, all parts frozen and in eval mode.

    `vae` is the folder of another autoencoder, such as one that was repaired for float16.
    """
    config = configs.read_json((vae or source.folder / "vae") / "config.json")
    classes = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
    }
    found = parts.load(
        source, StableDiffusionXLPipeline, classes, dtype, vae=vae, vae_dtype=vae_dtype(config, dtype)
    )
    family = SDXL(
        **{name: found[name] for name in ("vae", *classes)},
        scheduler_config=source.scheduler_config(),
        force_zeros_for_empty_prompt=source.index().get("force_zeros_for_empty_prompt", True),
    )
    unets.freeze((family.unet, family.vae, *family.text_encoders))
    return family.to(device)
