"""The names that --report-to takes, checked before anything heavy is imported: accelerate's trackers, none, all."""

import difflib
import importlib.util
from collections.abc import Sequence

from preftune.files import lock

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""Trackers of accelerate; each is the name of its package as well."""


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for what is no name, and for none or all beside others."""
    for name in names:
        if name not in (*TRACKERS, "none", "all"):
            several = name.replace(",", " ").split()
            near = several if len(several) > 1 else difflib.get_close_matches(name.lower(), TRACKERS, n=1)
            meant = f" (did you mean {' '.join(near)}?)" if near else ""
            raise ValueError(
                f"--report-to {name} is no tracker{meant}; there are {', '.join(TRACKERS)}, and none or all"
            )
    alone = {"none", "all"}.intersection(names)
    if not names or (alone and set(names) != alone) or len(alone) > 1:
        raise ValueError(
            f"--report-to {' '.join(names)} names no trackers; give none, all (those that are installed), or one or more of"
            f" {', '.join(TRACKERS)}"
        )


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers of --report-to, each once."""
    if "none" in names:
        return ()
    return tuple(filter(_is_installed, TRACKERS)) if "all" in names else tuple(dict.fromkeys(names))


def check_ready(names: Sequence[str], *, resumes: bool = False) -> None:
    """Raise ValueError where a tracker's package is missing, or where wandb cannot log in; at a terminal it asks for the key.

    A run that resumes, perhaps at night while the network is away, goes on without wandb where it cannot log in.
    """
    for name in chosen(names):
        if not _is_installed(name):
            others = [other for other in names if other != name] or ["none"]
            raise ValueError(
                f"--report-to {name} needs the package {name}: pip install {name}, or go without it by --report-to {' '.join(others)}"
            )
    if "wandb" in chosen(names) and lock.is_main_process():
        import wandb

        if wandb.setup().settings.mode not in (
            "online",
            "shared",
        ):  # WANDB_MODE, or what `wandb offline` noted
            return
        try:
            reason = None if wandb.login() else "it has no API key"
        except Exception as error:
            reason = str(error).strip()
        if reason is not None and not resumes:
            raise ValueError(
                f"--report-to wandb cannot log in: {reason}; run `wandb login`, set WANDB_API_KEY, or keep the metrics on"
                " this machine by WANDB_MODE=offline"
            )


def _is_installed(name: str) -> bool:
    """Whether a package can be imported; a folder of its name, as wandb makes one, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
