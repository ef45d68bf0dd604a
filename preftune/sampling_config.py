"""The settings of sampling, which flags are read into; needs no torch."""

import dataclasses
import math
from dataclasses import dataclass

from preftune import resolution as resolutions
from preftune.families.base import Defaults
from preftune.resolution import Resolution
from preftune.solver_names import SolverName


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of images that are shown or scored."""

    num_inference_steps: int | None = None
    """Denoising steps, 1 to 1000; None = the model family's default."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale; 1 or less = none, as in diffusers; None = the model family's default."""
    solver: SolverName | None = None
    """Solver (scheduler); None = the model family's default."""
    resolution: str | None = None
    """Pixels: 512, or width x height as 768x512; None = the training resolution, elsewhere the model's own."""
    batch_size: int = 8
    """Images per forward pass; affects speed and memory, not the images."""

    def __post_init__(self) -> None:
        steps, scale = self.num_inference_steps, self.guidance_scale
        if steps is not None and not 1 <= steps <= 1000:
            raise ValueError(f"--sample.num-inference-steps must lie in 1..1000, got {steps}")
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"--sample.guidance-scale must be a number of at least 0, got {scale}")
        if self.batch_size < 1:
            raise ValueError(f"--sample.batch-size must be at least 1, got {self.batch_size}")
        if self.resolution is not None:
            try:
                resolutions.parse(self.resolution)
            except ValueError as error:
                raise ValueError(f"--sample.resolution: {error}") from error

    def at(self, resolution: Resolution) -> "Sampling":
        """Return the same settings with this resolution where they name none."""
        return self if self.resolution is not None else dataclasses.replace(self, resolution=str(resolution))

    def by_groups_of(self, number: int) -> "Sampling":
        """Return the same settings with a batch size that is a multiple of `number`, at least `number`."""
        return dataclasses.replace(self, batch_size=max(1, self.batch_size // number) * number)

    def resolved(self, defaults: Defaults) -> "Resolved":
        """Return the settings with the family's defaults in place of None. ValueError, before any weight loads, for a solver or a
        number of steps that the model cannot be sampled with.
        """
        parsed = None if self.resolution is None else resolutions.parse(self.resolution)
        scale = self.guidance_scale  # 0 is a value, so no `or`
        settings = Resolved(
            num_inference_steps=self.num_inference_steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale if scale is None else scale,
            solver=self.solver or defaults.solver,
            resolution=parsed or defaults.resolution,
            batch_size=self.batch_size,
        )
        defaults.check_solver(settings.solver, settings.num_inference_steps, "--sample.num-inference-steps")
        return settings


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Sampling with all defaults filled in. Fields as in Sampling."""

    num_inference_steps: int
    guidance_scale: float
    solver: SolverName
    resolution: Resolution
    batch_size: int
