"""The model before tuning, beside the one that is tuned."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from preftune.training import workspace
from preftune.training.workspace import Workspace


class BeforeTuning:
    """The model of a workspace as it was: its LoRA switched off, or with --train full a second denoiser, frozen, in memory."""

    def __init__(self, w: Workspace) -> None:
        self._family, self._run = w.family, w.run
        self._second: nn.Module | None = None
        if w.model.train == "full":
            self._second = workspace.load_reference(w.model, w.run.config, w.run.device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context, without gradient, in which the family predicts as before tuning."""
        if self._second is None:
            with torch.no_grad(), self._family.reference():
                yield
            return
        tuned, self._family.denoiser = self._family.denoiser, self._second
        try:
            with torch.no_grad(), self._run.autocast():  # as in the prepared module
                yield
        finally:
            self._family.denoiser = tuned
