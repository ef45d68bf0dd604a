"""Where a model is: a pipeline folder, a single file, or a repository of the hub, found once and before any check.

`locate` is the one place that reads --model, --revision and --variant. What it returns is on this machine: a model of the
hub comes from the hub's cache where it is complete there, else it is downloaded, configurations first.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from preftune.families import configs, known, weights
from preftune.families.source import (
    INDEX,
    Source,
    check_variant,
    commit_of,
    models_of,
    parts_of,
)
from rewards import embedded, hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/(?:blob|resolve)/([^/]+)/(.+))?/?"
)
AUTOENCODERS = {"--vae": "madebyollin/sdxl-vae-fp16-fix", "--reward-vae": "madebyollin/taesd"}
"""A flag that names an autoencoder -> one that it may name."""
_EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
P = ParamSpec("P")
Found = TypeVar("Found")


def _once_a_folder(function: Callable[P, Found]) -> Callable[P, Found]:
    """Remember what a function returns, for each working directory: in another one a relative path is another one."""

    @functools.cache
    def remembered(here: Path, *args: P.args, **kwargs: P.kwargs) -> Found:
        return function(*args, **kwargs)

    @functools.wraps(function)
    def found(*args: P.args, **kwargs: P.kwargs) -> Found:
        return remembered(Path.cwd(), *args, **kwargs)  # type: ignore[arg-type]

    found.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return found


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The model that a program starts from."""

    model: str
    """Stable Diffusion 1.x, 2.x or XL: pipeline folder, .safetensors or .ckpt file, or a hub id as stable-diffusion-v1-5/stable-diffusion-v1-5."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None = main."""
    variant: str | None = None
    """Variant of the weights, as fp16; None = those without one, or the only one there is."""

    def __str__(self) -> str:
        """Return the model as a page names it: with its revision and variant, where it has them."""
        given = {"revision": self.revision, "variant": self.variant}
        more = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        return f"{self.model} ({more})" if more else self.model

    def flags(self) -> list[str]:
        """Return the flags that name this model to another program."""
        given = {"--model": self.model, "--revision": self.revision, "--variant": self.variant}
        return [word for flag, value in given.items() if value is not None for word in (flag, value)]

    def source(self) -> Source:
        """Return where the model is, after a download if it must be; ValueError as `locate`."""
        return locate(self.model, self.revision, self.variant)


def as_source(model: "Source | Path | str") -> Source:
    """Return the source of a model that was named by its path or hub id."""
    return model if isinstance(model, Source) else locate(str(model))


@_once_a_folder
def locate(model: str, revision: str | None = None, variant: str | None = None) -> Source:
    """Return where a model is; a model of the hub that is not in the cache is downloaded.

    ValueError, in one sentence with the next step, for a path that is missing, for a folder or file that is no
    model (such as a LoRA), and for a repository that is not to be had.
    """
    path = embedded.find(Path(model).expanduser())
    if page := _HUB_PAGE.fullmatch(model):
        repo, at, file = page.groups()
        if file is not None:
            found = hub.fetch_file(repo, file, revision=revision or at)
            return _from_file(model, found, variant, commit=commit_of(found))
        return _from_hub(repo, revision, variant)
    if path.exists() and revision is not None:
        raise ValueError(f"--revision {revision} is for hub ids, but {model} is a path; leave it out")
    if path.is_dir():
        check_pipeline_folder(path)
        return Source(name=model, folder=path, variant=variant, commit=commit_of(path / INDEX))
    if path.is_file():
        return _from_file(model, path, variant)
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
        return _from_hub(model, revision, variant)
    hint = f" (of the hub: https://huggingface.co/{model})" if _HUB_ID.fullmatch(model) else ""
    raise ValueError(
        f"{model} does not exist; name a pipeline folder, a .safetensors or .ckpt file, or a hub id as {_EXAMPLE}{hint}"
    )


