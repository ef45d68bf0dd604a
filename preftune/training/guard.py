"""The guard of a run: held-out scorers beside the proxy, RUN/best, RUN/progress.png, and an alarm where the run over-optimises.

What it decides by is in `guard_rule`. All that it knows is in RUN/samples, so a resumed run decides as one that was never stopped.
P prompts.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from preftune import files
from preftune.cli.notes import counted, say
from preftune.grid import captioned_grid
from preftune.images import save_image
from preftune.statistics import bootstrap
from preftune.training import progress_plot
from preftune.training.guard_config import GuardConfig
from preftune.training.guard_rule import Alarm, Moment, alarm, best_of, standing
from preftune.training.validation import Validation, short_names, taken
from rewards.card import Card, Scorer

BEST = "best"
"""Folder of the best checkpoint's weights in that of a run."""
PICTURE = "guard.png"
_NOTE = "guard.json"
_WEIGHTS = ("lora", "unet")
_SHOWN = 3  # prompts of the picture


class Guard:
    """Looks at each validation of a run and keeps the best checkpoint.

    Attributes:
        alarm: What is wrong with the last validation, or None.
    """

    def __init__(self, config: GuardConfig, folder: Path, ending: str = "") -> None:
        """`ending` is that of the names in RUN/samples of the images that it looks at."""
        self.config, self.folder, self.ending = config, folder, ending
        self.alarm: Alarm | None = None
        self._weights = config.weights()
        self._seen: list[tuple[int, Validation]] = []
        self._warned = False

    def restore(self, updates: int, *, keep: bool) -> None:
        """Look again at what a run that is resumed after so many updates has validated before. `keep`: this process writes RUN/best,
        of the best one's checkpoint, where it is not there.
        """
        seen = [(at, found) for at, found in taken(self.folder, self.ending) if at <= updates]
        self._seen = seen if seen and seen[0][0] == 0 else []  # nothing is compared without the base
        self._decide()
        self._warned = self.alarm is not None and not self.stops
        best = self.best()
        checkpoint = self.folder / f"step_{best or 0:06d}"
        if keep and best is not None and self.config.guard != "off" and _kept(self.folder) != best:
            files.remove(self.folder / BEST)
            if any((checkpoint / name).is_dir() for name in _WEIGHTS):
                self._keep_best(best, lambda place: _copy_weights(checkpoint, place))
            else:
                say(f"{self.folder / BEST} is lost: there is no checkpoint of update {best}, the best so far")

    def see(self, updates: int, found: Validation, write: Callable[[Path], None] | None) -> dict[str, float]:
        """Note a validation after so many updates, and return metrics. `write` puts the weights into a folder, on the main process.

        The base is seen first; where its images were lost, nothing is decided. A validation of the same updates as an earlier one takes its
        place.
        """
        if updates and not self._seen:
            return {}
        self._seen = [(at, one) for at, one in self._seen if at < updates] + [(updates, found)]
        self._decide()
        if write is not None:
            self._keep_best(updates, write)
            progress_plot.draw(self.folder, self.moments(), [one for _, one in self._seen], self._weights)
        now = standing(self.moments()[0], self.moments()[-1], self._weights)
        return {} if now is None else {"validation_holdout": float(now.mean())}

    @property
    def updates(self) -> int:
        """Updates of the last validation."""
        return self._seen[-1][0]

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.alarm is not None and self.config.guard == "stop"

    def moments(self) -> list[Moment]:
        """Return what the validations found, in their order."""
        return [_moment(at, found) for at, found in self._seen]

    def best(self) -> int | None:
        """Return the updates of the best checkpoint; None without held-out scorers that tell images apart."""
        index = best_of(self.moments(), self._weights) if self._seen else None
        return None if index is None else self._seen[index][0]

    def report(self) -> str | None:
        """Return a paragraph on an alarm that has not been told; None where there is none."""
        if self.alarm is None or self._warned:
            return None
        self._warned = True
        return f"{_reason(self.alarm, list(short_names(self._weights).values()))} {self._advice(self.alarm)}"

    def draw(self) -> Path | None:
        """Write RUN/guard.png, three prompts before training, at the best checkpoint and now; None where it has no images of them."""
        if self.alarm is None:
            return None
        best = f"best, {counted(self.alarm.best, 'update')}" if self.alarm.best else "before, still the best"
        rows = {0: "before", self.alarm.best: best}
        rows[self.alarm.updates] = f"now, {counted(self.alarm.updates, 'update')}"
        chosen = {at: found for at, found in self._seen if at in rows}
        images = {at: found.images() for at, found in chosen.items()}
        number = min(map(len, images.values()))
        if not number:
            return None
        columns = self._fallen(number)
        save_image(
            captioned_grid(
                [[images[at][i] for i in columns] for at in chosen],
                row_captions=[rows[at] for at in chosen],
                column_titles=[chosen[self.alarm.updates].prompts[i] for i in columns],
                cell_captions=[[found.caption(i) for i in columns] for found in chosen.values()],
            ),
            self.folder / PICTURE,
        )
        return self.folder / PICTURE

    def _decide(self) -> None:
        moments = self.moments()
        judged = self.config.guard != "off" and len(moments) > 1
        self.alarm = alarm(moments, self._weights, self.config.guard_diversity_drop) if judged else None

    def _keep_best(self, updates: int, write: Callable[[Path], None]) -> None:
        if self.config.guard == "off" or self.best() != updates:
            return
        moments = {moment.updates: moment for moment in self.moments()}
        now = standing(moments[self._seen[0][0]], moments[updates], self._weights)
        assert now is not None, "the best one has a standing"
        mean, low, high = bootstrap.mean(now)
        interval = None if np.isnan(low) else [low, high]
        note = {"updates": updates, "standing": mean, "interval": interval, "scorers": self._weights}
        with files.replacing(self.folder / BEST) as place:
            place.mkdir()
            write(place)
            files.write_text(place / _NOTE, json.dumps(note))

    def _fallen(self, number: int) -> list[int]:
        """Return the indices of the first prompts whose standing has fallen most since the best checkpoint, at most three."""
        assert self.alarm is not None, "there is an alarm"
        moments = {moment.updates: moment for moment in self.moments()}
        both = [
            standing(moments[0], moments[at], self._weights) for at in (self.alarm.best, self.alarm.updates)
        ]
        if both[0] is None or both[1] is None:
            return list(range(min(_SHOWN, number)))
        fall = (both[1] - both[0])[:number]
        return sorted(np.argsort(fall, kind="stable")[:_SHOWN].tolist())

    def _advice(self, found: Alarm) -> str:
        kept = "the base, which is still the best" if found.best == 0 else "the best checkpoint"
        where = (
            f"{self.folder / BEST} has {kept}"
            if self.best() is not None
            else "no checkpoint is kept as the best without --holdout-rewards"
        )
        if self.config.guard == "stop":
            return f"The run stops here (--guard stop); {where}; {PICTURE} shows prompts that lost most."
        return (
            f"The run goes on (--guard warn; stop would end it); {where}; {PICTURE} shows prompts that lost most. Cures: a smaller"
            " --learning-rate, fewer updates, --jitter, more than one scorer."
        )


