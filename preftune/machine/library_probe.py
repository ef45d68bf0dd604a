"""What only imported libraries know, as lines of JSON for `preftune doctor`, which runs this in a process of its own."""

import importlib
import json
import sys
from typing import Any

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "pyarrow")


def answer(**values: Any) -> None:
    """Write one line, at once: the next step may end the process."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def devices() -> list[str]:
    """Return a line for each device that torch can use."""
    import torch

    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16, use --mixed-precision fp16"
        lines.append(
            f"cuda:{index} {properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute {properties.major}.{properties.minor}, {bf16}"
        )
    if torch.backends.mps.is_available():
        lines.append("mps")
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"  # fmt: skip
    return lines or [f"cpu only, {torch.get_num_threads()} threads, bf16 computed; {built}"]


def main() -> int:
    """Import, ask, answer."""
    for name in _LIBRARIES:
        answer(next=name)
        try:
            importlib.import_module(name)
        except BaseException as error:
            answer(
                faults=[
                    f"{name} cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                ]
            )
    answer(next="torch")
    try:
        answer(devices=devices())
    except Exception as error:
        answer(devices=[f"not known: {error}"])
    answer(next="rewards")
    try:
        from rewards import CARDS
        from rewards.weights import local

        here = [card.name for card in CARDS.values() if not card.has_weights or local(card) is not None]
        answer(here=here, absent=[name for name in CARDS if name not in here])
    except Exception as error:
        answer(faults=[f"the scorers cannot be listed: {error}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
