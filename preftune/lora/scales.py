"""Scales of a low-rank update that are in no tensor: those of peft's adapter_config.json, and of the metadata that diffusers writes.

Both come from elsewhere, so they run nothing and hold finite numbers: of the patterns that peft allows, the names of layers are read.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.input_files import parse_json, read_object

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""peft's initialisations that also change the weights under the update."""
_NAME = re.compile(r"\^?[\w-]+(\.[\w-]+)*\$?", re.ASCII)
"""A pattern that is the name of a layer, or its end, and nothing else; with ^ it is the whole name."""


class Scales:
    """The scales of the layers of one part of a model, checked when they are read."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """`values` as in peft's LoraConfig, from the file `where`. ValueError for what A and B alone do not hold, and for what is
        neither a finite number nor the name of a layer.
        """
        start, kind = str(values.get("init_lora_weights")), str(values.get("peft_type", "LORA"))
        wrong = {
            f"peft_type {kind[:80]}": kind != "LORA",
            "use_dora (DoRA)": bool(values.get("use_dora")),
            "fan_in_fan_out": bool(values.get("fan_in_fan_out")),
            f"init_lora_weights {start[:80]}": start.startswith(_CHANGED_BASE),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(refusal(where, what))
        by_root = values.get("use_rslora")
        if not isinstance(by_root, bool | None):
            raise ValueError(f"{where}: use_rslora is {_shown(by_root)}; it must be true or false")
        self._by_root = bool(by_root)
        self.alpha = _number(values["lora_alpha"], "lora_alpha", where) if "lora_alpha" in values else None
        """The numerator for layers without their own; None: their rank."""
        self._own = _by_name(values.get("alpha_pattern"), where)

    def of(self, layer: str, rank: int) -> float:
        """Return the scale of one layer, with the alpha of the first pattern that is its name, or the end of it after a dot."""
        names = layer.split(".")
        ends = [".".join(names[first:]) for first in range(len(names))]
        whole = [f"^{layer}", f"^{layer.removeprefix('text_model.')}"]  # which newer text encoders lack
        own = [self._own[name] for name in (*ends, *whole) if name in self._own]
        alpha = min(own)[1] if own else rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self._by_root else rank)


def of_peft(path: Path) -> Scales:
    """Return the scales in peft's adapter_config.json; ValueError where it cannot be read, or as `Scales`."""
    return Scales(read_object(path), str(path))


def of_metadata(path: Path, text: str) -> dict[str, Scales]:
    """Return the scales that diffusers writes into a file's metadata, as unet.lora_alpha, by part; ValueError as `Scales`."""
    where = f"{path}: lora_adapter_metadata"
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(values).__name__}")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return {part: Scales(found, where) for part, found in parts.items()}


def refusal(where: object, what: str) -> str:
    """Return the sentence for a kind of update that is known but not taken."""
    return (
        f"{where} has {what}, but only LoRA and LoCon can be taken whole; merge it into a pipeline with the program"
        " that made it, and give that pipeline"
    )


def _shown(value: object) -> str:
    """A value in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(value: object, name: str, where: str) -> float:
    """A finite number, or ValueError."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: {name} is {_shown(value)}, not a finite number; save the LoRA again with the program that made it"
        )
    return number


def _by_name(patterns: object, where: str) -> dict[str, tuple[int, float]]:
    """Name of a layer, or its end -> place in the list, of which the first counts, and alpha.

    peft reads them as regular expressions. One of an unknown author can take years, so only names are taken.
    """
    if not isinstance(patterns, dict | None):
        raise ValueError(
            f"{where}: alpha_pattern is {_shown(patterns)}; it must be an object with an alpha for each name of a layer"
        )
    found: dict[str, tuple[int, float]] = {}
    for place, (pattern, value) in enumerate((patterns or {}).items()):
        name = pattern.replace(r"\.", ".")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}: alpha_pattern has {_shown(pattern)}, but only names of layers are read, such as attn1.to_q or"
                " ^conv_in; write the names in its place, or merge the LoRA into a pipeline with the program that made it"
            )
        alpha = _number(value, f"alpha_pattern {_shown(pattern)}", where)
        found.setdefault(name.removesuffix("$"), (place, alpha))
    return found
