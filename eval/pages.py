"""HTML pages from templates: values are escaped, and files can be embedded."""

import base64
from pathlib import Path

import jinja2


def render(template: Path, **values: object) -> str:
    """Return the page of a Jinja template; values are escaped, and one that is missing is an error."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def base64_of(path: Path) -> str:
    """Return a file as base64 text, as a page holds it in a data: URL."""
    return base64.b64encode(path.read_bytes()).decode("ascii")
