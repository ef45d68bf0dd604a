"""The flags of an OpenAI-compatible endpoint; needs neither torch nor an HTTP library."""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from rewards.input_files import parse_json

ASPECTS = ("prompt_following", "aesthetic", "fidelity", "harmlessness")
"""The four aspects of VisionPrefer (arXiv 2404.15100), whose own templates are not published; ours are in preftune/mllm/templates."""
ResponseFormat = Literal["json-schema", "json-object", "text"]
"""How a model is held to JSON: by a schema that the server enforces, by JSON alone, or by the words of the template."""


@dataclass(frozen=True, kw_only=True)
class TextEndpointConfig:
    """An endpoint that speaks OpenAI's chat completions, and how it is asked about texts."""

    base_url: str
    """Its address, such as http://localhost:8000/v1; requests go to ADDRESS/chat/completions."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, such as OPENAI_API_KEY; it is read there and written nowhere. None = no key."""
    response_format: ResponseFormat = "json-schema"
    """What holds the model to JSON: json-schema where the server knows it, else json-object, or text = the words of the template alone."""
    temperature: float = 0.0
    """Temperature of sampling."""
    seed: int = 0
    """Seed that is sent, plus 1 for each time that a wrong answer is asked for again."""
    max_tokens: int = 1024
    """Longest answer in tokens."""
    body: str = "{}"
    """JSON object that is merged into each request, such as '{"top_p": 0.9}'; null takes a key out."""
    concurrency: int = 4
    """Requests at the same time."""
    timeout: float = 120.0
    """Seconds until a request is given up and sent again."""
    retries: int = 5
    """Times that a request is sent again, after pauses that grow: after status 408, 425, 429 or 5xx, a timeout, a lost connection, or a reply that is no JSON. An address without a connection ever is tried twice."""
    answer_retries: int = 2
    """Times that an answer is asked for again that is a refusal, cut off, no JSON, or not of the schema."""
    max_failures: int = 20
    """Questions in a row without an answer after which the program ends, 3 where the server rejects all from the first on; 0 = it never ends by that."""
    price_input: float = 0.0
    """Price of a million tokens of input, for the printed cost."""
    price_output: float = 0.0
    """Price of a million tokens of output."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"--base-url is {self.base_url!r}; it must be like http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ValueError(
                "--base-url holds a user or password; name a variable of the key by --api-key-env"
            )
        if not self.model.strip():
            raise ValueError("--model is empty; it is the name of a model of the endpoint")
        for name, least in self._least().items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("temperature", "price_input", "price_output"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name.replace('_', '-')} must be a number of at least 0, got {value}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"--timeout must be a number of seconds above 0, got {self.timeout}")
        self.extra()

    def _least(self) -> dict[str, int]:
        """Whole numbers -> their lowest value."""
        once = {"max_tokens": 1, "concurrency": 1}
        return once | {"retries": 0, "answer_retries": 0, "max_failures": 0, "seed": 0}

    @property
    def url(self) -> str:
        """The address that requests go to; an address without a path has /v1."""
        base = self.base_url.rstrip("/")
        return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"

    def extra(self) -> dict[str, Any]:
        """Return what is merged into each request; ValueError for what is no JSON object."""
        value = parse_json(self.body, "--body")
        if not isinstance(value, dict):
            raise ValueError(f"--body is {self.body[:80]!r}; it must be a JSON object")
        if fixed := sorted({"messages", "model", "stream", "n"} & value.keys()):
            raise ValueError(f"--body must not hold {fixed[0]}, which the program sets")
        return value

    def key(self) -> str:
        """Return the key, empty without one. ValueError, which does not show it, where the variable is not set or no key."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(f"--api-key-env {self.api_key_env}: this environment variable is not set")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"--api-key-env {self.api_key_env}: the variable holds characters that no key has"
            )
        return key


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(TextEndpointConfig):
    """An endpoint whose model reads images, too."""

    seed: int = 0
    """Seed that is sent, plus 1 for each time that a wrong answer is asked for again; also of the images and orders that are shown."""
    image_side: int = 512
    """Images are sent as PNG, made smaller until no side has more pixels."""

    def _least(self) -> dict[str, int]:
        return super()._least() | {"image_side": 16}


@dataclass(frozen=True, kw_only=True)
class OptionalEndpointConfig(TextEndpointConfig):
    """An endpoint of a program that works without one, too: it is checked by `config`, once it is known to be asked."""

    base_url: str = ""
    """Address of the model of --cleaner model, such as http://localhost:8000/v1; requests go to ADDRESS/chat/completions."""
    model: str = ""
    """Name of the model there, for --cleaner model."""

    def __post_init__(self) -> None:
        """Check nothing yet."""

    def config(self) -> EndpointConfig:
        """Return the endpoint; ValueError where something is wrong or missing."""
        if not self.base_url or not self.model:
            raise ValueError("a model is asked: --base-url and --model name it")
        return EndpointConfig(**vars(self))

    def given(self) -> list[str]:
        """Return the flags that are not as they are by themselves."""
        usual = OptionalEndpointConfig()
        changed = [name for name, value in vars(self).items() if value != getattr(usual, name)]
        return [f"--{name.replace('_', '-')}" for name in changed]
