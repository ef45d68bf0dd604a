"""Functions that the families with a UNet2DConditionModel and an AutoencoderKL or AutoencoderTiny share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from preftune.ahead import initial_noise
from preftune.families import configs, quantization, vp, weights
from preftune.families.base import Cond, Defaults
from preftune.lora import tuning as loras
from preftune.lora.files import Update
from preftune.lora.names import Layers, layers_of
from preftune.resolution import Resolution
from preftune.solver_names import SolverName
from rewards.on_device import filled

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny

Call = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(x (N, C, h, w), t (N,), conditions by name (N, ...)) -> the network's output (N, C, h, w)."""


def defaults(
    denoiser: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    noise: vp.VP,
    *,
    family: str,
    latent_size: int,
    guidance_scale: float,
    solver: SolverName,
) -> Defaults:
    """Return the defaults of a model with these configurations; latent_size is its size where the UNet's names none.

    A distilled model has 4 steps of Euler without guidance instead.
    """
    return Defaults(
        family=family,
        distilled=noise.distilled,
        resolution=configs.trained_resolution(denoiser, autoencoder, latent_size),
        num_inference_steps=4 if noise.distilled else 50,
        guidance_scale=1.0 if noise.distilled else guidance_scale,
        solver="euler" if noise.distilled else solver,
        prediction_type=noise.prediction_type,
        zero_snr=noise.zero_snr,
        num_train_timesteps=int(noise.betas["num_train_timesteps"]),
        lora_target_modules=loras.LoRA().target_modules,
    )


def latent_shape(vae: Autoencoder, resolution: Resolution) -> tuple[int, int, int]:
    """Return (C, h, w); ValueError for a size that is no multiple of the autoencoder's factor."""
    factor = configs.vae_factor(vae.config)
    height, width = resolution
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")
    return int(vae.config["latent_channels"]), height // factor, width // factor


def guided(call: Call, x: Tensor, t: Tensor, cond: Cond, guidance_scale: float) -> Tensor:
    """Return the network's output in float32; above a guidance_scale of 1 with both passes, [negative, positive], in one batch.

    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6, with their w = guidance_scale - 1).
    """
    if guidance_scale <= 1:
        return call(x, t, cond.positive).float()
    pairs = {}
    for name, value in cond.positive.items():
        negative = cond.negative.get(name, value)
        pairs[name] = torch.cat([negative.expand_as(value), value])
    without, given = call(torch.cat([x, x]), torch.cat([t, t]), pairs).float().chunk(2)
    return without + guidance_scale * (given - without)


def decode(vae: Autoencoder, x0: Tensor) -> Tensor:
    """Return pixels in float32, not clamped."""
    statistics = _latent_statistics(vae, x0)
    if statistics is None:
        latents = x0 / vae.config["scaling_factor"]
    else:
        mean, std = statistics
        latents = x0 * std / vae.config["scaling_factor"] + mean
    pixels: Tensor = vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5
    return pixels


