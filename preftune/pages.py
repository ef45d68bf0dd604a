"""HTML pages from templates: the one place that makes them, so that every value is escaped; and files in them."""

import base64
from pathlib import Path

import jinja2


def render(template: Path, **values: object) -> str:
    """Return the page of a Jinja template, which may include others beside it; values are escaped, and one that is missing is an error."""
    beside = jinja2.FileSystemLoader(template.parent)
    environment = jinja2.Environment(loader=beside, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template.name).render(**values)


def base64_of(path: Path) -> str:
    """Return a file as base64 text, as a page holds it in a data: URL."""
    return base64.b64encode(path.read_bytes()).decode("ascii")
