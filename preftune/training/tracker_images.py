"""Images in trackers: small ones, with captions below where a tracker has no captions of its own."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from preftune.grid import captioned_grid
from preftune.images import thumbnail

_SIDE = 512
_SHEET = 2048  # of a grid, which has captions in it


def small(path: Path, caption: str) -> Image.Image:
    """Return an image file in RGB, made smaller where it exceeds 512 pixels a side, or, without a caption, 2048."""
    side = _SIDE if caption else _SHEET
    return thumbnail(path, side, side)


def with_caption(path: Path, caption: str) -> Image.Image:
    """Return the small image, on white above its caption where there is one."""
    image = small(path, caption)
    if not caption:
        return image
    return captioned_grid([[image]], cell_captions=[[caption]], cell_size=max(192, *image.size))


def names(key: str, images: Mapping[Path, str]) -> dict[str, tuple[Path, str]]:
    """Return name -> file and caption: the same names at each step, so that one can go through the steps of an image."""
    one = len(images) == 1
    return {key if one else f"{key}/{i:02d}": image for i, image in enumerate(images.items())}


def log_images(name: str, tracker: Any, key: str, images: Mapping[Path, str], step: int) -> None:
    """Show image files with captions in one of accelerate's trackers, in the way of that tracker."""
    named = names(key, images)
    if name in ("wandb", "swanlab", "trackio"):
        kind, more = importlib.import_module(name).Image, {"file_type": "jpg"} if name == "wandb" else {}
        shown = {place: kind(small(*image), caption=image[1], **more) for place, image in named.items()}
        tracker.log(shown if name == "trackio" else {key: list(shown.values())}, step=step)
    elif name == "aim":
        tracker.log_images({place: (small(*image), image[1]) for place, image in named.items()}, step=step)
    else:
        for place, image in named.items():
            _log_image(name, tracker, place, with_caption(*image), step)


def _log_image(name: str, tracker: Any, place: str, image: Image.Image, step: int) -> None:
    match name:
        case "comet_ml":
            tracker.tracker.log_image(image, name=place, step=step)
        case "mlflow":
            importlib.import_module(name).log_image(image, key=place, step=step)
        case "dvclive":
            tracker.tracker.log_image(f"{place}_{step:06d}.jpg", image)
        case _:
            tracker.log_images({place: [image]}, step=step)
