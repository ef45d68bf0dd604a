"""A reward of the user's own as a scorer: what the function gets, what it may return, and a trial before training.

The function is called with pixels (B, 3, H, W), float32 on the device of the images, and a list of B prompts. Pixels lie in
[0, 1]; while a model is trained by a reward's gradient they may leave it a little, since the decoder is not clamped. It returns
one score for each image, higher is better: a tensor (B,), or (B, 1), which is taken for (B,); where no gradient is needed also
an array or a list of B numbers. A module that is named, and modules at the top level of the file, are moved to the
device, frozen and set to eval mode.

Shapes: B batch, H W pixels of any size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards import own
from rewards.card import Card, Scorer
from rewards.own import OwnRewardError
from rewards.pixels import at_least_float32, takes_images


class OwnReward:
    """The scorer; OwnRewardError says in one sentence what the function did wrong, and where it is."""

    def __init__(self, card: Card, device: torch.device | str) -> None:
        self.card = card
        self.device = torch.device(device)
        self.function = own.function_of(card.name)
        self.file, self.line = own.place_of(self.function)
        path = own.path_of(card.name)
        if self.file is None and path is not None:  # functools.partial, say
            self.file = str(path.resolve())
        for part in (self.function, *own.namespace_of(card.name).values()):
            if isinstance(part, nn.Module):
                part.to(self.device).eval().requires_grad_(False)
            elif part is self.function and hasattr(part, "to"):
                part.to(self.device)

    @property
    def place(self) -> str:
        """Return the name, with file and line where they are known."""
        return self.card.name if self.line is None else f"{self.card.name} ({self.file}:{self.line})"

    @takes_images
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the function's scores (B,) float32 of pixels (B, 3, H, W)."""
        needed = torch.is_grad_enabled() and pixels.requires_grad
        try:
            result = self.function(at_least_float32(pixels).clone(), list(prompts))  # it may write into them
        except (Exception, SystemExit) as error:
            raise own.failure(self.card.name, self.file, error) from error
        scores = self._scores(result, len(pixels)).to(pixels.device)
        if needed and not scores.requires_grad:
            raise OwnRewardError(
                f"{self.place} returned scores without a gradient, which this method needs; compute them from the pixels with"
                " torch alone, without no_grad(), detach(), item(), numpy and PIL, or use a method without a reward's gradient,"
                " such as preftune raft"
            )
        return scores

    def _scores(self, result: Any, count: int) -> Tensor:
        """Return what the function returned as (B,) float32."""
        wanted = f"return one score for each image, a tensor of shape ({count},)"
        if isinstance(result, list | tuple) and result and all(isinstance(one, Tensor) for one in result):
            result = torch.stack(list(result)) if len({one.shape for one in result}) == 1 else list(result)
        if not isinstance(result, Tensor):
            words = "None" if result is None else f"{type(result).__name__} {result!r:.60}"
            try:
                result = torch.as_tensor(result, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise OwnRewardError(f"{self.place} returned {words} for {count} images; {wanted}") from error
            if result.ndim == 0:
                raise OwnRewardError(f"{self.place} returned {words} for {count} images; {wanted}")
        if result.is_meta:
            raise OwnRewardError(
                f"{self.place} returned a tensor on the device meta, without numbers; {wanted}"
            )
        if result.shape == (count, 1):
            result = result[:, 0]
        if result.shape != (count,) or result.is_complex():
            raise OwnRewardError(
                f"{self.place} returned a {'complex ' if result.is_complex() else ''}tensor of shape {tuple(result.shape)} for"
                f" {count} images; {wanted}"
            )
        return result.float()


def load_scorer(
    card: Card, weights: Path | None, device: torch.device | str, dtype: torch.dtype
) -> OwnReward:
    """Return the scorer; what precision its models have is the function's own business."""
    return OwnReward(card, device)


def find_files(card: Card, weights: Path | None) -> tuple[Path, ...]:
    """Return the file of the function, once it has run; none for a callable that was given.

    OwnRewardError where it fails or has no such callable. Files that it imports are not looked at.
    """
    own.function_of(card.name)
    path = own.path_of(card.name)
    return () if path is None else (path,)


def try_out(
    scorers: Sequence[Scorer], prompts: Sequence[str], size: tuple[int, int], *, gradient: bool
) -> list[str]:
    """Call the rewards of the user's own once with two random images of (width, height) pixels, and return warnings.

    OwnRewardError where one fails, where a score is not finite, and with `gradient` where it does not reach the pixels.
    The default random numbers are as before. Other scorers are left alone.
    """
    warnings = []
    for scorer in scorers:
        if isinstance(scorer, OwnReward):
            cuda = [scorer.device] if scorer.device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda), torch.enable_grad():
                warnings += _try_one(scorer, (list(prompts) or [""]) * 2, size, gradient=gradient)
    return warnings


def _try_one(scorer: OwnReward, prompts: list[str], size: tuple[int, int], *, gradient: bool) -> list[str]:
    width, height = size
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(scorer.device)
    pixels.requires_grad_(gradient)
    scores = scorer(pixels, prompts[:2])
    if not scores.isfinite().all():
        raise OwnRewardError(
            f"{scorer.place} returned {scores.detach().tolist()} for two random images; return finite numbers"
        )
    if not gradient:
        return []
    try:
        (found,) = torch.autograd.grad(scores.sum(), pixels, allow_unused=True)
    except Exception as error:
        raise own.failure(f"the backward pass of {scorer.place}", scorer.file, error) from error
    if found is None:
        raise OwnRewardError(
            f"{scorer.place} returned scores whose gradient does not reach the pixels, which this method needs; compute them"
            " from the pixels with torch alone, or use a method without a reward's gradient, such as preftune raft"
        )
    if not found.isfinite().all():
        raise OwnRewardError(
            f"{scorer.place} has a gradient of NaN or infinity for random images; look for a square root, logarithm or"
            " division at 0"
        )
    if not found.any():
        return [
            f"{scorer.place} has a gradient of 0 for random images, so that nothing may be learnt from it; look for"
            " rounding, comparisons and clamps"
        ]
    return []
