"""The card of a trained scorer, read from the files of its folder; needs no torch.

A folder holds config.json, model.safetensors with the authors' key names, and the vocabulary: merges.txt of
a CLIP, vocab.txt of an ImageReward. An ImageReward's config.json holds only its architecture; card.json,
which old folders lack, holds its origin. The name of the scorer is the path of the folder, as given.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rewards import embedded
from rewards.card import Card, Clip, ImageRewardConfig, Preprocess
from rewards.input_files import read_object

_CARD_FIELDS = ("typical_range", "mean", "std", "licence", "paper")
CARD_FILE = "card.json"
"""Of an ImageReward: what its config.json does not say."""
_FACTS = ("started_from", "licence", "typical_range")
_NEWER = {"head_dropout"}
"""What the config.json of a CLIP may lack: folders without a head are written as before there were any."""
_KEYS = {"clip", "preprocess", "started_from", *_CARD_FIELDS}


def clip_card(name: str, clip: Clip, preprocess: Preprocess) -> Card:
    """Return the card of a CLIP that nothing is known about yet: mean 0 and deviation 1."""
    return Card(
        name=name,
        module="rewards.clip",
        summary="a CLIP that was built here",
        prompted=True,
        differentiable=True,
        typical_range=(-2.0, 2.0),
        mean=0.0,
        std=1.0,
        licence="Apache-2.0",
        paper="arXiv:2103.00020",
        preprocess=preprocess,
        clip=clip,
    )


def imagereward_card(
    name: str, preprocess: Preprocess, licence: str = "that of what it started from"
) -> Card:
    """Return the card of an ImageReward: mean 0 and deviation 1, because its calls standardise over held-out images."""
    return Card(
        name=name,
        module="rewards.imagereward",
        summary="ImageReward's architecture, trained here",
        prompted=True,
        differentiable=True,
        typical_range=(-2.0, 2.0),
        mean=0.0,
        std=1.0,
        licence=licence,
        paper="arXiv:2304.05977",
        preprocess=preprocess,
    )


def with_statistics(card: Card, mean: float, std: float) -> Card:
    """Return the card with the mean and deviation of the scores; two deviations either way are the typical range."""
    return replace(card, mean=mean, std=std, typical_range=(mean - 2 * std, mean + 2 * std))


def to_json(card: Card) -> str:
    """Return the config.json of a CLIP that was trained from the scorer of this card."""
    assert card.clip is not None, f"{card.name} has no CLIP"
    assert card.preprocess is not None, f"{card.name} has no preprocessing"
    clip = {
        field: value for field, value in asdict(card.clip).items() if field not in _NEWER or value is not None
    }
    values: dict[str, Any] = {"clip": clip, "preprocess": asdict(card.preprocess)}
    values |= {field: getattr(card, field) for field in _CARD_FIELDS} | {"started_from": card.name}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def facts_to_json(card: Card) -> str:
    """Return the card.json of an ImageReward that was trained from the scorer of this card."""
    values = {"started_from": card.name, "licence": card.licence, "typical_range": card.typical_range}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def card_of(name: str) -> Card:
    """Return the card of a folder; ValueError names what is missing or wrong in it."""
    folder = embedded.find(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} lacks config.json; the folder of a trained scorer has it, in a run it is called scorer"
        )
    values = read_object(folder / "config.json")
    vocabulary = "merges.txt" if "clip" in values else "vocab.txt"
    missing = [file for file in (vocabulary, "model.safetensors") if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; the folder of a trained scorer has them")
    try:
        card = _clip(name, values) if "clip" in values else _imagereward(name, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not that of a trained scorer: {error}") from error
    if "clip" not in values and (folder / CARD_FILE).is_file():
        card = _with_facts(card, folder / CARD_FILE)
    return replace(card, folder=str(folder.resolve()))


def _clip(name: str, values: dict[str, Any]) -> Card:
    parts = {"clip": Clip, "preprocess": Preprocess}
    for kind, found, names in (
        ("the file", values, _KEYS),
        *((key, values.get(key, {}), {field.name for field in fields(part)}) for key, part in parts.items()),
    ):
        if different := found.keys() ^ names - (_NEWER - found.keys()):
            raise ValueError(
                f"{kind} must have exactly the fields {', '.join(sorted(names))}; different: {', '.join(sorted(different))}"
            )
    if values["clip"]["activation"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"activation must be gelu or quick_gelu, got {values['clip']['activation']!r}")
    if not values["std"] > 0:
        raise ValueError(f"std must be > 0, got {values['std']}")
    card = clip_card(name, Clip(**_tuples(values["clip"])), Preprocess(**_tuples(values["preprocess"])))
    return replace(
        card,
        summary=f"a CLIP that was trained here, from {values['started_from']}",
        **_tuples({field: values[field] for field in _CARD_FIELDS}),
    )


def _imagereward(name: str, values: dict[str, Any]) -> Card:
    config = ImageRewardConfig.from_json(json.dumps(values))
    return imagereward_card(name, config.preprocess)


def _with_facts(card: Card, path: Path) -> Card:
    """Return the card of an ImageReward with what its card.json says."""
    facts = read_object(path)
    if facts.keys() != set(_FACTS):
        raise ValueError(f"{path} must have exactly the fields {', '.join(_FACTS)}, not {', '.join(facts)}")
    match facts["typical_range"]:
        case [float() | int() as low, float() | int() as high]:
            typical = (low, high)
        case other:
            raise ValueError(f"{path}: typical_range must be two numbers, got {other!r}")
    return replace(
        card,
        summary=f"{card.summary}, from {facts['started_from']}",
        licence=facts["licence"],
        typical_range=typical,
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
