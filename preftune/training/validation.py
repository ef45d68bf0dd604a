"""Validation images: generated from fixed prompts and seeds, scored, and compared before and after training.

The images of one point in training are in `RUN/samples/NAME/`: 0000.png, ... and `scores.json`. A resumed
run reads the earlier ones from there. Prompts are distributed over processes, and images are written
immediately, so memory stays constant. Gold is the judge's score; it exists only if every prompt is a
caption of the shapes world. Held-out scorers are those that the run does not train on (preftune/training/guard.py).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from preftune import files
from preftune.cli.notes import counted
from preftune.cli.printable import show
from preftune.families.base import Family
from preftune.files import manifest
from preftune.grid import captioned_grid
from preftune.images import load_pixels, save_image, to_pil
from preftune.records import read_jsonl, write_jsonl
from preftune.sampling import Sampling, sample, sharded
from preftune.statistics import bootstrap, diversity
from preftune.statistics.image_features import ImageTower
from preftune.statistics.image_statistics import image_statistics
from preftune.training.run import Run
from rewards.mix import Mix
from rewards.shapes import SIZE, in_world
from rewards.shapes_judge import judge

_KEPT = 16  # images of a moment that stay on the disk


@dataclass(kw_only=True)
class Scoring:
    """What looks at validation images."""

    mix: Mix | None = None
    """Makes the proxy."""
    holdout: Mix | None = None
    """Scorers that are not trained on; their scores are kept one by one."""
    tower: ImageTower | None = None
    """Makes the features of which the diversity is computed."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Images of some prompts and their scores; proxy is None without scorers, gold outside the shapes world."""

    folder: Path
    """Holds the first images as 0000.png, ..."""
    prompts: list[str]
    proxy: list[float] | None
    gold: list[float] | None
    run: str
    """Run.fingerprint: scores under different ones are not compared."""
    holdout: dict[str, list[float]] = field(default_factory=dict)
    """Held-out scorer -> scores."""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """Statistic of the pixels -> its values (preftune/statistics/image_statistics.py)."""
    diversity: float | None = None
    """Vendi score of all images, one a prompt: 1 where all are equal; None without a tower."""

    def scores(self) -> dict[str, list[float]]:
        """Return the available scores: proxy, gold and those of held-out scorers."""
        both = {"proxy": self.proxy, "gold": self.gold}
        short = short_names(self.holdout)
        return {name: values for name, values in both.items() if values is not None} | {
            short[name]: values for name, values in self.holdout.items()
        }

    def means(self) -> dict[str, float]:
        """Return the means of scores and statistics, and the diversity, as metrics."""
        columns = self.scores() | {re.sub(r"\W", "_", name): one for name, one in self.statistics.items()}
        means = {f"validation_{name}": float(np.mean(values)) for name, values in columns.items()}
        return means if self.diversity is None else means | {"validation_diversity": self.diversity}

    def images(self) -> list[Tensor]:
        """Return the images on the disk, (3, H, W) each."""
        return [load_pixels(path) for path in sorted(self.folder.glob("*.png"))]

    def caption(self, index: int) -> str:
        """Return the scores of one image in words."""
        return ", ".join(f"{name} {values[index]:.2f}" for name, values in self.scores().items())

    def captions(self) -> dict[Path, str]:
        """Return image file -> prompt, and below it the scores."""
        paths = sorted(self.folder.glob("*.png"))
        return {path: f"{self.prompts[i]}\n{self.caption(i)}".strip() for i, path in enumerate(paths)}