def _reason(found: Alarm, names: Sequence[str]) -> str:
    """Return in a sentence what is wrong."""
    value, low, high = found.change
    if found.kind == "diversity":
        return (
            f"After {counted(found.updates, 'update')} the validation images are less diverse: Vendi score {value:.2f} before training,"
            f" {low:.2f} now, {high:.0%} less."
        )
    proxy = "while the proxy did not" if found.kind == "over-optimisation" else "and so did the proxy"
    return (
        f"After {counted(found.updates, 'update')} the held-out scores ({', '.join(names)}) have fallen since update {found.best}"
        f" by {-value:.2f} of their standard deviation {bootstrap.interval(-high, -low, '.2f')}, {proxy}."
    )


def _kept(folder: Path) -> int | None:
    """Return the updates of the weights in RUN/best; None where there are none."""
    try:
        return int(json.loads((folder / BEST / _NOTE).read_text(encoding="utf-8"))["updates"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _copy_weights(checkpoint: Path, place: Path) -> None:
    for name in _WEIGHTS:
        if (checkpoint / name).is_dir():
            shutil.copytree(checkpoint / name, place / name)


def _moment(updates: int, found: Validation) -> Moment:
    return Moment(
        updates=updates,
        proxy=None if found.proxy is None else np.asarray(found.proxy, dtype=float),
        holdout={name: np.asarray(values, dtype=float) for name, values in found.holdout.items()},
        diversity=found.diversity,
    )


def check_independent(trained: Sequence[Scorer], holdout: Sequence[Scorer]) -> list[str]:
    """Return warnings of held-out scorers with the backbone of a trained one. ValueError for one with the weights of a trained one."""
    warnings = []
    for one in holdout:
        for other in trained:
            mine, theirs = _tensors(one), _tensors(other)
            name, reason = one.card.name, ""
            if mine and mine <= theirs:
                raise ValueError(
                    f"--holdout-rewards {name} has the weights of --rewards {other.card.name}; a scorer that is optimised cannot tell"
                    " whether the images got better"
                )
            if mine & theirs:
                reason = "shares weights with"
            elif (backbone := _backbone(one.card)) is not None and backbone == _backbone(other.card):
                reason = f"began as the same {backbone} as"
            if reason:
                warnings.append(
                    f"--holdout-rewards {name} {reason} --rewards {other.card.name}: what fools one may fool both; better is one of"
                    " another backbone, such as ImageReward beside a CLIP"
                )
    return warnings


def _tensors(scorer: Scorer) -> set[tuple[tuple[int, ...], bytes]]:
    """Return what tells the larger tensors of a scorer from others: shape and the first numbers."""
    if not isinstance(scorer, nn.Module):
        return set()
    return {_mark(tensor.detach()) for tensor in scorer.parameters() if tensor.numel() >= 1024}


def _mark(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.flatten()[:256].float().cpu().numpy().tobytes()


def _backbone(card: Card) -> str | None:
    """Return the published model that a scorer began as; None for small ones, which began from nothing."""
    if card.clip is not None and card.clip.vision_width >= 1024:
        return f"CLIP of {card.clip.vision_layers} layers of width {card.clip.vision_width}"
    blip = card.module in ("rewards.imagereward", "rewards.blipscore")
    return "BLIP ViT-L" if blip and card.preprocess is not None and card.preprocess.size >= 224 else None
