"""The site builds without a warning; links of README and CONTRIBUTING lead somewhere; errors are quoted as they are said."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify
from torch import Tensor

import rewards
from docs_pages import PAGES, ROOT
from rewards import own
from rewards.own_scorer import try_out

LINK = re.compile(r"\]\(([^)\s]+)\)")
TROUBLES = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `mkdocs build --strict` writes it: a link or an anchor that leads nowhere ends it with an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_each_page_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.name).with_suffix(".html").is_file(), f"{page.name} is not in mkdocs.yml"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Fonts, scripts, styles and images lie in the site: it works offline, and nobody learns who reads it."""
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\s\">]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*>", page.read_text())
        assert loaded
        assert not [one for one in loaded if "//" in one], page.name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slugify(heading, "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "assets/tiny/README.md", "benchmarks/README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if "//" in link:
            continue
        place = page.parent / target if target else page
        assert place.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(place), f"{name}: {link}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_other_sites_are_named_by_https(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert "//" not in link or re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./~%+-]*)?", link), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("words", TROUBLES)
def test_errors_are_quoted_as_they_are_said(words: str) -> None:
    folders = ("rewards", "preftune", "finetune", "data_build", "eval")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert any(words in file.read_text() for file in files), f"no program says {words!r}"


def test_mistakes_of_own_rewards_are_quoted_as_they_are_said() -> None:
    """Each quoted sentence of the table in own-reward.md is what such a mistake brings."""
    page = (ROOT / "docs/own-reward.md").read_text()
    table = [line for line in page.partition("## Mistakes")[2].splitlines() if line.startswith("| ")]
    quotes = [quote for line in table for quote in re.findall(r"`([^`]+)`", line)]
    mistakes: dict[str, Callable[..., Tensor]] = {
        "shape": lambda pixels, prompts: pixels.mean((2, 3)),
        "cut": lambda pixels, prompts: pixels.detach().mean((1, 2, 3)),
        "nan": lambda pixels, prompts: pixels.mean((1, 2, 3)) * float("nan"),
        "steep": lambda pixels, prompts: (pixels * 0).sqrt().mean((1, 2, 3)),
        "one": lambda pixels: pixels.mean((1, 2, 3)),
        "swapped": lambda prompts, pixels: pixels.mean((1, 2, 3)),
    }
    said = ""
    for name, function in mistakes.items():
        with pytest.raises(own.OwnRewardError) as error, own.given({name: function}):
            try_out([rewards.load(name)], ["a"], (8, 8), gradient=True)
        said += f"{error.value}\n"
    assert len(quotes) == len(mistakes)
    for quote in quotes:
        assert quote in said
