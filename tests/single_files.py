"""Single files in the key names of the original code of Stable Diffusion, of real tiny parts.

The names are written from the original code, the other way round than diffusers' conversion: CompVis' UNet and autoencoder,
transformers' CLIP under cond_stage_model, open_clip's for Stable Diffusion 2 and for SDXL's second text encoder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from preftune import ahead
from preftune.families import Family
from preftune.families.single_file import PUBLISHED
from preftune.resolution import Resolution
from preftune.solver_names import SolverName
from preftune.solvers import SOLVERS

PROMPTS = ["a red circle", "two cats"]
State = dict[str, Tensor]
Changes = dict[str, dict[str, Any]]
"""Part -> changes of its config.json."""
UNET = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "sample_size": 8, "layers_per_block": 1}
TEXT = {
    "vocab_size": 514, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": tiny.MAX_LENGTH,
    "bos_token_id": 512, "eos_token_id": 513,
}  # fmt: skip
CHANGES: dict[str, Changes] = {
    "sd1": {
        "unet": {**UNET, "attention_head_dim": 4, "cross_attention_dim": 32},
        "text_encoder": {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "projection_dim": 32},
    },
    "sd2": {
        # diffusers knows Stable Diffusion 2.x by a text of width 1024
        "unet": {**UNET, "attention_head_dim": [2, 4, 4, 4], "cross_attention_dim": 1024, "sample_size": 12, "layers_per_block": 2},
        "text_encoder": {**TEXT, "hidden_size": 1024, "num_hidden_layers": 1, "projection_dim": 512},
    },
    "sdxl": {
        "unet": {
            **UNET, "block_out_channels": [16, 32, 32], "attention_head_dim": [2, 4, 4], "cross_attention_dim": 80,
            "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
        "text_encoder": {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "projection_dim": 32},
        # and SDXL by a tenth layer of the second text encoder
        "text_encoder_2": {**TEXT, "hidden_size": 48, "num_hidden_layers": 11, "projection_dim": 24},
    },
}  # fmt: skip
"""Changes of the published configurations: widths and numbers of layers, nothing else."""
CHANGES["sd2-base"] = {**CHANGES["sd2"], "unet": {**CHANGES["sd2"]["unet"], "sample_size": 8}}
VAE = {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}  # fmt: skip


NARROW = {
    "unet": {**CHANGES["sd2"]["unet"], "cross_attention_dim": 32, "layers_per_block": 1},
    "text_encoder": CHANGES["sd1"]["text_encoder"],
}
"""For Stable Diffusion 2.x where nobody has to know it by its width."""


def configurations(kind: str, folder: Path, changes: Changes | None = None) -> Path:
    """Write the published configurations of a kind with small widths, and a tiny tokenizer."""
    shutil.copytree(PUBLISHED / kind, folder)
    for part, values in {**(CHANGES[kind] if changes is None else changes), "vae": VAE}.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    for part in ("tokenizer", "tokenizer_2"):
        if (folder / part).is_dir():
            pad = json.loads((folder / part / "tokenizer_config.json").read_text())["pad_token"]
            tiny.tokenizer(folder / part, pad_token=pad)
    return folder


def pipeline(folder: Path, seed: int = 0) -> Any:
    """Return diffusers' pipeline of a folder of configurations, with random weights."""
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part, part_class in CLASSES.items():
            if part in index:
                config = json.loads((folder / part / "config.json").read_text())
                text = part.startswith("text")
                made = part_class(CLIPTextConfig(**config)) if text else part_class.from_config(config)
                for weight in made.parameters():  # no layer starts at 0 or 1, so that a swap is seen
                    weight.data += 0.02 * torch.randn_like(weight)
                parts[part] = made.eval()
    kind = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
    pipe = kind.from_pretrained(folder, **parts, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(family: Family, solver: SolverName, steps: int, scale: float, x: Tensor) -> Tensor:
    """Return what the family makes of the first latents x (B, C, h, w)."""
    cond = family.encode(PROMPTS)
    if solver in SOLVERS:
        resolution = Resolution(height=x.shape[-2] * 8, width=x.shape[-1] * 8)
        grid = family.timesteps(steps, solver, resolution)
        for now in ahead.steps(family, grid, [False] * steps, iter(()), len(x))[1]:
            x = ahead.step(family.predict(x, now.t, cond, scale), now, solver)
        return x
    scheduler = family.scheduler(solver, steps)
    for t in scheduler.timesteps:
        output = family.predict(x, t.expand(len(x)), cond, scale).output
        x = scheduler.step(output, t, x).prev_sample
    return x


def start(family: Family) -> Tensor:
    """Return the first latents of an image for each of PROMPTS, at the family's resolution."""
    shape = family.latent_shape(family.defaults.resolution)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(3))


