"""The linear layers of a frozen denoiser in 4 or 8 bits, under a LoRA that is trained in float32 (QLoRA, arXiv 2305.14314).

4bit and 8bit are bitsandbytes' (NF4, and LLM.int8(), arXiv 2208.07339), fp8 is torchao's float8_e4m3fn with one scale a row. Layers are
replaced in a loaded model, so that single files and --lora-start work as well. Convolutions, norms and embeddings stay in half precision.
peft puts its LoRA on these layers; the LoRA that is saved is for the model in any precision.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["4bit", "8bit", "fp8"]
LIBRARIES: dict[Kind, str] = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "fp8": "torchao"}


def check(kind: Kind) -> None:
    """Raise ValueError where the library of a kind is not installed."""
    library = LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"--quantization {kind} needs {library}: pip install {library}, or leave the flag out"
        )


def quantize(model: nn.Module, kind: Kind, device: torch.device | str) -> None:
    """Replace the linear layers of a frozen model by quantized ones on the device, one after the other; in place.

    They compute in the precision that the layers have.
    """
    layers = {name: part for name, part in model.named_modules() if type(part) is nn.Linear}
    assert layers, "the model has no linear layer"
    if kind == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig, quantize_

        quantize_(model, Float8WeightOnlyConfig(), filter_fn=lambda part, name: name in layers, device=device)
        model.requires_grad_(False)
        return
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _of_bitsandbytes(layer, kind, device))
    setattr(model, f"is_loaded_in_{kind}", True)  # as from_pretrained sets it: peft looks there


def is_quantized(model: nn.Module) -> bool:
    """Return whether `quantize` has replaced layers of a model."""
    return any(
        hasattr(part, "weight")
        and (_is_torchao(part.weight) or part.weight.dtype in (torch.uint8, torch.int8))
        for part in model.modules()
    )


def is_castable(tensor: Tensor) -> bool:
    """Return whether a weight may be cast to another precision: it is no number of bits, nor what torchao makes of one."""
    return tensor.is_floating_point() and not _is_torchao(tensor)


def _is_torchao(tensor: object) -> bool:
    """Whether it is a tensor of torchao, which has the dtype that it computes in; torchao may not be installed."""
    data = getattr(tensor, "data", tensor)
    return type(data).__module__.partition(".")[0] == "torchao"


def _of_bitsandbytes(layer: nn.Linear, kind: Kind, device: torch.device | str) -> nn.Module:
    """Return a layer of bitsandbytes with the layer's weights."""
    import bitsandbytes

    made: Any = bitsandbytes.nn
    sizes = {"bias": layer.bias is not None, "device": "meta"}
    weight = layer.weight.data
    new: Any
    if kind == "4bit":
        new = made.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=weight.dtype, quant_type="nf4", **sizes
        )
        new.weight = made.Params4bit(weight, requires_grad=False, quant_type="nf4")
        # On some CPUs a pass without gradient would put the weights into another order, which a pass with gradient cannot read.
        new.support_avx512bf16_for_cpu = False
    else:
        new = made.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **sizes)
        new.weight = made.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    found: nn.Module = new.to(device)
    return found