def validate(
    family: Family,
    scoring: Scoring,
    prompts: Sequence[str],
    sampling: Sampling,
    run: Run,
    name: str,
    negative: str = "",
) -> Validation | None:
    """Generate prompt i with seed i, score it, and write the results to `RUN/samples/NAME`; call it on
    every process.

    `negative` is the negative prompt. Only the first 16 images are kept; the others are only scored. None where a signal
    has asked a process to stop: the sampling ends at once, and `missed` tells the run that resumes.
    """
    if run.interrupted:
        return None
    folder = run.folder / "samples" / name
    partial = folder.with_name(f".{name}.tmp-shared")  # of all processes, so its name has no process in it
    if run.is_main:
        files.remove(partial)
        partial.mkdir(parents=True)
    run.wait()
    mine = sharded(prompts, run.rank, run.world)
    rows: list[dict[str, float]] = []
    features: list[Tensor] = []
    batches = sample(
        family,
        [prompt for _, prompt in mine],
        [index for index, _ in mine],
        sampling,
        negative=negative,
        progress=f"sampling {counted(len(prompts), 'validation prompt')}" if run.is_main else None,
    )
    for pixels in run.until_stopped(batches):
        part = mine[len(rows) : len(rows) + len(pixels)]
        scores = _score(scoring, pixels, [prompt for _, prompt in part], run.device)
        features += _features(scoring.tower, pixels, run.device)
        for (index, _), image, values in zip(part, pixels, scores, strict=True):
            if index < _KEPT:
                to_pil(image).save(partial / f"{index:04d}.png")
            rows.append({"index": index, **values})
    if run.interrupted:
        if run.is_main:
            files.remove(partial)
        return None
    write_jsonl(partial / f"rank_{run.rank}.jsonl", rows)
    if features:
        np.save(partial / f"rank_{run.rank}.npy", torch.cat(features).numpy())
    run.wait()
    if run.is_main:
        _collect(partial, prompts, run)
        found = _read(partial)
        assert found is not None, "it was written just now"
        save_image(
            _grid(found), run.folder / "samples" / f"{name}.png"
        )  # first: the folder says that all is there
        with files.replacing(folder) as place:
            partial.rename(place)
    run.wait()
    found = read(run.folder, name)
    assert found is not None, "the main process has written it"
    return found


def missed(run: Run, names: Iterable[str], *, milestone: bool = False) -> bool:
    """Return whether a resumed run lacks images of the moment at which it goes on, because a signal came while they were sampled,
    or their scores in its metrics, because it was killed again after they were made up. `milestone`: they are wanted there in any case.
    """
    if not run.resumed or run.start == 0 or not (milestone or run.due("validation_steps", run.start - 1)):
        return False
    return bool(run.row) or any(read(run.folder, name) is None for name in names)


@torch.no_grad()
def _score(
    scoring: Scoring, pixels: Tensor, prompts: list[str], device: torch.device
) -> list[dict[str, float]]:
    """Return each image's scores, where there are such, and statistics, by `kind name`."""
    columns: dict[str, list[float]] = {}
    if scoring.mix is not None:
        columns["proxy"] = scoring.mix(pixels.to(device), prompts).rewards.cpu().tolist()
    if in_world(prompts) and tuple(pixels.shape[-2:]) == (SIZE, SIZE):
        columns["gold"] = judge(pixels, prompts).gold.tolist()
    if scoring.holdout is not None:
        scores = scoring.holdout(pixels.to(device), prompts).scores.T.cpu().tolist()
        columns |= {f"holdout {name}": one for name, one in zip(scoring.holdout.names, scores, strict=True)}
    columns |= {f"statistics {name}": one.tolist() for name, one in image_statistics(pixels).items()}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(pixels))]


@torch.no_grad()
def _features(tower: ImageTower | None, pixels: Tensor, device: torch.device) -> list[Tensor]:
    """Return [unit vectors (B, D) float32 on the CPU], or nothing without a tower."""
    return [] if tower is None else [tower(pixels.to(device)).float().cpu()]


def _collect(folder: Path, prompts: Sequence[str], run: Run) -> None:
    """Join what the processes have written into scores.json; a score that some images lack is left out."""
    paths = [folder / f"rank_{rank}.jsonl" for rank in range(run.world)]
    unsorted = [row for path in paths for row in read_jsonl(path)]
    rows = sorted(unsorted, key=lambda row: int(row["index"]))
    columns = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
    content = {
        "prompts": list(prompts),
        "proxy": columns.get("proxy"),
        "gold": columns.get("gold"),
        "run": run.fingerprint,
        "diversity": _diversity(folder, run.world, [int(row["index"]) for row in unsorted]),
        **{kind: _of_kind(columns, kind) for kind in ("holdout", "statistics")},
    }
    files.write_text(folder / "scores.json", json.dumps(content))
    for path in paths:
        path.unlink()
    manifest.write(folder)


def _of_kind(columns: Mapping[str, list[float]], kind: str) -> dict[str, list[float]]:
    return {
        name.removeprefix(f"{kind} "): one for name, one in columns.items() if name.startswith(f"{kind} ")
    }