def names_a_model(text: str) -> bool:
    """Return whether a text names a whole model, of what may also name a LoRA, a UNet or a run; downloads nothing.

    A hub id does where the hub's cache has it, else its page: a run whose folder is missing, runs/refl, looks like a hub id.
    """
    path = embedded.find(Path(text).expanduser())
    if path.is_file():
        from preftune.families import single_file  # needs torch, which the flags do not

        return single_file.is_checkpoint(path)
    if path.is_dir():
        return (path / INDEX).is_file()
    if _HUB_PAGE.fullmatch(text):
        return True
    is_id = bool(_HUB_ID.fullmatch(text)) and not path.parent.is_dir()
    return is_id and hub.cached_folder(text) is not None


def check_pipeline_folder(folder: Path) -> None:
    """Raise ValueError for a folder without model_index.json; it says what the folder is instead."""
    if (folder / INDEX).is_file():
        return
    names = sorted(path.name for path in folder.iterdir())
    if what := lora_in(names):
        raise ValueError(
            f"{folder} is a LoRA ({what}), not a model: name the model that it was trained on as --model; preftune grid shows"
            f" it with --columns tuned={folder}"
        )
    if "lora" in names or "metrics.jsonl" in names:
        raise ValueError(
            f"{folder} is the folder of a run, not a model: name the run's --model, which its config.yaml has; preftune grid"
            f" shows it with --columns tuned={folder}"
        )
    singles = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    if singles and "config.json" not in names:
        raise ValueError(f"{folder} has no {INDEX}; name one of its files instead: {', '.join(singles[:4])}")
    part = (
        f" but {configs.read_json(folder / 'config.json').get('_class_name')}"
        if "config.json" in names
        else ""
    )
    raise ValueError(
        f"{folder} is not a diffusers pipeline folder{part}: it has no {INDEX}; save one with pipe.save_pretrained(folder)"
    )


def lora_in(names: Collection[str]) -> str | None:
    """Return the file, among these names, that only a LoRA has."""
    files = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
    return next((name for name in files if name in names), None)


def vae_folder(vae: str, flag: str = "--vae") -> Path | None:
    """Return the folder of an autoencoder that is named by its path, None for a hub id; ValueError where there is none."""
    path = embedded.find(Path(vae).expanduser())
    if not path.exists() and _HUB_ID.fullmatch(vae) and not path.parent.is_dir():
        return None
    if not path.is_dir():
        raise ValueError(
            f"{flag} {vae} {'is a file' if path.exists() else 'does not exist'}; name the folder of an autoencoder or a hub id,"
            f" as {AUTOENCODERS[flag]}"
        )
    return path


