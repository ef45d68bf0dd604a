"""Names of solvers and of prediction types, which flags and configurations have; needs no torch."""

from typing import Literal

SolverName = Literal["ddpm", "ddim", "euler", "pndm", "dpm++"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
