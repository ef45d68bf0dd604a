"""One update of the released ReFL loops (ImageReward's repository), written out: of all weights (ReFL.py), and of a LoRA
(ReFL_SDXL_LoRA.py) on a model of Stable Diffusion 1.x's kind.

| | all weights | LoRA | LoRA, half-base |
|---|---|---|---|
| weights of the UNet | float32 | float32: the script casts all but the UNet | half, as the script's comment and diffusers' scripts say |
| UNet's forward | autocast, checkpointed | autocast | autocast |
| text | encoded in each update | encoded before training | encoded before training |
| VAE, text encoder, scorer | half, no autocast | the same | the same |
| EMA | of all weights, diffusers' EMAModel | - | - |

All: conditional pass alone, DDPM's own noise, `set_timesteps` in each update, clamped pixels, torch's AdamW. Half is fp16 on
CUDA. Two things differ from the released text and cost the same: the late step is given its timestep (released: its
index), and the scorer resizes with antialiasing. Left out: logs, checkpoints, accumulation over four batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

import rewards
from benchmarks.refl_loops import EMA_DECAY, Trial, Update, autocast, optimised
from preftune import families
from preftune.families import Family
from preftune.training.workspace import DTYPES

LEARNING_RATES = {"full": 1e-5, "lora": 1e-4}
"""Defaults of the two scripts."""


def load(trial: Trial) -> Family:
    """Return the model of a released loop on the device, its UNet open for training and under autocast."""
    device, half = torch.device(trial.device), DTYPES[trial.precision]
    parts = families.load(trial.pipeline)
    parts.trainable(trial.refl().model.tuned(), seed=0)
    if trial.checkpointing == "on":
        parts.unet.enable_gradient_checkpointing()
    if trial.loop == "half-base":
        for weight in parts.unet.parameters():
            weight.data = weight.data if weight.requires_grad else weight.data.to(half)
    for module in parts.unet.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True  # peft's default
    parts.unet.to(device)
    for part in (parts.vae, parts.text_encoder):
        part.to(device, half)
    autocast(trial, parts.unet)
    return parts


def published(trial: Trial, planned: range) -> Update:
    """Return the update of a released loop; `planned` are the updates whose texts may be encoded beforehand."""
    config, device = trial.refl(), torch.device(trial.device)
    half, parts = DTYPES[trial.precision], load(trial)
    unet, vae, encode = parts.unet, parts.vae, encoder(parts.text_encoder, parts.tokenizer)
    scorer = rewards.load(trial.scorer, weights=trial.scorer_files, device=device, dtype=half)
    folder = trial.pipeline / "scheduler"
    scheduler = DDPMScheduler.from_pretrained(folder, steps_offset=0, clip_sample=False)
    side = config.model.size(parts.defaults).height // 8
    if trial.train == "lora":  # datasets.map, before training; each batch is moved to the device
        before = {index: encode(trial.prompts(index)).cpu() for index in planned}

    def loss(index: int) -> Tensor:
        texts = trial.prompts(index)
        states = encode(texts) if trial.train == "full" else before[index].to(device)
        scheduler.set_timesteps(trial.num_inference_steps, device=device)
        x = torch.randn(trial.train_batch_size, 4, side, side, device=device)
        for t in scheduler.timesteps[: trial.late]:
            with torch.no_grad():
                x = scheduler.step(unet(x, t, states).sample.float(), t, x).prev_sample
        t = scheduler.timesteps[trial.late]
        x0 = scheduler.step(unet(x, t, states).sample.float(), t, x).pred_original_sample
        image = vae.decode(x0.to(half) / vae.config.scaling_factor).sample
        pixels = (image / 2 + 0.5).clamp(0, 1)
        return config.reward_scale * torch.relu(2 - scorer(pixels, texts)).mean()

    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATES[trial.train], weight_decay=1e-2)
    return optimised(trial, weights, optimizer, loss, _average(trial, weights))


def encoder(text_encoder: nn.Module, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """Return prompts -> hidden states (B, tokens, width)."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        states: Tensor = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
        return states

    return encode


def _average(trial: Trial, weights: list[nn.Parameter]) -> Callable[[], None]:
    """Return what the script of all weights does after each update, and nothing for a LoRA."""
    if trial.train == "lora":
        return lambda: None
    average = EMAModel(weights, decay=EMA_DECAY)
    return lambda: average.step(weights)
