"""What a model is asked: a text, images, and the schema of the answer; as the body of a request, and as a key of the calls."""

import base64
import functools
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from preftune.images import thumbnail
from preftune.mllm.config import EndpointConfig
from rewards.digests import sha256_of


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is shown: what tells it from others, and how it is read when it is sent."""

    digest: str
    read: Callable[[int], Image.Image]
    """Returns it in RGB with no side above so many pixels; ValueError for an image that is damaged or too large."""

    def data_url(self, side: int) -> str:
        """Return the image as a data URL, PNG; ValueError as `read`."""
        content = io.BytesIO()
        self.read(side).save(content, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def of_file(path: Path) -> Picture:
    """Return the picture of an image file, which is told from others by its bytes."""
    return Picture(digest=sha256_of(path), read=lambda side: thumbnail(path, side, side))


def of_image(image: Image.Image) -> Picture:
    """Return the picture of an RGB image in memory, which is told from others by its pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes())
    return Picture(digest=digest.hexdigest(), read=functools.partial(_smaller, image))


def _smaller(image: Image.Image, side: int) -> Image.Image:
    smaller = image.copy()
    smaller.thumbnail((side, side), Image.Resampling.BICUBIC)
    return smaller


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text with images, numbered from 1, and the JSON schema of the answer."""

    text: str
    pictures: tuple[Picture, ...]
    schema: dict[str, Any]
    name: str
    """Of the schema: letters, digits, - and _."""

    def key(self, config: EndpointConfig) -> str:
        """Return what tells the question from others: model, text, schema, images and all parameters, but not where it is asked."""
        images = [f"{picture.digest} {config.image_side}" for picture in self.pictures]
        return hashlib.sha256(
            json.dumps(self._body(config, images, config.seed), sort_keys=True).encode()
        ).hexdigest()

    def body(self, config: EndpointConfig, attempt: int) -> dict[str, Any]:
        """Return the body of the request, of the first attempt, 0, or of a further one; ValueError for an image that cannot be read."""
        urls = [picture.data_url(config.image_side) for picture in self.pictures]
        return self._body(config, urls, config.seed + attempt)

    def _body(self, config: EndpointConfig, images: list[str], seed: int) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        for number, url in enumerate(images, 1):
            content.append({"type": "text", "text": f"Image {number}:"})
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": config.temperature,
            "seed": seed,
            "max_tokens": config.max_tokens,
        }
        if config.response_format == "json-schema":
            schema = {"name": self.name, "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif config.response_format == "json-object":
            body["response_format"] = {"type": "json_object"}
        return {name: value for name, value in (body | config.extra()).items() if value is not None}
