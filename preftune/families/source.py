"""A model on this machine: the folder of its configurations, and where its weights are."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.families import weights
from preftune.families.configs import AUTOENCODERS, PIPELINES, read_json

INDEX = "model_index.json"
_MODELS = {"UNet2DConditionModel", *AUTOENCODERS, "CLIPTextModel", "CLIPTextModelWithProjection"}
"""Classes of parts that have weights."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on this machine."""

    name: str = field(compare=False)
    """As the user wrote it; the same model under two names is equal."""
    folder: Path
    """The pipeline folder; of a single file, the published configurations of its kind."""
    file: Path | None = None
    """A single file with all weights."""
    variant: str | None = None
    commit: str | None = None
    """Of a model of the hub."""
    noise: tuple[tuple[str, Any], ...] = ()
    """What a single file says about the noise schedule, in the names of scheduler_config.json."""

    def __str__(self) -> str:
        return self.name

    def index(self) -> dict[str, Any]:
        """Return model_index.json."""
        return read_json(self.folder / INDEX)

    def scheduler_config(self) -> dict[str, Any]:
        """Return scheduler_config.json, with what a single file says."""
        return {**read_json(self.folder / "scheduler" / "scheduler_config.json"), **dict(self.noise)}

    def check_weights(self, without: Collection[str] = ()) -> None:
        """Raise ValueError unless all parts have their weights, but for those in `without`, which come from elsewhere."""
        if self.file is not None:
            return
        models = models_of(self.index())
        for part, library in models.items():
            if part not in without:
                weights.find(self.folder / part, library, self.variant)
        names = {part: weights.names_in(self.folder / part) for part in models}
        check_variant(self.name, names, models, self.variant)


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Return the parts that a known pipeline loads; ValueError for another pipeline."""
    class_name = index.get("_class_name")
    parts = PIPELINES.get(class_name) if isinstance(class_name, str) else None
    if parts is None:
        raise ValueError(f"it is a {class_name}; known are {', '.join(PIPELINES)}")
    return [
        part
        for part in parts
        if isinstance(index.get(part), list) and len(index[part]) == 2 and index[part][1]
    ]


def models_of(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts that have weights, with their library."""
    return {part: index[part][0] for part in parts_of(index) if index[part][1] in _MODELS}


def check_variant(
    where: str, names: Mapping[str, Collection[str]], models: Mapping[str, str], variant: str | None
) -> None:
    """Raise ValueError where no part has the variant."""
    if variant is None:
        return
    there = {kind for part, library in models.items() for kind in weights.variants(names[part], library)}
    if variant not in there:
        has = (
            f"has the variants {', '.join(sorted(there))}"
            if there
            else "has no variants; leave --variant out"
        )
        raise ValueError(f"--variant {variant} is not there: {where} {has}")


def commit_of(file: Path) -> str | None:
    """Return the commit of a file in the hub's cache, .../snapshots/COMMIT/..., or None elsewhere."""
    match = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})/", file.absolute().as_posix())
    return match[1] if match else None
