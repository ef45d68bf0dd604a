"""Terms of the flags --rewards and --reward-files, and the units of scores; needs no torch, so that flags are checked first."""

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from rewards import CARDS, embedded, find_card, own
from rewards.card import Card
from rewards.input_files import parse_json, read_text

Normalization = Literal["none", "card", "dataset"]
"""Normalization of scores before they are weighted."""
Combination = Literal["sum", "min"]
"""How the weighted scores of an image become one reward."""


def units(
    cards: Sequence[Card], normalization: Normalization, stats: Path | None
) -> list[tuple[float, float]]:
    """Return what to subtract and to divide by for each scorer; a driver calls it before it loads weights.

    ValueError for an unknown normalization, and for statistics that are missing, not needed, or without usable numbers.
    """
    if normalization not in ("none", "card", "dataset"):
        raise ValueError(f"unknown reward normalization {normalization!r}; one of none, card, dataset")
    if (normalization == "dataset") != (stats is not None):
        raise ValueError(
            f"--reward-normalization {normalization} with {'no file of statistics' if stats is None else stats}; dataset, and"
            " dataset alone, needs --reward-stats, a summary.json of preftune score"
        )
    if stats is not None:
        return _dataset_units([card.name for card in cards], stats)
    if normalization == "card":
        for card in cards:
            if not math.isfinite(card.std):
                raise ValueError(
                    f"--reward-normalization card needs the mean and deviation of {card.name}, which is your own and has none"
                    f" on record; measure them by `preftune score --rewards {card.name}` and give its summary.json to"
                    " --reward-normalization dataset --reward-stats, or use --reward-normalization none"
                )
    return [(card.mean, card.std) if normalization == "card" else (0.0, 1.0) for card in cards]


def _dataset_units(names: Sequence[str], stats: Path) -> list[tuple[float, float]]:
    """Return (mean, std) of each scorer from a summary.json."""
    text = read_text(stats, what="the file of statistics ")
    try:
        scores = parse_json(text, str(stats))["scores"]
        found = {name: (float(row["mean"]), float(row["std"])) for name, row in scores.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{stats} is no summary.json of preftune score ({type(error).__name__}: {error})"
        ) from error
    for name in names:
        if name not in found:
            raise ValueError(f"{stats} has no {name}; it has {', '.join(found) or 'no scores'}")
        if not (all(map(math.isfinite, found[name])) and found[name][1] > 0):
            raise ValueError(
                f"{stats} gives {name} mean {found[name][0]:g} and std {found[name][1]:g}; scores that do not differ"
                " cannot be normalized"
            )
    return [found[name] for name in names]


def _check_separators(term: str) -> None:
    """Refuse a term of scorers of the table that are written in another way: `a=1,b=2`, `a:1`."""
    several = [part for part in re.split(r"[,;\s]+", term) if part]
    if len(several) > 1 and all(re.split("[=:]", part)[0] in CARDS for part in several):
        raise ValueError(
            f"{term!r} has several scorers; they are separated by spaces, without quotes: {' '.join(several)}"
        )
    name, colon, weight = term.partition(":")
    if colon and name in CARDS:
        raise ValueError(f"unknown scorer {term!r}; a weight stands behind =, as in {name}={weight or 1}")


def parse_weights(terms: Sequence[str], flag: str = "--rewards") -> dict[str, float]:
    """Return {"imagereward": 0.5, "brightness": 1.0} for ["imagereward=0.5", "brightness"], in that order; `flag` gives the terms.

    A term is NAME or NAME=WEIGHT; NAME is a scorer of the table, the folder of a trained one, which may have a = in its path,
    or FILE.py:FUNCTION (rewards.own), which may run from now on. ValueError names the term that is malformed, repeated, zero,
    not finite, or of an unknown scorer.
    """
    weights: dict[str, float] = {}
    for term in terms:
        _check_separators(term)
        name, weight = _split(term, flag)
        find_card(name)
        own.named_by_user(name)
        if name in weights:
            raise ValueError(f"{flag} {term!r} repeats {name}; name each scorer once")
        weights[name] = weight
    if not weights:
        raise ValueError(
            f"{flag} is empty; name at least one scorer, as NAME or NAME=WEIGHT, of {', '.join(CARDS)}, or the folder of a"
            " trained one, or FILE.py:FUNCTION for a function of your own"
        )
    return weights


def parse_names(terms: Sequence[str]) -> tuple[str, ...]:
    """Return the scorers of a program that reports each by itself; ValueError as `parse_weights`, and for a weight but 1."""
    weights = parse_weights(terms)
    for name, weight in weights.items():
        if weight != 1:
            raise ValueError(
                f"--rewards {name}={weight:g} has a weight, but here each scorer is reported by itself; write {name}"
            )
    return tuple(weights)


def _split(term: str, flag: str) -> tuple[str, float]:
    """Return name and weight of a term."""
    if not term.rpartition("=")[1] or embedded.find(term).is_dir() or own.is_in_file(term):
        return term, 1.0
    name, _, text = term.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight) or weight == 0:
        raise ValueError(
            f"{flag} {term!r} is not NAME or NAME=WEIGHT with a finite weight other than 0, as in shapes or shapes=0.5"
            " (a file of weights is given as --reward-files NAME=PATH)"
        )
    return name, weight


def parse_files(terms: Sequence[str], names: Collection[str]) -> dict[str, Path]:
    """Return {"imagereward": Path("x.pt")} for ["imagereward=x.pt"]: weights on disk of some of these scorers.

    ValueError names the term that is malformed or repeated, or of a scorer that is not used.
    """
    files: dict[str, Path] = {}
    for term in terms:
        name, _, path = term.partition("=")
        if not name or not path or name in files:
            raise ValueError(
                f"--reward-files {term!r} is not scorer=path, once a scorer, as in imagereward=x.pt"
            )
        if name not in names:
            raise ValueError(f"--reward-files names {name}, which --rewards does not use")
        files[name] = embedded.find(path)
    return files
