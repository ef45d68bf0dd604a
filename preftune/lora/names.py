"""The layers of a model that a LoRA can update, and the names that LoRA files have for them.

A part is "unet", "text_encoder" or "text_encoder_2"; a layer is a path in it, such as
down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q. Names of the layers of a CLIP text encoder are those of
transformers 4, with text_model in front, in every file.

What the programs that read kohya's layout look for, from their public sources:

- kohya's sd-scripts (networks/lora.py): the path with _ for every dot, after lora_unet_, lora_te_ (Stable Diffusion), lora_te1_ or
  lora_te2_ (SDXL). Its SDXL UNet has the names of the original release, lora_unet_input_blocks_4_1_...
  (library/sdxl_model_util.py), its Stable Diffusion UNet those of diffusers, lora_unet_down_blocks_1_attentions_0_...
- AUTOMATIC1111's web UI (extensions-builtin/Lora): translates diffusers' names to those of the original release, and looks up
  what is already the original's. It misses the first upsampler of an SDXL UNet in diffusers' names, therefore SDXL is
  written in the original's. Of metadata it reads ss_base_model_version and ss_v2, to hide what is not for the loaded model.
- ComfyUI (comfy/lora.py): a table with both kinds of names for every layer; lora_te_ and lora_te1_ are the same to it.
- All three scale an update by alpha / rank, and without an alpha by 1; none reads a scale from the metadata.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

Layout = Literal["kohya", "diffusers", "peft"]
"""kohya: one file for AUTOMATIC1111's web UI, ComfyUI and sd-scripts; diffusers: a folder; peft: a folder with one for each part."""

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
"""Part -> kohya's prefix; SDXL's first text encoder has lora_te1_."""

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class Layers:
    """The linear layers and convolutions of a model: part -> layer -> shape of its weight."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]

    @property
    def is_xl(self) -> bool:
        """Return whether it is a model with two text encoders, whose UNet has the original's names in kohya's files."""
        return "text_encoder_2" in self.shapes

    def by_flat_name(self) -> dict[tuple[str, str], str]:
        """Return (part, name with _ for every dot) -> layer, for diffusers' and for the original release's names."""
        found: dict[tuple[str, str], str] = {}
        for part, shapes in self.shapes.items():
            original = original_names(shapes) if part == "unet" else {}
            for layer in shapes:
                for name in {_without_level(part, layer), original.get(layer, layer)}:
                    found.setdefault((part, flat(name)), layer)
        return found

    def kohya_names(self) -> dict[tuple[str, str], str]:
        """Return (part, layer) -> its name in a file for the programs above, without .lora_down.weight."""
        found = {}
        for part, shapes in self.shapes.items():
            original = original_names(shapes) if part == "unet" and self.is_xl else {}
            prefix = "lora_te1_" if part == "text_encoder" and self.is_xl else PREFIXES[part]
            for layer in shapes:
                found[part, layer] = prefix + flat(original.get(layer, file_name(part, layer)))
        return found


def layers_of(parts: Mapping[str, "nn.Module"]) -> Layers:
    """Return the layers of these modules by part, whether an update is on them or not."""
    return Layers({part: dict(_shapes(module)) for part, module in parts.items()})


def _shapes(module: "nn.Module") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every linear layer and convolution, under the name that it has without an update."""
    from torch import nn

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            # not the shape of a linear layer's weight: in 4 bits it is packed
            shape: tuple[int, ...] = tuple(layer.weight.shape)
            if isinstance(layer, nn.Linear):
                shape = int(layer.out_features), int(layer.in_features)
            yield name.removesuffix(".base_layer"), shape


def flat(name: str) -> str:
    """Return a path as kohya writes it."""
    return name.replace(".", "_")


def file_name(part: str, layer: str) -> str:
    """Return a layer's path as files have it: that of a text encoder with text_model in front."""
    plain = _without_level(part, layer)
    return plain if part == "unet" or plain.startswith("text_projection") else f"text_model.{plain}"


def _without_level(part: str, layer: str) -> str:
    """The path without the level of transformers 4, which newer text encoders lack."""
    return layer if part == "unet" else layer.removeprefix("text_model.")


def original_names(layers: Mapping[str, object]) -> dict[str, str]:
    """Return layer of a UNet in diffusers' names -> its path in the original release (CompVis, Stability AI).

    There the resnets, attentions and samplers of all blocks are counted in one list; a block going up has one resnet more than
    one going down, which is followed by its downsampler, so both have the same number of entries.
    """
    indices = [
        int(match[1]) for name in layers if (match := re.match(r"up_blocks\.\d+\.resnets\.(\d+)", name))
    ]
    entries = 1 + max(indices, default=0)
    attentive = {name.split(".")[1] for name in layers if re.match(r"up_blocks\.\d+\.attentions", name)}
    found = {}
    for layer in layers:
        name = _OUTSIDE.get(layer) or _original_name(layer, entries, attentive)
        if name is not None:
            found[layer] = name
    return found


def _original_name(layer: str, entries: int, attentive: set[str]) -> str | None:
    """The path in the original release of a layer in a block; None for one that is in no block."""
    match = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer
    )
    if match:
        way, block, kind, index, rest = match.groups()
        number = entries * int(block) + int(index)
        if kind == "downsamplers":
            return f"input_blocks.{entries * (int(block) + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{number + entries - 1}.{2 if block in attentive else 1}.{rest}"
        place = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    else:
        match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer)
        if not match:
            return None
        kind, index, rest = match.groups()
        # a resnet, an attention, a resnet
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{_RESNET.get(rest, rest)}"
    return f"{place}.{int(kind == 'attentions')}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
