"""Compare the choices of someone who saw pairs of images without scores with the judge.

    python assets/tiny/blind_agreement.py --folder blind --choices choices.txt

`blind_pairs.py` makes the folder. Each line of choices is the number of a pair and the better image: `12 L`, `12 R`, or `12 =`
where neither is clearly better; pairs may be left out, and what follows # is a note. Writes `agreement.json` into the folder: how
often the judge's gold is higher for the image that was chosen, in all and by the difference of gold, how often each source was
chosen, and every pair on which they disagree, with what the judge says of both images. Equal golds count as a half.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.cli import exit_on_user_error, parse
from preftune.cli.printable import show
from preftune.files import write_text
from preftune.images import load_pixels
from rewards.input_files import read_object, read_text
from rewards.shapes_judge import DIFFERENCES, judge

SIDES = {"L": "left", "R": "right"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare blind choices with the judge."""

    folder: Path
    """Folder of blind_pairs.py."""
    choices: Path
    """Text file with a line for each pair, such as 12 L."""


def read_choices(text: str, numbers: Sequence[int]) -> dict[int, str]:
    """Return number -> L, R or =; ValueError for another line, an unknown pair or one that was chosen twice."""
    choices: dict[int, str] = {}
    for place, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if (
            len(words) != 2
            or not words[0].isascii()
            or not words[0].isdigit()
            or words[1].upper() not in ("L", "R", "=")
        ):
            raise ValueError(f"--choices line {place}: {line!r} is not NUMBER L, NUMBER R or NUMBER =")
        number = int(words[0])
        if number not in numbers:
            raise ValueError(f"--choices line {place}: there is no pair {number}")
        if number in choices:
            raise ValueError(f"--choices line {place}: pair {number} was chosen before")
        choices[number] = words[1].upper()
    return choices


def judge_pairs(folder: Path, pairs: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """Return number -> side -> alignment, fidelity and gold."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for pair in pairs:
        pixels = torch.stack([load_pixels(folder / pair["files"][side]) for side in SIDES])
        judged = judge(pixels, [pair["prompt"]] * len(SIDES))
        found[pair["number"]] = {
            side: {
                name: round(float(getattr(judged, name)[k]), 4) for name in ("alignment", "fidelity", "gold")
            }
            for k, side in enumerate(SIDES)
        }
    return found


def compare(
    pairs: Sequence[Mapping[str, Any]],
    choices: Mapping[int, str],
    judged: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """Return what is written to agreement.json."""
    rows, chosen = [], {"first": 0, "second": 0}
    for pair in pairs:
        number = pair["number"]
        choice = choices.get(number, "=")
        if choice == "=":
            continue
        chosen[pair[SIDES[choice]]] += 1
        ahead = judged[number][choice]["gold"] - judged[number]["R" if choice == "L" else "L"]["gold"]
        agrees = 0.5 if ahead == 0 else float(ahead > 0)
        rows.append((abs(ahead), agrees, pair))
    bins: dict[str, list[float]] = {f"{low:g}-{high:g}": [] for low, high in itertools.pairwise(DIFFERENCES)}
    for size, agrees, _ in rows:
        list(bins.values())[int(np.digitize(size, DIFFERENCES[1:-1]))].append(agrees)
    return {
        "pairs": len(pairs),
        "answered": len(choices),
        "clear_choices": len(rows),
        "judge_agrees": _mean([agrees for _, agrees, _ in rows]),
        "by_difference_of_gold": {
            name: {"pairs": len(found), "judge_agrees": _mean(found)} for name, found in bins.items()
        },
        "chosen": chosen,
        "disagreements": [
            {
                "number": pair["number"],
                "prompt": pair["prompt"],
                "choice": choices[pair["number"]],
                **judged[pair["number"]],
            }
            for _, agrees, pair in rows
            if agrees < 1
        ],
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main(config: Config) -> None:
    """Judge the pairs, compare, and write agreement.json."""
    with exit_on_user_error():
        key = read_object(config.folder / "key.json")
        if "pairs" not in key:
            raise ValueError(f"--folder: {config.folder / 'key.json'} has no pairs; blind_pairs.py writes it")
        pairs = key["pairs"]
        choices = read_choices(
            read_text(config.choices, what="the choices "), [pair["number"] for pair in pairs]
        )
        judged = judge_pairs(
            config.folder, [pair for pair in pairs if choices.get(pair["number"], "=") != "="]
        )
    result = compare(pairs, choices, judged)
    write_text(config.folder / "agreement.json", json.dumps(result, indent=1) + "\n")
    show(json.dumps({name: value for name, value in result.items() if name != "disagreements"}))


if __name__ == "__main__":
    main(parse(Config))