def _diversity(folder: Path, world: int, indices: Sequence[int]) -> float | None:
    """Return the Vendi score of the features that the processes have written, which are removed, of images with these indices.

    None where there are none.
    """
    paths = [path for rank in range(world) if (path := folder / f"rank_{rank}.npy").exists()]
    if not paths:
        return None
    features = np.concatenate([np.load(path).astype(np.float64) for path in paths])[np.argsort(indices)]
    for path in paths:
        path.unlink()
    return float(diversity.vendi(features))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return scorer -> what to call it below a picture: of the folder of a trained one as few last parts as tell it from the others."""
    parts = {name: Path(name).parts if Path(name).is_dir() else (name,) for name in names}
    short = {}
    for name, mine in parts.items():
        tails = [mine[-count:] for count in range(1, len(mine) + 1)]
        others = [other for one, other in parts.items() if one != name]
        unique = [
            tail for tail in tails if tail != ("scorer",) and all(o[-len(tail) :] != tail for o in others)
        ]
        short[name] = "/".join((unique or [mine])[0])
    return short


def read(run: Path, name: str) -> Validation | None:
    """Return what `validate` wrote, or None where it did not, or where that is damaged."""
    return _read(run / "samples" / name)


def _read(folder: Path) -> Validation | None:
    try:
        manifest.verify(folder)
    except ValueError:
        return None
    return Validation(folder=folder, **json.loads((folder / "scores.json").read_text(encoding="utf-8")))


def taken(run: Path, ending: str = "") -> list[tuple[int, Validation]]:
    """Return (updates, what `validate` wrote) of all moments with that ending, in their order; without those of another run than the first."""
    named = [
        re.fullmatch(rf"step_(\d+){re.escape(ending)}", path.name)
        for path in (run / "samples").glob("step_*")
    ]
    moments = sorted((int(match[1]), read(run, match[0])) for match in named if match is not None)
    found = [(updates, one) for updates, one in moments if one is not None]
    return [(updates, one) for updates, one in found if one.run == found[0][1].run]


def _grid(found: Validation) -> Image.Image:
    """The images of one moment, four in a row."""
    images = found.images()
    captions = list(found.captions().values())
    starts = range(0, len(images), 4)
    return captioned_grid(
        [images[i : i + 4] for i in starts], cell_captions=[captions[i : i + 4] for i in starts]
    )


def comparison(moments: Mapping[str, Validation], number: int = 8) -> Image.Image:
    """Return a grid with a row for each moment of the same prompts and seeds, scores below."""
    first = next(iter(moments.values()))
    rows = [found.images()[:number] for found in moments.values()]
    return captioned_grid(
        rows,
        row_captions=list(moments),
        column_titles=first.prompts[: len(rows[0])],
        cell_captions=[
            [found.caption(i) for i in range(len(row))]
            for found, row in zip(moments.values(), rows, strict=True)
        ],
    )


def summary(moments: Mapping[str, Validation]) -> str:
    """Return lines that say how each later moment of the same prompts differs from the first, with 95 % intervals."""
    (title, first), *others = moments.items()
    lines = [f"{counted(len(first.prompts), 'validation prompt')}; change with its 95 % interval:"]
    for other_title, other in others:
        for name, old in first.scores().items():
            new = other.scores().get(name)
            if new is None:
                continue
            mean, low, high = bootstrap.mean(np.asarray(new) - np.asarray(old))
            lines.append(
                f"{name:5s} {title} {np.mean(old):.3f} -> {other_title} {np.mean(new):.3f}"
                f"  change {mean:+z.3f} {bootstrap.interval(low, high, '+z.3f')}".rstrip()
            )
    return "\n".join(lines)


def write_comparison(run: Path, names: Mapping[str, str]) -> list[Path]:
    """Write `RUN/before_after.png` of moments that were validated, {title: name}, and print what changed since the first.

    Returns the file, where it was written and is not what it was before.
    """
    moments = {title: found for title, name in names.items() if (found := read(run, name)) is not None}
    written: list[Path] = []
    lost = [f"samples/{name}" for title, name in names.items() if title not in moments]
    if lost:
        show(f"no comparison of before and after: {', '.join(lost)} is not there or damaged")
    elif len({found.run for found in moments.values()}) > 1:
        show("no comparison of before and after: the settings, inputs or scorers differ between them")
    else:
        place = run / "before_after.png"
        earlier = place.read_bytes() if place.is_file() else b""
        save_image(comparison(moments), place)
        written = [place] * (place.read_bytes() != earlier)
        show(summary(moments))
    show(f"tuned weights, metrics and images: {run}")
    return written
