"""Print the table of scorers: what each measures, and whether its weights are here."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards import CARDS, Card


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a scorer and, below it, what it measures; argv defaults to that of the process, and takes nothing."""
    name = Path(sys.argv[0]).name
    argparse.ArgumentParser(
        prog="python -m rewards" if name == "__main__.py" else name,
        description="Print the table of scorers.",
        allow_abbrev=False,
    ).parse_args(argv)
    rows: list[tuple[str, ...]] = [
        ("name", "paper", "reads prompt", "gradient", "range", "licence", "input", "weights", "here")
    ]
    rows += [_row(card) for card in CARDS.values()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", *(f"{card.name}: {card.summary}" for card in CARDS.values())]
    lines += [
        "FILE.py:FUNCTION: a function of your own, f(pixels, prompts) -> (B,), in a file that you name in --rewards"
    ]
    print("\n".join(line.rstrip() for line in lines))  # at once: `| head` breaks no line


def _row(card: Card) -> tuple[str, ...]:
    from rewards.weights import local  # needs torch, which --help does not

    low, high = card.typical_range
    source = card.folder or (f"{card.repo or card.source}/{card.file}" if card.file else "none needed")
    here = not card.has_weights or local(card) is not None
    return (
        card.name,
        card.paper,
        "yes" if card.prompted else "no",
        "yes" if card.differentiable else "no",
        f"{low:g} .. {high:g}",
        card.licence,
        f"{card.preprocess.size} px" if card.preprocess else "any",
        f"{source} ({card.size})" if card.size else source,
        "yes" if here else "no",
    )


if __name__ == "__main__":
    main()