def latents_of_pipeline(pipe: Any, steps: int, scale: float, x: Tensor) -> Tensor:
    """Return what diffusers' pipeline makes of the first latents x."""
    found: Tensor = pipe(
        PROMPTS, latents=x, num_inference_steps=steps, guidance_scale=scale, output_type="latent",
        height=x.shape[-2] * 8, width=x.shape[-1] * 8,
    ).images  # fmt: skip
    return found


def single_file(pipe: Any) -> State:
    """Return the weights of a pipeline under the names of the original code."""
    state = {f"model.diffusion_model.{name}": value for name, value in _unet(pipe.unet).items()}
    state |= {f"first_stage_model.{name}": value for name, value in _vae(pipe.vae.state_dict()).items()}
    first = pipe.text_encoder.state_dict()
    if hasattr(pipe, "text_encoder_2"):
        state |= _clip(first, "conditioner.embedders.0.transformer.")
        state |= _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif pipe.unet.config.cross_attention_dim == 1024:
        state |= _open_clip(first, "cond_stage_model.model.")
    else:
        state |= _clip(first, "cond_stage_model.transformer.")
    return {name: value.contiguous() for name, value in state.items()}


def _unet(unet: Any) -> State:
    """openaimodel.UNetModel: blocks are numbered through, with their down- and upsamplers."""
    layers, blocks = unet.config.layers_per_block, len(unet.config.down_block_types)
    renames = [
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    ]  # fmt: skip
    for i in range(blocks):
        for j in range(layers):
            place = (layers + 1) * i + j + 1
            renames.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{place}.0"))
            renames.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{place}.1"))
        renames.append(
            (f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(layers + 1) * (i + 1)}.0.op")
        )
        for j in range(layers + 1):
            place = (layers + 1) * i + j
            renames.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{place}.0"))
            renames.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{place}.1"))
        after = 2 if "CrossAttn" in unet.config.up_block_types[i] else 1
        place = (layers + 1) * i + layers
        renames.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{place}.{after}.conv"))
    inside = [
        (".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".norm2.", ".out_layers.0."),
        (".conv2.", ".out_layers.3."), (".time_emb_proj.", ".emb_layers.1."), (".conv_shortcut.", ".skip_connection."),
    ]  # fmt: skip
    state = {}
    for name, value in unet.state_dict().items():
        old, new = next((o, n) for o, n in renames if name.startswith(f"{o}."))
        renamed = new + name.removeprefix(old)
        for theirs, ours in inside if "resnets" in name else ():
            renamed = renamed.replace(theirs, ours)
        state[renamed] = value
    return state


def _vae(weights: State) -> State:
    """AutoencoderKL of the original code: its decoder counts blocks from the image on, attention is 1 x 1 convolutions."""
    renames = [
        (".conv_norm_out.", ".norm_out."), (".conv_shortcut.", ".nin_shortcut."),
        ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."), (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
        (".resnets.", ".block."), ("down_blocks.", "down."),
    ]  # fmt: skip
    renames += [(f"up_blocks.{i}.", f"up.{3 - i}.") for i in range(4)]
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    state = {}
    for name, value in weights.items():
        renamed = name
        for old, new in renames:
            renamed = renamed.replace(old, new)
        if "attn_1" in renamed:
            old, new = next((o, n) for o, n in attention.items() if f".{o}." in renamed)
            renamed = renamed.replace(f".{old}.", f".{new}.")
            value = value[..., None, None] if value.ndim == 2 else value
        state[renamed] = value
    return state


def _clip(weights: State, prefix: str) -> State:
    """CLIP of transformers, with the position ids that its old versions wrote."""
    state = {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()
    }
    return state | {f"{prefix}text_model.embeddings.position_ids": torch.arange(tiny.MAX_LENGTH)[None]}


def _open_clip(weights: State, prefix: str) -> State:
    """open_clip: query, key and value in one matrix, and the projection to be multiplied from the right."""
    renames = [
        ("text_model.", ""), ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.token_embedding.", "token_embedding."), ("final_layer_norm.", "ln_final."),
        ("encoder.layers.", "transformer.resblocks."), ("self_attn.out_proj.", "attn.out_proj."), ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."), ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
    ]  # fmt: skip
    state = {}
    for name, value in weights.items():
        if name == "text_projection.weight":
            state[f"{prefix}text_projection"] = value.T
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue
        renamed = name
        for old, new in renames:
            renamed = renamed.replace(old, new)
        if ".q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            renamed = renamed.replace("self_attn.q_proj.weight", "attn.in_proj_weight")
            renamed = renamed.replace("self_attn.q_proj.bias", "attn.in_proj_bias")
        state[prefix + renamed] = value
    return state