def keep_layout(vae: Autoencoder) -> None:
    """Let the decoder go on in the layout of its weights after its attention, which leaves channels last.

    On a CPU the gradient of group norm in half precision takes 25 times as long there: 50 ms instead of 2 for 32 images of
    64 pixels with 16 channels. In float32, and on a GPU, nothing changes.
    """

    def contiguous(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        half = output.dtype in (torch.bfloat16, torch.float16)
        return output.contiguous() if half and output.device.type == "cpu" else output

    middle = getattr(vae.decoder, "mid_block", None)  # a small autoencoder has none
    if middle is not None:
        middle.register_forward_hook(contiguous)


def moments(vae: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the mean and the standard deviation of the posterior, (B, C, h, w) in the autoencoder's precision.

    An AutoencoderTiny has no posterior: its latents are always the same.
    """
    encoded = vae.encode((pixels * 2 - 1).to(vae.dtype))
    posterior = getattr(encoded, "latent_dist", None)
    return (encoded.latents, None) if posterior is None else (posterior.mean, posterior.std)


def latents_of(
    vae: Autoencoder, mean: Tensor, std: Tensor | None, generators: Sequence[Generator] | None
) -> Tensor:
    """Return scaled latents in float32: the posterior's mean, or a sample of it by each image's generator.

    Without a standard deviation no random number is drawn.
    """
    latents = mean.float()
    if generators is not None and std is not None:
        noise = initial_noise(latents.shape[1:], generators, latents.device).to(latents)
        latents = latents + std.float() * noise
    statistics = _latent_statistics(vae, latents)
    if statistics is not None:
        latents = (latents - statistics[0]) / statistics[1]
    return latents * vae.config["scaling_factor"]


def _latent_statistics(vae: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and standard deviation of each latent channel, (C, 1, 1), where the configuration has both."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None
    return filled(mean, x.device, x.dtype).reshape(-1, 1, 1), filled(std, x.device, x.dtype).reshape(-1, 1, 1)


def freeze(parts: Iterable[nn.Module]) -> None:
    """Freeze all weights, and put the parts in eval mode."""
    for part in parts:
        part.requires_grad_(False).eval()


def cast(part: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Cast what is frozen, and move the part: a device needs no room for what it is cast from. Trained weights stay float32,
    because small updates would be lost in half precision.
    """
    for tensor in (*part.parameters(), *part.buffers()):
        if dtype is not None and quantization.is_castable(tensor) and not tensor.requires_grad:
            tensor.data = tensor.data.to(dtype)
    part.to(device)


def channels_last(part: nn.Module, device: torch.device) -> None:
    """Lay out the weights of convolutions on a CUDA GPU as its tensor cores read them, so that they need not copy activations."""
    if device.type == "cuda":
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Tuned:
    """What a LoRA may update of a model, a UNet and text encoders, and what was put on them.

    `parts` are unet, text_encoder and so on. `changed` are called when they answer differently from then on; none of them may hold
    the family, whose weights would stay in memory until the garbage collector runs.
    """

    def __init__(self, parts: Mapping[str, nn.Module], changed: Sequence[Callable[[], None]]) -> None:
        self._parts, self._told = parts, changed
        self._replaced = False
        self._start: Update | None = None

    def _changed(self) -> None:
        for told in self._told:
            told()

    def open(self, lora: loras.LoRA | None, seed: int) -> nn.Module:
        """Open the LoRA of the frozen UNet, or with None all its weights, in float32; return the UNet."""
        unet = self._parts["unet"]
        if lora is None:
            self._replaced = True
            unet.float().requires_grad_(True)
        else:
            loras.inject(unet, lora, seed)
        return unet

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block the parts are those before tuning. ValueError where the UNet's own weights were tuned."""
        if self._replaced:
            raise ValueError(
                "all weights of the UNet are tuned, so the model before tuning is gone; use --train lora"
            )
        return self._switched_off()

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        if not loras.is_on(*self._parts.values()):
            yield
            return
        try:
            with loras.disabled(*self._parts.values()):
                self._changed()
                yield
        finally:
            self._changed()

    def save(self, folder: Path, lora: loras.LoRA | None) -> None:
        """Write `pytorch_lora_weights.safetensors`, with what the model started from, or without a LoRA the UNet in diffusers'
        folder format.
        """
        unet: Any = self._parts["unet"]
        if lora is None:
            unet.save_pretrained(folder)
        else:
            loras.save(unet, folder, self._start)

    def load(self, folder: Path, weight: float) -> None:
        """Load a LoRA or a folder of a UNet, frozen. ValueError where it does not fit."""
        assert self._start is None, "the model starts from a LoRA already"
        if loras.find(folder):
            loras.load(self._parts, folder, weight)
        else:
            _replace(self._parts, folder, weight)
            self._replaced = True
        self._changed()

    def start_from(self, path: Path) -> None:
        """Merge a LoRA into the parts."""
        self._start = loras.merge_file(self._parts, path)
        self._changed()

    def layers(self) -> Layers:
        """Return the layers of all parts."""
        return layers_of(self._parts)


def set_speed(
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    attention: str,
    *,
    gradient_checkpointing: bool,
    vae_checkpointing: bool,
) -> None:
    """Choose the attention kernel, and what is computed again in the backward pass instead of kept."""
    if attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:
            raise ValueError(
                f'--attention xformers: {error}; pip install -e ".[xformers]" on a machine with a GPU, or use sdpa'
            ) from error
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if vae_checkpointing:
        vae.enable_gradient_checkpointing()


def _replace(parts: Mapping[str, nn.Module], folder: Path, weight: float) -> None:
    """Give the UNet the weights of a folder, frozen, and remove any LoRA. ValueError where they do not fit."""
    unet = parts["unet"]
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither a LoRA ({loras.FILE}) nor a UNet (config.json)")
    if weight != 1:
        raise ValueError(f"{folder} is a whole UNet, which has no weight {weight}; only a LoRA has one")
    configs.read_model(folder, "UNet2DConditionModel")
    found = weights.find(folder, "diffusers")
    loras.unload(*parts.values())
    state = UNet2DConditionModel.from_pretrained(
        folder, variant=found.variant, use_safetensors=found.safetensors, local_files_only=True
    ).state_dict()
    here = unet.state_dict()
    wrong = [name for name in here.keys() | state.keys() if not _same_shape(here, state, name)]
    if wrong:
        raise ValueError(
            f"{folder} is another UNet: {min(wrong)} and {len(wrong) - 1} more weights do not fit"
        )
    unet.load_state_dict(state)
    unet.requires_grad_(False)


def layers_of_folder(folder: Path, text_encoders: Mapping[str, type[PreTrainedModel]]) -> Layers:
    """Return the layers that a LoRA can update of a pipeline folder with these text encoders; reads its JSON files alone."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs.read_json(folder / "unet" / "config.json"))
        }
        for part, kind in text_encoders.items():
            assert kind.config_class is not None
            config = kind.config_class.from_pretrained(folder, subfolder=part, local_files_only=True)
            parts[part] = kind(config)
    return layers_of(parts)


def _same_shape(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> bool:
    """Whether both have the weight, in one shape."""
    return name in one and name in other and one[name].shape == other[name].shape