@_once_a_folder
def locate_vae(vae: str, flag: str = "--vae") -> Path:
    """Return the folder of an autoencoder that is named by its path or hub id; ValueError where there is none.

    A hub id is answered from the cache or downloaded, as a model is.
    """
    path = vae_folder(vae, flag)
    if path is not None:
        return path

    def choose(names: Collection[str]) -> list[str]:
        found = weights.choose([name for name in names if "/" not in name], "diffusers", None)
        if "config.json" not in names or found is None:
            raise ValueError(
                f"{vae} is no autoencoder of diffusers: it has no config.json with weights; name another {flag}"
            )
        return ["config.json", *found.files]

    folder = hub.cached_folder(vae)
    if folder is not None:
        try:
            choose(weights.names_in(folder))
        except ValueError:
            folder = None
    return folder or hub.fetch_folder(vae, choose, words="config.json diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------- single files


def _from_file(model: str, path: Path, variant: str | None, commit: str | None = None) -> Source:
    if variant is not None:
        raise ValueError(
            f"--variant {variant} is for pipeline folders and hub ids, but {model} is one file; leave it out"
        )
    from preftune.families import single_file  # needs torch, which the flags do not

    kind = single_file.detect(path)
    return Source(name=model, folder=kind.folder, file=path, commit=commit, noise=kind.noise)


# ---------------------------------------------------------------- the hub


def _from_hub(repo: str, revision: str | None, variant: str | None) -> Source:
    """Return the snapshot of a repository: from the cache where it is complete, else downloaded."""
    folder = hub.cached_folder(repo, revision)
    lacks = "" if folder is None else _lacks(folder, variant)
    if folder is None or lacks:
        try:
            folder = _download(repo, revision, variant)
        except ValueError as error:
            raise ValueError(
                f"{error} (the cache has a part of it: {lacks})" if lacks else str(error)
            ) from error
    return Source(name=repo, folder=folder, variant=variant, commit=commit_of(folder / INDEX))


def _download(repo: str, revision: str | None, variant: str | None) -> Path:
    """Download what is missing of a model; its configurations are checked before gigabytes are downloaded."""
    weight = f"*/*model.{variant}.safetensors" if variant else "*/*model.safetensors"
    patterns = " ".join(f'--include "{pattern}"' for pattern in ("*.json", "*.txt", weight))
    fetch = functools.partial(
        hub.fetch_folder, repo, revision=revision, words=f'{patterns} --exclude "safety_checker/*"'
    )
    fetch(functools.partial(_index_of, repo))
    folder = fetch(_chooser(repo, revision, _configurations))
    known.check(Source(name=repo, folder=folder, variant=variant))
    choose = functools.partial(_weights_too, variant=variant)
    return fetch(_chooser(repo, revision, choose))


def _lacks(folder: Path, variant: str | None) -> str:
    """Return what a snapshot in the cache lacks of what this model needs, or nothing."""
    source = Source(name=str(folder), folder=folder, variant=variant)
    try:
        for part in parts_of(source.index()):
            if part.startswith("tokenizer"):
                configs.check_tokenizer(folder / part)
            else:
                configs.read_json(
                    folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
                )
        source.check_weights()
    except ValueError as error:
        return str(error)
    return ""


def _index_of(repo: str, names: Collection[str]) -> Sequence[str]:
    """Choose model_index.json; ValueError where there is none, which says what the repository is instead."""
    if INDEX in names:
        return [INDEX]
    if lora_in(names):
        raise ValueError(f"{repo} is a LoRA, not a model; name the model that it was trained on as --model")
    singles = [name for name in names if name.endswith((".safetensors", ".ckpt")) and "/" not in name]
    if singles and "config.json" not in names:
        raise ValueError(
            f"{repo} has no {INDEX}; name one of its files, as https://huggingface.co/{repo}/blob/main/{singles[0]}"
        )
    raise ValueError(
        f"{repo} has no {INDEX}, so it is no pipeline of diffusers; name another hub id, as {_EXAMPLE}"
    )


def _chooser(
    repo: str, revision: str | None, choose: Callable[[Mapping[str, Any], Collection[str]], Sequence[str]]
) -> Callable[[Collection[str]], Sequence[str]]:
    """Return a choice of files that knows the repository's model_index.json."""
    index = configs.read_json(hub.fetch_file(repo, INDEX, revision=revision))

    def chosen(names: Collection[str]) -> Sequence[str]:
        try:
            return choose(index, names)
        except ValueError as error:
            raise ValueError(f"{repo}: {error}") from error

    return chosen


def _configurations(index: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Choose configurations and vocabularies of the pipeline's parts."""
    wanted = tuple(f"{part}/" for part in parts_of(index))
    return [INDEX] + [
        name
        for name in names
        if name.startswith(wanted) and name.endswith((".json", ".txt")) and ".index." not in name
    ]


def _weights_too(index: Mapping[str, Any], names: Collection[str], *, variant: str | None) -> list[str]:
    """Choose configurations and, of each part, one kind of weights: no other formats, no safety checker."""
    files = _configurations(index, names)
    models = models_of(index)
    inside = {
        part: {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}
        for part in models
    }
    check_variant("it", inside, models, variant)
    for part, library in models.items():
        found = weights.choose(inside[part], library, variant)
        if found is None:
            raise ValueError(f"{part} has no weights in safetensors or .bin files")
        files += [f"{part}/{name}" for name in found.files]
    return files
