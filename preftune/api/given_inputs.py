"""Inputs that a call from Python gives as objects: prompts in a list, rewards as functions."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune import files
from preftune.typed_prompts import SUFFIXES
from rewards.input_files import has_surrogate

Functions = dict[str, Callable[..., Any]]

PROMPT_ARGUMENTS = ("prompts", "validation_prompts")
_WRITTEN = re.compile(rf"({'|'.join(PROMPT_ARGUMENTS)})_[0-9a-f]{{12}}\.json")


def scorers(rewards: Any) -> tuple[Any, Functions]:
    """Return rewards as --rewards takes them, and the functions among them by name.

    `rewards` is "imagereward=1", a function, a list of such, or a dict of name -> weight, function or (function, weight).
    A function without a name of its own in the dict has that of its definition. ValueError for anything else.
    """
    if isinstance(rewards, Mapping):
        rows = [_named(str(name), value) for name, value in rewards.items()]
    elif isinstance(rewards, Sequence) and not isinstance(rewards, str | bytes):
        rows = [_unnamed(one) for one in rewards]
    else:
        rows = [_unnamed(rewards)]
    functions: Functions = {}
    for term, function in rows:
        if function is not None:
            name = term.rpartition("=")[0]
            if name in functions:
                raise ValueError(
                    f"rewards has two functions called {name}; name them, as rewards={{'mine': f}}"
                )
            functions[name] = function
    return [term for term, _ in rows], functions


def _unnamed(one: Any) -> tuple[str, Callable[..., Any] | None]:
    if isinstance(one, str):
        return one, None
    name = getattr(one, "__name__", type(one).__name__)
    if not callable(one):
        raise ValueError(
            f"rewards holds {one!r}; give the name of a scorer, as 'imagereward=1', a function of pixels and prompts, or a"
            " dict, as {'imagereward': 1, 'mine': (function, 0.5)}"
        )
    if not name.isidentifier():
        raise ValueError("rewards holds a function without a name; name it, as rewards={'mine': function}")
    return f"{name}=1", one


def _named(name: str, value: Any) -> tuple[str, Callable[..., Any] | None]:
    function, weight = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 1)
    if not isinstance(value, tuple | list) and not callable(value):
        function, weight = None, value
    if isinstance(weight, bool) or (function is not None and not callable(function)):
        raise ValueError(
            f"rewards has {value!r} for {name}; give a weight, a function, or (function, weight)"
        )
    try:
        number = float(weight)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rewards has {value!r} for {name}; give a weight, a function, or (function, weight)"
        ) from error
    return f"{name}={number!r}", function


def prompt_file(name: str, prompts: Any) -> tuple[str, str] | None:
    """Return the name and content of the file that a list of prompts becomes; None for a path.

    The name depends on the prompts alone: the same list goes on with the same run. ValueError for a list that is empty or
    holds anything but strings, and for a string that is a prompt instead of a path.
    """
    if prompts is None or isinstance(prompts, Path):
        return None
    if isinstance(prompts, str):
        if Path(prompts).suffix.lower() in SUFFIXES or Path(prompts).exists():
            return None
        raise ValueError(
            f"{name} is {prompts!r}, which is no prompt file; name a file that ends in {', '.join(SUFFIXES)}, or give the"
            f" prompts themselves in a list: {name}=[{prompts!r}]"
        )
    if isinstance(prompts, Mapping | set | bytes) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"{name} is a {type(prompts).__name__}; give the path of a prompt file or a list of strings"
        )
    texts = list(prompts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise ValueError(
            f"{name} {f'holds {wrong[0]!r}' if wrong else 'is an empty list'}; give a list of strings"
        )
    if any(map(has_surrogate, texts)):
        raise ValueError(
            f"{name} holds half a character, which is no text; decode the file that it is from as UTF-8"
        )
    content = json.dumps(texts, ensure_ascii=False, indent=0) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return f"{name}_{digest}.json", content


class Written:
    """Prompt files in the folder of a run; those that its config.yaml does not name at the end are removed."""

    def __init__(self, folder: Path, contents: Mapping[str, str]) -> None:
        self._folder, self._contents = folder, contents
        self._missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]

    def write(self) -> None:
        """Write those that are not there; by this process as the folder's only writer."""
        for name, content in self._contents.items():
            if not (self._folder / name).exists():
                files.write_text(self._folder / name, content)

    def tidy(self) -> None:
        """Remove what no run needs, of this call and of earlier runs in the folder; also folders that were made for nothing."""
        config = self._folder / "config.yaml"
        named = config.read_text(encoding="utf-8") if config.is_file() else ""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if _WRITTEN.fullmatch(path.name) and path.name not in named:
                files.remove(path)
        for folder in self._missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
