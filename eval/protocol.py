"""Protocols of published evaluations: which prompts, how many images of each, which scorers, and how scores are averaged.

A protocol is a YAML file in eval/configs/benchmark/, chosen by its name, or a file of the user's own with the same keys. Prompt
lists whose licence allows it come with the package, in eval/configs/benchmark/prompts/; for the others the user gives a
file, and the protocol says where it is from. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from preftune.cli import errors_raised, parse
from preftune.prompts import read_prompts
from preftune.sampling_config import Sampling
from rewards import embedded
from rewards.terms import parse_names

FOLDER = Path("eval/configs/benchmark")
NAMES = ("hpsv2", "hpsv2.1", "drawbench", "imagereward", "pickscore", "lpo", "parti", "geneval_prompts")
"""Protocols that come with the package."""
ALL = "all"
"""Name of the group of a protocol that has one only."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Who is followed, and what they do."""

    follows: str
    """Paper and code."""
    note: str = ""
    """What a user should know before he compares with published numbers."""
    prompt_files: tuple[str, ...]
    """GROUP=FILE of each group of prompts, such as a style; or one FILE."""
    source: str
    """Where the files of prompts come from, and their licence."""
    num_prompts: int
    """Of each group."""
    num_images_per_prompt: int = 1
    """Images of each prompt."""
    part_size: int | None = None
    """Prompts in file order whose mean is one value of a group's table; the table has mean and population standard deviation of
    these values. None = no parts.
    """
    factor: float = 1.0
    """By which published tables multiply the scores."""
    rewards: tuple[str, ...]
    """Scorers."""
    seed: int = 0
    """Of the first image."""
    sample: Sampling = field(default_factory=Sampling)
    """Sampling that is published; the rest is the model's own."""

    def __post_init__(self) -> None:
        for name, value in (
            ("num_prompts", self.num_prompts), ("num_images_per_prompt", self.num_images_per_prompt), ("part_size", self.part_size),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.prompt_files:
            raise ValueError("prompt_files is empty; name a file, or GROUP=FILE for each group")
        if len(self.files()) < len(self.prompt_files):
            raise ValueError("prompt_files has two files without a group, or of one group; write GROUP=FILE")
        parse_names(self.rewards)

    def files(self) -> dict[str, str]:
        """Return group -> name of its file."""
        terms = (term.rpartition("=") for term in self.prompt_files)
        return {group or ALL: name for group, _, name in terms}

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the names of the groups, in their order; empty where there is one only."""
        return tuple(self.files()) if len(self.prompt_files) > 1 else ()

    def size(self) -> int:
        """Return the number of images of a model."""
        return len(self.prompt_files) * self.num_prompts * self.num_images_per_prompt

    def sampling(self, typed: Sampling) -> Sampling:
        """Return the published sampling where the user typed none; the batch size is the user's."""
        given = {f.name: value for f in fields(typed) if (value := getattr(typed, f.name)) is not None}
        return replace(self.sample, **given)

    def summary(self, name: str) -> str:
        """Return what it does and whom it follows, in sentences."""
        prompts = f"{self.num_prompts:,} prompts"
        if self.groups:
            prompts = f"{len(self.groups)} groups ({', '.join(self.groups)}) of {prompts}"
        images = "1 image" if self.num_images_per_prompt == 1 else f"{self.num_images_per_prompt} images"
        parts = f"; means of parts of {self.part_size} prompts, in file order" if self.part_size else ""
        text = f"{name}: {prompts}, {images} a prompt, {self.size():,} images a model{parts}; scored by {', '.join(self.rewards)}. Follows {self.follows}."
        return f"{text} {self.note}".rstrip()


def load_protocol(name: str) -> Protocol:
    """Return the protocol of a name or of a YAML file; ValueError for what is neither, and for a file that is wrong."""
    path = Path(name) if _is_own(name) else embedded.find(FOLDER / f"{name}.yaml")
    if not path.is_file() or (not _is_own(name) and name not in NAMES):
        raise ValueError(
            f"there is no protocol {name}; name one of {', '.join(NAMES)}, or a YAML file with the keys of"
            f" {FOLDER / 'parti.yaml'}"
        )
    try:
        with errors_raised():
            return parse(Protocol, ["--config", str(path)])
    except ValueError as error:
        raise ValueError(f"the protocol {path} is wrong: {error}") from error


def _is_own(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def read_lists(name: str, protocol: Protocol, given: Path | None) -> dict[str, list[str]]:
    """Return group -> its prompts, from a file or folder that the user gave, else from the package; from beside a file of his own.

    ValueError where a file is missing, which says where it comes from, or has another number of prompts.
    """
    files = protocol.files()
    if given is None:
        folder = Path(name).parent if _is_own(name) else embedded.find(FOLDER / "prompts")
        paths = {group: folder / file for group, file in files.items()}
    elif len(files) == 1 and not given.is_dir():
        paths = dict.fromkeys(files, given)
    else:
        paths = {group: given / file for group, file in files.items()}
    for path in paths.values():
        if not path.is_file():
            wanted = (
                files[next(iter(files))] if len(files) == 1 else f"a folder with {', '.join(files.values())}"
            )
            raise ValueError(
                f"the prompts of {name} {f'are not at {path}' if given or _is_own(name) else 'do not come with preftune'}: they are from"
                f" {protocol.source}; give {wanted} as --prompts"
            )
    lists = {group: read_prompts(path) for group, path in paths.items()}
    for group, prompts in lists.items():
        if len(prompts) != protocol.num_prompts:
            raise ValueError(
                f"{paths[group]} has {len(prompts):,} prompts, and {name} {protocol.num_prompts:,}; give the file of"
                f" {protocol.source}"
            )
    return lists


def first(lists: Mapping[str, Sequence[str]], count: int | None) -> dict[str, list[str]]:
    """Return the first prompts of each group."""
    return {group: [*prompts[:count]] for group, prompts in lists.items()}
