"""Scores, image statistics and features of the images of a folder, kept on the disk chunk by chunk, so that a killed program goes on.

    scores/TITLE/scored.json     what the scores are of: images, prompts, scorers, settings
    scores/TITLE/000000.npz      scores (n, R), statistics (n, K) and features (n, D) of the images of a chunk

Chunks begin at the same images whenever the program was stopped, so the scores are the same to the last bit. Letters: N images, R
scorers, K statistics, D features of an image.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.agreement import Floats
from eval.compared_folders import ModelFolder
from eval.report_folder import begin_folder
from eval.view_scores import PromptedImage, score_views
from preftune.files import replacing, tidy
from preftune.statistics.image_features import ImageTower, clip_tower, describe
from preftune.statistics.image_statistics import STATISTICS
from rewards import Scorer

CHUNK = 512
"""Images whose scores are written together, or a little less: a whole number of batches."""
RECORD = "scored.json"


@dataclass(frozen=True, kw_only=True)
class FolderScores:
    """What was measured of the images of a model."""

    scores: Floats
    """(N, R)."""
    statistics: Floats
    """(N, K)."""
    features: Floats | None
    """(N, D) unit vectors; None without a tower."""


def score_folder(
    images: Sequence[PromptedImage],
    scorers: Sequence[Scorer],
    folder: Path,
    device: torch.device,
    *,
    weights: Mapping[str, Any],
    batch_size: int,
    workers: int,
    title: str,
    tower: ImageTower | None = None,
) -> FolderScores:
    """Return what was measured of N images; chunks that are in the folder are read, the others are measured and written.

    `tower` makes the features; None = that of the first CLIP among the scorers. `weights` says what tells scorers and tower from others.

    ValueError for an image that cannot be read or that a scorer refuses. No pixels stay in memory.
    """
    chunk = max(1, CHUNK // batch_size) * batch_size
    tower = clip_tower(scorers) if tower is None else tower
    tidy(folder.parent, folder)
    record = {"images": digest_of(images), "weights": weights, "chunk": chunk, "batch size": batch_size}
    begin_folder(folder, RECORD, record)
    found = []
    for start in range(0, len(images), chunk):
        path, part = folder / f"{start:06d}.npz", images[start : start + chunk]
        if not path.is_file():
            progress = f"scoring {title}, {start + 1}-{start + len(part)} of {len(images)}"
            table, rejected = score_views(
                part, scorers, (), device, batch_size=batch_size, workers=workers, progress=progress
            )
            if rejected:
                raise ValueError(
                    f"{len(rejected)} images of {title} cannot be scored; the first: {rejected[min(rejected)]}"
                )
            seen = describe([image.path for image in part], tower, device, batch_size=batch_size)
            arrays = {
                "scores": np.stack([table[scorer.card.name][0] for scorer in scorers], axis=1),
                "statistics": np.stack([seen.statistics[name] for name in STATISTICS], axis=1),
            }
            if seen.features is not None:
                arrays["features"] = seen.features.astype(np.float32)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        with np.load(path, allow_pickle=False) as kept:
            found.append({name: kept[name] for name in kept.files})
    return FolderScores(
        scores=np.concatenate([part["scores"] for part in found]),
        statistics=np.concatenate([part["statistics"] for part in found]),
        features=None
        if tower is None
        else np.concatenate([part["features"] for part in found]).astype(np.float64),
    )


def images_by_prompt(folder: ModelFolder) -> dict[str, list[PromptedImage]]:
    """Return prompt -> its images by seed, in the order in which the prompts come."""
    found: dict[str, list[PromptedImage]] = {row.text: [] for row in folder.rows}
    for row in sorted(folder.rows, key=lambda row: -1 if row.seed is None else row.seed):
        found[row.text].append(PromptedImage(path=row.path, prompt=row.text))
    return found


def digest_of(images: Sequence[PromptedImage]) -> str:
    """Return what tells these images from others: SHA-256 of their names, prompts, sizes in bytes and times of change."""
    found = hashlib.sha256()
    for line in _lines(images):
        found.update(line.encode())
    return found.hexdigest()


def _lines(images: Sequence[PromptedImage]) -> Iterator[str]:
    for image in images:
        stat = image.path.stat()
        yield json.dumps([image.path.name, image.prompt, stat.st_size, stat.st_mtime_ns]) + "\n"
